"""`CAECodec`: the codec's metadata and checks, and the calls of zarr."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from numbers import Integral
from types import FrameType
from typing import Any, Literal, Self, cast

import numpy as np
import zarr
from packaging.version import Version
from zarr.abc.buffer import Buffer, NDBuffer
from zarr.abc.codec import (
    ArrayArrayCodec,
    ArrayBytesCodec,
    ArrayBytesCodecPartialDecodeMixin,
    ArrayBytesCodecPartialEncodeMixin,
)
from zarr.abc.store import ByteGetter, ByteSetter
from zarr.codecs import ShardingCodec
from zarr.storage import StorePath

from zarr_cae._zarr import JSON, ArraySpec, parse_named_configuration
from zarr_cae.codec.chunk import ChunkCoder, decode_chunk, encode_chunk
from zarr_cae.codec.partial import read_selection, write_selection
from zarr_cae.codec.plan import MissingChunkError, contiguous, run, run_async
from zarr_cae.errors import CAEConfigurationError, WeightsNotFoundError
from zarr_cae.pixels.convert import resolve_value_range
from zarr_cae.pixels.layout import RGB, Layout, ValueRange, ValueTransform, resolve_channel_axis
from zarr_cae.pixels.mask import find_mask
from zarr_cae.weights.file import DEFAULT_MODEL, METRICS, MODELS, QUALITIES, Metric, Weights, WeightsInfo
from zarr_cae.weights.registry import check_digest, default_digest, find, load, resolve

NAME = "cae"
ChannelAxis = int | Literal["auto"] | None
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LARGEST_PSNR = 200
_EVOLVES_IN_ORDER = Version(zarr.__version__) >= Version("3.2")
"""Whether zarr passes each codec the spec that the codecs before it leave; older releases pass the array's own."""


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
        "photographs". Metadata store the digest.
    channel_axis
        The axis of the colour channels in the array, counted from the end (-1 is the last axis) or from the front.
        An axis of length 3 is coded as RGB, any other as independent grey planes; None means that there is no such
        axis. Of the other axes the last two are rows and columns. "auto" takes the last axis if it has length 3, and
        otherwise none. Metadata store the number counted from the end. Codecs before this one, such as transpose, come
        first: the axis is one of their output.
    value_range
        (lowest, highest) value of the data. uint8 has the default (0, 255); every other dtype needs it.
    nodata
        The value of pixels without data: a number, inside or outside `value_range`, or NaN. They are stored exactly,
        as a mask, and no other pixel is read back with this value: the nearest one takes its place. By default every
        pixel has data, and NaN is refused. The attribute holds what is not finite as "NaN", "Infinity" or "-Infinity".
    value_transform
        "sqrt" codes the square roots of the values, which makes the noise of photon counts equally strong in dark and
        in bright places (Anscombe 1948). Use it for dark and sparse data, such as fluorescence, with `value_range`
        from the value of no light, in units of counted photons as far as they are known.
    min_psnr
        PSNR in dB of the value range that each chunk must reach, such as 38. A chunk that misses it is coded with the
        next better qualities of the same weights (qualities 1 to 5 and 6 to 8 share weights), and at the last one its
        tiles that miss it are stored without loss. Encoding costs one more decoding, and another encoding for each
        further quality. A write of a part is compared with the new pixels and with what the rest of the chunk gave
        before, so it may miss the PSNR of the rest against the pixels that were written first.

    Raises
    ------
    CAEConfigurationError
        If a parameter is out of its range, or does not fit the array.
    WeightsNotFoundError
        If the weights are not on this machine.
    """

    is_fixed_size = False

    quality: int = 8
    _: KW_ONLY
    metric: Metric = "mse"
    model: str = DEFAULT_MODEL
    weights: str = ""
    channel_axis: ChannelAxis = "auto"
    value_range: ValueRange | None = None
    nodata: float | str | None = None
    value_transform: ValueTransform = None
    min_psnr: float | None = None
    _origin: Literal["made", "guessed", "stored"] = field(default="made", init=False, repr=False, compare=False)
    """Whether the codec was made by a user, its channel axis guessed from "auto", or read from metadata. Stored
    arrays must open, so some checks are for new arrays only."""

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("quality", _integer(self.quality))
        _check_choice("quality", self.quality, tuple(QUALITIES))
        _check_choice("metric", self.metric, METRICS)
        _check_choice("model", self.model, MODELS)
        put("channel_axis", _channel_axis(self.channel_axis))
        put("value_range", _value_range(self.value_range))
        put("nodata", _nodata(self.nodata))
        put("min_psnr", _min_psnr(self.min_psnr))
        _check_choice("value_transform", self.value_transform, (None, "sqrt"))
        weights = resolve(self.weights or None, model=self.model, quality=self.quality, metric=self.metric)
        put("weights", weights)

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
        if self.value_range is not None:
            configuration["value_range"] = self.value_range
        if self.nodata is not None:
            configuration["nodata"] = self.nodata
        if self.value_transform is not None:
            configuration["value_transform"] = self.value_transform
        if self.min_psnr is not None:
            configuration["min_psnr"] = self.min_psnr
        return {"name": NAME, "configuration": configuration}

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        """Return the codec with its channel axis resolved; refuse arrays that can't be coded.

        zarr calls this when an array is created or opened. Weights for another model, metric or quality are refused
        here too. Missing weights are refused here for a new array only: an archive whose weights are missing opens.
        """
        spec = array_spec if _EVOLVES_IN_ORDER else _after_filters(self, array_spec, sys._getframe(1))  # noqa: SLF001
        dtype = spec.dtype.to_native_dtype()
        low, high = resolve_value_range(dtype, self.value_range)
        nodata = _resolve_nodata(dtype, self.nodata)
        missing = nodata is not None and bool(find_mask(np.asarray(spec.fill_value, dtype), nodata))
        if not missing and not low <= cast("float", spec.fill_value) <= high:
            raise CAEConfigurationError(
                f"cae: fill_value {spec.fill_value} lies outside value_range {low, high}, and incomplete chunks are "
                "filled with it; give fill_value=<a value inside>, or nodata=<the fill_value> if such pixels have no "
                "data"
            )
        axis = resolve_channel_axis(spec.shape, self.channel_axis)
        with suppress(*(WeightsNotFoundError, OSError) if self._origin == "stored" else ()):
            self._find_weights()
        evolved = replace(self, channel_axis=None if axis is None else axis - len(spec.shape))
        guessed = self.channel_axis == "auto" and self._origin == "made"
        object.__setattr__(evolved, "_origin", "guessed" if guessed else self._origin)
        return evolved

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:  # noqa: ARG002
        """Refuse chunks that cut or pad an axis of three colours that "auto" found: they would be coded as grey planes.

        A user who gives the number of the axis means that.
        """
        if self._origin != "guessed" or self.channel_axis is None:
            return
        axis = cast("int", self.channel_axis)
        # zarr passes the grid from before any transpose, so the colours may lie along another of its axes.
        if any(set(_chunk_lengths(chunk_grid, one)) == {RGB} for one in range(len(shape))):
            return
        chunks = tuple(max(_chunk_lengths(chunk_grid, one)) for one in range(len(shape)))
        wanted = tuple(RGB if one == axis + len(shape) else length for one, length in enumerate(chunks))
        raise CAEConfigurationError(
            f"cae: chunks of {chunks} cut or pad axis {axis} of {shape}, which holds three colours; use chunks="
            f"{wanted}, or give channel_axis={axis} to code its channels as independent grey planes"
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
    axis = resolve_channel_axis(spec.shape, codec.channel_axis)
    dtype = spec.dtype.to_native_dtype()
    return ChunkCoder(
        Layout(spec.shape, axis), spec, resolve_value_range(dtype, codec.value_range), codec.quality,
        lambda: loaded(codec), _resolve_nodata(dtype, codec.nodata), codec.value_transform, codec.min_psnr,
    )  # fmt: skip


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


def _after_filters(codec: CAECodec, array_spec: ArraySpec, frame: FrameType | None) -> ArraySpec:
    """Return the spec as it reaches `codec`: zarr < 3.2 passes the array's own spec even after a transpose.

    The chain of codecs stands only in the caller: the metadata's constructor, or the sharding codec.
    """
    chain: tuple[object, ...] = ()
    for _ in range(3):
        if frame is None or chain:
            break
        caller = frame.f_locals.get("self")
        chain = caller.codecs if isinstance(caller, ShardingCodec) else frame.f_locals.get("codecs_parsed_partial", ())
        frame = frame.f_back
    spec = array_spec
    for other in chain:
        if other is codec:
            return spec
        if isinstance(other, ArrayArrayCodec):
            spec = other.resolve_metadata(spec)
    return array_spec


def _integer(value: object) -> object:
    """Return a NumPy integer as a Python integer, which JSON can hold; return anything else unchanged."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise CAEConfigurationError(f"cae: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _channel_axis(value: object) -> ChannelAxis:
    value = _integer(value)
    if value is None or type(value) is int or (isinstance(value, str) and value == "auto"):
        return cast("ChannelAxis", value)
    raise CAEConfigurationError(f"cae: channel_axis must be an integer, None or 'auto', got {value!r}")


