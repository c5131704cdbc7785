"""Read and write a part of a chunk.

Reading fetches, decodes and synthesises only the tiles under the selection and its surroundings. Frames of version 2
have a CRC32C for each tile; frames of version 1 have only one for all: see `read_selection`.

Writing replaces only latents that the written pixels reach. All other latents keep their symbols, and tiles without a
changed symbol keep their bytes. So the rest of a chunk does not change, however often parts of it are written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from zarr_cae.codec.chunk import ChunkCoder, decode_chunk, encode_chunk, on_host
from zarr_cae.codec.plan import Fetch, Plan, Put
from zarr_cae.codec.windows import Box, assembled, enclosing, runs
from zarr_cae.coder.frame import FrameHeader, FrameIndex, Symbols, pack, parse_index, unpack
from zarr_cae.coder.tiles import Patch, Tile, decode_tile, encode_tile, tiles
from zarr_cae.errors import FrameError
from zarr_cae.networks.pieces import HALO
from zarr_cae.threads import over_cores

Pixels: TypeAlias = npt.NDArray[Any]
Streams: TypeAlias = dict[int, memoryview]
_FIXED_BYTES = 20
_LENGTH_BYTES = 3
"""Bytes of the first request, for the header and for the length of each tile: fewer than the smallest frame has."""
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
    if frame is None:
        wanted, streams = yield from _fetch_tiles(coder, box, patch)
    else:
        header, streams = _unpack(frame, coder)
        wanted = tiles(header, box.planes, patch)
    symbols = assembled(_decode(wanted, streams, coder), len(box.planes), patch)
    synthesised = yield coder.synthesise(symbols)
    return coder.to_pixels(box.cut(synthesised, patch), box.layout)[box.inside]


def _fetch_tiles(coder: ChunkCoder, box: Box, patch: Patch) -> Plan[tuple[list[Tile], Streams]]:
    """Fetch the index of the frame and then the tiles that hold a patch of the box's planes."""
    index = yield from _fetch_index(coder)
    if isinstance(index, memoryview):  # the store answered with the whole frame
        header, streams = _unpack(index, coder)
        return tiles(header, box.planes, patch), streams
    wanted = tiles(index.header, box.planes, patch)
    streams = yield from _fetch_streams(coder, index, [tile.number for tile in wanted])
    return wanted, streams


def _fetch_index(coder: ChunkCoder) -> Plan[FrameIndex | memoryview]:
    """Fetch the index of a frame with as few bytes as possible; return the whole frame if the store sends that."""
    head, more = b"", _FIXED_BYTES + _LENGTH_BYTES * coder.geometry.tile_count
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


def _fetch_streams(coder: ChunkCoder, index: FrameIndex, numbers: Sequence[int]) -> Plan[Streams]:
    """Fetch the streams of some tiles, neighbours in one request."""
    spans = list(runs(numbers))
    ranges = [(index.offsets[first], index.offsets[last + 1]) for first, last in spans]
    parts = yield Fetch(ranges)
    streams = {}
    for (first, last), (begin, end), part in zip(spans, ranges, parts, strict=True):
        if len(part) > end - begin:
            return _unpack(_whole(part, end), coder)[1]
        if len(part) < end - begin:
            raise FrameError(
                f"cae: frame needs bytes {begin} to {end} for its tiles; got {len(part)}: the stored chunk is truncated"
            )
        for number in range(first, last + 1):
            stored = part[index.offsets[number] - begin : index.offsets[number + 1] - begin]
            streams[number] = index.stream(number, stored)
    return streams


def _whole(part: memoryview, end: int) -> memoryview:
    """Return an answer that is longer than the request, if it is a whole frame: some servers ignore byte ranges."""
    if bytes(part[:4]) != b"ZCAE":
        raise FrameError(
            f"cae: the store answered a request for bytes up to {end} of the chunk with {len(part)} other bytes; "
            "expected the range or the whole chunk: does the server honour byte ranges?"
        )
    return part


def _unpack(frame: memoryview, coder: ChunkCoder) -> tuple[FrameHeader, Streams]:
    header, streams = unpack(frame, coder.header)
    return header, dict(enumerate(streams))


