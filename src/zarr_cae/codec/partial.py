"""Read and write a part of a chunk.

Reading fetches, decodes and synthesises only the tiles under the selection and its surroundings. Frames of version 2
have a CRC32C for each tile; frames of version 1 have only one for all: see `read_selection`.

Writing replaces only latents that the written pixels reach. All other latents keep their symbols, and tiles without a
changed symbol keep their bytes. So the rest of a chunk does not change, however often parts of it are written. Pixels
beside the written ones are coded again, and lose quality each time: `codec.wear` warns of that, and `codec.buffered`
collects parts until a chunk is complete. Exact tiles stay exact, the mask follows the written pixels, and latent
positions under them are no longer corrected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from zarr_cae.codec.chunk import ChunkCoder, decode_chunk, encode_chunk, is_all_fill, on_host
from zarr_cae.codec.correct import stored_areas, without
from zarr_cae.codec.exact import (
    Parts,
    box_pixels,
    mask_section,
    restore,
    stored_mask,
    tile_pixels,
    tile_samples,
    whole_pixels,
)
from zarr_cae.codec.floor import calmed, is_unusual, poor_tiles
from zarr_cae.codec.plan import Fetch, Plan, Put
from zarr_cae.codec.wear import note_recoded, wears
from zarr_cae.codec.windows import Box, assembled, enclosing, runs
from zarr_cae.coder.frame import FrameIndex, Symbols, pack, parse_frame, parse_index
from zarr_cae.coder.lossless import encode_pixels
from zarr_cae.coder.tiles import Patch, Tile, decode_streams, decode_tile, encode_streams, encode_tile, tiles
from zarr_cae.errors import FrameError
from zarr_cae.networks.pieces import HALO
from zarr_cae.pixels.layout import Mask, Pixels, Planes
from zarr_cae.pixels.mask import find_mask
from zarr_cae.threads import over_cores

_FIXED_BYTES = 20
_LENGTH_BYTES = 3
"""Bytes of the first request, for the header and for the length of each tile: fewer than the smallest frame has."""
_MOST_AT_FIRST = 1 << 20
"""Most bytes of that request. Metadata may lie about the number of tiles, and a store may make room for the answer."""
_SLACK = 0.1
"""Largest root mean square difference, in grey levels, of pixels that count as read from the chunk and unchanged."""


def read_selection(coder: ChunkCoder, selection: Any, *, ranges: bool) -> Plan[Any]:
    """Return the selected pixels of a chunk: within one grey level, those of the decoded whole chunk.

    Parameters
    ----------
    coder
        Codes the chunks of the array.
    selection
        A NumPy selection of the chunk's pixels.
    ranges
        Whether fetching parts of the frame is cheaper than fetching all of it. All of it is fetched, too, if the
        selection needs more than half of the tiles. Otherwise each part is checked by itself: the header against the
        array, the lengths against the bytes that came, in version 2 each part against its CRC32C, and each stream by
        its decoder, whose lanes must end in the state in which the encoder started, and at the last word.

    Returns
    -------
    array
        A NumPy array, or a tensor as from `decode_chunk` if the selection is the whole chunk.

    Raises
    ------
    FrameError, StreamError
        If the frame or a stream is malformed.
    MissingChunkError
        If the chunk is not stored.
    """
    geometry = coder.geometry
    frame = None
    if not ranges or geometry.tile_count == 1:
        (frame,) = yield Fetch()  # at once: most missing chunks of an array cost no more than this
    box = enclosing(selection, coder.layout)
    patch = box.patch.widened(HALO, geometry.latent_shape)
    if frame is None and 2 * len(tiles(geometry, box.planes, patch)) > geometry.tile_count:
        (frame,) = yield Fetch()
    if frame is not None and box.complete:
        return (yield from decode_chunk(coder, frame))
    parts = (yield from _fetch_parts(coder, box, patch)) if frame is None else _unpack(frame, coder)
    coder = coder.of_frame(parts.header)
    decoded = _decode(tiles(parts.header, box.planes, patch), parts, coder)
    areas = stored_areas(coder, parts.header, parts.corrections, box.planes, patch)
    synthesised = yield coder.synthesise(assembled(decoded, len(box.planes), patch), areas)
    return restore(coder, coder.to_pixels(box.cut(synthesised, patch), box.layout), box, parts)[box.inside]


def _fetch_parts(coder: ChunkCoder, box: Box, patch: Patch) -> Plan[Parts]:
    """Fetch the index of the frame, and then its mask and the tiles that hold a patch of the box's planes."""
    index = yield from _fetch_index(coder)
    if isinstance(index, memoryview):  # the store answered with the whole frame
        return _unpack(index, coder)
    return (yield from _fetch_tiles(coder, index, [tile.number for tile in tiles(index.header, box.planes, patch)]))


