"""Chunks to float planes and back: dtype and value range, padding, crop, rounding.

`pixels.device` does the same for tensors on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zarr_cae.coder.frame import STRIDE
from zarr_cae.errors import CAEConfigurationError, CAEDataError
from zarr_cae.pixels.layout import RGB, Chunk, Layout, Planes, ValueRange, ValueTransform

_AT_A_TIME = 1 << 17
"""Samples converted at a time: few enough for the cache of a core."""


def resolve_value_range(dtype: np.dtype[Any], value_range: ValueRange | None) -> ValueRange:
    """Return the values that become 0 and 1.

    Parameters
    ----------
    dtype
        The dtype of the array.
    value_range
        (lowest, highest) value of the data. None is (0, 255) for uint8, and an error for other dtypes.

    Raises
    ------
    CAEConfigurationError
        If the dtype can't be coded, or the range does not fit it.
    """
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
        largest = float(np.finfo(dtype).max)  # a Python float: NumPy's would convert the other operand of a comparison
        fits = -largest <= low < high <= largest and math.isfinite(float(high) - float(low))
    else:
        fits = np.iinfo(dtype).min <= low < high <= np.iinfo(dtype).max and low == int(low) and high == int(high)
        low, high = (int(low), int(high)) if fits else (low, high)
    if not fits:
        raise CAEConfigurationError(f"cae: value_range {low, high} is not an ascending pair of values of dtype {dtype}")
    return low, high


def to_planes(chunk: Chunk, layout: Layout, value_range: ValueRange) -> Planes:
    """Return a chunk as planes (N, 3 or 1, H', W') in [0, 1], padded with the edge pixels to multiples of 16.

    The chunk is not changed.

    Raises
    ------
    CAEDataError
        If a value lies outside the range: decoding could not return it.
    """
    if layout.mixed:
        together: Planes = joined(to_planes(chunk, layout.separate, value_range), layout)
        return together
    low, high = value_range
    if not (chunk.dtype == np.uint8 and value_range == (0, 255)):
        _check_range(chunk, value_range)
    ordered = chunk.transpose(layout.channels_first)
    ordered = ordered.reshape(layout.planes, 1 if layout.grey else RGB, layout.height, layout.width)
    rows, columns = (-(-side // STRIDE) * STRIDE for side in ordered.shape[2:])
    # The components of a pixel lie side by side in memory: the networks read them in this order.
    planes = np.empty((len(ordered), rows, columns, ordered.shape[1]), np.float32).transpose(0, 3, 1, 2)
    inside = planes[:, :, : layout.height, : layout.width]
    if chunk.dtype.kind == "f":
        np.divide(np.subtract(ordered, low, dtype=np.float64), float(high) - float(low), out=inside, casting="unsafe")
    else:
        np.multiply(_above(ordered, int(low)), np.float32(1 / (high - low)), out=inside, casting="unsafe")
    planes[:, :, : layout.height, layout.width :] = planes[:, :, : layout.height, layout.width - 1 : layout.width]
    planes[:, :, layout.height :] = planes[:, :, layout.height - 1 : layout.height]
    return planes


def joined(planes: Any, layout: Layout) -> Any:
    """Return sample planes (S, 1, H, W) as the planes (N, 3 or 1, H, W) of a layout, with grey components repeated.

    The planes may be an array or a tensor.
    """
    if layout.grey:
        return planes
    images = planes.reshape(layout.images, layout.channels, *planes.shape[2:])
    components = [*(layout.colour or ()), *(channel for channel in layout.greys for _ in range(RGB))]
    return images[:, components].reshape(layout.planes, RGB, *planes.shape[2:])


def separated(planes: Planes, layout: Layout) -> Planes:
    """Return the planes (N, 3 or 1, H, W) of a layout as sample planes (S, 1, H, W): the inverse of `joined`.

    A grey plane is the mean of its components.
    """
    if layout.grey:
        grey: Planes = planes.mean(1, keepdims=True)
        return grey
    images = planes.reshape(layout.images, -1, RGB, *planes.shape[2:])
    samples = np.empty((layout.images, layout.channels, *planes.shape[2:]), planes.dtype)
    samples[:, layout.colour] = images[:, 0]
    samples[:, layout.greys] = images[:, 1:].mean(2)
    return samples.reshape(-1, 1, *planes.shape[2:])


def _above(integers: Chunk, low: int) -> Chunk:
    """Return the exact distance of integers from `low`, as unsigned integers: their own dtype may be too small."""
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
    """Return the error message for pixels outside their range; a NaN is both the lowest and the highest value."""
    if lowest != lowest:  # noqa: PLR0124
        return (
            f"cae: pixels have NaN, which does not fit value_range {value_range}; if NaN stands for pixels without "
            "data, create the array with CAECodec(..., nodata=float('nan')), which stores them exactly; otherwise "
            "replace NaN by a value inside (numpy.nan_to_num; numpy.clip keeps NaN)"
        )
    return (
        f"cae: pixels from {lowest} to {highest} do not fit value_range {value_range}; clip them, or create the "
        "array with a wider value_range (and, as incomplete chunks are filled with it, a fill_value inside)"
    )


def to_root(planes: Planes, value_range: ValueRange) -> Planes:
    """Return planes under the value transform "sqrt", which equalises the noise of photon counts.

    With E = highest - lowest and a = sqrt(3/8), a sample x in [0, 1] becomes

        y = (sqrt(E x + 3/8) - a) / (sqrt(E + 3/8) - a),

    which rises from 0 to 1. Values count in units of the data, from the lowest of the range. (Anscombe, The
    transformation of Poisson, binomial and negative-binomial data, Biometrika 35, 1948.)

    Parameters
    ----------
    planes
        (N, C, H, W) float32 in [0, 1], as from `to_planes`.
    value_range
        (lowest, highest) value of the data.

    Returns
    -------
    array
        (N, C, H, W) float32 in [0, 1].
    """
    extent, least, factor = root_constants(value_range)
    values = planes * np.float64(extent)
    values += 0.375
    np.sqrt(values, out=values)
    values -= least
    values *= factor
    return values.astype(np.float32).clip(0, 1)


def from_root(planes: Planes, value_range: ValueRange) -> Planes:
    """Return planes without the value transform "sqrt": the algebraic inverse of `to_root`, after a clip to [0, 1].

    x = ((y (sqrt(E + 3/8) - a) + a)^2 - 3/8) / E
    """
    extent, least, factor = root_constants(value_range)
    values = np.clip(planes, 0, 1).astype(np.float64)
    values /= factor
    values += least
    np.square(values, out=values)
    values -= 0.375
    values /= extent
    return values.astype(np.float32).clip(0, 1)


def root_constants(value_range: ValueRange) -> tuple[float, float, float]:
    """Return E, sqrt(3/8) and 1 / (sqrt(E + 3/8) - sqrt(3/8)) of the value transform "sqrt"."""
    extent, least = float(value_range[1] - value_range[0]), math.sqrt(0.375)  # large integers are subtracted exactly
    return extent, least, 1 / (math.sqrt(extent + 0.375) - least)


def to_chunk(
    planes: Planes,
    layout: Layout,
    dtype: np.dtype[Any],
    value_range: ValueRange,
    transform: ValueTransform = None,
) -> Chunk:
    """Return planes (N, 3 or 1, H', W') as a chunk: cropped, clipped to the range, rounded if dtype is integer.

    The value transform is undone. A grey plane is the mean of its components, if it has three.
    """
    if layout.mixed or planes.shape[1] == RGB > len(layout.colour or ()):
        planes, layout = separated(planes, layout), layout.separate
    if transform == "sqrt":
        planes = from_root(planes, value_range)
    low, high = value_range
    # Convert some rows at a time, to bound memory.
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
    """Return values in [low, high], computed in float64: in a small range far from 0 there are few float32 values."""
    values = planes * np.float64(float(high) - float(low))
    values += low
    return np.clip(values, low, high, out=values)


def _integers(planes: Planes, dtype: np.dtype[Any], low: int, high: int) -> Chunk:
    """Return values in [low, high], modulo 2^n in the unsigned type of the dtype's size."""
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
