"""`CAEBottleneckCodec`: chunk frames to latents, read only, without torch.

The latents of a chunk are what its synthesis network receives: symbol * step + offset, two float32 operations with
constants of the weights file on integers that are coded without loss. They are the same bits on every machine.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, NoReturn, Self, cast

import numpy as np
import numpy.typing as npt
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.chunk_key_encodings import ChunkKeyEncoding, parse_chunk_key_encoding
from zarr.core.common import JSON, parse_named_configuration

from zarr_cae.codec import cae as codec
from zarr_cae.coder import tiles as entropy
from zarr_cae.coder.compile import dequantiser
from zarr_cae.coder.frame import STRIDE, FrameHeader
from zarr_cae.coder.tables import Tables
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.pixels.layout import RGB, Layout

NAME = "cae_bottleneck"


def latent_shape(shape: Sequence[int], layout: Layout, channels: int) -> tuple[int, ...]:
    """The shape of the latents of pixels that are cut into chunks.

    Parameters
    ----------
    shape
        Of an array, a shard or a chunk of pixels, in the axes of `layout`.
    layout
        Of one chunk. Each of its chunks has latents of its own: one row for 16 rows of pixels, and one for the rest.
        So n rows in chunks of c become `n // c * ceil(c / 16) + ceil(n % c / 16)`, which is ceil(n / 16) if c is a
        multiple of 16; columns likewise.
    channels
        M, of the weights. A channel axis has M latents for each RGB chunk along it, or for each grey plane, plane by
        plane (channel m of plane p at p * M + m). Without a channel axis, a last axis of length M is added.
    """
    result = []
    for axis, (length, chunk) in enumerate(zip(shape, layout.shape, strict=True)):
        if axis in layout.spatial_axes:
            result.append(length // chunk * -(-chunk // STRIDE) + -(-(length % chunk) // STRIDE))
        elif axis == layout.channel_axis:
            result.append(channels * (length if layout.grey else -(-length // RGB)))
        else:
            result.append(length)
    return (*result, channels) if layout.channel_axis is None else tuple(result)


@dataclass(frozen=True)
class Places:
    """Where the latents of a chunk lie in an array of its shape, C order, in elements from its first."""

    planes: tuple[tuple[int, int], ...]
    """Length and stride of each axis along which planes lie, in the order of `layout.channels_first`."""
    rows: int
    columns: int
    channels: int
    """From one to the next."""

    @classmethod
    def of(cls, layout: Layout, channels: int) -> Places:
        """Those of a chunk of pixels, with M channels."""
        shape = latent_shape(layout.shape, layout, channels)
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        last = len(layout.shape)
        order = (*range(last - 2), last, last - 2, last - 1) if layout.channel_axis is None else layout.channels_first
        *batch, axis, rows, columns = order
        planes = (*((shape[i], strides[i]) for i in batch), (shape[axis] // channels, strides[axis] * channels))
        return cls(planes, strides[rows], strides[columns], strides[axis])

    def first(self, tile: entropy.Tile) -> int:
        """The place of a tile's first latent."""
        place: int = tile.rows.start * self.rows + tile.columns.start * self.columns
        plane = tile.plane
        for length, stride in reversed(self.planes):
            plane, index = divmod(plane, length)
            place += index * stride
        return place