def _fetch_index(coder: ChunkCoder) -> Plan[FrameIndex | memoryview]:
    """Fetch the index of a frame with as few bytes as possible; return the whole frame if the store sends that."""
    head, more = b"", min(_FIXED_BYTES + _LENGTH_BYTES * coder.geometry.tile_count, _MOST_AT_FIRST)
    while True:
        (part,) = yield Fetch([(len(head), len(head) + more)])
        if len(part) > more:
            return _whole(part, len(head) + more)
        head += part
        index = parse_index(head, coder.header)
        if not isinstance(index, int):
            return index
        if len(part) < more:
            raise FrameError(f"cae: frame ends at least {index} bytes too early: the stored chunk is truncated")
        more = max(index, len(head))  # another tile size than ours: few requests matter more than bytes


def _fetch_tiles(coder: ChunkCoder, index: FrameIndex, numbers: Sequence[int]) -> Plan[Parts]:
    """Fetch some tiles, neighbours in one request, and the mask if there is one."""
    spans = list(runs(numbers))
    ranges = [(index.offsets[first], index.offsets[last + 1]) for first, last in spans]
    asked = ranges if index.mask is None else [index.mask, *ranges]
    fetched = list((yield Fetch(asked)))
    for (begin, end), part in zip(asked, fetched, strict=True):
        if len(part) > end - begin:
            return _unpack(_whole(part, end), coder)
        if len(part) < end - begin:
            raise FrameError(
                f"cae: frame needs bytes {begin} to {end} for its tiles; got {len(part)}: the stored chunk is truncated"
            )
    mask = None if index.mask is None else index.mask_section(fetched.pop(0))
    streams: dict[int, memoryview] = {}
    exact: dict[int, memoryview] = {}
    corrections: dict[int, memoryview] = {}
    for (first, last), (begin, _), part in zip(spans, ranges, fetched, strict=True):
        for number in range(first, last + 1):
            stored = part[index.offsets[number] - begin : index.offsets[number + 1] - begin]
            tile = index.parts(number, stored)
            streams[number] = tile.stream
            if tile.pixels is not None:
                exact[number] = tile.pixels
            if tile.correction is not None:
                corrections[number] = tile.correction
    return Parts(index.header, streams, mask, exact, corrections)


def _whole(part: memoryview, end: int) -> memoryview:
    """Return an answer that is longer than the request, if it is a whole frame: some servers ignore byte ranges."""
    if bytes(part[:4]) != b"ZCAE":
        raise FrameError(
            f"cae: the store answered a request for bytes up to {end} of the chunk with {len(part)} other bytes; "
            "expected the range or the whole chunk: does the server honour byte ranges?"
        )
    return part


def _unpack(frame: memoryview, coder: ChunkCoder) -> Parts:
    return Parts.of(parse_frame(frame, coder.header))


def _decode(wanted: Sequence[Tile], parts: Parts, coder: ChunkCoder) -> list[tuple[Tile, Symbols]]:
    tables, version = coder.tables, parts.header.version
    return over_cores(
        lambda tile: (tile, decode_tile(parts.streams[tile.number], tile.patch.shape, tables, version)), wanted
    )


def write_selection(coder: ChunkCoder, selection: Any, value: Any) -> Plan[None]:
    """Write `value` to a selection of a chunk's pixels, and leave the rest as it is.

    Parameters
    ----------
    coder
        Codes the chunks of the array.
    selection
        A NumPy selection of the chunk's pixels.
    value
        A scalar, or an array of the selection's shape with or without its axes of length 1; a NumPy array or an array
        on a GPU. The latter stays there if it is the whole chunk.

    Raises
    ------
    FrameError, StreamError
        If the stored chunk is malformed.
    CAEDataError
        If the value lies outside the value range.
    """
    box = enclosing(selection, coder.layout)
    if box.complete:
        if value.shape != coder.layout.shape:
            value = np.broadcast_to(_fitted(on_host(value, coder.spec), coder.layout.shape), coder.layout.shape)
        yield from _store(coder, value)
        return
    value = on_host(value, coder.spec)
    found = yield Fetch(optional=True)
    if found is None:
        yield from _write_to_missing(coder, selection, value)
    else:
        yield from _write_to_stored(coder, selection, value, box, found[0])


def _write_to_missing(coder: ChunkCoder, selection: Any, value: Pixels) -> Plan[None]:
    """Write to a chunk that is not stored: all its other pixels have the fill value."""
    chunk = np.full(coder.layout.shape, coder.spec.fill_value, coder.dtype)
    _put(chunk, selection, value)
    yield from _store(coder, chunk)


