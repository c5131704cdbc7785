"""Mutants for `attack.py`: good frames of every version, and copies of them that are damaged by a random generator."""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

import crc32c
import numpy as np

PIXELS = np.dtype("<u2")
"""The data type of exact tiles in `frames`."""


def mutated(random: np.random.Generator, content: bytes) -> bytes:
    """Return the bytes with damage at one to four places: flipped, cut off, inserted, doubled or overwritten."""
    result = bytearray(content)
    for _ in range(random.integers(1, 5)):
        place = int(random.integers(0, len(result) + 1))
        size = int(random.integers(1, 9))
        match random.integers(0, 7):
            case 0 | 1:
                if place < len(result):
                    result[place] ^= 1 << int(random.integers(0, 8))
            case 2:
                result[place : place + size] = random.bytes(size)
            case 3:
                result[place : place + size] = bytes([random.choice([0, 0x7F, 0x80, 0xFF])]) * size
            case 4:
                del result[place : place + size]
            case 5:
                result[place:place] = random.bytes(size)
            case 6:
                if random.random() < 0.3:
                    del result[place:]
                else:
                    result[place:place] = result[place : place + 4 * size]
    return bytes(result)


@cache
def frames() -> list[tuple[Any, Any, bytes]]:
    """Return header, tables and bytes of good frames of every version and kind."""
    from dataclasses import replace

    from zarr_cae.coder import tiles
    from zarr_cae.coder.frame import FrameHeader, pack
    from zarr_cae.coder.lossless import encode_mask, encode_pixels
    from zarr_cae.weights import registry
    from zarr_cae.weights.file import DEFAULT_MODEL

    random, made = np.random.default_rng(0), []
    for quality, metric in ((1, "mse"), (8, "mse"), (4, "ms-ssim")):
        digest = registry.default_digest(DEFAULT_MODEL, quality, metric)
        info = registry.find(digest, model=DEFAULT_MODEL, quality=quality, metric=metric)
        weights = registry.load(info.path)
        tables = first_channels(weights.tables[weights.row(quality)], 8)
        for planes, height, width, grey, tile in ((1, 40, 56, False, 2), (2, 17, 30, True, 32), (1, 96, 96, False, 4)):
            for spread in (0, 1, 40):
                for some in (tables, without_contexts(tables)):
                    header = FrameHeader(planes, height, width, grey, tile, some.frame_version)
                    shape = (planes, some.channels, *header.latent_shape)
                    symbols = np.rint(random.standard_cauchy(shape) * spread).clip(-32768, 32767).astype(np.int16)
                    made.append((header, some, tiles.encode(symbols, header, some)))
                third = replace(header, version=3, row=0)
                mask = np.zeros((planes, third.components, height, width), np.bool_)
                mask[..., : random.integers(1, height), random.integers(0, width) :] = True
                mask ^= random.random(mask.shape) < (0, 0.01, 0.4)[random.integers(0, 3)]
                exact = {
                    one.number: encode_pixels(random.integers(0, 300, pixel_shape(third, one)).astype(PIXELS))
                    for one in tiles.tiles(third)[::2]
                }
                streams = tiles.encode_streams(symbols, third, tables)
                made.append((third, tables, pack(third, streams, mask=encode_mask(mask), exact=exact, psnr=4000)))
                made.append((third, tables, pack(third, streams, corrections=corrections(random, third))))
                parts = {"mask": encode_mask(mask), "exact": exact, "corrections": corrections(random, third)}
                made.append((third, tables, pack(third, streams, **parts)))
    return made


def corrections(random: np.random.Generator, header: Any) -> dict[int, bytes]:
    """Return correction sections of the first tile and of most others, of all forms and with numbers of all sizes."""
    from zarr_cae.coder import tiles
    from zarr_cae.coder.correction import SCALES, Correction, encode_correction

    made = {}
    for tile in tiles.tiles(header):
        largest = 10 ** random.uniform(0, 4.5)
        numbers = random.uniform(-largest, largest, (header.components, 11 + header.components)).astype(np.int64)
        where = random.random(tile.patch.shape) < 0.7 if random.random() < 0.5 else None
        if tile.number == 0 or (random.random() < 0.7 and (where is None or where.any())):
            some = None if where is None or not where.any() else where
            scale = SCALES[random.integers(0, 2)]
            made[tile.number] = encode_correction(Correction(scale, int(random.integers(1, 256)), numbers, some))
    return made


def pixel_shape(header: Any, tile: Any) -> tuple[int, int, int]:
    """Return components, rows and columns of the pixels of a tile."""
    rows, columns = tile.patch.scaled(16)
    return (
        header.components,
        min(rows.stop, header.height) - rows.start,
        min(columns.stop, header.width) - columns.start,
    )


def without_contexts(tables: Any) -> Any:
    """Return tables for frames of version 1."""
    from zarr_cae.coder.tables import Tables

    rows = tables.channels
    used = int(tables.length[:rows].sum())
    return Tables(tables.minimum[:rows], tables.length[:rows], tables.frequency[:used])


def first_channels(tables: Any, count: int) -> Any:
    """Return the tables of the first channels, so that many mutants a second can be tried."""
    from zarr_cae.coder.contexts import Contexts
    from zarr_cae.coder.tables import Tables

    rows = count * tables.classes
    old = tables.contexts
    contexts = None
    if old is not None:
        source = np.where(old.source[:count] < count, old.source[:count], -1)
        contexts = Contexts(
            source, *(getattr(old, name)[:count] for name in ("weight", "threshold", "predicted", "zero"))
        )
    used = int(tables.length[:rows].sum())
    return Tables(tables.minimum[:rows], tables.length[:rows], tables.frequency[:used], contexts)


