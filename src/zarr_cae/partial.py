"""Part of a chunk: plans that read a selection of its pixels, and that write one and leave the rest as it is.

Reading fetches, decodes and synthesises only the tiles under the selection and its surroundings. Those ranges of the
frame are checked one by one, not by the frame's CRC32C: see `reading`.

Writing replaces only latents that the written pixels reach. All others keep their symbols, and tiles without a changed
symbol their bytes, so that however often parts of a chunk are written, the rest of it stays what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from zarr_cae import entropy, framing
from zarr_cae.chunks import ChunkJob, Fetch, Plan, Synthesise
from zarr_cae.errors import FrameError
from zarr_cae.framing import FrameHeader
from zarr_cae.pixels import Chunk
from zarr_cae.windows import Tile, assembled, enclosing, everything, runs, tiles

Pixels = npt.NDArray[Any]
Streams = dict[int, memoryview]
_FIXED_BYTES = 16
_LENGTH_BYTES = 3
"""Of the header, and of each tile's length: what is fetched at first, which is less than the smallest frame."""


def reading(job: ChunkJob, selection: Any, *, ranges: bool) -> Plan[Chunk]:
    """The selected pixels of a chunk, which are those of the whole chunk's decoding within a grey level.

    Parameters
    ----------
    job
        For the chunk.
    selection
        Of the chunk's pixels, as numpy takes it.
    ranges
        Whether fetching parts of the frame is cheaper than fetching it whole. The frame is fetched whole, and its
        CRC32C checked, also where the selection needs more than half of its tiles. Otherwise each part is checked by
        itself: the header against the array, the lengths against the bytes that came, and each stream by its decoder,
        whose lanes must end in the state in which the encoder started and at the last word.

    Raises
    ------
    FrameError, StreamError
        For anything malformed.
    MissingChunkError
        If there is no chunk.
    """
    box = enclosing(selection, job.layout) or everything(selection, job.layout)
    planes = box.planes
    patch = box.patch.widened(job.header)
    if ranges and 2 * len(tiles(job.header, planes, patch)) <= job.header.tile_count:
        index = yield from _index(job.header)
        wanted = tiles(index.header, planes, patch)
        streams = yield from _streams(index, [tile.number for tile in wanted])
    else:
        header, streams = _unpacked((yield Fetch(None)), job.header)
        wanted = tiles(header, planes, patch)
    _ = job.engine  # on this thread, not on the event loop's
    synthesised = yield Synthesise(job, assembled(_decoded(wanted, streams, job), len(planes), patch))
    pixels = job.pixels(box.cut(synthesised, patch), box.layout)
    return pixels[box.inside]


def _index(expected: FrameHeader) -> Plan[framing.FrameIndex]:
    """The index of a frame, from as few bytes of its beginning as it takes."""
    head, more = b"", _FIXED_BYTES + _LENGTH_BYTES * expected.tile_count
    while True:
        (part,) = yield Fetch([(len(head), len(head) + more)])
        head += part
        index = framing.parse_index(head, expected)
        if not isinstance(index, int):
            return index
        if len(part) < more:
            raise FrameError(f"cae: frame ends at least {index} bytes too early: the stored chunk is truncated")
        more = index


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
            streams[number] = part[index.offsets[number] - begin : index.offsets[number + 1] - begin]
    return streams


def _unpacked(parts: Sequence[memoryview], expected: FrameHeader) -> tuple[FrameHeader, Streams]:
    (frame,) = parts
    header, streams = framing.unpack(frame, expected)
    return header, dict(enumerate(streams))


def _decoded(wanted: Sequence[Tile], streams: Streams, job: ChunkJob) -> list[tuple[Tile, entropy.Symbols]]:
    def decode(tile: Tile) -> tuple[Tile, entropy.Symbols]:
        return tile, entropy.decode_tile(streams[tile.number], *tile.patch.shape, job.tables)

    return list(entropy.over_cores(decode, wanted))