def _write_to_stored(coder: ChunkCoder, selection: Any, value: Pixels, box: Box, frame: memoryview) -> Plan[None]:
    """Write to a stored chunk, and change only latents that the new pixels can reach.

    Three patches lie around the latents under the selection, each wider than the one before by `HALO`: the latents
    that the new pixels can reach (`reached`), the latents under pixels that take part in these (`seen`), and the
    latents that take part in such pixels (`source`). The pixels over `seen` are decoded once, and analysed both as
    they were and with the new values. Symbols under the selection are replaced; other symbols in `reached` only if the
    two analyses differ there. So pixels nearby lose no more quality than they must, and writing back unchanged pixels
    changes nothing at all.
    """
    given, parts = coder, _unpack(frame, coder)
    header, coder = parts.header, coder.of_frame(parts.header)
    reached = box.patch.widened(HALO, header.latent_shape)
    seen = reached.widened(HALO, header.latent_shape)
    source = seen.widened(HALO, header.latent_shape)
    decoded = _decode(tiles(header, box.planes, source), parts, coder)
    symbols = assembled(decoded, len(box.planes), source)
    around = box.grown(seen)
    synthesised = yield coder.synthesise(symbols, stored_areas(coder, header, parts.corrections, box.planes, source))
    before = restore(coder, coder.to_pixels(around.cut(synthesised, source), around.layout), around, parts)
    after = before.copy()
    _put(after, around.inside, value)
    left, padding = (_padding(coder, parts, around, pixels) for pixels in (after, before))
    # This refuses values outside the range.
    planes = [coder.to_planes(after, around.layout, left), coder.to_planes(before, around.layout, padding)]
    if (
        (left is None or padding is None or np.array_equal(left, padding))
        and _alike(after, before, planes, around, coder)
        and _equal_in_exact_tiles(after, before, around, parts, coder)
    ):
        return
    if is_all_fill(after, coder.spec):
        chunk = on_host((yield from decode_chunk(given, frame)), coder.spec)
        _put(chunk, selection, value)
        if is_all_fill(chunk, coder.spec):
            yield Put(None)
            return
    count = len(box.planes)
    both = yield coder.analyse(np.concatenate(planes))
    changed = both[:count] != both[count:]
    changed[:, :, *box.patch.within(seen)] = True
    inner = (slice(None), slice(None), *reached.within(seen))
    new = np.where(changed[inner], both[:count][inner], symbols[:, :, *reached.within(source)])
    touched = _changed_tiles(decoded, new, reached)
    streams = [parts.streams[number] for number in range(header.tile_count)]
    for number, stream in over_cores(
        lambda one: (one[0].number, encode_tile(one[1], coder.tables, header.version)), touched
    ):
        streams[number] = stream
    mask, exact = _new_mask(coder, parts, around, after), _new_exact(coder, parts, around, after)
    corrections = without(coder, header, parts.corrections, box.planes, box.patch)
    unsure = any(is_unusual(own[None, :, *reached.within(tile.patch)], coder) for tile, own in touched)
    if unsure or coder.min_psnr is not None or (mask is not None and header.version < 3):
        chunk = on_host((yield from decode_chunk(given, frame)), coder.spec)
        _put(chunk, selection, value)
        all_symbols = decode_streams(header, streams, coder.tables)
        areas = stored_areas(coder, header, corrections)
        now = whole_pixels(coder, (yield coder.synthesise(all_symbols, areas)), mask)
        exact = {**poor_tiles(coder, header, chunk, now, mask, tiles(header, box.planes, seen)), **exact}
        if (exact or mask is not None) and header.version < 3:
            header = replace(header, version=3, row=coder.row)
        calm = yield from calmed(coder, header, chunk, all_symbols, exact)
        if calm is not all_symbols or header.version > parts.header.version:
            streams = list(encode_streams(calm, header, coder.tables))
    kept = {number: section for number, section in corrections.items() if number not in exact}
    packed = pack(header, streams, mask=mask_section(coder, mask), exact=exact, corrections=kept)
    if any(tile.number not in exact for tile, _ in touched) and wears(coder, around, before):
        note_recoded(coder, frame, packed)
    yield Put(coder.to_buffer(packed))


def _new_mask(coder: ChunkCoder, parts: Parts, box: Box, pixels: Pixels) -> Mask | None:
    """Return the mask of the chunk with new pixels in a box; None if nothing is masked."""
    inside = box_pixels(box)
    holes = _padding(coder, parts, box, pixels) if coder.nodata is None else find_mask(pixels, coder.nodata)
    if holes is None:
        return None
    mask = stored_mask(coder, parts).copy()
    mask[box.samples, inside.rows, inside.columns] = coder.to_samples(holes, box.layout)
    return mask if mask.any() else None