def with_checksum(content: bytes) -> bytes:
    """Return the bytes with their CRC32C behind them."""
    return content + crc32c.crc32c(content).to_bytes(4, "little")


def mutant_frame(random: np.random.Generator) -> tuple[Any, Any, bytes]:
    """Return header, tables and bytes of a damaged frame."""
    header, tables, frame = frames()[random.integers(0, len(frames()))]
    kind = random.integers(0, 10)
    if kind < 6:
        return header, tables, damaged(random, frame, header)
    if kind < 8:
        return header, tables, with_damaged_head(random, frame, header)
    if kind == 8:  # parts of another frame
        _, _, other = frames()[random.integers(0, len(frames()))]
        return header, tables, damaged(random, frame, header, other)
    return header, tables, mutated(random, frame)


def damaged(random: np.random.Generator, frame: bytes, header: Any, other: bytes | None = None) -> bytes:
    """Return a frame with damage in a stream or section, or with the streams and sections of another frame."""
    from dataclasses import replace

    from zarr_cae.coder.frame import pack, parse_frame

    parsed = parse_frame(frame, header)
    streams = [bytes(stream) for stream in parsed.streams]
    exact = {tile: bytes(section) for tile, section in parsed.exact.items()}
    mask = None if parsed.mask is None else bytes(parsed.mask)
    sections = {tile: bytes(section) for tile, section in parsed.corrections.items()}
    if other is not None:
        return with_parts_of(other, header, parsed)
    if sections and random.random() < 0.6:
        for _ in range(random.integers(1, 3)):
            tile = random.choice(list(sections))
            sections[tile] = mutated(random, sections[tile]) or b"\0"
        if random.random() < 0.2:
            return with_damaged_length(random, frame, header)
        return pack(parsed.header, streams, mask=mask, exact=exact, corrections=sections)
    part = random.integers(0, 3)
    if part == 0 and mask is not None:
        mask = damaged_section(random, mask, 1 if mask[0] == 1 else 0)
    elif part == 1 and exact:
        tile = random.choice(list(exact))
        exact[tile] = damaged_section(random, exact[tile], 1)
    else:
        for _ in range(random.integers(1, 3)):
            number = int(random.integers(0, len(streams)))
            streams[number] = mutated(random, streams[number])
        if random.random() < 0.1:
            streams = [streams[number] for number in random.permutation(len(streams))]
    row = None if parsed.header.row is None or random.random() < 0.9 else int(random.integers(0, 256))
    damaged_row = replace(parsed.header, row=parsed.header.row if row is None else row)
    return pack(damaged_row, streams, mask=mask, exact=exact, corrections=sections)


def with_parts_of(other: bytes, header: Any, parsed: Any) -> bytes:
    """Return a parsed frame with the streams and sections of another one."""
    from zarr_cae.coder.frame import pack, parse_frame

    source = parse_frame(other, own_header(other))
    streams = [bytes(source.streams[n % len(source.streams)]) for n in range(header.tile_count)]
    mask, exact, sections = parsed.mask, parsed.exact, parsed.corrections
    if header.version == 3 and source.mask is not None:
        mask, pixels = source.mask, list(source.exact.values())
        exact = {tile: pixels[n % len(pixels)] for n, tile in enumerate(exact)} if pixels else exact
    if header.version == 3 and source.corrections:
        found = list(source.corrections.values())
        sections = {tile: found[tile % len(found)] for tile in range(header.tile_count)}
    return pack(parsed.header, streams, mask=mask, exact=exact, corrections=sections)


def damaged_section(random: np.random.Generator, section: bytes, begin: int) -> bytes:
    """Return a section with damage to its bytes, or to what its zlib stream holds."""
    if random.random() < 0.3:
        return mutated(random, section) or b"\0"
    return section[:begin] + zlib.compress(mutated(random, zlib.decompress(section[begin:])))


def with_damaged_length(random: np.random.Generator, frame: bytes, header: Any) -> bytes:
    """Return a frame with damage in the first bytes of a tile, which hold the length of its correction."""
    from zarr_cae.coder.frame import FrameIndex, parse_index

    index = parse_index(frame, header)
    assert isinstance(index, FrameIndex)
    tile = int(random.integers(0, header.tile_count))
    begin, end = index.offsets[tile], index.offsets[tile + 1]
    content = bytearray(frame[begin : end - 4])
    size = int(random.integers(1, 7))
    content[:size] = random.bytes(len(content[:size]))
    return frame[:begin] + with_checksum(bytes(content)) + frame[end:]


def own_header(frame: bytes) -> Any:
    """Return the header of a good frame, but for its tile size and row."""
    from zarr_cae.coder.fields import Reader
    from zarr_cae.coder.frame import FrameHeader

    reader = Reader(memoryview(frame)[6:])
    planes, height, width = (reader.varint("size", 0) for _ in range(3))
    return FrameHeader(planes, height, width, grey=bool(frame[5] & 1), version=frame[4])


def with_damaged_head(random: np.random.Generator, frame: bytes, header: Any) -> bytes:
    """Return a frame whose head is damaged but whose checksums match."""
    from zarr_cae.coder.frame import FrameIndex, parse_index

    index = parse_index(frame, header)
    assert isinstance(index, FrameIndex)
    body = (index.mask or index.offsets)[0]
    if header.version == 1:
        return with_checksum(mutated(random, frame[:body]) + frame[body:-4])
    return with_checksum(mutated(random, frame[: body - 4])) + frame[body:]
