"""Part of a chunk: plans that read a selection of its pixels, and that write one and leave the rest as it is.

Reading fetches, decodes and synthesises only the tiles under the selection and its surroundings. Frames of version 2
have a CRC32C for each tile; those of version 1 only one for all: see `reading`.

Writing replaces only latents that the written pixels reach. All others keep their symbols, and tiles without a changed
symbol their bytes, so that however often parts of a chunk are written, the rest of it stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_cae.codec.chunk import (
    Analyse,
    ChunkJob,
    Fetch,
    Put,
    Synthesise,
    SynthesiseChunk,
    decoding,
    encoding,
    on_host,
)
from zarr_cae.codec.plan import Plan
from zarr_cae.codec.windows import Patch, Tile, assembled, enclosing, everything, runs, tiles
from zarr_cae.coder import frame as framing
from zarr_cae.coder import tiles as entropy
from zarr_cae.coder.frame import FrameHeader
from zarr_cae.errors import FrameError
from zarr_cae.pixels.layout import Chunk

Pixels = npt.NDArray[Any]
Streams = dict[int, memoryview]
_FIXED_BYTES = 20
_LENGTH_BYTES = 3
"""Of the header, and of each tile's length: what is fetched at first, which is less than the smallest frame."""
_SLACK = 0.1
"""Root mean square, in grey levels, up to which a write counts as one of what is there."""


def reading(job: ChunkJob, selection: Any, *, ranges: bool) -> Plan[Any]:
    """The selected pixels of a chunk, which are those of the whole chunk's decoding within a grey level.

    An array, or a tensor of the device as from `decoding` if the selection is the whole chunk.

    Parameters
    ----------
    job
        For the chunk.
    selection
        Of the chunk's pixels, as numpy takes it.
    ranges
        Whether fetching parts of the frame is cheaper than fetching it whole. It is fetched whole also where the
        selection needs more than half of its tiles. Otherwise each part is checked by itself: the header against the
        array, the lengths against the bytes that came, in version 2 each part's CRC32C, and each stream by its decoder,
        whose lanes must end in the state in which the encoder started and at the last word.

    Raises
    ------
    FrameError, StreamError
        For anything malformed.
    MissingChunkError
        If there is no chunk.
    """
    expected = job.outline  # the weights, which a missing chunk doesn't need, come after the first bytes
    frame = None
    if not ranges or expected.tile_count == 1:
        (frame,) = yield Fetch(None)  # at once: most missing chunks of an array cost no more than this
    box = enclosing(selection, job.layout) or everything(selection, job.layout)
    planes = box.planes
    patch = box.patch.widened(expected)
    if frame is None and 2 * len(tiles(expected, planes, patch)) > expected.tile_count:
        (frame,) = yield Fetch(None)
    if frame is None:
        index = yield from _index(job)
        wanted = tiles(index.header, planes, patch)
        streams = yield from _streams(index, [tile.number for tile in wanted])
    else:
        header, streams = _unpacked(frame, job.header)
        wanted = tiles(header, planes, patch)
    symbols = assembled(_decoded(wanted, streams, job), len(planes), patch)
    if box.complete and job.engine.takes(job.form):
        return (yield SynthesiseChunk(job, symbols))
    _ = job.engine  # on this thread, not on the event loop's
    synthesised = yield Synthesise(job, symbols)
    pixels: Chunk = job.pixels(box.cut(synthesised, patch), box.layout)[box.inside]
    return pixels


def _index(job: ChunkJob) -> Plan[framing.FrameIndex]:
    """The index of a frame, from as few bytes of its beginning as it takes."""
    head, more = b"", _FIXED_BYTES + _LENGTH_BYTES * job.outline.tile_count
    while True:
        (part,) = yield Fetch([(len(head), len(head) + more)])
        head += part
        index = framing.parse_index(head, job.header)
        if not isinstance(index, int):
            return index
        if len(part) < more:
            raise FrameError(f"cae: frame ends at least {index} bytes too early: the stored chunk is truncated")
        more = max(index, len(head))  # another tile size than ours: few requests matter more than bytes


def _streams(index: framing.FrameIndex, numbers: Sequence[int]) -> Plan[Streams]:
    """The streams of some tiles, neighbours fetched together."""
    spans = list(runs(numbers))
    ranges = [(index.offsets[first], index.offsets[last + 1]) for first, last in spans]
    parts = yield Fetch(ranges)
    streams = {}
    for (first, last), (begin, end), part in zip(spans, ranges, parts, strict=True):
        if len(part) != end - begin:
            raise FrameError(
                f"cae: frame needs bytes {begin} to {end} for its tiles; got {len(part)}: the stored chunk is truncated"
            )
        for number in range(first, last + 1):
            stored = part[index.offsets[number] - begin : index.offsets[number + 1] - begin]
            streams[number] = index.stream(number, stored)
    return streams


def _unpacked(frame: memoryview, expected: FrameHeader) -> tuple[FrameHeader, Streams]:
    header, streams = framing.unpack(frame, expected)
    return header, dict(enumerate(streams))


def _decoded(wanted: Sequence[Tile], streams: Streams, job: ChunkJob) -> list[tuple[Tile, entropy.Symbols]]:
    def decode(tile: Tile) -> tuple[Tile, entropy.Symbols]:
        return tile, entropy.decode_tile(streams[tile.number], *tile.patch.shape, job.tables)

    return list(entropy.over_cores(decode, wanted))