def _value_range(value: object) -> ValueRange | None:
    if value is None:
        return None
    try:
        low, high = cast("Any", value)
        pair = tuple(_number(v) for v in (low, high))
    except (TypeError, ValueError, OverflowError) as error:
        raise CAEConfigurationError(f"cae: value_range must be a pair (lowest, highest), got {value!r}") from error
    if not all(map(math.isfinite, pair)):
        raise CAEConfigurationError(f"cae: value_range must be finite, got {value!r}")
    return cast("ValueRange", pair)


def _nodata(value: Any) -> float | str | None:
    if value is None or (isinstance(value, str) and value in _NOT_FINITE):
        return value
    try:
        number = float("text") if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise CAEConfigurationError(
            f'cae: nodata must be a number, NaN or None, got {value!r}; in metadata NaN is the string "NaN"'
        ) from error
    if math.isfinite(number):
        return _number(value)
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _min_psnr(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bool) else _number(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= _LARGEST_PSNR:
        raise CAEConfigurationError(
            f"cae: min_psnr must be a number of dB above 0 and up to {_LARGEST_PSNR}, or None, got {value!r}"
        )
    return number


def _resolve_nodata(dtype: np.dtype[Any], nodata: float | str | None) -> float | None:
    """Return the nodata value as a number, if pixels of the dtype can have it."""
    if nodata is None:
        return None
    number = _NOT_FINITE[nodata] if isinstance(nodata, str) else nodata
    if dtype.kind == "f":
        fits = isinstance(nodata, str) or abs(number) <= float(np.finfo(dtype).max)
    else:
        fits = math.isfinite(number) and number == int(number) and np.iinfo(dtype).min <= number <= np.iinfo(dtype).max
    if not fits:
        raise CAEConfigurationError(f"cae: nodata must be a value of dtype {dtype}, got {nodata!r}")
    return number if dtype.kind == "f" else int(number)


def _number(value: Any) -> float:
    """Return an integer if `value` has an integer type, or is a whole number that a float holds exactly."""
    number = float(value)
    return int(value) if isinstance(value, Integral) or (number.is_integer() and abs(number) <= 1 << 53) else number
