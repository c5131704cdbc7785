"""Zarr chunks to float planes and back: axes, dtype and value range, padding, crop, rounding.

A chunk has a channel axis or none. Of its other axes the last two are an image's rows and columns, and all before
them are batch axes. A channel axis of length 3 is coded as RGB, one plane of three components; any other length, or
no channel axis, as independent grey planes of one component.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_cae.coder.frame import STRIDE
from zarr_cae.errors import CAEConfigurationError, CAEDataError

RGB = 3
_IMAGE_MINIMUM = 32
_IMAGE_ASPECT = 4
_STACK_MINIMUM = 16

Chunk = npt.NDArray[Any]
Planes = npt.NDArray[np.float32]
ValueRange = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """How the axes of a chunk map to planes (N, C, H, W)."""

    shape: tuple[int, ...]
    """The chunk's shape."""
    channel_axis: int | None

    def __post_init__(self) -> None:
        axis, needed = self.channel_axis, 2 if self.channel_axis is None else 3
        if len(self.shape) < needed:
            with_channels = "" if axis is None else " and a channel axis"
            raise CAEConfigurationError(
                f"cae: shape {self.shape} has {len(self.shape)} axes; rows and columns{with_channels} need "
                f"at least {needed}"
            )
        if axis is not None and not 0 <= axis < len(self.shape):
            raise CAEConfigurationError(
                f"cae: channel_axis {axis} does not exist in shape {self.shape}; expected 0 to {len(self.shape) - 1}"
            )

    @property
    def channels(self) -> int:
        """Length of the channel axis; 1 without one."""
        return 1 if self.channel_axis is None else self.shape[self.channel_axis]

    @property
    def grey(self) -> bool:
        """Whether the planes have one component each, not three."""
        return self.channels != RGB

    @property
    def spatial_axes(self) -> tuple[int, int]:
        """The axes of the image's rows and columns."""
        rows, columns = [axis for axis in range(len(self.shape)) if axis != self.channel_axis][-2:]
        return rows, columns

    @property
    def height(self) -> int:
        """Rows of a plane in pixels, before padding."""
        return self.shape[self.spatial_axes[0]]

    @property
    def width(self) -> int:
        """Columns of a plane in pixels, before padding."""
        return self.shape[self.spatial_axes[1]]

    @property
    def planes(self) -> int:
        """Number of planes: images, times channels where these are grey."""
        return math.prod(self.shape) // (self.height * self.width * (1 if self.grey else RGB))

    @property
    def channels_first(self) -> tuple[int, ...]:
        """The permutation that puts batch axes first, then channels if there are any, rows, columns."""
        rows, columns = self.spatial_axes
        batch = [axis for axis in range(len(self.shape)) if axis not in (self.channel_axis, rows, columns)]
        return (*batch, *(() if self.channel_axis is None else (self.channel_axis,)), rows, columns)


