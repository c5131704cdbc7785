"""`CAECodec`: the codec's metadata and checks, and the calls of zarr."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, Literal, Self, cast

import numpy as np
from zarr.abc.buffer import Buffer, NDBuffer
from zarr.abc.codec import (
    ArrayBytesCodec,
    ArrayBytesCodecPartialDecodeMixin,
    ArrayBytesCodecPartialEncodeMixin,
)
from zarr.abc.store import ByteGetter, ByteSetter
from zarr.storage import StorePath

from zarr_cae._zarr import JSON, ArraySpec, parse_named_configuration, spec_after_filters
from zarr_cae.codec.chunk import ChunkCoder, decode_chunk, encode_chunk
from zarr_cae.codec.parameters import (
    ChannelAxis,
    Colour,
    check_choice,
    checked_channel_axis,
    checked_colour,
    checked_integer,
    checked_min_psnr,
    checked_nodata,
    checked_value_range,
    resolve_nodata,
)  # fmt: skip
from zarr_cae.codec.partial import read_selection, write_selection
from zarr_cae.codec.plan import MissingChunkError, contiguous, run, run_async
from zarr_cae.errors import CAEConfigurationError, WeightsNotFoundError
from zarr_cae.pixels.convert import resolve_value_range
from zarr_cae.pixels.layout import RGB, Layout, ValueRange, ValueTransform, resolve_channel_axis
from zarr_cae.pixels.mask import find_mask
from zarr_cae.weights.file import DEFAULT_MODEL, METRICS, MODELS, QUALITIES, Metric, Weights, WeightsInfo
from zarr_cae.weights.registry import Digest, check_digest, default_digest, find, load, resolve

NAME = "cae"


@dataclass(frozen=True, repr=False)
class CAECodec(ArrayBytesCodec, ArrayBytesCodecPartialDecodeMixin, ArrayBytesCodecPartialEncodeMixin):
    """Code image chunks as the entropy-coded latents of a convolutional autoencoder. This is lossy.

    Use it as the serializer of a Zarr v3 array: `zarr.create_array(..., serializer=CAECodec(quality=4),
    compressors=None)`. The format is specified in `zarr_cae/spec/cae.md`; the networks are those of Ballé et al. 2018
    (arXiv:1802.01436), or their smaller relatives `cae-v1`.

    Parameters
    ----------
    quality
        1 (smallest) to 8 (best): 0.13 to 2.0 bits per pixel on photographs.
    metric
        The measure for which the networks were trained: "mse" (PSNR) or "ms-ssim".
    model
        "cae-v1", the bundled family, or "bmshj2018-factorized" of CompressAI, once its weights are on this machine.
    weights
        `sha256:...` of a weights file on this machine, or the name of a family of weights; by default the family
        "photographs". Metadata store the digest. The digest of a bundled file stands for its family at qualities that
        the file does not have, so `dataclasses.replace(codec, quality=...)` works. Else replace `weights` too: "" is
        the default.
    channel_axis
        The axis of the colour channels in the array, counted from the end (-1 is the last axis) or from the front.
        An axis of length 3 is coded as RGB, any other as independent grey planes; None means that there is no such
        axis. Of the other axes the last two are rows and columns. "auto" takes the last axis if it has length 3, and
        otherwise none. Metadata store the number counted from the end. Codecs before this one, such as transpose, run
        first: the axis is counted in their output.
    colour
        The positions of red, green and blue along `channel_axis`, such as (0, 1, 2), if that has more than three
        channels. These three are coded together, the others as grey planes. An alpha channel that is mostly opaque then
        adds about a tenth to the bytes of RGB; fine outlines or an infrared band add half or more. Without `colour`
        four channels cost about three times as much as RGB. Each chunk must hold all channels. With
        `channel_axis="auto"` the last axis is taken, if it has three channels, or more but at most a quarter of its two
        neighbours.
    value_range
        (lowest, highest) value of the data. uint8 has the default (0, 255); every other dtype needs it.
    nodata
        The value of pixels without data: a number, inside or outside `value_range`, or NaN. They are stored exactly,
        as a mask, and no other pixel is read back with this value: it gets the nearest other value. By default every
        pixel has data, and NaN is refused. The attribute holds values that are not finite as the strings "NaN",
        "Infinity" or "-Infinity".
    value_transform
        "sqrt" codes the square roots of the values, which makes the noise of photon counts equally strong in dark and
        in bright places (Anscombe 1948). Use it for dark and sparse data, such as fluorescence, with `value_range`
        starting at the value of a dark pixel, in photons if the scale is known. If that value is above 0, give the
        array a `fill_value` inside the range.
    min_psnr
        PSNR in dB of the value range that each chunk must reach, such as 38. A chunk that misses it is coded with the
        next better qualities of the same weights (qualities 1 to 5 and 6 to 8 share weights), and at the last one its
        tiles that miss it are stored without loss. The part of a chunk beyond the array does not count. Encoding costs
        one more decoding, and another encoding for each further quality. A partial write is compared with the new
        pixels, and elsewhere with the pixels decoded before it; so the rest may miss the PSNR against the pixels first
        written.

    Raises
    ------
    CAEConfigurationError
        If a parameter is out of its range, or does not fit the array.
    WeightsNotFoundError
        If the weights are not on this machine.

    Examples
    --------
    >>> array = zarr.create_array(
    ...     "photo.zarr", data=pixels, chunks=(256, 256, 3), serializer=CAECodec(quality=4), compressors=None
    ... )  # doctest: +SKIP
    """

    is_fixed_size = False

    quality: int = 8
    _: KW_ONLY
    metric: Metric = "mse"
    model: str = DEFAULT_MODEL
    weights: str = ""
    channel_axis: ChannelAxis = "auto"
    colour: Colour = None
    value_range: ValueRange | None = None
    nodata: float | str | None = None
    value_transform: ValueTransform = None
    min_psnr: float | None = None
    _origin: Literal["made", "guessed", "stored"] = field(default="made", init=False, repr=False, compare=False)
    """Whether the codec was made by a user, its channel axis guessed from "auto", or read from metadata. Stored
    arrays must open, so some checks are for new arrays only."""

    _channels: int = field(default=0, init=False, repr=False, compare=False)
    """The number of channels of the array, once it is known."""

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("quality", checked_integer(self.quality))
        check_choice("quality", self.quality, tuple(QUALITIES))
        check_choice("metric", self.metric, METRICS)
        check_choice("model", self.model, MODELS)
        put("channel_axis", checked_channel_axis(self.channel_axis))
        put("colour", checked_colour(self.colour, self.channel_axis))
        put("value_range", checked_value_range(self.value_range))
        put("nodata", checked_nodata(self.nodata))
        put("min_psnr", checked_min_psnr(self.min_psnr))
        check_choice("value_transform", self.value_transform, (None, "sqrt"))
        weights = resolve(self.weights or None, model=self.model, quality=self.quality, metric=self.metric)
        put("weights", Digest(weights))

    def __repr__(self) -> str:
        default = {field.name: field.default for field in fields(self) if field.init}
        with suppress(WeightsNotFoundError):
            default["weights"] = default_digest(self.model, self.quality, self.metric)
        given = [
            f"{name}={value!r}"
            for name in default
            if name != "quality" and (value := getattr(self, name)) != default[name]
        ]
        return f"{type(self).__name__}({', '.join([f'quality={self.quality}', *given])})"

    def _find_weights(self) -> WeightsInfo:
        return find(self.weights, model=self.model, quality=self.quality, metric=self.metric)

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """Return the codec that `zarr.json` describes; its weights need not be on this machine."""
        try:
            _, found = parse_named_configuration(data, NAME, require_configuration=False)
        except (TypeError, ValueError) as error:
            raise CAEConfigurationError(f"cae: metadata of the codec are malformed: {error}; got {data!r}") from error
        configuration: dict[str, Any] = {
            key: value for key, value in (found or {}).items() if value is not None or key == "channel_axis"
        }
        unknown = sorted(set(configuration) - {field.name for field in fields(cls) if field.init})
        if unknown:
            raise CAEConfigurationError(
                f"cae: configuration has unknown fields {unknown}; it was written by a newer zarr-cae: install that"
            )
        if "weights" in configuration:
            check_digest(configuration["weights"])  # names may stand for other weights on another machine
        codec = cls(**configuration)
        object.__setattr__(codec, "_origin", "stored")
        if "weights" in configuration:  # stored chunks need this very file, not another one of its family
            object.__setattr__(codec, "weights", Digest(configuration["weights"]))
        return codec

    def to_dict(self) -> dict[str, JSON]:
        """Return the entry for `zarr.json`: all that decoding needs, and no settings of the machine."""
        configuration: dict[str, JSON] = {
            "model": self.model,
            "quality": self.quality,
            "metric": self.metric,
            "weights": self.weights,
            "channel_axis": self.channel_axis,
        }
        for name in ("colour", "value_range", "nodata", "value_transform", "min_psnr"):
            if (value := getattr(self, name)) is not None:
                configuration[name] = value
        return {"name": NAME, "configuration": configuration}

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        """Return the codec with its channel axis resolved; refuse arrays that can't be coded.

        zarr calls this when an array is created or opened. Weights for another model, metric or quality are refused
        here too. Missing weights are refused here for a new array only: an archive whose weights are missing opens.
        """
        spec = spec_after_filters(self, array_spec)
        dtype = spec.dtype.to_native_dtype()
        low, high = resolve_value_range(dtype, self.value_range)
        nodata = resolve_nodata(dtype, self.nodata)
        missing = nodata is not None and bool(find_mask(np.asarray(spec.fill_value, dtype), nodata))
        if not missing and not low <= cast("float", spec.fill_value) <= high:
            raise CAEConfigurationError(
                f"cae: fill_value {spec.fill_value} lies outside value_range {low, high}, and incomplete chunks are "
                "filled with it; give fill_value=<a value inside>, or nodata=<the fill_value> if such pixels have no "
                "data"
            )
        layout = layout_of(self, spec.shape)
        axis = layout.channel_axis
        with suppress(*(WeightsNotFoundError, OSError) if self._origin == "stored" else ()):
            self._find_weights()
        evolved = replace(self, channel_axis=None if axis is None else axis - len(spec.shape))
        guessed = self.channel_axis == "auto" and self._origin == "made"
        object.__setattr__(evolved, "_origin", "guessed" if guessed else self._origin)
        object.__setattr__(evolved, "_channels", layout.channels)
        return evolved

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:  # noqa: ARG002
        """Refuse chunks that cut or pad the axis of colours: these would be coded as grey planes.

        An axis of length 3 that the user gave by its number may have chunks of length 1: then each colour is coded by
        itself, as the user wants it.
        """
        if self.channel_axis is None or not self._channels:
            return  # zarr 3.4 also asks codecs behind shards, before they have seen an array
        named = self.colour is None and self._origin != "guessed"
        if named and (self._origin == "stored" or self._channels != RGB):
            return
        axis = cast("int", self.channel_axis)
        whole = ({self._channels}, {1}) if named else ({self._channels},)
        # zarr passes the grid from before any transpose, so the colours may lie along another of its axes.
        if any(set(_chunk_lengths(chunk_grid, one)) in whole for one in range(len(shape))):
            return
        chunks = tuple(max(_chunk_lengths(chunk_grid, one)) for one in range(len(shape)))
        wanted = tuple(self._channels if one == axis + len(shape) else n for one, n in enumerate(chunks))
        without = "leave out colour"
        if self.colour is None:
            alone = tuple(1 if one == axis + len(shape) else n for one, n in enumerate(chunks))
            without = f"give channel_axis={axis} and chunks={alone}"
        raise CAEConfigurationError(
            f"cae: chunks of {chunks} cut or pad axis {axis} of {shape}, which holds colours; use chunks={wanted}, or "
            f"{without} to code its channels as independent grey planes"
        )

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Raise NotImplementedError: the size is not known before coding."""
        raise NotImplementedError

    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return run(encode_chunk(_coder(self, chunk_spec), chunk_array.as_ndarray_like()))

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return await run_async(encode_chunk(_coder(self, chunk_spec), chunk_array.as_ndarray_like()))

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return _handed_over(run(decode_chunk(_coder(self, chunk_spec), contiguous(chunk_bytes))), chunk_spec)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return _handed_over(
            await run_async(decode_chunk(_coder(self, chunk_spec), contiguous(chunk_bytes))), chunk_spec
        )

    def _decode_partial_sync(self, byte_getter: Any, selection: Any, chunk_spec: ArraySpec) -> NDBuffer | None:
        plan = read_selection(_coder(self, chunk_spec), selection, ranges=isinstance(byte_getter, StorePath))
        try:
            return _handed_over(run(plan, byte_getter), chunk_spec)
        except MissingChunkError:
            return None

    async def _decode_partial_single(
        self, byte_getter: ByteGetter, selection: Any, chunk_spec: ArraySpec
    ) -> NDBuffer | None:
        plan = read_selection(_coder(self, chunk_spec), selection, ranges=isinstance(byte_getter, StorePath))
        try:
            return _handed_over(await run_async(plan, byte_getter), chunk_spec)
        except MissingChunkError:
            return None

    def _encode_partial_sync(
        self, byte_setter: Any, chunk_array: NDBuffer, selection: Any, chunk_spec: ArraySpec
    ) -> None:
        run(write_selection(_coder(self, chunk_spec), selection, chunk_array.as_ndarray_like()), byte_setter)

    async def _encode_partial_single(
        self, byte_setter: ByteSetter, chunk_array: NDBuffer, selection: Any, chunk_spec: ArraySpec
    ) -> None:
        await run_async(
            write_selection(_coder(self, chunk_spec), selection, chunk_array.as_ndarray_like()), byte_setter
        )


