"""Convert a slide into an OME-Zarr pyramid, block after block.

    convert_block    read or assemble the pixels of one block, write its shard and its reduced copy
    convert_here     all blocks in this process, the next one read while one is coded

`zarr_cae.slides.conversion` opens the slide and decides; `zarr_cae.slides.cluster` gives the blocks to other machines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
import zarr
from zarr.storage import LocalStore, MemoryStore, StorePath

from zarr_cae.errors import CAEDataError
from zarr_cae.pixels.layout import Pixels
from zarr_cae.slides.background import begin
from zarr_cae.slides.conversion import Conversion, array_options, source_state
from zarr_cae.slides.journal import Journal, flush, read_reduced, remove_reduced, write_reduced
from zarr_cae.slides.pyramid import Block, reduced, reduced_data
from zarr_cae.slides.sources import Slide, open_slide

__all__ = ["Advance", "close_slide", "convert_block", "convert_here"]

Advance = Callable[[float], object]
"""Called with the megapixels that were coded since the last call."""
_CONCURRENCY = 64
_CONFIG: Any = {"write_empty_chunks": False}


def _level_array(conversion: Conversion, out: Path, level: int) -> zarr.AsyncArray[Any]:
    """Open the array of a level, to write with `WritingCodec`."""
    model = zarr.create_array(MemoryStore(), config=_CONFIG, **array_options(conversion, level))
    where = StorePath(LocalStore(out), str(level))
    return zarr.AsyncArray(cast("Any", model.metadata), where, config=_CONFIG)


_opened: dict[tuple[Any, ...], Slide] = {}
"""The slide that this process reads from; one at most."""
_lock = Lock()


def _slide(conversion: Conversion) -> Slide:
    """Return the open slide of a conversion. Raise CAEDataError if the file was changed since the conversion began."""
    source, choices = conversion.source, conversion.choices
    if not source.is_dir() and source_state(source) != conversion.state:
        raise CAEDataError(f"cae: {source} was changed while it was converted; give --restart to convert the new one")
    key = source, choices.series, choices.level, *conversion.state.values()
    with _lock:
        if key not in _opened:
            while _opened:
                _opened.popitem()[1].close()
            _opened[key] = open_slide(source, series=choices.series, level=choices.level)
        return _opened[key]


def close_slide() -> None:
    """Close the slide that this process reads from, if there is one."""
    with _lock:
        while _opened:
            _opened.popitem()[1].close()


def read_block(conversion: Conversion, folder: Path, block: Block) -> Pixels:
    """Return the pixels of a block: from the source, or from the reduced copies of its children."""
    if block.level == 0:
        return _slide(conversion).read(conversion.window(block))
    window = conversion.window(block)
    pixels = np.empty([part.stop - part.start for part in window], conversion.dtype)
    for child in conversion.pyramid.children(block):
        part = read_reduced(folder, child)
        row, column = (
            (place % 2) * (edge // 2)
            for place, edge in zip((child.row, child.column), conversion.pyramid.edge, strict=True)
        )
        pixels[..., row : row + part.shape[-2], column : column + part.shape[-1]] = part
    return pixels


def convert_block(
    conversion: Conversion, folder: Path, block: Block, pixels: Pixels | None = None, advance: Advance | None = None
) -> None:
    """Write one block to its level, and its reduced copy for its parent. May be repeated at any time.

    Parameters
    ----------
    conversion, folder
        The conversion and the folder of its journal.
    block
        The block. Its children must be done.
    pixels
        Its pixels, if they were read already.
    advance
        Called as chunks are coded.
    """
    if pixels is None:
        pixels = read_block(conversion, folder, block)
    if block.level + 1 < len(conversion.pyramid.sizes):
        choices = conversion.choices
        if choices.nodata is None:
            smaller = reduced(pixels, choices.downsample)
        else:
            smaller = reduced_data(pixels, choices.downsample, choices.nodata, conversion.value_range)
        write_reduced(folder, block, smaller)
    window = conversion.window(block)

    def count(samples: int) -> None:
        if advance is not None:
            advance(samples / conversion.channels / 1e6)

    async def write() -> None:
        count_rest = begin(pixels.size, count)
        out = folder / "out"
        array = _level_array(conversion, out, block.level)
        keys = [f"{block.level}/{key}" for key in _keys(conversion, block, array)]
        for key in keys:  # left by an interrupted run: zarr would read and merge them
            await array.store_path.store.delete(key)
        await array.setitem(window, pixels)
        await asyncio.to_thread(flush, [out / key for key in keys], out)
        count_rest()

    with zarr.config.set({"async.concurrency": max(_CONCURRENCY, zarr.config.get("async.concurrency"))}):
        asyncio.run(write())


def _keys(conversion: Conversion, block: Block, array: zarr.AsyncArray[Any]) -> Iterable[str]:
    """Yield the keys of the shards (or chunks) that a block covers."""
    stored = array.shards or array.chunks
    ranges = [
        range(part.start // length, -(-part.stop // length))
        for part, length in zip(conversion.window(block), stored, strict=True)
    ]
    for place in np.ndindex(*(len(one) for one in ranges)):
        coordinates = tuple(one[index] for one, index in zip(ranges, place, strict=True))
        yield cast("Any", array.metadata).encode_chunk_key(coordinates)


def convert_here(conversion: Conversion, journal: Journal, advance: Advance) -> None:
    """Convert all blocks that are not done yet in this process; the next block is read while one is coded."""
    blocks = [block for block in conversion.pyramid.blocks(by_rows=conversion.by_rows) if block not in journal]
    leaves = iter([block for block in blocks if block.level == 0])
    with ThreadPoolExecutor(1, thread_name_prefix="cae-slide") as reader:

        def read_next() -> Future[Pixels] | None:
            following = next(leaves, None)
            return None if following is None else reader.submit(read_block, conversion, journal.folder, following)

        try:
            waiting = read_next()
            for block in blocks:
                pixels = None
                if block.level == 0:
                    assert waiting is not None
                    pixels, waiting = waiting.result(), read_next()
                convert_block(conversion, journal.folder, block, pixels, advance)
                journal.record(block)
                for child in conversion.pyramid.children(block):
                    remove_reduced(journal.folder, child)
        finally:
            reader.shutdown(cancel_futures=True)
            close_slide()
