"""Symbols (N, M, h, w) to a chunk frame and back: cut into tiles, each entropy-coded on its own, over the cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from zarr_cae.coder import frame as framing
from zarr_cae.coder import rans
from zarr_cae.coder.tables import Tables

Symbols = npt.NDArray[np.int16]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


chosen_threads: Callable[[], int | None] | None = None
"""How many threads this machine's settings allow, if they say. Nothing is known of them here: `settings` sets this."""


def cores() -> int:
    """Those that this process may use now: of those that it has, as many as the settings or OMP_NUM_THREADS say."""
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = chosen_threads() if chosen_threads is not None else None
    return min(present, chosen or _openmp_threads() or present)


def _openmp_threads() -> int | None:
    """Of the outermost level, where the variable has one for each."""
    number = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(number) if number.isdecimal() else None


@lru_cache(maxsize=8)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="cae-entropy")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a pool's threads do not survive a fork


def over_cores(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterable[_Result]:
    """`map`, over the cores (the coder releases the GIL) if there is more than one item."""
    return map(function, items) if len(items) == 1 else _pool(cores()).map(function, items)


def encode_tile(tile: Symbols, tables: Tables) -> bytes:
    """The stream of one tile of symbols (M, h, w)."""
    return rans.encode(np.ascontiguousarray(tile), tables)


def decode_tile(stream: bytes | memoryview, rows: int, columns: int, tables: Tables) -> Symbols:
    """The symbols (M, rows, columns) of one tile's stream. Raises StreamError if it is malformed."""
    return rans.decode(stream, (rows, columns), tables)


def encode(symbols: Symbols, header: framing.FrameHeader, tables: Tables) -> bytes:
    """The frame of a chunk's symbols (N, M, h, w), whose N, h and w are the header's."""
    places = [(plane, *tile) for plane in range(header.planes) for tile in header.tiles()]

    def code(place: tuple[int, slice, slice]) -> bytes:
        plane, rows, columns = place
        return encode_tile(symbols[plane, :, rows, columns], tables)

    return framing.pack(header, list(over_cores(code, places)))


class Tile(NamedTuple):
    """The stream of one tile of a frame, and which of the chunk's latents it holds."""

    plane: int
    rows: slice
    columns: slice
    stream: memoryview


def tiles(frame: bytes | memoryview, expected: framing.FrameHeader) -> list[Tile]:
    """The tiles of a frame. Raises FrameError if it is malformed, before anything of the chunk's size is allocated."""
    header, streams = framing.unpack(frame, expected)
    places = [(plane, *tile) for plane in range(header.planes) for tile in header.tiles()]
    return [Tile(*place, stream) for place, stream in zip(places, streams, strict=True)]


def decode_into(put: Callable[[Tile, Symbols], None], found: Sequence[Tile], tables: Tables) -> None:
    """Hand each tile and its symbols (M, h, w) to `put`: in any order, from several threads at a time.

    Raises StreamError if a stream is malformed; others may have been handed over by then.
    """

    def code(tile: Tile) -> None:
        _, rows, columns, stream = tile
        put(tile, decode_tile(stream, rows.stop - rows.start, columns.stop - columns.start, tables))

    for _ in over_cores(code, found):
        pass


def decode(frame: bytes | memoryview, expected: framing.FrameHeader, tables: Tables) -> Symbols:
    """The symbols (N, M, h, w) of a frame. Raises FrameError or StreamError for anything malformed."""
    found = tiles(frame, expected)
    symbols = np.empty((expected.planes, tables.channels, *expected.latent_shape), np.int16)

    def put(tile: Tile, values: Symbols) -> None:
        symbols[tile.plane, :, tile.rows, tile.columns] = values

    decode_into(put, found, tables)
    return symbols
