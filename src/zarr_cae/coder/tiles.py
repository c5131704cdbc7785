"""Code the integer symbols (N, M, h, w) of a chunk to its frame and back, tile by tile.

The planes of a chunk are cut into tiles. Each tile is coded to a stream of its own, on several cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_cae.coder import rans
from zarr_cae.coder.frame import FrameHeader, Symbols, pack, parse_frame
from zarr_cae.coder.tables import Tables
from zarr_cae.threads import over_cores


@dataclass(frozen=True)
class Patch:
    """A rectangle of latent positions of a plane."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def widened(self, by: int, shape: tuple[int, int]) -> Patch:
        """Return the patch with `by` more positions on each side, cropped to a plane of this shape."""
        rows, columns = (
            slice(max(0, side.start - by), min(length, side.stop + by))
            for side, length in zip((self.rows, self.columns), shape, strict=True)
        )
        return Patch(rows, columns)

    def within(self, outer: Patch) -> tuple[slice, slice]:
        """Return the slices of an array of `outer` that hold this patch, as far as both overlap."""
        rows, columns = (
            slice(max(own.start, other.start) - other.start, min(own.stop, other.stop) - other.start)
            for own, other in ((self.rows, outer.rows), (self.columns, outer.columns))
        )
        return rows, columns

    def meets(self, other: Patch) -> bool:
        """Return whether the two patches overlap."""
        return all(
            max(own.start, one.start) < min(own.stop, one.stop)
            for own, one in ((self.rows, other.rows), (self.columns, other.columns))
        )

    def scaled(self, samples: int) -> tuple[slice, slice]:
        """Return the slices of the patch in an array with this many samples per position along each axis."""
        rows, columns = (slice(side.start * samples, side.stop * samples) for side in (self.rows, self.columns))
        return rows, columns


class Tile(NamedTuple):
    """One tile of a frame."""

    number: int
    """Position of its stream among those of the frame."""
    plane: int
    """Index of its plane among the requested planes."""
    patch: Patch
    """The latent positions that it holds."""


def tiles(
    header: FrameHeader, planes: Sequence[int] | npt.NDArray[np.intp] | None = None, patch: Patch | None = None
) -> list[Tile]:
    """Return the tiles of some planes (default: all) that overlap a patch (default: the whole plane).

    They come plane by plane, in the order in which the planes are given, and in the order of the frame within a plane.
    """
    rows, columns = header.latent_shape
    patch = Patch(slice(0, rows), slice(0, columns)) if patch is None else patch
    down, across = header.tile_grid
    edge = header.tile
    found = []
    for place, plane in enumerate(range(header.planes) if planes is None else planes):
        for row in range(patch.rows.start // edge, -(-patch.rows.stop // edge)):
            for column in range(patch.columns.start // edge, -(-patch.columns.stop // edge)):
                own = Patch(
                    slice(row * edge, min((row + 1) * edge, rows)),
                    slice(column * edge, min((column + 1) * edge, columns)),
                )
                found.append(Tile((int(plane) * down + row) * across + column, place, own))
    return found


def encode_tile(symbols: Symbols, tables: Tables, version: int = 2) -> bytes:
    """Return the stream of one tile of symbols (M, h, w), for a frame of this version (1 and 2 are alike)."""
    return rans.encode(np.ascontiguousarray(symbols), tables, version)


def decode_tile(stream: bytes | memoryview, shape: tuple[int, int], tables: Tables, version: int = 2) -> Symbols:
    """Return the symbols (M, h, w) of one tile's stream, where `shape` is (h, w) and `version` that of the frame.

    Raises
    ------
    StreamError
        If the stream is malformed.
    """
    return rans.decode(stream, shape, tables, version)


def encode_streams(symbols: Symbols, header: FrameHeader, tables: Tables) -> list[bytes]:
    """Return the streams of all tiles of a chunk's symbols (N, M, h, w); N, h and w are those of the header."""

    def code(tile: Tile) -> bytes:
        return encode_tile(symbols[tile.plane, :, tile.patch.rows, tile.patch.columns], tables, header.version)

    return over_cores(code, tiles(header))


def encode(symbols: Symbols, header: FrameHeader, tables: Tables) -> bytes:
    """Return the frame of a chunk's symbols (N, M, h, w); N, h and w are those of the header."""
    return pack(header, encode_streams(symbols, header, tables))


def unpack(frame: bytes | memoryview, expected: FrameHeader) -> tuple[FrameHeader, list[tuple[Tile, memoryview]]]:
    """Return the header of a frame, and its tiles with their streams.

    Raises
    ------
    FrameError
        If the frame is malformed. Nothing of the chunk's size is allocated before it is checked.
    """
    parsed = parse_frame(frame, expected)
    return parsed.header, list(zip(tiles(parsed.header), parsed.streams, strict=True))


def decode_each(
    found: Sequence[tuple[Tile, bytes | memoryview]], tables: Tables, version: int, put: Callable[[Tile, Symbols], None]
) -> None:
    """Decode tiles, and call `put` with each tile and its symbols (M, h, w), in any order and from several threads.

    `tables` are those of the row that coded the frame, and `version` is the frame's.

    Raises
    ------
    StreamError
        If a stream is malformed. `put` may have been called for other tiles by then.
    """

    def code(one: tuple[Tile, bytes | memoryview]) -> None:
        tile, stream = one
        put(tile, decode_tile(stream, tile.patch.shape, tables, version))

    over_cores(code, found)


def decode(frame: bytes | memoryview, expected: FrameHeader, tables: Tables) -> Symbols:
    """Return the symbols (N, M, h, w) of a frame.

    Raises
    ------
    FrameError, StreamError
        If the frame or a stream in it is malformed.
    """
    parsed = parse_frame(frame, expected)
    return decode_streams(parsed.header, parsed.streams, tables)


def decode_streams(header: FrameHeader, streams: Sequence[bytes | memoryview], tables: Tables) -> Symbols:
    """Return the symbols (N, M, h, w) of the streams of all tiles; `tables` are those of the row that coded them.

    Raises
    ------
    StreamError
        If a stream is malformed.
    """
    symbols = np.empty((header.planes, tables.channels, *header.latent_shape), np.int16)

    def put(tile: Tile, values: Symbols) -> None:
        symbols[tile.plane, :, tile.patch.rows, tile.patch.columns] = values

    decode_each(list(zip(tiles(header), streams, strict=True)), tables, header.version, put)
    return symbols
