"""Warn of repeated writes of small parts of chunks: each one decodes pixels around the part and encodes them again.

A codec does not know the array that it works for, nor the name of the chunk. So a chunk is recognised by its frame: the
fingerprints of frames in which old pixels were coded again are kept. If old pixels of such a frame are coded once more,
the chunk is worn by repeated writes, and a warning says so, once for each kind of chunk.

Arrays with another codec beside this one give it whole chunks only: zarr decodes a chunk, changes a part and has all
of it encoded. Such a chunk is recognised by samples of its pixels: some are those that were decoded before, others are
new.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter, OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zarr_cae.errors import CAEWearWarning
from zarr_cae.pixels.layout import Layout
from zarr_cae.threads import hold_across_fork

if TYPE_CHECKING:
    from zarr_cae.codec.chunk import ChunkCoder
    from zarr_cae.codec.windows import Box

_SAMPLES = 24
_LENGTH = 16
"""Pixels of a sample, along a row."""
_SAME = 4
"""The fewest samples that an encoded chunk has in common with a decoded one that it was made from."""
_MOST = 1 << 16

_lock = threading.Lock()
hold_across_fork(_lock)
_recoded: OrderedDict[int, None] = OrderedDict()
"""Fingerprints of frames in which old pixels were coded again, the newest last."""
_decoded: OrderedDict[tuple[Layout, int, int], int] = OrderedDict()
"""Frames by the layout of their chunk, the number of a sample and a fingerprint of its decoded pixels."""
_told: OrderedDict[str, None] = OrderedDict()
"""Kinds of chunks that a warning has named."""
_encodes = False
"""Whether this process has encoded a chunk: others only read, and need no samples."""


def wears(coder: ChunkCoder, box: Box, before: npt.NDArray[Any]) -> bool:
    """Return whether a write codes pixels again that it does not replace.

    Pixels near the fill value don't count: most of them were never written. Nor does a selection that begins at the
    chunk's first pixel, since that is how zarr writes all of a chunk at the array's end.
    """
    if isinstance(box.inside, tuple) and all(map(_begins, box.inside)) and all(at[0] == 0 for at in box.indices):
        return False
    others = np.ones(before.shape, bool)
    others[box.inside] = False
    values, fill = before[others].astype(np.float64), float(coder.spec.fill_value)
    if math.isnan(fill):
        return not bool(np.isnan(values).all())
    low, high = coder.value_range
    with np.errstate(invalid="ignore", over="ignore"):  # infinity less infinity is NaN, which counts as near
        return bool((np.abs(values - fill) > (high - low) / 32).any())


def _begins(part: Any) -> bool:
    return (part.start in {None, 0}) if isinstance(part, slice) else isinstance(part, int) and part == 0


def note_recoded(coder: ChunkCoder, before: memoryview, after: bytes) -> None:
    """Note that a write of a part of a chunk codes other pixels again; warn if that happens repeatedly.

    Parameters
    ----------
    coder
        Codes the chunk.
    before, after
        The chunk's frame before the write and after it.
    """
    _note(coder, hash(bytes(before)), hash(after))


def note_decoded(coder: ChunkCoder, frame: memoryview, pixels: Any) -> None:
    """Note the pixels of a whole chunk that was decoded."""
    if not _encodes or not isinstance(pixels, np.ndarray):
        return
    fingerprint = hash(bytes(frame))
    with _lock:
        for number, sample in _samples(coder.layout, pixels):
            _put(_decoded, (coder.layout, number, sample), fingerprint)


def note_encoded(coder: ChunkCoder, pixels: Any, frame: bytes) -> None:
    """Note that a whole chunk was encoded; warn if it was decoded, changed in part and encoded repeatedly."""
    global _encodes  # noqa: PLW0603 - set once
    _encodes = True
    if not _decoded or not isinstance(pixels, np.ndarray):
        return
    samples = _samples(coder.layout, pixels)
    with _lock:
        found = Counter(_decoded.get((coder.layout, number, sample)) for number, sample in samples)
        missing = found.pop(None, 0)
        ((before, same),) = found.most_common(1) or [(None, 0)]
        if before is None or same < _SAME:
            return
        if not missing:  # the change lies between the samples, or there is none
            if before in _recoded:
                _put(_recoded, hash(frame), None)
            return
    _note(coder, before, hash(frame))


def _note(coder: ChunkCoder, before: int, after: int) -> None:
    kind = f"a chunk {coder.layout.shape} of {coder.dtype}, quality {coder.quality},"
    with _lock:
        repeated = before in _recoded
        _put(_recoded, after, None)
        if not repeated or kind in _told:
            return
        _put(_told, kind, None)
    warnings.warn(
        f"cae: {kind} is written in parts. Each write decodes old pixels and encodes them again, and they lose quality "
        "each time. Write whole chunks, or collect the parts: `with zarr_cae.buffered(array) as target: "
        "target[...] = ...`",
        CAEWearWarning,
        stacklevel=2,
    )


def _put(entries: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    entries[key] = value
    entries.move_to_end(key)
    if len(entries) > _MOST:
        entries.popitem(last=False)


def _samples(layout: Layout, pixels: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """Return numbers and fingerprints of samples. Those with a single value are left out: they identify nothing."""
    found = [sample.tobytes() for sample in pixels[_places(layout)]]
    size = pixels.dtype.itemsize
    return [(number, hash(one)) for number, one in enumerate(found) if one != one[:size] * _LENGTH]


@lru_cache(maxsize=64)
def _places(layout: Layout) -> tuple[npt.NDArray[np.intp], ...]:
    """Return a NumPy index of the samples, each along a row, spread over rows, columns, channels and planes."""
    number, along = np.arange(_SAMPLES)[:, None], np.arange(_LENGTH)[None]
    rows, columns = layout.spatial_axes
    places = []
    for axis, length in enumerate(layout.shape):
        if axis == rows:
            place = (2 * number + 1) * length // (2 * _SAMPLES)
        elif axis == columns:
            place = (number * 7 % _SAMPLES * max(length - _LENGTH, 0) // _SAMPLES + along) % length
        elif axis == layout.channel_axis:
            place = number % length
        else:
            place = number * 5 % _SAMPLES * length // _SAMPLES
        places.append(np.broadcast_to(place, (_SAMPLES, _LENGTH)))
    return tuple(places)


def forget() -> None:
    """Forget all frames, pixels and warnings."""
    with _lock:
        for entries in (_recoded, _decoded, _told):
            entries.clear()
