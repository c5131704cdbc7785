"""The levels of a pyramid, and the order in which its blocks are made.

A pyramid is made in one pass from pixels. Every level is divided into blocks of the same edges. A block of level k is
made from at most four blocks of level k - 1, its children, reduced by two. A block can be made as soon as its children
are there, so memory holds one block and the reduced copies of its children, however large the image is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from zarr_cae.pixels.layout import Pixels, ValueRange
from zarr_cae.pixels.mask import apply_mask, find_mask

__all__ = ["Block", "Downsample", "Pyramid", "level_sizes", "reduced", "reduced_data"]

Downsample = Literal["mean", "nearest"]


class Block(NamedTuple):
    """One block of a level, by its place in the grid of blocks."""

    level: int
    plane: tuple[int, ...]
    """Indices along the axes before rows and columns, for example (time, z)."""
    row: int
    column: int

    @property
    def name(self) -> str:
        """The block as text, as it stands in the journal: level, plane, row and column."""
        return "/".join(map(str, (self.level, *self.plane, self.row, self.column)))

    @property
    def parent(self) -> Block:
        """The block of the next smaller level that holds a reduced copy of this one."""
        return Block(self.level + 1, self.plane, self.row // 2, self.column // 2)


def level_sizes(rows: int, columns: int, smallest: int, levels: int | None = None) -> list[tuple[int, int]]:
    """Return rows and columns of each level, from the largest on.

    Parameters
    ----------
    rows, columns
        Size of the image in pixels.
    smallest
        Without `levels`: halve the image until neither side is longer than this.
    levels
        The number of levels; None for as many as `smallest` asks for.
    """
    sizes = [(rows, columns)]
    while (max(sizes[-1]) > smallest) if levels is None else (len(sizes) < levels):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


@dataclass(frozen=True)
class Pyramid:
    """The grid of blocks of every level."""

    sizes: tuple[tuple[int, int], ...]
    """Rows and columns of each level in pixels."""
    planes: tuple[int, ...]
    """Lengths of the axes whose every index has blocks of its own."""
    edge: tuple[int, int]
    """Rows and columns of a block in pixels; even numbers."""

    def grid(self, level: int) -> tuple[int, int]:
        """Return how many rows and columns of blocks a level has."""
        rows, columns = (-(-n // edge) for n, edge in zip(self.sizes[level], self.edge, strict=True))
        return rows, columns

    def window(self, block: Block) -> tuple[slice, slice]:
        """Return the rows and columns of pixels that a block covers in its level."""
        starts = block.row * self.edge[0], block.column * self.edge[1]
        rows, columns = (
            slice(start, min(start + edge, length))
            for start, edge, length in zip(starts, self.edge, self.sizes[block.level], strict=True)
        )
        return rows, columns

    def pixels(self, block: Block) -> int:
        """Return how many pixels a block has."""
        rows, columns = self.window(block)
        pixels: int = (rows.stop - rows.start) * (columns.stop - columns.start)
        return pixels

    def children(self, block: Block) -> list[Block]:
        """Return the blocks of the next larger level from which a block is made; none for level 0."""
        if block.level == 0:
            return []
        rows, columns = self.grid(block.level - 1)
        places = itertools.product((2 * block.row, 2 * block.row + 1), (2 * block.column, 2 * block.column + 1))
        return [Block(block.level - 1, block.plane, row, col) for row, col in places if row < rows and col < columns]

    def blocks(self, *, by_rows: bool = False) -> Iterator[Block]:
        """Yield all blocks, children before their parent.

        Parameters
        ----------
        by_rows
            Go through level 0 row by row, for files in which a pixel is cheap to read only together with its row. By
            default each block follows its children at once, so that few reduced copies wait for their parent.
        """
        for plane in itertools.product(*(range(n) for n in self.planes)):
            if by_rows:
                yield from self._by_rows(plane)
            else:
                for row, column in itertools.product(*map(range, self.grid(len(self.sizes) - 1))):
                    yield from self._below(Block(len(self.sizes) - 1, plane, row, column))

    def _below(self, block: Block) -> Iterator[Block]:
        for child in self.children(block):
            yield from self._below(child)
        yield block

    def _by_rows(self, plane: tuple[int, ...]) -> Iterator[Block]:
        left: dict[Block, int] = {}
        for row, column in itertools.product(*map(range, self.grid(0))):
            block = Block(0, plane, row, column)
            yield block
            while block.level + 1 < len(self.sizes):
                block = block.parent
                left[block] = left.get(block, len(self.children(block))) - 1
                if left[block]:
                    break
                yield block


def reduced(pixels: Pixels, downsample: Downsample = "mean") -> Pixels:
    """Return an image of half the rows and columns, which are the last two axes.

    With "mean" each pixel is the mean of its 2 x 2 pixels (fewer at an odd edge); integers are rounded half up.
    "nearest" takes the first of the four.
    """
    if downsample == "nearest":
        return np.ascontiguousarray(pixels[..., ::2, ::2])
    odd = [(0, 0)] * (pixels.ndim - 2) + [(0, length % 2) for length in pixels.shape[-2:]]
    if any(pad for _, pad in odd):
        pixels = np.pad(pixels, odd, mode="edge")
    quarters = [pixels[..., row::2, column::2] for row, column in itertools.product((0, 1), (0, 1))]
    if pixels.dtype.kind == "f":
        return (_sum(quarters, np.dtype(np.float64)) / 4).astype(pixels.dtype)
    if pixels.dtype.itemsize < 8:
        wide = np.dtype({1: np.int16, 2: np.int32, 4: np.int64}[pixels.dtype.itemsize])
        total = _sum(quarters, wide)
        total += 2
        total >>= 2
        return total.astype(pixels.dtype)
    whole = sum(quarter >> 2 for quarter in quarters)  # sums of 64-bit integers could overflow
    rest = sum(quarter & 3 for quarter in quarters) + 2
    return np.asarray(whole + (rest >> 2), pixels.dtype)


def reduced_data(pixels: Pixels, downsample: Downsample, nodata: float, value_range: ValueRange) -> Pixels:
    """Return the same as `reduced`, for an image in which pixels of the value `nodata` have no data.

    A pixel without data counts as the first of its 2 x 2 pixels that has data. The result has no data where none of the
    four has.
    """
    if downsample == "nearest":
        return reduced(pixels, downsample)
    odd = [(0, 0)] * (pixels.ndim - 2) + [(0, length % 2) for length in pixels.shape[-2:]]
    filled = np.pad(pixels, odd, mode="edge")
    holes = find_mask(filled, nodata)
    places = [(..., slice(row, None, 2), slice(column, None, 2)) for row, column in itertools.product((0, 1), (0, 1))]
    first, empty = filled[places[0]].copy(), holes[places[0]].copy()
    for place in places[1:]:
        taken = empty & ~holes[place]
        first[taken] = filled[place][taken]
        empty &= ~taken
    for place in places:
        np.copyto(filled[place], first, where=holes[place])
    result = reduced(filled, downsample)
    apply_mask(result, empty, nodata, value_range)
    return result


def _sum(parts: Sequence[Pixels], dtype: np.dtype[Any]) -> Pixels:
    total = parts[0].astype(dtype)
    for part in parts[1:]:
        total += part
    return total
