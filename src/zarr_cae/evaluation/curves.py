"""Rate-distortion points and curves: measure, average over images, write and read CSV, load published curves.

Nothing here knows a codec. A caller that has coded an image passes the original and the result to `measure`, which
returns a `Point`. Points are averaged over images into a `Curve` for each codec.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.bd_rate import bd_rate
from zarr_cae.evaluation.measures import (
    SMALLEST_MS_SSIM,
    SMALLEST_SSIM,
    bits_per_pixel,
    cie76,
    ms_ssim,
    ms_ssim_decibels,
    psnr,
    ssim,
)

Measure: TypeAlias = Literal["psnr", "ms_ssim"]
"""The measures of quality by which curves are compared."""


@dataclass(frozen=True)
class Point:
    """The figures of one image that was coded once, or means over images.

    Attributes
    ----------
    codec
        Its name.
    setting
        The codec's own quality number.
    image
        Its name; "mean of N" for means over N images.
    bpp
        Bits per pixel.
    psnr
        In dB.
    ssim, ms_ssim
        At most 1; `nan` for images that are too small for the measure.
    delta_e
        Mean CIE76 colour difference.
    encode_seconds, decode_seconds
        Wall-clock time.
    """

    codec: str
    setting: float
    image: str
    bpp: float
    psnr: float
    ssim: float
    ms_ssim: float
    delta_e: float
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Curve:
    """A rate-distortion curve in order of rate: bits per pixel, PSNR in dB, MS-SSIM as it is (not in dB)."""

    name: str
    bpp: tuple[float, ...]
    psnr: tuple[float, ...]
    ms_ssim: tuple[float, ...]

    def quality(self, measure: Measure) -> tuple[float, ...]:
        """Return the curve's PSNR or its MS-SSIM, either in dB.

        Raises
        ------
        CAEConfigurationError
            For any other measure.
        """
        if measure == "psnr":
            return self.psnr
        if measure == "ms_ssim":
            return tuple(map(ms_ssim_decibels, self.ms_ssim))
        raise CAEConfigurationError(f"cae: a curve has 'psnr' and 'ms_ssim', not {measure!r}")

    def bd_rate(self, anchor: Curve, measure: Measure = "psnr") -> float:
        """Return the excess of bytes over the anchor in percent at equal quality; see `bd_rate.bd_rate` for errors."""
        return bd_rate(anchor.bpp, anchor.quality(measure), self.bpp, self.quality(measure))


@dataclass(frozen=True)
class Coded:
    """An image that was encoded and decoded: its pixels, the number of bytes, and wall-clock times in seconds."""

    pixels: NDArray[Any]
    nbytes: int
    encode_seconds: float
    decode_seconds: float


def measure(codec: str, setting: float, image: str, original: NDArray[np.uint8], coded: Coded) -> Point:
    """Measure one image that was coded and decoded.

    Parameters
    ----------
    codec, setting, image
        As in `Point`.
    original
        (H, W, 3) or (H, W), uint8.
    coded
        The result; its pixels have the form of the original.

    Returns
    -------
    Point

    Raises
    ------
    CAEConfigurationError
        For other shapes or dtypes; if a library of the extra `compare` is missing.
    """
    delta_e = cie76(original, coded.pixels)  # also checks shapes and dtypes
    height, width = original.shape[:2]
    shortest = min(height, width)
    return Point(
        codec, setting, image, bits_per_pixel(coded.nbytes, height, width), psnr(original, coded.pixels),
        ssim(original, coded.pixels) if shortest >= SMALLEST_SSIM else math.nan,
        ms_ssim(original, coded.pixels) if shortest >= SMALLEST_MS_SSIM else math.nan,
        delta_e, coded.encode_seconds, coded.decode_seconds,
    )  # fmt: skip


_NAMES = tuple(field.name for field in fields(Point))


def _figures(point: Point) -> list[float]:
    return [getattr(point, name) for name in _NAMES[3:]]


def average(points: Iterable[Point]) -> list[Point]:
    """Return one point for each codec and setting: plain means over its images (for PSNR, of dB).

    Returns
    -------
    list of Point
        Codecs in the order in which they first appear, then in order of rate.

    Raises
    ------
    CAEConfigurationError
        If an image comes twice, or if the settings of a codec were not all measured on the same images: their means
        could not be compared.
    """
    groups: dict[str, dict[float, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        groups[point.codec][point.setting].append(point)
    averages = []
    for codec, settings in groups.items():
        images = [sorted(point.image for point in group) for group in settings.values()]
        if any(names != images[0] or len(set(names)) != len(names) for names in images):
            raise CAEConfigurationError(f"cae: every setting of {codec} must be measured once on each of the images")
        means = [
            Point(codec, setting, f"mean of {len(group)}", *np.mean([_figures(p) for p in group], axis=0).tolist())
            for setting, group in settings.items()
        ]
        averages += sorted(means, key=lambda point: point.bpp)
    return averages


def to_curves(points: Iterable[Point]) -> dict[str, Curve]:
    """Average the points of every codec and return its curve, by name. It raises the errors of `average`."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in average(points):
        groups[point.codec].append(point)
    return {
        name: Curve(name, *(tuple(getattr(point, axis) for point in group) for axis in ("bpp", "psnr", "ms_ssim")))
        for name, group in groups.items()
    }


def load_published(path: str | Path) -> dict[str, Curve]:
    """Load curves, by name, from JSON: {"curves": {name: {"bpp": [...], "psnr": [...], "ms_ssim": [...]}}}.

    Points may be in any order.

    Raises
    ------
    CAEConfigurationError
        If the file can't be read or has another form.
    """
    try:
        loaded = {}
        for name, curve in json.loads(Path(path).read_text("utf-8"))["curves"].items():
            rows = sorted(zip(curve["bpp"], curve["psnr"], curve["ms_ssim"], strict=True))
            bpp, decibels, similarity = (tuple(map(float, column)) for column in zip(*rows, strict=True))
            loaded[name] = Curve(name, bpp, decibels, similarity)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CAEConfigurationError(f"cae: {path} is not a JSON file of rate-distortion curves: {error!r}") from error
    return loaded


def write_csv(points: Iterable[Point], path: str | Path) -> None:
    """Write points as CSV: a line of names, then a line for each point, numbers in full precision."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_NAMES)
        writer.writerows([point.codec, point.setting, point.image, *_figures(point)] for point in points)


def read_csv(path: str | Path) -> list[Point]:
    """Read points from a file of `write_csv`.

    Raises
    ------
    CAEConfigurationError
        If the file can't be read or has another form.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        points = [Point(codec, float(setting), image, *map(float, rest)) for codec, setting, image, *rest in rows]
    except (OSError, ValueError, TypeError) as error:
        raise CAEConfigurationError(f"cae: {path} is not a table of points: {error}") from error
    if tuple(header) != _NAMES:
        raise CAEConfigurationError(f"cae: {path} is not a table of points: its columns are not {', '.join(_NAMES)}")
    return points
