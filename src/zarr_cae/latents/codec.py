"""`CAEBottleneckCodec`: decode the frame of a chunk to its latents. It is read only and needs no torch.

The latents of a chunk are the input of its synthesis transform: symbol * step + offset. These are two float32
operations on integers that are coded without loss, with constants from the weights file, so every machine gets the
same bits.
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
from zarr.abc.buffer import Buffer, NDBuffer
from zarr.abc.codec import ArrayBytesCodec

from zarr_cae._zarr import JSON, ArraySpec, ChunkKeyEncoding, parse_chunk_key_encoding, parse_named_configuration
from zarr_cae.codec.cae import NAME as CAE_NAME
from zarr_cae.codec.cae import CAECodec, layout_of, loaded
from zarr_cae.coder import tiles
from zarr_cae.coder.compile import dequantiser
from zarr_cae.coder.frame import STRIDE, FrameHeader, Symbols
from zarr_cae.coder.tables import Tables
from zarr_cae.coder.tiles import Tile
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.pixels.layout import Layout

NAME = "cae_bottleneck"


def latent_shape(shape: Sequence[int], layout: Layout, channels: int) -> tuple[int, ...]:
    """Return the shape of the latents of an array, a shard or a chunk.

    Parameters
    ----------
    shape
        The shape in pixels, with the axes of `layout`.
    layout
        The layout of one chunk. Each chunk has latents of its own: one row of latents for 16 rows of pixels, and one
        for the rows that remain. An array of n rows in chunks of c rows has
        `n // c * ceil(c / 16) + ceil(n % c / 16)` rows of latents, which is ceil(n / 16) if 16 divides c. The same
        holds for columns.
    channels
        M, the number of latent channels of the weights. The channel axis has M latents for each plane along it, plane
        after plane: channel m of plane p is at p * M + m. An RGB chunk is one plane. With the codec's `colour`, the
        plane of colours comes first, and the other channels follow in ascending order. Without a channel axis, the
        latents have an additional last axis of length M.

    Returns
    -------
    tuple of int
        As many lengths as `shape` has, and one more if the layout has no channel axis.

    Raises
    ------
    CAEConfigurationError
        If the last chunk along the channel axis is not complete, and chunks have colours beside other channels.
    """
    result = []
    for axis, (length, chunk) in enumerate(zip(shape, layout.shape, strict=True)):
        if axis in layout.spatial_axes:
            result.append(length // chunk * -(-chunk // STRIDE) + -(-(length % chunk) // STRIDE))
        elif axis == layout.channel_axis:
            if length % chunk and layout.colour and layout.planes_per_image > 1:
                raise CAEConfigurationError(
                    f"cae: latents need complete chunks along the channel axis, as the codec has colour; got {length} "
                    f"channels in chunks of {chunk}"
                )
            result.append(channels * (length if layout.grey else -(-length // chunk) * layout.planes_per_image))
        else:
            result.append(length)
    return (*result, channels) if layout.channel_axis is None else tuple(result)


@dataclass(frozen=True)
class LatentStrides:
    """Where the latents of a tile lie in the array of a chunk's latents (C order), counted in elements."""

    planes: tuple[tuple[int, int], ...]
    """Length and stride of each axis along which planes lie, in the order of `layout.channels_first`."""
    rows: int
    columns: int
    channels: int

    @classmethod
    def of(cls, layout: Layout, channels: int) -> LatentStrides:
        """Return the strides for chunks of this layout with M latent channels."""
        shape = latent_shape(layout.shape, layout, channels)
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        last = len(layout.shape)
        order = (*range(last - 2), last, last - 2, last - 1) if layout.channel_axis is None else layout.channels_first
        *batch, axis, rows, columns = order
        planes = (*((shape[i], strides[i]) for i in batch), (shape[axis] // channels, strides[axis] * channels))
        return cls(planes, strides[rows], strides[columns], strides[axis])

    def start(self, tile: Tile) -> int:
        """Return the index of the first latent of a tile."""
        index: int = tile.patch.rows.start * self.rows + tile.patch.columns.start * self.columns
        plane = tile.plane
        for length, stride in reversed(self.planes):
            plane, position = divmod(plane, length)
            index += position * stride
        return index


@dataclass(frozen=True)
class CAEBottleneckCodec(ArrayBytesCodec):
    """Decode chunks of the codec `cae` to float32 latents; read only.

    This codec appears in the metadata that `BottleneckStore` rewrites. It has no use elsewhere.

    Parameters
    ----------
    cae
        The codec that wrote the chunks, with a resolved channel axis.
    chunk_shape
        The shape in pixels of a chunk, as the codec `cae` gets it.

    Raises
    ------
    CAEConfigurationError
        If the channel axis is "auto", or does not fit the chunk shape.
    """

    is_fixed_size = False

    cae: CAECodec
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
        return layout_of(self.cae, self.chunk_shape)

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """Return the codec that a rewritten `zarr.json` describes."""
        _, found = parse_named_configuration(data, NAME)
        configuration = dict(found)
        shape = configuration.pop("chunk_shape", None)
        if not isinstance(shape, list | tuple) or not all(type(length) is int for length in shape):
            raise CAEConfigurationError(f"cae: cae_bottleneck needs chunk_shape as a list of integers; got {shape!r}")
        cae = CAECodec.from_dict({"name": CAE_NAME, "configuration": configuration})
        return cls(cae, tuple(cast("Sequence[int]", shape)))

    def to_dict(self) -> dict[str, JSON]:
        """Return the configuration of the codec `cae` together with the shape of its chunks."""
        configuration = cast("dict[str, JSON]", self.cae.to_dict()["configuration"])
        return {"name": NAME, "configuration": {**configuration, "chunk_shape": list(self.chunk_shape)}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Raise NotImplementedError: the size is not known before coding."""
        raise NotImplementedError

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        chunk = _chunk_constants(self)
        if chunk_spec.shape != chunk.shape:
            raise CAEConfigurationError(
                f"cae: latents of a chunk of {self.chunk_shape} have shape {chunk.shape}, but the array says "
                f"{chunk_spec.shape}; open it with `zarr_cae.open_bottleneck`"
            )
        frame = memoryview(cast("Any", chunk_bytes.as_numpy_array()))
        header, found = tiles.unpack(frame, chunk.header)
        tables, step, offset = _row_constants(self, header.row_of(chunk.rows, chunk.row))
        values = np.empty(chunk.shape, np.float32)
        dequantise, flat, strides = dequantiser(), values.reshape(-1), chunk.strides

        def put(tile: Tile, symbols: Symbols) -> None:
            dequantise(
                symbols.reshape(-1), symbols.shape[2], step, offset,
                flat, strides.start(tile), strides.rows, strides.columns, strides.channels,
            )  # fmt: skip

        tiles.decode_each(found, tables, header.version, put)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(values)

    async def decode(self, chunks_and_specs: Iterable[tuple[Buffer | None, ArraySpec]]) -> Iterable[NDBuffer | None]:
        """Decode a batch of chunks; a missing chunk stays None.

        zarr's default pipeline passes one chunk at a time. For one chunk this skips `asyncio.gather`, which took a
        fifth of the time.
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


class _ChunkConstants(NamedTuple):
    """Values that are the same for all chunks of an array."""

    header: FrameHeader
    shape: tuple[int, ...]
    strides: LatentStrides
    row: int
    """Row of the weights file for the array's quality."""
    rows: int
    """Number of rows of the weights file."""


@lru_cache(maxsize=64)
def _chunk_constants(codec: CAEBottleneckCodec) -> _ChunkConstants:
    """Return the constants of an array. Raise WeightsNotFoundError if the weights are not on this machine."""
    weights, layout = loaded(codec.cae), codec.layout
    row = weights.row(codec.cae.quality)
    version = weights.tables[row].frame_version
    return _ChunkConstants(
        FrameHeader(layout.planes, layout.height, layout.width, layout.grey, version=version),
        latent_shape(layout.shape, layout, weights.latent_channels),
        LatentStrides.of(layout, weights.latent_channels),
        row,
        len(weights.tables),
    )


@lru_cache(maxsize=64)
def _row_constants(
    codec: CAEBottleneckCodec, row: int
) -> tuple[Tables, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the tables, steps and offsets of a row of the weights file."""
    weights = loaded(codec.cae)
    step, offset = (np.ascontiguousarray(weights.tensors[name][row], np.float32) for name in ("step", "offset"))
    return weights.tables[row], step, offset


def refuse_writing() -> NoReturn:
    """Raise CAEConfigurationError: latents can't be written back into an archive."""
    raise CAEConfigurationError(
        "cae: latents are read only; write pixels to the array itself, or latents to an array of your own"
    )


@dataclass(frozen=True)
class WithoutLatentAxis(ChunkKeyEncoding):
    """Chunk keys for latents that have one axis more than their pixels.

    The chunks are stored under the keys of the pixels, so the last coordinate, which is always 0, is left out.

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
        """Return the entry for rewritten metadata."""
        return {"name": NAME, "configuration": {"encoding": self.encoding.to_dict()}}

    def decode_chunk_key(self, chunk_key: str) -> tuple[int, ...]:
        """Return the coordinates of the chunk with this key."""
        return (*self.encoding.decode_chunk_key(chunk_key), 0)

    def encode_chunk_key(self, chunk_coords: tuple[int, ...]) -> str:
        """Return the key of a chunk."""
        return self.encoding.encode_chunk_key(chunk_coords[:-1])