def _decode(wanted: Sequence[Tile], streams: Streams, coder: ChunkCoder) -> list[tuple[Tile, Symbols]]:
    tables = coder.tables
    return over_cores(lambda tile: (tile, decode_tile(streams[tile.number], tile.patch.shape, tables)), wanted)


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
    header, streams = _unpack(frame, coder)
    reached = box.patch.widened(HALO, header.latent_shape)
    seen = reached.widened(HALO, header.latent_shape)
    source = seen.widened(HALO, header.latent_shape)
    decoded = _decode(tiles(header, box.planes, source), streams, coder)
    symbols = assembled(decoded, len(box.planes), source)
    around = box.grown(seen)
    before = coder.to_pixels(around.cut((yield coder.synthesise(symbols)), source), around.layout)
    after = before.copy()
    _put(after, around.inside, value)
    planes = [coder.to_planes(pixels, around.layout) for pixels in (after, before)]  # refuses values outside the range
    if _alike(after, before, after[around.inside].size, coder):
        return
    if _blank(coder, after):
        chunk = on_host((yield from decode_chunk(coder, frame)), coder.spec)
        _put(chunk, selection, value)
        if _blank(coder, chunk):
            yield Put(None)
            return
    count = len(box.planes)
    both = yield coder.analyse(np.concatenate(planes))
    changed = both[:count] != both[count:]
    changed[:, :, *box.patch.within(seen)] = True
    inner = (slice(None), slice(None), *reached.within(seen))
    new = np.where(changed[inner], both[:count][inner], symbols[:, :, *reached.within(source)])
    recoded: dict[int, bytes | memoryview] = {**streams, **_recode(decoded, new, reached, coder)}
    yield Put(coder.to_buffer(pack(header, list(recoded.values()))))


def _alike(after: Pixels, before: Pixels, written: int, coder: ChunkCoder) -> bool:
    """Return whether pixels differ no more than two decodings of the same latents do: they may have been read here.

    Sums of bfloat16 depend a little on the shape of the planes that are decoded together. Up to one pixel in a
    thousand is rounded to the other side, or, in floats, most pixels differ by some hundredths of a grey level.
    """
    low, high = coder.value_range  # integers if the dtype is one
    if after.dtype.kind == "f":
        difference = np.abs(after.astype(np.float64) - before)
    else:  # in integers: a float64 can't tell large ones apart
        larger, smaller = np.maximum(after, before), np.minimum(after, before)
        unsigned = np.dtype(f"u{after.dtype.itemsize}")
        difference = (larger.view(unsigned) - smaller.view(unsigned)).astype(np.float64)
    levels = 255 / float(high - low) * difference
    return bool(levels.max() <= 1) and float(np.square(levels).sum()) <= _SLACK**2 * written


def _recode(
    decoded: Sequence[tuple[Tile, Symbols]], new: Symbols, reached: Patch, coder: ChunkCoder
) -> dict[int, bytes]:
    """Return the new streams of the tiles in which a patch of new symbols (N, M, h, w) differs from the old ones."""
    touched: list[tuple[int, Symbols]] = []
    for tile, own in decoded:
        here, there = tile.patch.within(reached), reached.within(tile.patch)
        if tile.patch.meets(reached) and not np.array_equal(own[:, *there], new[tile.plane, :, *here]):
            own[:, *there] = new[tile.plane, :, *here]
            touched.append((tile.number, own))
    tables = coder.tables
    return dict(over_cores(lambda one: (one[0], encode_tile(one[1], tables)), touched))


def _store(coder: ChunkCoder, chunk: Any) -> Plan[None]:
    """Store a whole chunk, or delete it if zarr would not keep it."""
    frame = None if _blank(coder, chunk) else (yield from encode_chunk(coder, chunk))
    yield Put(frame)


def _blank(coder: ChunkCoder, pixels: Any) -> bool:
    """Return whether zarr keeps no chunk that has only these pixels: all have the fill value."""
    return not coder.spec.config.write_empty_chunks and bool((pixels == coder.spec.fill_value).all())


def _fitted(value: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Return the value in this shape if it has as many elements: zarr drops axes that an integer selects from."""
    return value.reshape(shape) if value.ndim and value.shape != shape and value.size == math.prod(shape) else value


def _put(pixels: Pixels, selection: Any, value: Pixels) -> None:
    pixels[selection] = _fitted(value, pixels[selection].shape)