@dataclass(frozen=True)
class CAEBottleneckCodec(ArrayBytesCodec):
    """Chunks of the codec `cae` decoded to float32 latents; read only.

    It stands in metadata that `BottleneckStore` rewrites, and is of no use elsewhere.

    Parameters
    ----------
    cae
        The codec that wrote the chunks, its channel axis resolved.
    chunk_shape
        The shape of a chunk of pixels as that codec sees it.

    Raises
    ------
    CAEConfigurationError
        If the channel axis is not resolved, or the chunk shape does not fit it.
    """

    is_fixed_size = False

    cae: codec.CAECodec
    chunk_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.cae.channel_axis == "auto":
            raise CAEConfigurationError("cae: cae_bottleneck needs channel_axis as a number or null; got 'auto'")
        if not self.chunk_shape or min(self.chunk_shape) < 1:
            raise CAEConfigurationError(
                f"cae: cae_bottleneck needs a chunk_shape of lengths >= 1; got {self.chunk_shape}"
            )
        _ = self.layout

    @property
    def layout(self) -> Layout:
        """How the axes of a chunk of pixels map to planes."""
        return Layout(self.chunk_shape, cast("int | None", self.cae.channel_axis))

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """The codec that rewritten metadata describes."""
        _, found = parse_named_configuration(data, NAME)
        configuration = dict(found)
        shape = configuration.pop("chunk_shape", None)
        if not isinstance(shape, list | tuple) or not all(type(length) is int for length in shape):
            raise CAEConfigurationError(f"cae: cae_bottleneck needs chunk_shape as a list of integers; got {shape!r}")
        cae = codec.CAECodec.from_dict({"name": codec.NAME, "configuration": configuration})
        return cls(cae, tuple(cast("Sequence[int]", shape)))

    def to_dict(self) -> dict[str, JSON]:
        """The configuration of `cae`, and the shape of its chunks."""
        configuration = cast("dict[str, JSON]", self.cae.to_dict()["configuration"])
        return {"name": NAME, "configuration": {**configuration, "chunk_shape": list(self.chunk_shape)}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Unknown before coding."""
        raise NotImplementedError

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        found = _prepared(self)
        if chunk_spec.shape != found.shape:
            raise CAEConfigurationError(
                f"cae: latents of a chunk of {self.chunk_shape} have shape {found.shape}, but the array says "
                f"{chunk_spec.shape}; open it with `zarr_cae.open_bottleneck`"
            )
        frame = memoryview(cast("Any", chunk_bytes.as_numpy_array()))
        tiles = entropy.tiles(frame, found.header)
        values = np.empty(found.shape, np.float32)
        dequantise, flat, places = dequantiser(), values.reshape(-1), found.places

        def put(tile: entropy.Tile, symbols: entropy.Symbols) -> None:
            strides = places.rows, places.columns, places.channels
            width, begin = symbols.shape[2], places.first(tile)
            dequantise(symbols.reshape(-1), width, found.step, found.offset, flat, begin, *strides)

        entropy.decode_into(put, tiles, found.tables)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(values)

    async def decode(self, chunks_and_specs: Iterable[tuple[Buffer | None, ArraySpec]]) -> Iterable[NDBuffer | None]:
        """What zarr does, without its gathering under a limit where a batch is one chunk, as by default.

        That took a fifth of zarr's time for a chunk.
        """
        batch = list(chunks_and_specs)
        if len(batch) != 1:
            return await super().decode(batch)
        chunk_bytes, chunk_spec = batch[0]
        return [None if chunk_bytes is None else await self._decode_single(chunk_bytes, chunk_spec)]

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> NoReturn:  # noqa: ARG002
        refuse_writing()

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> NoReturn:  # noqa: ARG002
        refuse_writing()


class _Prepared(NamedTuple):
    """What all chunks of an array share."""

    header: FrameHeader
    shape: tuple[int, ...]
    places: Places
    tables: Tables
    step: npt.NDArray[np.float32]
    offset: npt.NDArray[np.float32]


@lru_cache(maxsize=64)
def _prepared(own: CAEBottleneckCodec) -> _Prepared:
    """Raises WeightsNotFoundError if the weights are not on this machine."""
    weights, layout = codec.loaded(own.cae), own.layout
    row = weights.row(own.cae.quality)
    tables = weights.tables[row]
    return _Prepared(
        FrameHeader(layout.planes, layout.height, layout.width, layout.grey, version=tables.frame_version),
        latent_shape(layout.shape, layout, weights.latent_channels),
        Places.of(layout, weights.latent_channels),
        tables,
        *(np.ascontiguousarray(weights.tensors[name][row], np.float32) for name in ("step", "offset")),
    )


def refuse_writing() -> NoReturn:
    """Raise CAEConfigurationError: there is no way from latents back into an archive."""
    raise CAEConfigurationError(
        "cae: latents are read only; write pixels to the array itself, or latents to an array of your own"
    )


@dataclass(frozen=True)
class WithoutLatentAxis(ChunkKeyEncoding):
    """Chunk keys of latents with an axis that their pixels don't have: those of the pixels, by leaving out the last.

    Parameters
    ----------
    encoding
        The chunk key encoding of the array of pixels.
    """

    name: ClassVar[str] = NAME
    encoding: ChunkKeyEncoding

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoding", parse_chunk_key_encoding(cast("Any", self.encoding)))

    def to_dict(self) -> dict[str, JSON]:
        """What rewritten metadata holds."""
        return {"name": NAME, "configuration": {"encoding": self.encoding.to_dict()}}

    def decode_chunk_key(self, chunk_key: str) -> tuple[int, ...]:
        """The chunk that a key belongs to."""
        return (*self.encoding.decode_chunk_key(chunk_key), 0)

    def encode_chunk_key(self, chunk_coords: tuple[int, ...]) -> str:
        """The key of a chunk; there is only one along the last axis."""
        return self.encoding.encode_chunk_key(chunk_coords[:-1])
