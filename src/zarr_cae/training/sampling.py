"""Windows from all over a collection, for a fit: to train on, and to hold out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.pixels.convert import resolve_value_range, to_planes, to_root
from zarr_cae.pixels.layout import Layout, ValueRange, ValueTransform
from zarr_cae.pixels.mask import fill, find_mask

Window = npt.NDArray[Any]
"""(H, W, 3), uint8 or float32 from 0 to 255, NaN where there is no data. Grey windows repeat their only channel."""
EDGE = 256
_EDGES = (EDGE, 128, 64)
_SMALLEST = 32
_FEWEST, _MOST = 16, 400
_CANDIDATES = 3
"""Windows that are read for each one that is kept, where there are so many."""
_FLAT = 0.1
"""A window counts as flat, such as the glass around tissue, if its deviation is less than this share of that of busy
windows of the same picture."""
_BUSY = 90
_FLAT_SHARE = 0.05
"""Flat windows among those that are kept, so that a fit does not forget them."""
_HELD_OUT_SHARE = 0.1
_LARGEST_HELD_OUT_SHARE = 1 / 3
_MOST_HELD_OUT = 16
_PADDED_EVERY = 4
_FEWEST_IMAGES = 4
"""Of so many images or more, whole ones are held out."""
_TWO_RUNS = 20
"""Of so many images or more, some neighbours are held out in the first half, and some in the second."""


@dataclass(frozen=True)
class ImageStack:
    """An array of pictures: which axis holds colours, and which values its samples have."""

    array: Any
    channel_axis: int | None
    value_range: ValueRange | None = None
    close: Callable[[], None] = lambda: None
    nodata: float | None = None
    """The value of samples without data."""
    same_place: tuple[int, ...] = ()
    """Axes along which pictures show the same place, such as the channels of a microscope: they count as one image."""
    value_transform: ValueTransform = None
    """The value transform of the codec: windows have the values that it codes."""


@dataclass(frozen=True)
class ImageSource:
    """A part of a collection, such as an image file, that is opened when windows of it are read."""

    size: float
    """Its pixels, in any unit that is the same for all parts."""
    open: Callable[[], ImageStack]


@dataclass(frozen=True)
class Sample:
    """Windows of a collection."""

    windows: list[Window]
    held_out: list[Window]
    """No pixel of these is in `windows`. They are from other images, if the collection has at least four."""
    description: str
    """What was held out, such as "4 of 40 images"."""


@dataclass(frozen=True)
class _Cell:
    """A place for a window: cells of a picture do not overlap."""

    plane: tuple[int, ...]
    rows: slice
    columns: slice

    def place(self, same_place: tuple[int, ...]) -> _Place:
        """Return the place within its part. Pictures along the axes `same_place` have the same places."""
        image = tuple(number for axis, number in enumerate(self.plane) if axis not in same_place)
        return image, self.rows.start, self.columns.start


_Place = tuple[tuple[int, ...], int, int]
"""Where a window lies in its part: the image, and its first row and column there."""


def sample_windows(parts: Sequence[ImageSource], seed: int) -> Sample:
    """Return windows from all over a collection.

    Few of them are flat, such as the glass around tissue. Windows without any data are left out.

    Parameters
    ----------
    parts
        The collection. A part with more pixels gives more windows.
    seed
        Of the random choice.

    Raises
    ------
    CAEConfigurationError
        If the collection is too small, or a picture has values outside its value range.
    """
    random = np.random.default_rng(seed)
    order = [parts[index] for index in sorted(random.permutation(len(parts))[:_MOST])]
    total = sum(part.size for part in order)
    for edge in _EDGES:
        by_part = [_windows(part, edge, max(1, round(_MOST * part.size / total)), random) for part in order]
        count = sum(map(len, by_part))
        if count >= _FEWEST or edge == _EDGES[-1]:
            break
    if count < 4:
        raise CAEConfigurationError(
            f"cae: a fit needs at least 4 windows of {_EDGES[-1]} px from the images, and found {count}; use the "
            "bundled weights for so few pixels"
        )
    return _divided([(part, *one) for part, windows in enumerate(by_part) for one in windows], random)


def _divided(found: Sequence[tuple[int, _Place, Window]], random: np.random.Generator) -> Sample:
    """Hold out a share of the windows: whole images if there are enough of them, else neighbouring rows of windows.

    Images of one patient, or of one flight, look alike, and are often neighbours in the order of the collection. So
    neighbours are held out together.

    Parameters
    ----------
    found
        The number of the part, the place there, and the window.
    random
        Puts the windows into a random order, and chooses some of those held out if they are many.
    """
    # Try whole parts, images within them, rows of windows, places, and at last single windows.
    for depth in range(1, 6):
        groups = [(part, *place, number)[:depth] for number, (part, place, _) in enumerate(found)]
        counts = Counter(groups)
        units = sorted(counts)
        whole_images = depth <= 2
        if whole_images and len(units) < _FEWEST_IMAGES:
            continue
        chosen = {units[one] for one in _runs([counts[unit] for unit in units])}
        held_out = [number for number, group in enumerate(groups) if group in chosen]
        if len(held_out) <= _LARGEST_HELD_OUT_SHARE * len(found):
            break
    description = f"{len(chosen)} of {len(units)} images"
    if not whole_images:
        description = f"{len(held_out)} of {len(found)} windows{', side by side' if len(held_out) > 1 else ''}"
    rest = [number for number, group in enumerate(groups) if group not in chosen]
    some = random.permutation(held_out)[:_MOST_HELD_OUT]
    return Sample([found[one][2] for one in random.permutation(rest)], [found[one][2] for one in some], description)


def _runs(counts: Sequence[int]) -> Iterator[int]:
    """Yield the numbers of the units to hold out, by how many windows each unit has."""
    if len(counts) < _TWO_RUNS:
        yield from _run(counts, 0, len(counts))
    else:
        middle = len(counts) // 2
        yield from _run(counts, 0, middle)
        yield from _run(counts, middle, len(counts))


def _run(counts: Sequence[int], start: int, stop: int) -> range:
    """Return consecutive units that have the share of windows to hold out, and few more; the most central ones."""
    least = _HELD_OUT_SHARE * sum(counts[start:stop])
    runs = []
    for first in range(start, stop):
        totals = np.cumsum(counts[first:stop])
        if totals[-1] >= least:
            length = int(np.searchsorted(totals, least)) + 1
            off_centre = abs(2 * first + length - start - stop)
            runs.append((int(totals[length - 1]), off_centre, range(first, first + length)))
    return min(runs, key=lambda run: run[:2])[2]


def large_enough(sample: Sample, least: int) -> Sample:
    """Return the windows of a sample with sides of at least `least` pixels.

    Raises
    ------
    CAEConfigurationError
        If there are fewer than three to train on, or none to hold out.
    """
    windows, held_out = (
        [window for window in some if min(window.shape[:2]) >= least] for some in (sample.windows, sample.held_out)
    )
    if len(windows) < 3 or not held_out:
        raise CAEConfigurationError(
            f"cae: a fit for ms-ssim needs windows of at least {least} px; the images are too small"
        )
    return Sample(windows, held_out, sample.description)


def some_padded(windows: Sequence[Window], random: np.random.Generator) -> list[Window]:
    """Return windows of which every fourth ends in padding, as chunks at the edges of an array do.

    The padding is black or white by turns: the usual fill values. A fit that knew none made such chunks a tenth larger.
    """
    result = list(windows)
    for number, place in enumerate(range(_PADDED_EVERY - 1, len(result), _PADDED_EVERY)):
        window, axis = result[place], number % 2
        values = window[..., : 1 if window.strides[2] == 0 else 3].copy()
        padding = slice(int(random.integers(1, window.shape[axis])), None)
        values[(slice(None),) * axis + (padding,)] = 255 if number // 2 % 2 else 0
        result[place] = np.broadcast_to(values, window.shape)
    return result


def _windows(part: ImageSource, edge: int, count: int, random: np.random.Generator) -> list[tuple[_Place, Window]]:
    """Return up to `count` windows of a part, few of which are flat, and their places."""
    picture = part.open()
    try:
        cells = list(_cells(picture, edge, random, _CANDIDATES * count))
        read = [(cell.place(picture.same_place), _read(picture, cell)) for cell in cells]
    finally:
        picture.close()
    found = [(place, window) for place, window in read if window is not None]
    deviation = np.array([np.nanstd(window) for _, window in found])
    flat = deviation < _FLAT * np.percentile(deviation, _BUSY) if found else np.zeros(0, bool)
    order = random.permutation(len(found))
    busy_ones = [found[index] for index in order if not flat[index]][:count]
    flat_ones = [found[index] for index in order if flat[index]]
    return [*busy_ones, *flat_ones[: math.ceil(_FLAT_SHARE * len(busy_ones))]]


def _cells(picture: ImageStack, edge: int, random: np.random.Generator, count: int) -> Iterator[_Cell]:
    """Yield up to `count` random cells, sorted by place, so that files are read from their beginning to their end."""
    shape = picture.array.shape
    layout = Layout(shape, picture.channel_axis)
    height, width = (min(edge, side) // 16 * 16 for side in (layout.height, layout.width))
    if min(height, width) < _SMALLEST:
        return
    axes = {*layout.spatial_axes, *([layout.channel_axis] if layout.channel_axis is not None else [])}
    planes = [1 if axis in axes else length for axis, length in enumerate(shape)]
    grid = (*planes, layout.height // height, layout.width // width)
    total = math.prod(grid)
    chosen = random.choice(total, count, replace=False) if total > count else np.arange(total)
    shift = [int(random.integers(side % step + 1)) for side, step in ((layout.height, height), (layout.width, width))]
    for number in np.sort(chosen):
        *plane, row, column = (int(place) for place in np.unravel_index(number, grid))
        top, left = row * height + shift[0], column * width + shift[1]
        yield _Cell(tuple(plane), slice(top, top + height), slice(left, left + width))


def filled(window: Window) -> Window:
    """Return a window in which samples without data have values as the codec fills them in."""
    mask = np.isnan(window) if window.dtype.kind == "f" else np.zeros(0, bool)
    if not mask.any():
        return window
    channels = 1 if window.strides[2] == 0 else window.shape[2]
    values = window[..., :channels].copy()
    fill(values.transpose(2, 0, 1)[None], mask[..., :channels].transpose(2, 0, 1)[None])
    return np.broadcast_to(values, window.shape)


def _read(picture: ImageStack, cell: _Cell) -> Window | None:
    """Return a window, or None if it has no data.

    Of several channels that are not colours, the window has one after the other by its place.
    """
    layout = Layout(picture.array.shape, picture.channel_axis)
    window: list[slice] = [slice(place, place + 1) for place in cell.plane]
    for axis, part in zip(layout.spatial_axes, (cell.rows, cell.columns), strict=True):
        window[axis] = part
    if layout.channel_axis is not None:
        channel = (cell.rows.start + cell.columns.start) // 16 % layout.channels
        window[layout.channel_axis] = slice(channel, channel + 1) if layout.grey else slice(0, layout.channels)
    pixels = np.asarray(picture.array[tuple(window)])
    value_range = resolve_value_range(pixels.dtype, picture.value_range)
    own = Layout(pixels.shape, layout.channel_axis)
    mask = None if picture.nodata is None else find_mask(pixels, picture.nodata)
    if mask is None or not mask.any():
        mask = None
    elif mask.all():
        return None
    else:
        pixels = np.where(mask, pixels.dtype.type(value_range[0]), pixels)
    planes = to_planes(pixels, own, value_range)
    if picture.value_transform == "sqrt":
        planes = to_root(planes, value_range)
    values = planes[0].transpose(1, 2, 0) * np.float32(255)
    if mask is not None:
        values[to_planes(mask.view(np.uint8), own, (0, 1))[0].transpose(1, 2, 0) > 0.5] = np.nan
    elif pixels.dtype == np.uint8 and tuple(value_range) == (0, 255) and picture.value_transform is None:
        values = np.rint(values).astype(np.uint8)
    return np.broadcast_to(values, (*values.shape[:2], 3))
