"""`CAECodec`: metadata, validation and glue between zarr and the rooms above."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral
from types import FrameType
from typing import Any, Literal, Self, TypeVar, cast

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
from zarr_cae.pixels.layout import Layout, ValueRange, resolve_channel_axis
from zarr_cae.weights.registry import (
    DEFAULT_MODEL,
    METRICS,
    MODELS,
    QUALITIES,
    Metric,
    Weights,
    check_digest,
    default_digest,
    find,
    load,
)

NAME = "cae"
ChannelAxis = int | Literal["auto"] | None
_FIELDS = ("quality", "metric", "model", "weights", "channel_axis", "value_range")
_Codec = TypeVar("_Codec", bound="CAECodec")
_EVOLVES_IN_ORDER = Version(zarr.__version__) >= Version("3.2")
"""Whether zarr hands each codec the spec that the codecs before it leave; older ones hand all the array's own."""


@dataclass(frozen=True)
class CAECodec(ArrayBytesCodec, ArrayBytesCodecPartialDecodeMixin, ArrayBytesCodecPartialEncodeMixin):
    """Image chunks as the entropy-coded latents of a convolutional autoencoder; lossy.

    Parameters
    ----------
    quality
        1 (smallest) to 8 (best): about 0.13 to 2.2 bits per pixel on photographs.
    metric
        What the networks were trained for: "mse" (PSNR) or "ms-ssim".
    model
        "cae-v1", the bundled family, or "bmshj2018-factorized", CompressAI's, once its weights are on this machine.
    weights
        `sha256:...` of the weights file; None takes the one for this model, quality and metric.
    channel_axis
        Axis of the colour channels, counted in the array as the codec sees it (after any transpose). Length 3 is
        coded as RGB, any other as independent grey planes; None is no such axis. Of the other axes the last two are
        rows and columns. "auto" takes the only axis of length 3, or none, and refuses what is ambiguous. Inside
        shards zarr shows it the shape of one inner chunk in place of the array's.
    value_range
        (lowest, highest) value of the data; needed for every dtype but uint8. Writing values outside it is an error.

    Raises
    ------
    CAEConfigurationError
        For a parameter out of range; WeightsNotFoundError for weights that are not on this machine.
    """

    is_fixed_size = False

    quality: int
    metric: Metric
    model: str
    weights: str
    channel_axis: ChannelAxis
    value_range: ValueRange | None

    def __init__(
        self,
        quality: int = 8,
        metric: Metric = "mse",
        model: str = DEFAULT_MODEL,
        weights: str | None = None,
        channel_axis: ChannelAxis = "auto",
        value_range: ValueRange | None = None,
    ) -> None:
        self._set(quality, metric, model, weights, channel_axis, value_range)
        if weights is not None:
            find(weights, model=model, quality=quality, metric=metric)

    def _set(
        self,
        quality: object,
        metric: object,
        model: object,
        weights: object,
        channel_axis: object,
        value_range: object,
    ) -> None:
        quality = _integer(quality)
        _check_choice("quality", quality, tuple(QUALITIES))
        _check_choice("metric", metric, METRICS)
        _check_choice("model", model, MODELS)
        if weights is None:
            weights = default_digest(cast("str", model), cast("int", quality), cast("str", metric))
        values = (quality, metric, model, check_digest(weights), _channel_axis(channel_axis), _value_range(value_range))
        for name, value in zip(_FIELDS, values, strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """The codec that `zarr.json` describes; its weights need not be on this machine until chunks are read."""
        try:
            _, found = parse_named_configuration(data, NAME, require_configuration=False)
        except (TypeError, ValueError) as error:
            raise CAEConfigurationError(f"cae: metadata of the codec are malformed: {error}; got {data!r}") from error
        configuration = {"quality": 8, "metric": "mse", "model": DEFAULT_MODEL, "channel_axis": "auto", **(found or {})}
        unknown = sorted(set(configuration) - set(_FIELDS))
        if unknown:
            raise CAEConfigurationError(
                f"cae: configuration has unknown fields {unknown}; it was written by a newer zarr-cae: install that"
            )
        codec = cls.__new__(cls)
        codec._set(*(configuration.get(name) for name in _FIELDS))  # noqa: SLF001
        return codec

    def to_dict(self) -> dict[str, JSON]:
        """What `zarr.json` holds: all that decoding needs, nothing of the machine."""
        configuration: dict[str, JSON] = {
            "model": self.model,
            "quality": self.quality,
            "metric": self.metric,
            "weights": self.weights,
            "channel_axis": self.channel_axis,
        }
        if self.value_range is not None:
            configuration["value_range"] = self.value_range
        return {"name": NAME, "configuration": configuration}

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        """Resolve `channel_axis` against the array and refuse what cannot be coded, when it is created or opened.

        Weights that are of another model, metric or quality are refused here too. Those that are not on this machine,
        or lie in a folder that cannot be read, are missed only when chunks are.
        """
        spec = array_spec if _EVOLVES_IN_ORDER else _after_filters(self, array_spec, sys._getframe(1))  # noqa: SLF001
        low, high = resolve_value_range(spec.dtype.to_native_dtype(), self.value_range)
        if not low <= cast("float", spec.fill_value) <= high:
            raise CAEConfigurationError(
                f"cae: fill_value {spec.fill_value} lies outside value_range {low, high}, and incomplete chunks are "
                "filled with it; give fill_value=<a value inside>"
            )
        axis = resolve_channel_axis(spec.shape, self.channel_axis)
        with suppress(WeightsNotFoundError, OSError):
            find(self.weights, model=self.model, quality=self.quality, metric=self.metric)
        return self if axis == self.channel_axis else _replace_axis(self, axis)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Unknown before coding."""
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
    # A tensor stays on its device: what zarr has there takes what knows its `__cuda_array_interface__`.
    return buffer.from_numpy_array(pixels) if isinstance(pixels, np.ndarray) else buffer.from_ndarray_like(pixels)


def _coder(codec: CAECodec, spec: ArraySpec) -> ChunkCoder:
    axis = resolve_channel_axis(spec.shape, codec.channel_axis)
    value_range = resolve_value_range(spec.dtype.to_native_dtype(), codec.value_range)
    return ChunkCoder(Layout(spec.shape, axis), spec, value_range, codec.quality, lambda: loaded(codec))


def loaded(codec: CAECodec) -> Weights:
    """The verified weights of a codec. Raises WeightsNotFoundError if they are not on this machine."""
    return load(find(codec.weights, model=codec.model, quality=codec.quality, metric=codec.metric).path)


def _replace_axis(codec: _Codec, channel_axis: int | None) -> _Codec:
    """The same codec with its channel axis resolved; unlike `dataclasses.replace`, without looking for weights."""
    return type(codec).from_dict(
        {"name": NAME, "configuration": {**cast("Any", codec.to_dict()["configuration"]), "channel_axis": channel_axis}}
    )


def _after_filters(codec: CAECodec, array_spec: ArraySpec, frame: FrameType | None) -> ArraySpec:
    """The spec as it reaches `codec`, for zarr < 3.2, which hands over the array's own even after a transpose.

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
    """NumPy's integers as Python's, which JSON can hold; anything else as it is."""
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


def _number(value: Any) -> float:
    """An integer where `value` is one and a float holds it exactly, or where it came as one."""
    number = float(value)
    return int(value) if isinstance(value, Integral) or (number.is_integer() and abs(number) <= 1 << 53) else number