@dataclass(frozen=True)
class PixelFormat:
    """The pixels of a whole chunk: how they map to planes, their dtype and value range."""

    layout: Layout
    dtype: np.dtype[Any]
    value_range: ValueRange
    stays: bool = False
    """Whether decoded pixels stay on the device of the network, as a tensor."""

    @property
    def plane_shape(self) -> tuple[int, int, int]:
        """Components, rows and columns of a plane, padded."""
        rows, columns = (-(-side // STRIDE) * STRIDE for side in (self.layout.height, self.layout.width))
        return 1 if self.layout.grey else RGB, rows, columns

    @property
    def pixels(self) -> int:
        """Of all planes."""
        return self.layout.planes * self.plane_shape[1] * self.plane_shape[2]


_AT_A_TIME = 1 << 17
"""Samples that are converted at a time; few enough for a core's cache."""


def resolve_channel_axis(shape: tuple[int, ...], channel_axis: int | str | None) -> int | None:
    """The channel axis of an array of this shape, as a non-negative number or None.

    "auto" takes the only axis of length 3, or none, and refuses what could be read in two ways: several such axes;
    none, and last two axes that are no image's; one before the last axis of a stack (four axes or more) whose columns
    are fewer than 16 and a quarter of the rows or less, as (3, 256, 256, 4) is rather a stack of 3 RGBA images. Raises
    CAEConfigurationError.
    """
    explicit = "give channel_axis=<number of the axis>, or channel_axis=None if there is none"
    if channel_axis != "auto":
        if isinstance(channel_axis, str):
            raise CAEConfigurationError(f"cae: channel_axis must be an integer, None or 'auto', got {channel_axis!r}")
        if channel_axis is not None and -len(shape) <= channel_axis < 0:
            channel_axis += len(shape)
        return Layout(shape, channel_axis).channel_axis
    if len(shape) <= 2:
        return Layout(shape, None).channel_axis
    threes = [axis for axis, length in enumerate(shape) if length == RGB]
    if len(threes) == 1:
        layout = Layout(shape, threes[0])
        narrow = layout.width < _STACK_MINIMUM and layout.height >= _IMAGE_ASPECT * layout.width
        if narrow and len(shape) > 3 and threes[0] < len(shape) - 1:
            raise CAEConfigurationError(
                f"cae: channel_axis 'auto' is ambiguous for shape {shape}: axis {threes[0]} has length 3, but RGB "
                f"images of {layout.height} x {layout.width} (the last two of the other axes) may not be what is "
                f"meant; {explicit}"
            )
        return threes[0]
    if threes:
        raise CAEConfigurationError(
            f"cae: channel_axis 'auto' is ambiguous for shape {shape}: axes {threes} all have length 3; {explicit}"
        )
    smaller, larger = sorted(shape[-2:])
    if smaller < _IMAGE_MINIMUM or larger >= _IMAGE_ASPECT * smaller:
        raise CAEConfigurationError(
            f"cae: channel_axis 'auto' is ambiguous for shape {shape}: no axis has length 3, and images of "
            f"{shape[-2]} x {shape[-1]} (the last two axes) may not be what is meant; {explicit}"
        )
    return None


def resolve_value_range(dtype: np.dtype[Any], value_range: ValueRange | None) -> ValueRange:
    """The values that become 0 and 1. Raises CAEConfigurationError for what cannot be coded."""
    if dtype.kind not in "uif":
        raise CAEConfigurationError(f"cae: dtype {dtype} cannot be coded; expected a real integer or float dtype")
    if value_range is None:
        if dtype == np.uint8:
            return 0, 255
        raise CAEConfigurationError(
            f"cae: dtype {dtype} needs value_range=(lowest, highest) of the data; only uint8 has a default, (0, 255)"
        )
    low, high = value_range
    if dtype.kind == "f":
        largest = float(np.finfo(dtype).max)  # a float of Python: NumPy's would convert what it is compared with
        fits = -largest <= low < high <= largest and math.isfinite(float(high) - float(low))
    else:
        fits = np.iinfo(dtype).min <= low < high <= np.iinfo(dtype).max and low == int(low) and high == int(high)
        low, high = (int(low), int(high)) if fits else (low, high)
    if not fits:
        raise CAEConfigurationError(f"cae: value_range {low, high} is not an ascending pair of values of dtype {dtype}")
    return low, high


def to_planes(chunk: Chunk, layout: Layout, value_range: ValueRange) -> Planes:
    """A chunk as planes (N, 3 or 1, H', W') in [0, 1], H' and W' padded to multiples of 16 with the edge pixels.

    The chunk is not changed. Raises CAEDataError for values outside the range, which could not be given back.
    """
    low, high = value_range
    if not (chunk.dtype == np.uint8 and value_range == (0, 255)):
        _check_range(chunk, value_range)
    ordered = chunk.transpose(layout.channels_first)
    ordered = ordered.reshape(layout.planes, 1 if layout.grey else RGB, layout.height, layout.width)
    rows, columns = (-(-side // STRIDE) * STRIDE for side in ordered.shape[2:])
    # The components of a pixel side by side in memory, as networks take them.
    planes = np.empty((len(ordered), rows, columns, ordered.shape[1]), np.float32).transpose(0, 3, 1, 2)
    inside = planes[:, :, : layout.height, : layout.width]
    if chunk.dtype.kind == "f":
        np.divide(np.subtract(ordered, low, dtype=np.float64), float(high) - float(low), out=inside, casting="unsafe")
    else:
        np.multiply(_above(ordered, int(low)), np.float32(1 / (high - low)), out=inside, casting="unsafe")
    planes[:, :, : layout.height, layout.width :] = planes[:, :, : layout.height, layout.width - 1 : layout.width]
    planes[:, :, layout.height :] = planes[:, :, layout.height - 1 : layout.height]
    return planes


def _above(integers: Chunk, low: int) -> Chunk:
    """How far integers lie above `low`, exactly: modulo 2^n, as their own dtype may not hold the distance."""
    if low == 0:
        return integers
    distance = integers.astype(f"u{integers.itemsize}")
    distance -= distance.dtype.type(low % (1 << 8 * distance.itemsize))
    return distance


def _check_range(chunk: Chunk, value_range: ValueRange) -> None:
    lowest, highest = chunk.min(), chunk.max()
    if not (value_range[0] <= lowest and highest <= value_range[1]):
        raise CAEDataError(outside_message(lowest, highest, value_range))


def outside_message(lowest: Any, highest: Any, value_range: ValueRange) -> str:
    """What is said of pixels outside their range."""
    return (
        f"cae: pixels from {lowest} to {highest} do not fit value_range {value_range}; clip them, or create the "
        "array with a wider value_range (and, as incomplete chunks are filled with it, a fill_value inside)"
    )


def to_chunk(planes: Planes, layout: Layout, dtype: np.dtype[Any], value_range: ValueRange) -> Chunk:
    """Planes (N, 3 or 1, H', W') back to a chunk: cropped, clipped to the range, rounded where dtype is integer."""
    low, high = value_range
    # Components side by side, and only some rows at a time in floats: a chunk may be large.
    values = np.empty((len(planes), layout.height, layout.width, planes.shape[1]), dtype).transpose(0, 3, 1, 2)
    count = max(1, _AT_A_TIME // planes[:, :, 0].size)
    for top in range(0, layout.height, count):
        rows = slice(top, min(top + count, layout.height))
        some = planes[:, :, rows, : layout.width]
        values[:, :, rows] = (
            _floats(some, low, high) if dtype.kind == "f" else _integers(some, dtype, int(low), int(high))
        ).astype(dtype, copy=False)
    order = layout.channels_first
    ordered = values.reshape([layout.shape[axis] for axis in order])
    return np.ascontiguousarray(ordered.transpose(np.argsort(order)))


def _floats(planes: Planes, low: float, high: float) -> Chunk:
    """Values in [low, high]; in float64, as a small range far from 0 has few values of float32."""
    values = planes * np.float64(float(high) - float(low))
    values += low
    return np.clip(values, low, high, out=values)


def _integers(planes: Planes, dtype: np.dtype[Any], low: int, high: int) -> Chunk:
    """Values in [low, high] in dtype, or modulo 2^n in the unsigned type of its size."""
    extent = high - low
    values = planes * (np.float32(extent) if extent < 1 << 16 else np.float64(extent))
    largest = float(extent)
    if largest > extent:  # float64 has rounded it up
        largest = math.nextafter(largest, 0)
    np.clip(values, 0, values.dtype.type(largest), out=values)
    np.rint(values, out=values)
    integers: Chunk = values.astype(f"u{dtype.itemsize}")
    if low:
        integers += integers.dtype.type(low % (1 << 8 * integers.itemsize))
    return integers
