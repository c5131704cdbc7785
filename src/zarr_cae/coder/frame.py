"""The chunk frame: a header and one stream per tile, checked by CRC32C.

The weights decide the version: tables without contexts make version 1, tables with contexts version 2 (see `rans`).
Little endian; varints are base 128, 7 bits a byte, low bits first, high bit set on all but the last byte, never with a
superfluous last byte, below 2^32:

    4 bytes      magic, the ASCII characters ZCAE
    1 byte       version, 1 or 2
    1 byte       flags: bit 0 set if the planes are grey, clear if they are RGB; the others clear
    varint       planes: images in the chunk, three colours counting as one
    varint       height of a plane in pixels
    varint       width of a plane in pixels
    1 byte       log2 of the edge of a tile in latent positions, 0 to 10
    varints      bytes of each tile's stream

and then, in version 1,

    ...          the tiles' streams, one after the other
    4 bytes      CRC32C (Castagnoli) of all before it

in version 2, where what is read of a frame can be checked without the rest,

    4 bytes      CRC32C of all before it
    ...          for each tile, its stream and the CRC32C of that, 4 bytes

A plane has ceil(height / 16) x ceil(width / 16) latent positions, cut into tiles from its upper left corner; tiles at
the lower and right edge are smaller. Tiles are ordered by plane, then tile row, then tile column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

import crc32c
import numpy as np
import numpy.typing as npt

from zarr_cae.errors import CAEConfigurationError, FrameError

__all__ = ["STRIDE", "FrameHeader", "FrameIndex", "Symbols", "pack", "parse_index", "unpack"]

STRIDE = 16
"""Pixels per latent position, along rows and columns."""
Symbols: TypeAlias = npt.NDArray[np.int16]
"""Quantised latents: (N, M, h, w) of a chunk's planes, or (M, h, w) of one tile."""

_MAGIC = b"ZCAE"
_VERSIONS = (1, 2)
_GREY = 1
_CHECKSUM_BYTES = 4
_MAX_LOG2_TILE = 10
_MAX_VARINT_BYTES = 5
_VARINT_END = 1 << 32


