"""The geometry of parts of a chunk: which latents, tiles and bytes a selection of its pixels needs.

Three rectangles matter. A *box* is the part of a chunk that a selection lies in, in pixels. A *patch* is a rectangle of
latent positions of a plane. *Tiles* are the pieces that a frame stores on their own. Pixel r lies over latent position
r // 16. Latents up to `HALO` positions away take part in it, and it takes part in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from zarr_cae.coder.frame import STRIDE, Symbols
from zarr_cae.coder.tiles import Patch, Tile
from zarr_cae.pixels.layout import Layout

Index: TypeAlias = int | slice | npt.NDArray[np.intp]
Indices: TypeAlias = range | npt.NDArray[np.intp]
"""Ascending indices along an axis. A range takes no memory, however long the axis is."""


@dataclass(frozen=True)
class Box:
    """Pixels of a chunk: the product of some indices along each of its axes."""

    chunk: Layout
    indices: tuple[Indices, ...]
    """The indices along each axis of the chunk; without gaps along rows and columns, and with all
    three channels of colour or none."""
    inside: Any
    """The same selection relative to the box: a tuple with an `Index` for each axis. It has another form only if the
    box is the whole chunk."""

    @property
    def layout(self) -> Layout:
        """The layout of an array that holds only the box."""
        chunk, colour = self.chunk, self.chunk.colour
        if colour and chunk.channel_axis is not None:
            channels = self.indices[chunk.channel_axis]
            place = channels.index if isinstance(channels, range) else partial(np.searchsorted, channels)
            colour = tuple(int(place(one)) for one in colour) if colour[0] in channels else ()
        return Layout(tuple(map(len, self.indices)), chunk.channel_axis, colour)

    @property
    def complete(self) -> bool:
        """Whether the selection is the whole chunk, in order."""
        return (
            isinstance(self.inside, tuple)
            and len(self.inside) == len(self.chunk.shape)
            and all(
                isinstance(one, slice) and one.indices(length) == (0, length, 1)
                for one, length in zip(self.inside, self.chunk.shape, strict=True)
            )
            and self.layout.shape == self.chunk.shape
        )

    @property
    def samples(self) -> npt.NDArray[np.intp]:
        """The sample planes of the chunk that the box holds, in the order of its layout."""
        axes = self.chunk.channels_first[:-2]
        if not axes:
            return np.zeros(1, np.intp)
        product = np.ix_(*(np.asarray(self.indices[axis], np.intp) for axis in axes))
        return np.ravel_multi_index(product, [self.chunk.shape[axis] for axis in axes]).reshape(-1)

    @property
    def planes(self) -> npt.NDArray[np.intp]:
        """The planes of the chunk that hold pixels of the box, in the order of its layout."""
        samples, layout = self.samples, self.layout
        if not layout.colour and not self.chunk.colour:
            return samples
        firsts = (int(samples[layout.samples_of(plane)[0]]) for plane in range(layout.planes))
        return np.array([self.chunk.plane_of(sample) for sample in firsts], np.intp)

    @property
    def patch(self) -> Patch:
        """The latent positions under the box."""
        rows, columns = (self.indices[axis] for axis in self.chunk.spatial_axes)
        return Patch(*(slice(int(side[0]) // STRIDE, int(side[-1]) // STRIDE + 1) for side in (rows, columns)))

    def cut(self, planes: npt.NDArray[np.float32], patch: Patch) -> npt.NDArray[np.float32]:
        """Return planes (N, C, H, W) of a patch around the box, cut so that they begin where the box begins."""
        top, left = (
            int(self.indices[axis][0]) - side.start * STRIDE
            for axis, side in zip(self.chunk.spatial_axes, (patch.rows, patch.columns), strict=True)
        )
        return planes[:, :, top:, left:]

    def grown(self, patch: Patch) -> Box:
        """Return the box with all pixels of a patch around it, and the same selection in it."""
        indices, inside = list(self.indices), self.inside
        for axis, side in zip(self.chunk.spatial_axes, (patch.rows, patch.columns), strict=True):
            begin = side.start * STRIDE
            by = int(self.indices[axis][0]) - begin
            indices[axis] = range(begin, min(side.stop * STRIDE, self.chunk.shape[axis]))
            if by:  # never if the box is the whole chunk, where the selection may have any form
                inside = (*inside[:axis], _shifted(inside[axis], by), *inside[axis + 1 :])
        return replace(self, indices=tuple(indices), inside=inside)


def enclosing(selection: object, chunk: Layout) -> Box:
    """Return the smallest box around a selection of a chunk's pixels.

    Parameters
    ----------
    selection
        A NumPy selection in the form that zarr passes: integers, slices with a positive step, and integer or
        one-dimensional boolean arrays, one for each axis; axes left out at the end are taken whole.
    chunk
        The layout of the chunk.

    Returns
    -------
    Box
        The box. It is the whole chunk if the selection is empty or of another kind.
    """
    everything = Box(chunk, tuple(map(range, chunk.shape)), selection)
    parts = selection if isinstance(selection, tuple) else (selection,)
    if len(parts) > len(chunk.shape):
        return everything
    parts += (slice(None),) * (len(chunk.shape) - len(parts))
    indices: list[Indices] = []
    inside: list[Index] = []
    for axis, (part, length) in enumerate(zip(parts, chunk.shape, strict=True)):
        found = _along(part, length)
        if found is None:
            return everything
        wanted, index = found
        if axis in chunk.spatial_axes:
            box: Indices = range(int(min(wanted[0], wanted[-1])), int(max(wanted[0], wanted[-1])) + 1)
            if not isinstance(wanted, range):
                box = range(int(wanted.min()), int(wanted.max()) + 1)
        elif axis == chunk.channel_axis and chunk.colour and any(one in wanted for one in chunk.colour):
            box = np.union1d(chunk.colour, wanted)  # a plane of colours is decoded as a whole
            if isinstance(wanted, range) or len(box) == length:
                box = range(int(box[0]), int(box[-1]) + 1)
        else:
            box = wanted if isinstance(wanted, range) else np.unique(wanted)
        indices.append(box)
        inside.append(_placed(index, wanted, box))
    return Box(chunk, tuple(indices), tuple(inside))


def _along(part: object, length: int) -> tuple[Indices, Index] | None:
    """Return the indices that a part of a selection selects along its axis, and the part without negative numbers."""
    if isinstance(part, slice):
        wanted = range(length)[part]
        if len(wanted) == 0 or wanted.step < 0:
            return None
        return wanted, slice(0, len(wanted))
    if isinstance(part, Integral) and not isinstance(part, bool):
        array = np.asarray(int(part))
    elif isinstance(part, np.ndarray | list):
        array = np.asarray(part)
        if array.dtype == bool and array.shape == (length,):
            array = np.flatnonzero(array)
    else:
        return None
    if array.dtype.kind not in "iu" or array.size == 0 or not -length <= array.min() <= array.max() < length:
        return None
    array = np.where(array < 0, array + length, array).astype(np.intp)
    return array.reshape(-1), array if isinstance(part, np.ndarray | list) else int(array)


def _placed(index: Index, wanted: Indices, box: Indices) -> Index:
    """Return where in `box` the indices `wanted` lie, in the form of `index`."""
    if isinstance(wanted, range):
        if isinstance(box, range):
            start, step = (wanted[0] - box[0]) // box.step, wanted.step // box.step
            return slice(start, start + (len(wanted) - 1) * step + 1, step)
        raise AssertionError("a slice gives a box without gaps")
    at = wanted - box[0] if isinstance(box, range) else np.searchsorted(box, wanted)
    return at.reshape(index.shape) if isinstance(index, np.ndarray) else int(at[0])


def _shifted(index: Index, by: int) -> Index:
    return slice(index.start + by, index.stop + by, index.step) if isinstance(index, slice) else index + by


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and last tile of each run of consecutive numbers: their streams are adjacent in a frame."""
    ordered = sorted(numbers)
    first = 0
    for place, number in enumerate(ordered):
        if place + 1 == len(ordered) or ordered[place + 1] != number + 1:
            yield ordered[first], number
            first = place + 1


def assembled(found: Sequence[tuple[Tile, Symbols]], planes: int, patch: Patch) -> Symbols:
    """Return the symbols (N, M, h, w) of a patch of some planes, from the tiles that hold it, each (M, h, w)."""
    symbols = np.empty((planes, len(found[0][1]), *patch.shape), np.int16)
    for tile, own in found:
        rows, columns = tile.patch.within(patch)
        symbols[tile.plane, :, rows, columns] = own[(slice(None), *patch.within(tile.patch))]
    return symbols
