"""Windows from all over a collection, for a fit: to train on, and to hold out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.pixels.convert import resolve_value_range, to_planes
from zarr_cae.pixels.layout import Layout, ValueRange
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
_MOST_HELD_OUT = 16


@dataclass(frozen=True)
class ImageStack:
    """An array of pictures: which axis holds colours, and which values its samples have."""

    array: Any
    channel_axis: int | None
    value_range: ValueRange | None = None
    close: Callable[[], None] = lambda: None
    nodata: float | None = None
    """The value of samples without data."""


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
    """No pixel of these is in `windows`. They are from other parts, if the collection has many."""


@dataclass(frozen=True)
class _Cell:
    """A place for a window: cells of a picture do not overlap."""

    plane: tuple[int, ...]
    rows: slice
    columns: slice


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
    order = [parts[index] for index in random.permutation(len(parts))[:_MOST]]
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
    every = round(1 / _HELD_OUT_SHARE)
    filled = [windows for windows in by_part if windows]
    if len(filled) >= 2 * every:
        held_out = [window for windows in filled[::every] for window in windows]
        rest = [window for place, windows in enumerate(filled) if place % every for window in windows]
    else:
        windows = [window for windows in filled for window in windows]
        held_out = windows[::every]
        rest = [window for place, window in enumerate(windows) if place % every]
    chosen = random.permutation(len(held_out))[:_MOST_HELD_OUT]
    return Sample(rest, [held_out[index] for index in chosen])


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
    return Sample(windows, held_out)


def _windows(part: ImageSource, edge: int, count: int, random: np.random.Generator) -> list[Window]:
    """Return up to `count` windows of a part in random order, few of which are flat."""
    picture = part.open()
    try:
        cells = list(_cells(picture, edge, random, _CANDIDATES * count))
        found = [window for cell in cells if (window := _read(picture, cell)) is not None]
    finally:
        picture.close()
    deviation = np.array([np.nanstd(window) for window in found])
    flat = deviation < _FLAT * np.percentile(deviation, _BUSY) if found else np.zeros(0, bool)
    busy_ones = [window for window, one in zip(found, flat, strict=True) if not one][:count]
    flat_ones = [window for window, one in zip(found, flat, strict=True) if one]
    kept = [*busy_ones, *flat_ones[: math.ceil(_FLAT_SHARE * len(busy_ones))]]
    return [kept[index] for index in random.permutation(len(kept))]


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
    values = to_planes(pixels, own, value_range)[0].transpose(1, 2, 0) * np.float32(255)
    if mask is not None:
        values[to_planes(mask.view(np.uint8), own, (0, 1))[0].transpose(1, 2, 0) > 0.5] = np.nan
    elif pixels.dtype == np.uint8 and tuple(value_range) == (0, 255):
        values = np.rint(values).astype(np.uint8)
    return np.broadcast_to(values, (*values.shape[:2], 3))
