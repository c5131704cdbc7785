"""`CAECodec`: metadata, validation and glue between zarr and the rooms above."""

from __future__ import annotations

import asyncio
import math
import sys
from dataclasses import dataclass
from numbers import Integral
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

import zarr
from packaging.version import Version
from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON, parse_named_configuration

from zarr_cae import entropy
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.framing import FrameHeader
from zarr_cae.pixels import (
    RGB,
    Layout,
    ValueRange,
    resolve_channel_axis,
    resolve_value_range,
    to_chunk,
    to_planes,
)
from zarr_cae.tables import Tables
from zarr_cae.weights import (
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

if TYPE_CHECKING:
    from zarr_cae.engine import Engine, Settings

NAME = "cae"
ChannelAxis = int | Literal["auto"] | None
_FIELDS = ("quality", "metric", "model", "weights", "channel_axis", "value_range")
_Codec = TypeVar("_Codec", bound="CAECodec")
_EVOLVES_IN_ORDER = Version(zarr.__version__) >= Version("3.2")
"""Whether zarr hands each codec the spec that the codecs before it leave; older ones hand all the array's own."""


@dataclass(frozen=True)
class CAECodec(ArrayBytesCodec):
    """Image chunks as the entropy-coded latents of a convolutional autoencoder; lossy.

    Parameters
    ----------
    quality
        1 (smallest) to 8 (best): about 0.2 to 2.8 bits per pixel on photographs.
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
        """Resolve `channel_axis` against the array and refuse what cannot be coded, when the array is created."""
        spec = array_spec if _EVOLVES_IN_ORDER else _after_filters(self, array_spec, sys._getframe(1))  # noqa: SLF001
        low, high = resolve_value_range(spec.dtype.to_native_dtype(), self.value_range)
        if not low <= cast("float", spec.fill_value) <= high:
            raise CAEConfigurationError(
                f"cae: fill_value {spec.fill_value} lies outside value_range {low, high}, and incomplete chunks are "
                "filled with it; give fill_value=<a value inside>"
            )
        axis = resolve_channel_axis(spec.shape, self.channel_axis)
        return self if axis == self.channel_axis else _replace_axis(self, axis)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Unknown before coding."""
        raise NotImplementedError

    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        job = _ChunkJob.of(self, chunk_spec)
        symbols = job.engine.analyse(job.planes(chunk_array), self.quality, job.settings)
        return job.frame(symbols)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        job = await asyncio.to_thread(_ChunkJob.of, self, chunk_spec)
        planes = await asyncio.to_thread(job.planes, chunk_array)
        symbols = await job.engine.analyse_async(planes, self.quality, job.settings)
        return await asyncio.to_thread(job.frame, symbols)

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        job = _ChunkJob.of(self, chunk_spec)
        planes = job.engine.synthesise(job.symbols(chunk_bytes), self.quality, job.components, job.settings)
        return job.chunk(planes)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        job = await asyncio.to_thread(_ChunkJob.of, self, chunk_spec)
        symbols = await asyncio.to_thread(job.symbols, chunk_bytes)
        planes = await job.engine.synthesise_async(symbols, self.quality, job.components, job.settings)
        return await asyncio.to_thread(job.chunk, planes)


@dataclass(frozen=True)
class _ChunkJob:
    """The steps from a chunk to its frame and back, around the engine's."""

    layout: Layout
    spec: ArraySpec
    value_range: ValueRange
    weights: Weights
    quality: int
    engine: Engine
    settings: Settings

    @classmethod
    def of(cls, codec: CAECodec, spec: ArraySpec) -> _ChunkJob:
        """Find the weights and the engine; the first call in a process imports torch."""
        from zarr_cae.engine import Settings, engine_for

        axis = resolve_channel_axis(spec.shape, codec.channel_axis)
        value_range = resolve_value_range(spec.dtype.to_native_dtype(), codec.value_range)
        try:
            settings = Settings(**zarr.config.get("cae", {}))
        except TypeError as error:
            raise CAEConfigurationError(f"cae: zarr.config key cae.*: {error}") from error
        weights = loaded(codec)
        engine = engine_for(weights, settings)
        return cls(Layout(spec.shape, axis), spec, value_range, weights, codec.quality, engine, settings)

    @property
    def components(self) -> int:
        return 1 if self.layout.grey else RGB

    @property
    def header(self) -> FrameHeader:
        layout = self.layout
        return FrameHeader(layout.planes, layout.height, layout.width, layout.grey, version=self.tables.frame_version)

    @property
    def tables(self) -> Tables:
        return self.weights.tables[self.weights.row(self.quality)]

    def planes(self, chunk: NDBuffer) -> Any:
        return to_planes(chunk.as_numpy_array(), self.layout, self.value_range)

    def frame(self, symbols: Any) -> Buffer:
        content = entropy.encode(symbols, self.header, self.tables)
        return self.spec.prototype.buffer.from_bytes(content)

    def symbols(self, frame: Buffer) -> Any:
        return entropy.decode(frame.as_numpy_array().tobytes(), self.header, self.tables)

    def chunk(self, planes: Any) -> NDBuffer:
        pixels = to_chunk(planes, self.layout, self.spec.dtype.to_native_dtype(), self.value_range)
        return self.spec.prototype.nd_buffer.from_numpy_array(pixels)


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