@dataclass(frozen=True)
class FrameHeader:
    """What a frame holds: `planes` images of height x width pixels, grey or RGB, in tiles of tile x tile positions.

    Raises
    ------
    CAEConfigurationError
        If planes, height or width are not in [1, 2^32), `tile` is not a power of two in [1, 1024], or the version is
        unknown.
    """

    planes: int
    height: int
    width: int
    grey: bool
    tile: int = 32
    version: int = 1

    def __post_init__(self) -> None:
        for name in ("planes", "height", "width"):
            value = getattr(self, name)
            if not 1 <= value < _VARINT_END:
                raise CAEConfigurationError(f"cae: frame's {name} must be in [1, 2^32); got {value}")
        if self.version not in _VERSIONS:
            raise CAEConfigurationError(f"cae: frame's version must be one of {_VERSIONS}; got {self.version}")
        if self.tile not in {1 << n for n in range(_MAX_LOG2_TILE + 1)}:
            raise CAEConfigurationError(
                f"cae: frame's tile must be a power of two in [1, {1 << _MAX_LOG2_TILE}]; got {self.tile}"
            )

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Rows and columns of latent positions of a plane."""
        return -(-self.height // STRIDE), -(-self.width // STRIDE)

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Rows and columns of tiles of a plane."""
        rows, columns = self.latent_shape
        return -(-rows // self.tile), -(-columns // self.tile)

    @property
    def tile_count(self) -> int:
        """Tiles of all planes."""
        rows, columns = self.tile_grid
        return self.planes * rows * columns


@dataclass(frozen=True)
class FrameIndex:
    """Where the tiles of a frame lie: tile i is stored as frame[offsets[i]:offsets[i + 1]]."""

    header: FrameHeader
    offsets: tuple[int, ...]

    @property
    def frame_bytes(self) -> int:
        """Length of the whole frame."""
        return self.offsets[-1] + (_CHECKSUM_BYTES if self.header.version == 1 else 0)

    def stream(self, tile: int, stored: memoryview) -> memoryview:
        """The stream in what is stored of a tile. Raises FrameError if version 2's checksum does not match."""
        if self.header.version == 1:
            return stored
        stream = stored[:-_CHECKSUM_BYTES]
        _check_checksum(f"tile {tile}'s", stream, stored[-_CHECKSUM_BYTES:])
        return stream


def pack(header: FrameHeader, streams: Sequence[bytes | memoryview]) -> bytes:
    """Join the streams of all tiles, ordered by plane, tile row and tile column, to a frame.

    Raises
    ------
    CAEConfigurationError
        If the number of streams is not `header.tile_count`, or a stream has 2^32 bytes or more.
    """
    if len(streams) != header.tile_count:
        raise CAEConfigurationError(
            f"cae: frame of {_described(header)} needs {header.tile_count} tile streams; got {len(streams)}"
        )
    longest = max(map(len, streams))
    if longest >= _VARINT_END:
        raise CAEConfigurationError(f"cae: frame's tile streams must be shorter than 2^32 bytes; got {longest}")
    frame = bytearray(_MAGIC)
    frame += bytes([header.version, _GREY if header.grey else 0])
    for value in (header.planes, header.height, header.width):
        frame += _varint(value)
    frame.append(header.tile.bit_length() - 1)
    for stream in streams:
        frame += _varint(len(stream))
    if header.version == 1:
        return _sealed(frame + b"".join(streams))
    return _sealed(frame) + b"".join(map(_sealed, streams))


def _sealed(content: bytes | bytearray | memoryview) -> bytes:
    return bytes(content) + crc32c.crc32c(content).to_bytes(_CHECKSUM_BYTES, "little")


def _check_checksum(whose: str, content: memoryview, checksum: memoryview, hint: str = "") -> None:
    computed, stored = crc32c.crc32c(content), int.from_bytes(checksum, "little")
    if computed != stored:
        raise FrameError(
            f"cae: frame's {whose} checksum must be {stored:#010x}; its bytes have {computed:#010x}: "
            f"the stored chunk is damaged{hint}"
        )


def unpack(frame: bytes | memoryview, expected: FrameHeader) -> tuple[FrameHeader, list[memoryview]]:
    """Check a whole frame and return its header and the stream of each tile.

    Parameters
    ----------
    frame
        All bytes of the frame and nothing else; contiguous. The streams returned are views of it.
    expected
        What the array's chunk must hold; its `tile` does not count.

    Raises
    ------
    FrameError
        If the frame is no frame, of a newer version, damaged, malformed, or of another shape than expected.
    """
    view = memoryview(frame).cast("B")
    _check_magic(view)
    smallest = len(_MAGIC) + 1 + _CHECKSUM_BYTES
    if len(view) < smallest:
        raise FrameError(f"cae: frame needs at least {smallest} bytes; got {len(view)}: the stored chunk is truncated")
    if view[4] != max(_VERSIONS):
        hint = "" if view[4] in _VERSIONS else f" (or written by a zarr-cae with frame version {view[4]}: upgrade)"
        _check_checksum("whole", view[:-_CHECKSUM_BYTES], view[-_CHECKSUM_BYTES:], hint)
    index = parse_index(view, expected)
    missing = index if isinstance(index, int) else max(index.frame_bytes - len(view), 0)
    if missing:
        raise FrameError(f"cae: frame ends at least {missing} bytes too early: the stored chunk is truncated")
    assert isinstance(index, FrameIndex)
    if index.frame_bytes < len(view):
        raise FrameError(
            f"cae: frame must end after {index.frame_bytes} bytes; got {len(view)}: the stored chunk has a foreign tail"
        )
    stored = [view[begin:end] for begin, end in pairwise(index.offsets)]
    return index.header, [index.stream(tile, part) for tile, part in enumerate(stored)]


def parse_index(head: bytes | memoryview, expected: FrameHeader) -> FrameIndex | int:
    """Read header and tile lengths from the first bytes of a frame; the checksum only where it covers these alone.

    Parameters
    ----------
    head
        A prefix of a frame, of any length.
    expected
        What the array's chunk must hold; its `tile` does not count.

    Returns
    -------
    FrameIndex, or int
        The number of further bytes that are needed at the least, if `head` is too short. Repeated reads of that many
        come to an end after at most 5 bytes a number.

    Raises
    ------
    FrameError
        If what is there is no frame, of a newer version, malformed, or of another shape than expected.
    """
    view = memoryview(head).cast("B")
    _check_prefix(view)
    start = len(_MAGIC) + 2
    shortest = start + 5  # three varints, the tile size and the length of one tile
    if len(view) < shortest:
        return shortest - len(view)
    dimensions: list[int] = []
    for name in ("plane count", "height", "width"):
        value, start = _read_varint(view, start, name)
        if start > len(view):
            return start + 4 - len(dimensions) - len(view)
        dimensions.append(value)
    _check_expected(dimensions, view[4], bool(view[5] & _GREY), expected)
    if start == len(view):
        return 2
    if view[start] > _MAX_LOG2_TILE:
        raise FrameError(
            f"cae: frame's log2 of the tile size must be 0 to {_MAX_LOG2_TILE}; got {view[start]}: "
            "the stored chunk is damaged"
        )
    header = FrameHeader(
        expected.planes, expected.height, expected.width, expected.grey, 1 << view[start], expected.version
    )
    start += 1
    lengths: list[int] = []
    count = header.tile_count
    if count > len(view) - start:  # each length takes a byte: no loop over more tiles than there are bytes
        return count - (len(view) - start)
    for tile in range(count):
        length, start = _read_varint(view, start, f"length of tile {tile}")
        if start > len(view):
            return start + count - tile - 1 - len(view)
        lengths.append(length)
    return _index(header, lengths, view, start)


def _index(header: FrameHeader, lengths: list[int], view: memoryview, start: int) -> FrameIndex | int:
    """What `parse_index` returns once all before `start` is read."""
    if header.version > 1:
        end = start + _CHECKSUM_BYTES
        if end > len(view):
            return end - len(view)
        _check_checksum("index's", view[:start], view[start:end])
        start, lengths = end, [length + _CHECKSUM_BYTES for length in lengths]
    return FrameIndex(header, tuple(accumulate(lengths, initial=start)))


def _check_magic(view: memoryview) -> None:
    if len(view) == 0 or view[: len(_MAGIC)] != _MAGIC[: len(view)]:
        raise FrameError(
            f"cae: frame must begin with {_MAGIC!r}; got {bytes(view[: len(_MAGIC)])!r}: not a cae frame; "
            "was the chunk written with other codecs?"
        )


def _check_prefix(view: memoryview) -> None:
    _check_magic(view)
    if len(view) > 4 and view[4] not in _VERSIONS:
        advice = "upgrade zarr-cae to read this array" if view[4] > max(_VERSIONS) else "the stored chunk is damaged"
        raise FrameError(f"cae: frame's version must be one of {_VERSIONS}; got {view[4]}: {advice}")
    if len(view) > 5 and view[5] & ~_GREY:
        raise FrameError(f"cae: frame's flags must be 0 or {_GREY}; got {view[5]}: the stored chunk is damaged")


def _check_expected(dimensions: list[int], version: int, grey: bool, expected: FrameHeader) -> None:
    if (*dimensions, grey) == (expected.planes, expected.height, expected.width, expected.grey):
        if version == expected.version:
            return
        raise FrameError(
            f"cae: frame's version must be {expected.version}, which the weights of the array call for; got {version}: "
            "it was written with other weights"
        )
    planes, height, width = dimensions
    raise FrameError(
        f"cae: frame must hold {_described(expected)}; got {planes} {'grey' if grey else 'RGB'} planes of "
        f"{height} x {width}: it is of another array or chunk shape"
    )


def _described(header: FrameHeader) -> str:
    return f"{header.planes} {'grey' if header.grey else 'RGB'} planes of {header.height} x {header.width}"


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _read_varint(view: memoryview, start: int, name: str) -> tuple[int, int]:
    """Value and end of the varint at `start`; an end beyond the view if it is cut off there."""
    value = 0
    for n, byte in enumerate(view[start : start + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * n
        if byte < 0x80:
            if n and byte == 0:
                raise FrameError(f"cae: frame's {name} has a superfluous last byte: the stored chunk is damaged")
            if value >= _VARINT_END:
                raise FrameError(f"cae: frame's {name} must be below 2^32; got {value}: the stored chunk is damaged")
            return value, start + n + 1
    if len(view) - start >= _MAX_VARINT_BYTES:
        raise FrameError(f"cae: frame's {name} must have at most 5 bytes: the stored chunk is damaged")
    return 0, len(view) + 1
