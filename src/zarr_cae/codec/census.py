"""Count how the stored chunks of an array were coded, from the headers of their frames alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, TransposeCodec

from zarr_cae._zarr import sync
from zarr_cae.codec.cae import CAECodec, layout_of, loaded
from zarr_cae.codec.plan import contiguous
from zarr_cae.codec.verify import stored_chunks
from zarr_cae.coder.frame import FrameHeader, FrameIndex, parse_index
from zarr_cae.errors import FrameError, WeightsNotFoundError

__all__ = ["Census", "take_census"]

_AT_A_TIME = 64
_MOST_TILES = 4096
_NOT_STORED = (1 << 64) - 1


@dataclass
class Census:
    """How the chunks of an array were coded."""

    chunks: int = 0
    """Chunks whose header was read."""
    qualities: Counter[int] = field(default_factory=Counter)
    """Chunks of each quality."""
    masked: int = 0
    """Chunks with a mask."""
    corrected: int = 0
    """Chunks with corrections."""
    tiles: int = 0
    exact_tiles: int = 0
    exact_chunks: int = 0
    """Chunks with exact tiles."""
    lowest_psnr: int | None = None
    """The lowest PSNR that the writer measured, in hundredths of dB; None if it measured none."""
    unmeasured: int = 0
    """Chunks without a measured PSNR."""
    damaged: int = 0
    """Chunks whose header can't be read."""
    complete: bool = True
    """Whether all stored chunks were counted."""

    def add(self, index: FrameIndex, quality: int) -> None:
        """Count one chunk."""
        self.chunks += 1
        self.qualities[quality] += 1
        self.masked += index.mask is not None
        self.corrected += index.corrected
        self.tiles += index.header.tile_count
        self.exact_tiles += len(index.exact)
        self.exact_chunks += bool(index.exact)
        if index.psnr is None:
            self.unmeasured += 1
        else:
            self.lowest_psnr = index.psnr if self.lowest_psnr is None else min(self.lowest_psnr, index.psnr)


def take_census(array: zarr.Array[Any], *, most: int = 10_000) -> Census | None:
    """Read the headers of an array's frames, several at a time, by ranges of bytes.

    Parameters
    ----------
    array
        An array.
    most
        The number of chunks after which counting ends.

    Returns
    -------
    Census or None
        None if headers can't be read by themselves: the array has another codec, compressed frames, nested shards or
        shards with an index of another form, or its weights are not on this machine.
    """
    found = _find(getattr(array.metadata, "codecs", ()), array.chunks)
    if found is None:
        return None
    codec, shape, sharding = found
    try:
        weights = loaded(codec)
    except WeightsNotFoundError:
        return None
    layout = layout_of(codec, shape)
    row = weights.row(codec.quality)
    version = weights.tables[row].frame_version
    header = FrameHeader(layout.planes, layout.height, layout.width, layout.grey, version=version)
    census = Census()

    async def count(key: str, begin: int, end: int | None) -> None:
        try:
            index = await _read_index(array.store_path.store, key, begin, end, header)
            census.add(index, weights.info.qualities[index.header.row_of(len(weights.tables), row)])
        except FrameError:
            census.damaged += 1

    async def count_all() -> None:
        batch: list[Any] = []
        async for place in _places(array, sharding, census):
            if census.chunks + census.damaged + len(batch) >= most:
                census.complete = False
                break
            batch.append(count(*place))
            if len(batch) == _AT_A_TIME:
                await asyncio.gather(*batch)
                batch.clear()
        await asyncio.gather(*batch)

    sync(count_all())
    return census


def _find(
    codecs: Sequence[Any], shape: tuple[int, ...]
) -> tuple[CAECodec, tuple[int, ...], ShardingCodec | None] | None:
    """Return the codec `cae`, the shape of its chunks and the sharding around it; None if headers can't be read."""
    sharding = None
    chain = list(codecs)
    while chain:
        codec = chain.pop(0)
        if isinstance(codec, TransposeCodec):
            shape = tuple(shape[axis] for axis in codec.order)
        elif isinstance(codec, ShardingCodec) and sharding is None and not chain:
            sharding, shape, chain = codec, codec.chunk_shape, list(codec.codecs)
            if [type(one) for one in codec.index_codecs] != [BytesCodec, Crc32cCodec]:
                return None
        elif isinstance(codec, CAECodec) and not chain:
            return codec, shape, sharding
        else:
            return None
    return None


async def _places(
    array: zarr.Array[Any], sharding: ShardingCodec | None, census: Census
) -> AsyncIterator[tuple[str, int, int | None]]:
    """Yield the key of each stored frame, and the bytes there that it takes."""
    store = array.store_path.store
    outer = array.shards or array.chunks
    count = int(np.prod([long // short for long, short in zip(outer, array.chunks, strict=True)], dtype=object))
    async for key, _ in stored_chunks(array):
        if sharding is None:
            yield key, 0, None
            continue
        size = 16 * count
        at_start = str(getattr(sharding.index_location, "value", sharding.index_location)) == "start"
        wanted = RangeByteRequest(0, size) if at_start else SuffixByteRequest(size + 4)
        index = (await _read(store, key, wanted))[:size]
        if len(index) < size:
            census.damaged += 1
            continue
        for offset, length in np.frombuffer(index, "<u8").reshape(-1, 2).tolist():
            if offset != _NOT_STORED:
                yield key, offset, offset + length


async def _read_index(store: Store, key: str, begin: int, end: int | None, header: FrameHeader) -> FrameIndex:
    """Read the index of a frame with few requests. Raise FrameError if it is damaged."""
    head, more = b"", 32 + 3 * min(header.tile_count, _MOST_TILES)
    while True:
        first = begin + len(head)
        last = first + more if end is None else min(first + more, end)
        part = await _read(store, key, RangeByteRequest(first, last)) if first < last else b""
        head += part
        index = parse_index(head, header)
        if isinstance(index, FrameIndex):
            return index
        if not part:
            raise FrameError(f"cae: frame {key} ends in its header: the stored chunk is truncated")
        more = index


async def _read(store: Store, key: str, wanted: ByteRequest) -> bytes:
    found = await store.get(key, default_buffer_prototype(), wanted)
    return b"" if found is None else bytes(contiguous(found))