def _padding(coder: ChunkCoder, parts: Parts, box: Box, pixels: Pixels) -> Mask | None:
    """Return where pixels of a box are padding that the frame stores as a mask; None if it stores none."""
    if coder.nodata is not None or parts.mask is None:
        return None
    inside = box_pixels(box)
    stored = coder.from_samples(stored_mask(coder, parts)[box.samples, inside.rows, inside.columns], box.layout)
    return stored & find_mask(pixels, coder.spec.fill_value)


def _new_exact(coder: ChunkCoder, parts: Parts, box: Box, pixels: Pixels) -> dict[int, bytes | memoryview]:
    """Return the pixel sections of the exact tiles of the chunk with new pixels in a box."""
    exact: dict[int, bytes | memoryview] = dict(parts.exact)
    if not exact:
        return exact
    samples, inside = coder.to_samples(pixels, box.layout), box_pixels(box)
    for tile in tiles(parts.header, box.planes, box.patch):
        if tile.number in exact:
            own, values = tile_pixels(parts.header, tile), tile_samples(coder, parts, tile)
            values[:, *inside.within(own)] = samples[box.layout.samples_of(tile.plane), *own.within(inside)]
            exact[tile.number] = encode_pixels(values)
    return exact


def _equal_in_exact_tiles(after: Pixels, before: Pixels, box: Box, parts: Parts, coder: ChunkCoder) -> bool:
    """Return whether the pixels of a box are equal in its exact tiles, where every difference counts."""
    if not parts.exact:
        return True
    new, old, inside = coder.to_samples(after, box.layout), coder.to_samples(before, box.layout), box_pixels(box)
    places = (
        (box.layout.samples_of(tile.plane), *tile_pixels(parts.header, tile).within(inside))
        for tile in tiles(parts.header, box.planes, box.patch)
        if tile.number in parts.exact
    )
    return all(np.array_equal(new[place], old[place], equal_nan=True) for place in places)


def _alike(after: Pixels, before: Pixels, planes: Sequence[Planes], box: Box, coder: ChunkCoder) -> bool:
    """Return whether pixels of a box differ no more than two decodings of the same latents do.

    Then they may have been read here. Sums of bfloat16 depend a little on the shape of the planes that are decoded
    together. Up to one pixel in a thousand is rounded to the other side, or, in floats, most pixels differ by some
    hundredths of a grey level. With a value transform, levels are those of the planes, which are given in the order of
    the pixels: in the dark, a difference between photon counts is small in units of the data, but not there.
    """
    written = after[box.inside].size
    if coder.nodata is not None:
        mask = find_mask(after, coder.nodata)
        if not np.array_equal(mask, find_mask(before, coder.nodata)):
            return False
        after, before = (np.where(mask, coder.dtype.type(coder.value_range[0]), one) for one in (after, before))
    low, high = coder.value_range  # integers if the dtype is one
    if coder.transform is not None:
        inside = (..., slice(box.layout.height), slice(box.layout.width))
        levels = 255 * np.abs(planes[0][inside].astype(np.float64) - planes[1][inside])
    elif after.dtype.kind == "f":
        levels = 255 / float(high - low) * np.abs(after.astype(np.float64) - before)
    else:  # in integers: a float64 can't tell large ones apart
        larger, smaller = np.maximum(after, before), np.minimum(after, before)
        unsigned = np.dtype(f"u{after.dtype.itemsize}")
        levels = 255 / float(high - low) * (larger.view(unsigned) - smaller.view(unsigned)).astype(np.float64)
    return bool(levels.max() <= 1) and float(np.square(levels).sum()) <= _SLACK**2 * written


def _changed_tiles(decoded: Sequence[tuple[Tile, Symbols]], new: Symbols, reached: Patch) -> list[tuple[Tile, Symbols]]:
    """Return the tiles in which a patch of new symbols (N, M, h, w) differs from the old ones, with all their symbols.

    The symbols of `decoded` become the new ones.
    """
    touched: list[tuple[Tile, Symbols]] = []
    for tile, own in decoded:
        here, there = tile.patch.within(reached), reached.within(tile.patch)
        if tile.patch.meets(reached) and not np.array_equal(own[:, *there], new[tile.plane, :, *here]):
            own[:, *there] = new[tile.plane, :, *here]
            touched.append((tile, own))
    return touched


def _store(coder: ChunkCoder, chunk: Any) -> Plan[None]:
    """Store a whole chunk, or delete it if zarr would not keep it."""
    frame = None if is_all_fill(chunk, coder.spec) else (yield from encode_chunk(coder, chunk))
    yield Put(frame)


def _fitted(value: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Return the value in this shape if it has as many elements: zarr drops axes that an integer selects from."""
    return value.reshape(shape) if value.ndim and value.shape != shape and value.size == math.prod(shape) else value


def _put(pixels: Pixels, selection: Any, value: Pixels) -> None:
    pixels[selection] = _fitted(value, pixels[selection].shape)
