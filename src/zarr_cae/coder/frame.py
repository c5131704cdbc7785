"""The frame of a chunk: a header, then the stream of each tile, with checksums.

The section "Frames" of spec/cae.md defines the bytes of all versions. Versions 1 and 2 differ in their checksums;
releases before version 3 wrote the one that the tables of the weights call for (`Tables.frame_version`). Version 3 can
hold a mask, exact tiles, corrections and the PSNR that the writer measured, and says which row of the weights file
coded the chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np

from zarr_cae.coder.fields import CHECKSUM_BYTES, VARINT_END, Reader, TooShortError, check_checksum, sealed, varints
from zarr_cae.coder.header import MAX_LOG2_TILE, STRIDE, VERSIONS, FrameHeader, Symbols
from zarr_cae.coder.index import FrameIndex, TileParts
from zarr_cae.errors import CAEConfigurationError, FrameError

__all__ = [
    "NO_ERROR",
    "STRIDE",
    "Frame",
    "FrameHeader",
    "FrameIndex",
    "Symbols",
    "TileParts",
    "pack",
    "parse_frame",
    "parse_index",
    "unpack",
]  # fmt: skip

NO_ERROR = 65535
"""The PSNR in a frame of a chunk in which no sample differs."""
MAGIC = b"ZCAE"
_GREY, _MASKED, _EXACT, _MEASURED, _CORRECTED = 1, 2, 4, 8, 16
_FLAGS = {1: _GREY, 2: _GREY, 3: _GREY | _MASKED | _EXACT | _MEASURED | _CORRECTED}


@dataclass(frozen=True)
class Frame:
    """The checked parts of a whole frame.

    Attributes
    ----------
    header
        The header.
    streams
        The stream of each tile; views of the frame.
    mask
        The mask section for `lossless.decode_mask`, or None.
    exact
        For each exact tile, by number, the pixel section for `lossless.decode_pixels`.
    corrections
        For each tile that has one, by number, the correction section for `correction.decode_correction`.
    """

    header: FrameHeader
    streams: Sequence[memoryview]
    mask: memoryview | None
    exact: Mapping[int, memoryview]
    corrections: Mapping[int, memoryview] = field(default_factory=dict)


def pack(
    header: FrameHeader,
    streams: Sequence[bytes | memoryview],
    *,
    mask: bytes | memoryview | None = None,
    exact: Mapping[int, bytes | memoryview] | None = None,
    psnr: int | None = None,
    corrections: Mapping[int, bytes | memoryview] | None = None,
) -> bytes:
    """Return the frame of a chunk.

    Parameters
    ----------
    header
        The header. In version 3 it must have a row.
    streams
        The streams of all tiles, in the order of `tiles.tiles`.
    mask
        The mask section from `lossless.encode_mask`, if samples are masked; version 3 only.
    exact
        The pixel sections from `lossless.encode_pixels` of exact tiles, by number of the tile; version 3 only.
    psnr
        The measured PSNR of the chunk in hundredths of dB, 0 to 65535; version 3 only.
    corrections
        The correction sections from `correction.encode_correction` of corrected tiles, by number of the tile; version 3
        only.

    Raises
    ------
    CAEConfigurationError
        If the number of streams is not `header.tile_count`, a part has 2^32 bytes or more, a section is empty, an
        exact or corrected tile does not exist, the row is missing, or the version has none of these sections.
    """
    exact = exact or {}
    if corrections:
        sections = (corrections.get(tile, b"") for tile in range(len(streams)))
        streams = [b"".join((varints([len(own)]), own, one)) for own, one in zip(sections, streams, strict=True)]
    _check_parts(header, streams, mask, {**exact, **(corrections or {})}, psnr)
    flags = (_GREY if header.grey else 0) | (_MASKED if mask is not None else 0) | (_EXACT if exact else 0)
    flags |= (0 if psnr is None else _MEASURED) | (_CORRECTED if corrections else 0)
    frame = bytearray(MAGIC)
    frame += bytes([header.version, flags])
    frame += varints([header.planes, header.height, header.width])
    frame.append(header.tile.bit_length() - 1)
    if header.row is not None:
        frame.append(header.row)
    if psnr is not None:
        frame += psnr.to_bytes(2, "little")
    if mask is not None:
        frame += varints([len(mask)])
    if exact:
        chosen = np.zeros(header.tile_count, np.bool_)
        chosen[list(exact)] = True
        frame += np.packbits(chosen, bitorder="little").tobytes()
    frame += varints([len(stream) for stream in streams] + [len(exact[tile]) for tile in sorted(exact)])
    if header.version == 1:
        return sealed(frame + b"".join(streams))
    stored = [sealed(b"".join([stream, exact.get(tile, b"")])) for tile, stream in enumerate(streams)]
    return b"".join([sealed(frame), b"" if mask is None else sealed(mask), *stored])


def _check_parts(
    header: FrameHeader,
    streams: Sequence[bytes | memoryview],
    mask: bytes | memoryview | None,
    by_tile: Mapping[int, bytes | memoryview],
    psnr: int | None,
) -> None:
    if len(streams) != header.tile_count:
        raise CAEConfigurationError(
            f"cae: frame of {_described(header)} needs {header.tile_count} tile streams; got {len(streams)}"
        )
    sections = [*by_tile.values(), *([] if mask is None else [mask])]
    longest = max(map(len, [*streams, *sections]))
    if longest >= VARINT_END:
        raise CAEConfigurationError(f"cae: frame's parts must be shorter than 2^32 bytes; got {longest}")
    if header.version == 3 and header.row is None:
        raise CAEConfigurationError("cae: frame of version 3 needs the row of the weights file that coded it")
    if (sections or psnr is not None) and header.version < 3:
        raise CAEConfigurationError(
            f"cae: only frames of version 3 hold masks, exact tiles, corrections and a PSNR; got {header.version}"
        )
    if not all(map(len, sections)) or not all(0 <= tile < header.tile_count for tile in by_tile):
        raise CAEConfigurationError(
            f"cae: frame's sections must not be empty, and their tiles must be in [0, {header.tile_count}); got tiles "
            f"{sorted(by_tile)}"
        )


def unpack(frame: bytes | memoryview, expected: FrameHeader) -> tuple[FrameHeader, Sequence[memoryview]]:
    """Check a whole frame and return its header and the stream of each tile, which is enough to read latents.

    See `parse_frame`, which returns masks and exact tiles as well.
    """
    found = parse_frame(frame, expected)
    return found.header, found.streams


def parse_frame(frame: bytes | memoryview, expected: FrameHeader) -> Frame:
    """Check a whole frame, with all its checksums, and return its parts.

    Parameters
    ----------
    frame
        All bytes of the frame and nothing else; contiguous. The parts returned are views of it.
    expected
        The header that the array's chunk must have, with `Tables.frame_version` as version. Frames of version 3 are
        always accepted. `tile` and `row` may differ.

    Raises
    ------
    FrameError
        If the bytes are not a cae frame, or the frame is of a newer version, damaged, malformed, or of another shape.
    """
    view = memoryview(frame).cast("B")
    _check_magic(view)
    smallest = len(MAGIC) + 1 + CHECKSUM_BYTES
    if len(view) < smallest:
        raise FrameError(f"cae: frame needs at least {smallest} bytes; got {len(view)}: the stored chunk is truncated")
    if view[4] not in VERSIONS[1:]:
        hint = "" if view[4] in VERSIONS else f" (or written by a zarr-cae with frame version {view[4]}: upgrade)"
        check_checksum("whole", view[:-CHECKSUM_BYTES], view[-CHECKSUM_BYTES:], hint)
    index = parse_index(view, expected)
    missing = index if isinstance(index, int) else max(index.frame_bytes - len(view), 0)
    if missing:
        raise FrameError(f"cae: frame ends at least {missing} bytes too early: the stored chunk is truncated")
    assert isinstance(index, FrameIndex)
    if index.frame_bytes < len(view):
        raise FrameError(
            f"cae: frame must end after {index.frame_bytes} bytes; got {len(view)}: the stored chunk has extra bytes "
            "at its end"
        )
    parts = [index.parts(tile, view[begin:end]) for tile, (begin, end) in enumerate(pairwise(index.offsets))]
    return Frame(
        index.header,
        [one.stream for one in parts],
        None if index.mask is None else index.mask_section(view[slice(*index.mask)]),
        {tile: one.pixels for tile, one in enumerate(parts) if one.pixels is not None},
        {tile: one.correction for tile, one in enumerate(parts) if one.correction is not None},
    )


def parse_index(head: bytes | memoryview, expected: FrameHeader) -> FrameIndex | int:
    """Read the header and the lengths of all parts from the first bytes of a frame.

    The checksum is checked in versions 2 and 3, where it covers these bytes alone.

    Parameters
    ----------
    head
        The beginning of a frame, of any length.
    expected
        As for `parse_frame`.

    Returns
    -------
    FrameIndex or int
        If `head` is too short, the least number of further bytes that are needed. Repeated reads of that many
        bytes come to an end after at most 5 reads per number.

    Raises
    ------
    FrameError
        If the bytes are not the beginning of a cae frame, or the frame is of a newer version, malformed, or of another
        shape.
    """
    view = memoryview(head).cast("B")
    _check_prefix(view)
    try:
        return _parse(Reader(view), expected)
    except TooShortError as error:
        return error.missing


def _parse(reader: Reader, expected: FrameHeader) -> FrameIndex:
    reader.need(len(MAGIC) + 7)  # version, flags, three varints, the size of a tile and the length of one tile
    version, flags = reader.take(len(MAGIC) + 2, 0)[4:]
    dimensions = [reader.varint(name, 4 - n) for n, name in enumerate(("plane count", "height", "width"))]
    _check_expected(dimensions, version, bool(flags & _GREY), expected)
    (log2_tile,) = reader.take(1, 1)
    if log2_tile > MAX_LOG2_TILE:
        raise FrameError(
            f"cae: frame's log2 of the tile size must be 0 to {MAX_LOG2_TILE}; got {log2_tile}: "
            "the stored chunk is damaged"
        )
    row = reader.take(1, 1)[0] if version == 3 else None
    psnr = int.from_bytes(reader.take(2, 1), "little") if flags & _MEASURED else None
    header = FrameHeader(expected.planes, expected.height, expected.width, expected.grey, 1 << log2_tile, version, row)
    count = header.tile_count
    mask = _checked_section(reader.varint("length of the mask", count), "mask") if flags & _MASKED else 0
    exact = _exact_tiles(reader.take(-(-count // 8), count), count) if flags & _EXACT else []
    numbers = count + len(exact)
    reader.need(numbers)  # each length takes a byte, so a hostile count is refused before the loop over it
    lengths = [reader.varint(f"length of tile {tile}", numbers - tile - 1) for tile in range(count)]
    pixels = {
        tile: _checked_section(
            reader.varint(f"length of the pixels of tile {tile}", len(exact) - n - 1), f"pixel section of tile {tile}"
        )
        for n, tile in enumerate(exact)
    }
    if version == 1:
        return FrameIndex(header, tuple(accumulate(lengths, initial=reader.at)))
    end = reader.at
    check_checksum("index's", reader.view[:end], reader.take(CHECKSUM_BYTES, 0))
    first = reader.at + mask + CHECKSUM_BYTES if mask else reader.at
    stored = [length + pixels.get(tile, 0) + CHECKSUM_BYTES for tile, length in enumerate(lengths)]
    place = (reader.at, first) if mask else None
    corrected = bool(flags & _CORRECTED)
    return FrameIndex(header, tuple(accumulate(stored, initial=first)), place, pixels, psnr, corrected)


def _exact_tiles(stored: memoryview, count: int) -> list[int]:
    """Return the numbers of the exact tiles from one bit per tile."""
    bits = np.unpackbits(np.frombuffer(stored, np.uint8), bitorder="little")
    if bits[count:].any() or not bits.any():
        raise FrameError(
            f"cae: frame's bits of exact tiles must name at least one of {count} tiles and no other: "
            "the stored chunk is damaged"
        )
    numbers: list[int] = np.flatnonzero(bits).tolist()
    return numbers


def _checked_section(length: int, name: str) -> int:
    if length == 0:
        raise FrameError(f"cae: frame's {name} must have at least one byte; got 0: the stored chunk is damaged")
    return length


def _check_magic(view: memoryview) -> None:
    if len(view) == 0 or view[: len(MAGIC)] != MAGIC[: len(view)]:
        raise FrameError(
            f"cae: frame must begin with {MAGIC!r}; got {bytes(view[: len(MAGIC)])!r}: not a cae frame; "
            "was the chunk written with other codecs?"
        )


def _check_prefix(view: memoryview) -> None:
    _check_magic(view)
    if len(view) > 4 and view[4] not in VERSIONS:
        advice = "upgrade zarr-cae to read this array" if view[4] > max(VERSIONS) else "the stored chunk is damaged"
        raise FrameError(f"cae: frame's version must be one of {VERSIONS}; got {view[4]}: {advice}")
    if len(view) > 5 and view[5] & ~_FLAGS[view[4]]:
        raise FrameError(
            f"cae: frame's flags must be 0 to {_FLAGS[view[4]]} in version {view[4]}; got {view[5]}: "
            "the stored chunk is damaged"
        )


def _check_expected(dimensions: list[int], version: int, grey: bool, expected: FrameHeader) -> None:
    if (*dimensions, grey) == (expected.planes, expected.height, expected.width, expected.grey):
        if version in (3, expected.version):
            return
        allowed = " or ".join(map(str, sorted({expected.version, 3})))
        raise FrameError(
            f"cae: frame's version must be {allowed}, which the weights of the array call for; got {version}: "
            "it was written with other weights"
        )
    planes, height, width = dimensions
    raise FrameError(
        f"cae: frame must hold {_described(expected)}; got {planes} {'grey' if grey else 'RGB'} planes of "
        f"{height} x {width}: it is of another array or chunk shape"
    )


def _described(header: FrameHeader) -> str:
    return f"{header.planes} {'grey' if header.grey else 'RGB'} planes of {header.height} x {header.width}"
