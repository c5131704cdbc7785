"""Which latents, tiles and bytes of a chunk a selection of its pixels needs: geometry only.

Three rectangles matter. A *box* is the part of a chunk that a selection lies in, in pixels. A *patch* is a rectangle of
latent positions of a plane. *Tiles* are what a frame stores apart. Pixel r lies over latent position r // 16; positions
up to `HALO` away take part in it, and it takes part in those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from zarr_cae.coder.frame import STRIDE, FrameHeader
from zarr_cae.pixels.layout import Layout

HALO = 6
"""Latent positions around a tile that can reach into it: 84 px in `cae-v1` analysis, 5.25 positions in synthesis."""
LEAST_COLUMNS = 51
"""Latent columns that a network is given of a plane that has so many.

In bfloat16 oneDNN sums a convolution whose output has more than 50 columns in another order than a narrower one. A few
symbols in a million were rounded to the other side for it, which showed as two grey levels. Where pieces of a plane are
on the same side of 50 as the whole, at every scale, both have the same symbols.
"""

Index: TypeAlias = int | slice | npt.NDArray[np.intp]
Indices = npt.NDArray[np.intp]
Symbols = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Patch:
    """Rows and columns of latent positions of a plane."""

    rows: slice
    columns: slice

    def widened(self, header: FrameHeader) -> Patch:
        """The patch and `HALO` more positions on each side, as far as the plane goes."""
        rows, columns = (
            slice(max(0, side.start - HALO), min(size, side.stop + HALO))
            for side, size in zip((self.rows, self.columns), header.latent_shape, strict=True)
        )
        return Patch(rows, columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def within(self, outer: Patch) -> tuple[slice, slice]:
        """Where this patch lies in an array of `outer`, as far as it does."""
        rows, columns = (
            slice(max(own.start, other.start) - other.start, min(own.stop, other.stop) - other.start)
            for own, other in ((self.rows, outer.rows), (self.columns, outer.columns))
        )
        return rows, columns

    def meets(self, other: Patch) -> bool:
        """Whether the two have positions in common."""
        return all(
            max(own.start, one.start) < min(own.stop, one.stop)
            for own, one in ((self.rows, other.rows), (self.columns, other.columns))
        )

    def scaled(self, samples: int) -> tuple[slice, slice]:
        """Where the patch lies in an array with so many samples a position along each axis."""
        rows, columns = (slice(side.start * samples, side.stop * samples) for side in (self.rows, self.columns))
        return rows, columns


def pieces(shape: tuple[int, int], edge: int) -> Iterator[tuple[Patch, Patch]]:
    """Patches of about `edge` positions a side that make up a plane of `shape` positions, in rows.

    Before each the patch around it that a network must be given, with at least `LEAST_COLUMNS` if the plane has them.
    """
    across = shape[1] if shape[1] <= LEAST_COLUMNS else max(edge, LEAST_COLUMNS - 2 * HALO)
    for top in range(0, shape[0], edge):
        for left in range(0, shape[1], across):
            bottom, right = min(top + edge, shape[0]), min(left + across, shape[1])
            rows = slice(max(0, top - HALO), min(bottom + HALO, shape[0]))
            first = max(0, min(left - HALO, shape[1] - LEAST_COLUMNS))
            columns = slice(first, min(max(right + HALO, first + LEAST_COLUMNS), shape[1]))
            yield Patch(rows, columns), Patch(slice(top, bottom), slice(left, right))


@dataclass(frozen=True)
class Box:
    """Pixels of a chunk: the product of some indices along each of its axes."""

    chunk: Layout
    indices: tuple[Indices, ...]
    """For each axis of the chunk, ascending; without gaps along rows, columns and the axis of RGB."""
    inside: Any
    """The selection that the box was made for, as one of an array of the box alone: a tuple with an `Index` for each
    axis; of any other kind only where the box is the whole chunk."""

    @property
    def layout(self) -> Layout:
        """Of an array of the box alone."""
        return Layout(tuple(map(len, self.indices)), self.chunk.channel_axis)

    @property
    def complete(self) -> bool:
        """Whether the selection is the whole chunk as it is."""
        return (
            isinstance(self.inside, tuple)
            and self.layout.shape == self.chunk.shape
            and all(isinstance(one, slice) and one.step in (None, 1) for one in self.inside)
        )

    @property
    def planes(self) -> Indices:
        """The planes of the chunk that the box takes part in, in its own order."""
        axes = [axis for axis in self.chunk.channels_first[:-2] if self.chunk.grey or axis != self.chunk.channel_axis]
        if not axes:
            return np.zeros(1, np.intp)
        product = np.ix_(*(self.indices[axis] for axis in axes))
        return np.ravel_multi_index(product, [self.chunk.shape[axis] for axis in axes]).reshape(-1)

    @property
    def patch(self) -> Patch:
        """The latent positions under the box."""
        rows, columns = (self.indices[axis] for axis in self.chunk.spatial_axes)
        return Patch(*(slice(int(side[0]) // STRIDE, int(side[-1]) // STRIDE + 1) for side in (rows, columns)))

    def cut(self, planes: npt.NDArray[np.float32], patch: Patch) -> npt.NDArray[np.float32]:
        """From planes (N, C, H, W) of a patch around the box, those that begin with the box's first row and column."""
        top, left = (
            int(self.indices[axis][0]) - side.start * STRIDE
            for axis, side in zip(self.chunk.spatial_axes, (patch.rows, patch.columns), strict=True)
        )
        return planes[:, :, top:, left:]

    def grown(self, patch: Patch) -> Box:
        """The box with all pixels of a patch around it, and the same selection in it."""
        indices, inside = list(self.indices), self.inside
        for axis, side in zip(self.chunk.spatial_axes, (patch.rows, patch.columns), strict=True):
            begin = side.start * STRIDE
            by = int(self.indices[axis][0]) - begin
            indices[axis] = np.arange(begin, min(side.stop * STRIDE, self.chunk.shape[axis]))
            if by:  # never where the box is everything, whose selection may be of any kind
                inside = (*inside[:axis], _shifted(inside[axis], by), *inside[axis + 1 :])
        return replace(self, indices=tuple(indices), inside=inside)


