"""Selections of an array's pixels, and the chunks that they meet."""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr

AxisIndex: TypeAlias = slice | npt.NDArray[np.intp]
Region: TypeAlias = tuple[slice, ...]


@dataclass(frozen=True)
class Selection:
    """Pixels of an array: the product of some indices along each of its axes."""

    index: tuple[AxisIndex, ...]
    """For each axis a slice, without negative numbers, or an array of indices."""
    lengths: tuple[int, ...]
    """The number of indices along each axis."""
    dropped: tuple[bool, ...]
    """The axes with an integer, which the selected pixels don't have."""

    @classmethod
    def basic(cls, selection: Any, shape: tuple[int, ...]) -> Selection:
        """Return a selection with integers, slices and the ellipsis.

        Raises
        ------
        IndexError
            If the selection lies outside the array, or has other parts.
        """
        return cls._make(selection, shape, _basic)

    @classmethod
    def orthogonal(cls, selection: Any, shape: tuple[int, ...]) -> Selection:
        """Return a selection that may also have lists and arrays of integers, and masks of an axis.

        Raises
        ------
        IndexError
            If the selection lies outside the array, or has other parts.
        """
        return cls._make(selection, shape, _any)

    @classmethod
    def _make(cls, selection: Any, shape: tuple[int, ...], along: Any) -> Selection:
        parts = _one_for_each_axis(selection, len(shape))
        index = tuple(along(part, axis, length) for axis, (part, length) in enumerate(zip(parts, shape, strict=True)))
        lengths = tuple(
            len(range(length)[one]) if isinstance(one, slice) else len(one)
            for one, length in zip(index, shape, strict=True)
        )
        return cls(index, lengths, tuple(map(_is_integer, parts)))

    def expand(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the values that are assigned to the selection, with all axes of the array.

        Raises
        ------
        ValueError
            If the values don't fit the selection.
        """
        shape = tuple(length for length, dropped in zip(self.lengths, self.dropped, strict=True) if not dropped)
        while values.ndim > len(shape) and len(values) == 1:
            values = values[0]
        if values.ndim > len(shape) or any(
            own not in {1, wanted} for own, wanted in zip(values.shape[::-1], shape[::-1], strict=False)
        ):
            raise ValueError(f"cae: values of shape {values.shape} can't be assigned to a selection of shape {shape}")
        return np.broadcast_to(values, shape)[tuple(None if dropped else slice(None) for dropped in self.dropped)]

    def squeeze(self, pixels: npt.NDArray[Any]) -> Any:
        """Return selected pixels without the axes that an integer selects from; a scalar if no axis is left."""
        return pixels[tuple(0 if dropped else slice(None) for dropped in self.dropped)]


def _one_for_each_axis(selection: Any, count: int) -> list[Any]:
    parts = list(selection) if isinstance(selection, tuple) else [selection]
    dots = [place for place, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1:
        raise IndexError("cae: a selection can have only one ellipsis")
    if len(parts) - len(dots) > count:
        raise IndexError(f"cae: a selection has {len(parts) - len(dots)} parts; the array has {count} axes")
    missing = [slice(None)] * (count - len(parts) + len(dots))
    at = dots[0] if dots else len(parts)
    return parts[:at] + missing + parts[at + len(dots) :]


def _is_integer(part: object) -> bool:
    return not isinstance(part, bool | np.bool_ | np.ndarray) and hasattr(part, "__index__")


def _basic(part: Any, axis: int, length: int) -> slice:
    """Return an integer or a slice as a slice without negative numbers."""
    if _is_integer(part):
        number = operator.index(part)
        if not -length <= number < length:
            raise IndexError(f"cae: index {number} lies outside axis {axis} of length {length}")
        number %= length
        return slice(number, number + 1, 1)
    if not isinstance(part, slice):
        raise IndexError(
            f"cae: expected an integer, a slice or the ellipsis for axis {axis}, got {type(part).__name__}; use "
            "set_orthogonal_selection or get_orthogonal_selection for lists, arrays of integers and masks of one axis"
        )
    start, stop, step = part.indices(length)
    if step < 0:
        raise IndexError(f"cae: slices must have a positive step, got {part} for axis {axis}")
    return slice(start, max(start, stop), step)


def _any(part: Any, axis: int, length: int) -> AxisIndex:
    """Return a part of an orthogonal selection without negative numbers."""
    if _is_integer(part) or isinstance(part, slice):
        return _basic(part, axis, length)
    array = np.asarray(part)
    if array.dtype == bool and array.shape == (length,):
        return np.flatnonzero(array)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise IndexError(
            f"cae: expected one axis of integers, or a mask of length {length}, for axis {axis}; got {array.dtype} of "
            f"shape {array.shape}. Coordinates of single pixels and masks of the whole array aren't supported"
        )
    array = array.astype(np.intp)
    if array.size and not -length <= array.min() <= array.max() < length:
        raise IndexError(f"cae: indices {array.min()} to {array.max()} lie outside axis {axis} of length {length}")
    return np.where(array < 0, array + length, array)


@dataclass(frozen=True)
class Part:
    """The part of a selection that lies in one chunk, or in one shard."""

    key: tuple[int, ...]
    """The number of the chunk along each axis."""
    shape: tuple[int, ...]
    """The shape of the chunk inside the array."""
    inside: tuple[Any, ...]
    """A NumPy index of the selected pixels in the chunk."""
    outside: tuple[Any, ...]
    """A NumPy index of the same pixels among all selected ones."""
    size: int
    """The number of different pixels."""


@dataclass(frozen=True)
class Grid:
    """The chunks of an array, or its shards if it has some: what is written at once."""

    shape: tuple[int, ...]
    """The shape of the array."""
    edges: tuple[Sequence[int], ...]
    """For each axis where its chunks begin, and where the last one ends."""
    inner: tuple[int, ...] | None
    """The shape of the chunks of a shard; None if there are no shards."""

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> Grid:
        """Return the grid of an array."""
        shape = array.shape
        try:
            shards = array.shards
            sizes = array.chunks if shards is None else shards
        except NotImplementedError:  # chunks of several sizes along an axis, which zarr has from 3.2 on
            lengths: tuple[tuple[int, ...], ...] = array.write_chunk_sizes  # type: ignore[attr-defined,unused-ignore]
            return cls(shape, tuple([0, *accumulate(one)] for one in lengths), None)
        edges = tuple(range(0, length + size, size) for length, size in zip(shape, sizes, strict=True))
        return cls(shape, edges, None if shards is None else array.chunks)

    @property
    def count(self) -> int:
        """The number of chunks."""
        return prod(len(one) - 1 for one in self.edges)

    def region(self, key: tuple[int, ...]) -> Region:
        """Return the pixels of a chunk."""
        return tuple(
            slice(edges[one], min(edges[one + 1], length))
            for one, edges, length in zip(key, self.edges, self.shape, strict=True)
        )

    def parts(self, selection: Selection) -> Iterator[Part]:
        """Yield the part of a selection in each chunk that it meets."""
        axes = zip(selection.index, self.edges, self.shape, strict=True)
        for cuts in product(*(list(_cuts(index, edges, length)) for index, edges, length in axes)):
            yield Part(
                tuple(cut.number for cut in cuts),
                tuple(cut.length for cut in cuts),
                _together([cut.inside for cut in cuts]),
                _together([cut.outside for cut in cuts]),
                prod(cut.count for cut in cuts),
            )


@dataclass(frozen=True)
class _Cut:
    """What an index along one axis selects from one chunk."""

    number: int
    length: int
    inside: AxisIndex
    outside: AxisIndex
    count: int


def _cuts(index: AxisIndex, edges: Sequence[int], length: int) -> Iterator[_Cut]:
    wanted: Any = range(length)[index] if isinstance(index, slice) else np.unique(index)
    at = 0
    while at < len(wanted):
        number = bisect_right(edges, wanted[at]) - 1
        begin, end = edges[number], min(edges[number + 1], length)
        stop = bisect_left(wanted, end)
        if isinstance(index, slice):
            inside: AxisIndex = slice(wanted[at] - begin, wanted[stop - 1] - begin + 1, wanted.step)
            outside: AxisIndex = slice(at, stop)
        else:
            outside = np.flatnonzero((index >= begin) & (index < end))
            inside = index[outside] - begin
        yield _Cut(number, end - begin, inside, outside, stop - at)
        at = stop


def _together(indices: list[AxisIndex]) -> tuple[Any, ...]:
    """Return one NumPy index for all axes, which selects along each axis by itself."""
    if all(isinstance(one, slice) for one in indices):
        return tuple(indices)
    return np.ix_(*(np.arange(one.start, one.stop, one.step) if isinstance(one, slice) else one for one in indices))


def boxes(mask: npt.NDArray[np.bool_], inner: tuple[int, ...] | None) -> list[Region]:
    """Return boxes that together hold all pixels of a mask, which is not empty, and few others.

    Parameters
    ----------
    mask
        The written pixels of a chunk or of a shard.
    inner
        The shape of the chunks of a shard; None if the mask is that of a chunk.

    Returns
    -------
    list of tuple of slice
        One box, or one for each chunk of a shard if some chunks between them have no pixel of the mask.
    """
    whole = _bounds(mask)
    if inner is None:
        return [whole]
    found = []
    grid = [range(side.start // size * size, side.stop, size) for side, size in zip(whole, inner, strict=True)]
    for corner in product(*grid):
        own = mask[tuple(slice(at, at + size) for at, size in zip(corner, inner, strict=True))]
        if own.any():
            found.append(tuple(slice(at + s.start, at + s.stop) for at, s in zip(corner, _bounds(own), strict=True)))
    return [whole] if len(found) == prod(map(len, grid)) else found


def _bounds(mask: npt.NDArray[np.bool_]) -> Region:
    """Return the smallest box around the pixels of a mask."""
    box = []
    for axis in range(mask.ndim):
        places = np.flatnonzero(mask.any(axis=tuple(one for one in range(mask.ndim) if one != axis)))
        box.append(slice(int(places[0]), int(places[-1]) + 1))
    return tuple(box)