def _handed_over(pixels: Any, spec: ArraySpec) -> NDBuffer:
    buffer = spec.prototype.nd_buffer
    # A tensor stays on its device: zarr's GPU buffers accept objects with `__cuda_array_interface__`.
    return buffer.from_numpy_array(pixels) if isinstance(pixels, np.ndarray) else buffer.from_ndarray_like(pixels)


def _coder(codec: CAECodec, spec: ArraySpec) -> ChunkCoder:
    dtype = spec.dtype.to_native_dtype()
    return ChunkCoder(
        layout_of(codec, spec.shape), spec, resolve_value_range(dtype, codec.value_range), codec.quality,
        lambda: loaded(codec), resolve_nodata(dtype, codec.nodata), codec.value_transform, codec.min_psnr,
    )  # fmt: skip


def layout_of(codec: CAECodec, shape: tuple[int, ...]) -> Layout:
    """Return how the axes of an array or a chunk of this shape map to planes."""
    axis = resolve_channel_axis(shape, codec.channel_axis, colour=codec.colour is not None)
    return Layout(shape, axis, codec.colour)


def loaded(codec: CAECodec) -> Weights:
    """Return the verified weights of a codec.

    Raises
    ------
    WeightsNotFoundError
        If they are not on this machine.
    """
    return load(codec._find_weights().path)  # noqa: SLF001


def _chunk_lengths(chunk_grid: Any, axis: int) -> tuple[int, ...]:
    """Return the lengths that chunks have along an axis of a regular grid, or of a rectilinear one (zarr >= 3.2)."""
    shape = chunk_grid.chunk_shape if hasattr(chunk_grid, "chunk_shape") else chunk_grid.chunk_shapes
    lengths = shape[axis]
    return (lengths,) if isinstance(lengths, int) else tuple(lengths)