def enclosing(selection: object, chunk: Layout) -> Box | None:
    """The smallest box around a selection of a chunk's pixels.

    Parameters
    ----------
    selection
        As numpy takes it and zarr makes it: integers, slices with a positive step, and integer or one-dimensional
        boolean arrays, one for each axis; axes left out at the end are taken whole.
    chunk
        The layout of the chunk.

    Returns
    -------
    Box, or None
        None if the selection is empty or of another kind.
    """
    parts = selection if isinstance(selection, tuple) else (selection,)
    if len(parts) > len(chunk.shape):
        return None
    parts += (slice(None),) * (len(chunk.shape) - len(parts))
    found = [_along(part, length) for part, length in zip(parts, chunk.shape, strict=True)]
    indices: list[Indices] = []
    inside: list[Index] = []
    for axis, one in enumerate(found):
        if one is None:
            return None
        wanted, index = one
        if axis in chunk.spatial_axes:
            box = np.arange(wanted.min(), wanted.max() + 1)
        elif axis == chunk.channel_axis and not chunk.grey:
            box = np.arange(chunk.shape[axis])
        else:
            box = np.unique(wanted)
        indices.append(box)
        inside.append(_placed(index, wanted, box))
    return Box(chunk, tuple(indices), tuple(inside))


def everything(selection: Any, chunk: Layout) -> Box:
    """The box that is the whole chunk, for a selection that `enclosing` doesn't know."""
    return Box(chunk, tuple(map(np.arange, chunk.shape)), selection)


def _along(part: object, length: int) -> tuple[Indices, Index] | None:
    """The indices that a part of a selection means along its axis, and itself without negative numbers."""
    if isinstance(part, slice):
        wanted = np.arange(length)[part]
        if len(wanted) == 0 or (len(wanted) > 1 and wanted[1] < wanted[0]):
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
    """Where in `box` the indices `wanted` lie, in the form of `index`."""
    at = np.searchsorted(box, wanted)
    if isinstance(index, slice):
        step = int(at[1] - at[0]) if len(at) > 1 else 1
        return slice(int(at[0]), int(at[-1]) + 1, step)
    return at.reshape(index.shape) if isinstance(index, np.ndarray) else int(at[0])


def _shifted(index: Index, by: int) -> Index:
    return slice(index.start + by, index.stop + by, index.step) if isinstance(index, slice) else index + by


class Tile(NamedTuple):
    """A tile of a frame, as one of those that a patch of some planes needs."""

    number: int
    """In the order of the frame."""
    plane: int
    """Counted among the planes that were asked for."""
    patch: Patch


def tiles(header: FrameHeader, planes: Indices, patch: Patch) -> list[Tile]:
    """The tiles that hold a patch of some planes, each plane's in the order of the frame."""
    rows, columns = header.latent_shape
    across = header.tile_grid[1]
    edge = header.tile
    found = []
    for place, plane in enumerate(planes):
        first = int(plane) * (header.tile_count // header.planes)
        for row in range(patch.rows.start // edge, -(-patch.rows.stop // edge)):
            for column in range(patch.columns.start // edge, -(-patch.columns.stop // edge)):
                own = Patch(
                    slice(row * edge, min((row + 1) * edge, rows)),
                    slice(column * edge, min((column + 1) * edge, columns)),
                )
                found.append(Tile(first + row * across + column, place, own))
    return found


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of the runs of neighbours among tile numbers, whose streams lie side by side in the frame."""
    ordered = sorted(numbers)
    first = 0
    for place, number in enumerate(ordered):
        if place + 1 == len(ordered) or ordered[place + 1] != number + 1:
            yield ordered[first], number
            first = place + 1


def assembled(found: Sequence[tuple[Tile, Symbols]], planes: int, patch: Patch) -> Symbols:
    """The symbols (N, M, h, w) of a patch of some planes, from the tiles that hold it, each (M, h, w)."""
    symbols = np.empty((planes, len(found[0][1]), *patch.shape), np.int16)
    for tile, own in found:
        rows, columns = tile.patch.within(patch)
        symbols[tile.plane, :, rows, columns] = own[(slice(None), *patch.within(tile.patch))]
    return symbols