def writing(job: ChunkJob, selection: Any, value: Any) -> Plan[None]:
    """Write `value` to a selection of a chunk's pixels, and let the rest be.

    Three patches lie around the latents under the selection, each wider by `HALO`: those that the new pixels can
    reach, those whose pixels take part in these, and those that take part in such pixels. The pixels are decoded once
    as they were, and analysed as they were and as they shall be. Symbols under the selection are replaced; those
    around it only if the two analyses differ there. So what is merely near wears no more than it must, and writing
    back what was read changes nothing at all.

    Parameters
    ----------
    job
        For the chunk.
    selection
        Of the chunk's pixels, as numpy takes it.
    value
        What to write: of the selection's shape, with or without its axes of length 1, or a scalar. An array of numpy
        or of the device; the latter stays there if it is the whole chunk.

    Raises
    ------
    FrameError, StreamError
        If the chunk that is there is malformed.
    CAEDataError
        If the value lies outside the value range.
    """
    box = enclosing(selection, job.layout)
    whole = box is not None and box.complete
    if whole and value.shape == job.layout.shape:
        yield from _storing(job, value)
        return
    value = on_host(value, job.spec)
    if whole:
        yield from _storing(job, np.broadcast_to(_fitted(value, job.layout.shape), job.layout.shape))
        return
    found = yield Fetch(None, optional=True)
    if found is None:
        chunk = np.full(job.layout.shape, job.spec.fill_value, job.dtype)
        _put(chunk, selection, value)
        yield from _storing(job, chunk)
        return
    (frame,) = found
    box = box or everything(selection, job.layout)
    header, streams = _unpacked(frame, job.header)
    reached = box.patch.widened(header)
    seen = reached.widened(header)
    source = seen.widened(header)
    decoded = _decoded(tiles(header, box.planes, source), streams, job)
    symbols = assembled(decoded, len(box.planes), source)
    _ = job.engine  # on this thread, not on the event loop's
    around = box.grown(seen)
    before = job.pixels(around.cut((yield Synthesise(job, symbols)), source), around.layout)
    after = before.copy()
    _put(after, around.inside, value)
    planes = [job.planes(pixels, around.layout) for pixels in (after, before)]  # refuses values outside the range
    if _alike(after, before, after[around.inside].size, job):
        return
    if _blank(job, after):
        chunk = on_host((yield from decoding(job, frame)), job.spec)
        _put(chunk, selection, value)
        if _blank(job, chunk):
            yield Put(None)
            return
    count = len(box.planes)
    both = yield Analyse(job, np.concatenate(planes))
    changed = both[:count] != both[count:]
    changed[:, :, *box.patch.within(seen)] = True
    inner = (slice(None), slice(None), *reached.within(seen))
    kept = symbols[:, :, *reached.within(source)]
    new = np.where(changed[inner], both[:count][inner], kept)
    recoded: dict[int, bytes | memoryview] = {**streams, **_recoded(decoded, new, reached, job)}
    yield Put(job.buffer(framing.pack(header, list(recoded.values()))))


def _alike(after: Pixels, before: Pixels, written: int, job: ChunkJob) -> bool:
    """Whether pixels differ by no more than two decodings of the same latents, one of which may have been read.

    Sums of bfloat16 depend a little on the shape of what is decoded together: up to one pixel in a thousand is rounded
    to the other side, or, in floats, most of them differ by some hundredths of a grey level.
    """
    low, high = job.value_range
    levels = 255 / (float(high) - float(low)) * np.abs(after.astype(np.float64) - before)
    return bool(levels.max() <= 1) and float(np.square(levels).sum()) <= _SLACK**2 * written


def _recoded(
    decoded: Sequence[tuple[Tile, entropy.Symbols]], new: entropy.Symbols, reached: Patch, job: ChunkJob
) -> dict[int, bytes]:
    """The streams of the tiles in which a patch of new symbols (N, M, h, w) differs from the old."""
    touched: list[tuple[int, entropy.Symbols]] = []
    for tile, own in decoded:
        here, there = tile.patch.within(reached), reached.within(tile.patch)
        if tile.patch.meets(reached) and not np.array_equal(own[:, *there], new[tile.plane, :, *here]):
            own[:, *there] = new[tile.plane, :, *here]
            touched.append((tile.number, own))
    streams = entropy.over_cores(lambda one: entropy.encode_tile(one[1], job.tables), touched)
    return dict(zip((number for number, _ in touched), streams, strict=True))


def _storing(job: ChunkJob, chunk: Any) -> Plan[None]:
    """Store a whole chunk, or delete it where zarr keeps none."""
    if _blank(job, chunk):
        yield Put(None)
    else:
        yield Put((yield from encoding(job, chunk)))


def _blank(job: ChunkJob, pixels: Any) -> bool:
    """Whether a chunk with these pixels alone is not to be stored."""
    return not job.spec.config.write_empty_chunks and bool((pixels == job.spec.fill_value).all())


def _fitted(value: Pixels, shape: tuple[int, ...]) -> Pixels:
    """The value in this shape if it has as many numbers: zarr leaves out axes that an orthogonal selection drops."""
    return value.reshape(shape) if value.ndim and value.shape != shape and value.size == math.prod(shape) else value


def _put(pixels: Pixels, selection: Any, value: Pixels) -> None:
    pixels[selection] = _fitted(value, pixels[selection].shape)
