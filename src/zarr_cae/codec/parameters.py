"""Check the parameters of `CAECodec`, and bring them into the form that metadata store."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, Literal, cast

import numpy as np

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.pixels.layout import RGB, ValueRange

ChannelAxis = int | Literal["auto"] | None
Colour = tuple[int, int, int] | None
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LARGEST_PSNR = 200


def checked_integer(value: object) -> object:
    """Return a NumPy integer as a Python integer, which JSON can hold; return anything else unchanged."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is none of the choices."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise CAEConfigurationError(f"cae: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def checked_channel_axis(value: object) -> ChannelAxis:
    """Return the number of an axis as a Python integer, None or "auto"."""
    value = checked_integer(value)
    if value is None or type(value) is int or (isinstance(value, str) and value == "auto"):
        return cast("ChannelAxis", value)
    raise CAEConfigurationError(f"cae: channel_axis must be an integer, None or 'auto', got {value!r}")


def checked_colour(value: Any, channel_axis: ChannelAxis) -> Colour:
    """Return three channels as Python integers, or None."""
    if value is None:
        return None
    try:
        channels = tuple(map(checked_integer, value))
    except TypeError:
        channels = ()
    if not all(type(one) is int and one >= 0 for one in channels) or not len(channels) == len(set(channels)) == RGB:
        raise CAEConfigurationError(
            f"cae: colour must be the positions of red, green and blue along channel_axis, such as (0, 1, 2), or None; "
            f"got {value!r}"
        )
    if channel_axis is None:
        raise CAEConfigurationError(f"cae: colour {value!r} needs a channel_axis; got None")
    return cast("Colour", channels)


def checked_value_range(value: object) -> ValueRange | None:
    """Return a pair of finite numbers, or None."""
    if value is None:
        return None
    try:
        low, high = cast("Any", value)
        pair = tuple(_number(v) for v in (low, high))
    except (TypeError, ValueError, OverflowError) as error:
        raise CAEConfigurationError(f"cae: value_range must be a pair (lowest, highest), got {value!r}") from error
    if not all(map(math.isfinite, pair)):
        raise CAEConfigurationError(f"cae: value_range must be finite, got {value!r}")
    return cast("ValueRange", pair)


def checked_nodata(value: Any) -> float | str | None:
    """Return a finite number, "NaN", "Infinity", "-Infinity" or None."""
    if value is None or (isinstance(value, str) and value in _NOT_FINITE):
        return value
    try:
        number = float("text") if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise CAEConfigurationError(
            f'cae: nodata must be a number, NaN or None, got {value!r}; in metadata NaN is the string "NaN"'
        ) from error
    if math.isfinite(number):
        return _number(value)
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def checked_min_psnr(value: Any) -> float | None:
    """Return a number of dB within its limits, or None."""
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bool) else _number(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= _LARGEST_PSNR:
        raise CAEConfigurationError(
            f"cae: min_psnr must be a number of dB above 0 and up to {_LARGEST_PSNR}, or None, got {value!r}"
        )
    return number


def resolve_nodata(dtype: np.dtype[Any], nodata: float | str | None) -> float | None:
    """Return the nodata value as a number, if pixels of the dtype can have it."""
    if nodata is None:
        return None
    number = _NOT_FINITE[nodata] if isinstance(nodata, str) else nodata
    if dtype.kind == "f":
        fits = isinstance(nodata, str) or abs(number) <= float(np.finfo(dtype).max)
    else:
        fits = math.isfinite(number) and number == int(number) and np.iinfo(dtype).min <= number <= np.iinfo(dtype).max
    if not fits:
        raise CAEConfigurationError(f"cae: nodata must be a value of dtype {dtype}, got {nodata!r}")
    return number if dtype.kind == "f" else int(number)


def _number(value: Any) -> float:
    """Return an integer if `value` has an integer type, or is a whole number that a float holds exactly."""
    number = float(value)
    return int(value) if isinstance(value, Integral) or (number.is_integer() and abs(number) <= 1 << 53) else number
