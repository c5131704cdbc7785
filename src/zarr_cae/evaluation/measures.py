"""How good a lossy codec is: distortion measures, rate-distortion curves, BD-rate, tables and plots.

Nothing here knows a codec: whoever coded an image hands both versions, the bytes and the seconds to `measure`, which
makes a `Point`. Points go to CSV, are averaged over images into `Curve` objects, and curves are compared with
`Curve.bd_rate` and drawn with `plot`. Needs numpy; `plot` also needs matplotlib (extra `compare`).
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
from numpy.typing import ArrayLike, NDArray

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.bd_rate import bd_rate

__all__ = [
    "Curve",
    "Point",
    "average",
    "bits_per_pixel",
    "cie76",
    "load_published",
    "measure",
    "ms_ssim",
    "ms_ssim_decibels",
    "plot",
    "psnr",
    "read_csv",
    "to_curves",
    "write_csv",
]

Metric: TypeAlias = Literal["psnr", "ms_ssim"]
Floats: TypeAlias = NDArray[np.float64]


def psnr(a: ArrayLike, b: ArrayLike, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio 10 log10(peak^2 / MSE) in dB, the MSE over all samples of two equal-shaped arrays.

    Any shape and real dtype; `inf` for equal arrays. Raises CAEConfigurationError if the shapes differ or are empty.
    """
    x, y = _pair(a, b)
    difference = x.astype(np.float64) - y
    mse = float(np.mean(np.square(difference, out=difference)))
    return 10.0 * math.log10(peak * peak / mse) if mse else math.inf


_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest scale first
_MS_SSIM_SMALLEST = 10 * 2 ** (len(_MS_SSIM_WEIGHTS) - 1)  # the 11-tap window must fit the coarsest scale
_GAUSSIAN = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2)).astype(np.float32)
_GAUSSIAN /= _GAUSSIAN.sum()


def ms_ssim(a: ArrayLike, b: ArrayLike, peak: float = 255.0) -> float:
    """Multi-scale structural similarity (Wang, Simoncelli & Bovik 2003), 1 for equal images; higher is better.

    (H, W) or (H, W, C) of any real dtype, both sides above 160 px. Five scales, 11-tap Gaussian window of sigma 1.5
    without padding, K = (0.01, 0.03); every channel for itself, then their mean. Equals `pytorch_msssim.ms_ssim`
    (which zeroes negative contrast terms, and pads odd sides with zeros when it halves them) within 1e-4.
    Raises CAEConfigurationError for unequal, empty, too small or not image-shaped arrays.
    """
    x, y = _pair(a, b)
    if x.ndim not in {2, 3}:
        raise CAEConfigurationError(f"cae: MS-SSIM is of (H, W) or (H, W, C) images, not of shape {x.shape}")
    if min(x.shape[:2]) <= _MS_SSIM_SMALLEST:
        raise CAEConfigurationError(
            f"cae: MS-SSIM needs both sides above {_MS_SSIM_SMALLEST} px, the image is {x.shape[0]} x {x.shape[1]}"
        )
    if x.ndim == 2:
        x, y = x[..., None], y[..., None]
    return float(np.mean([_ms_ssim_plane(x[..., c], y[..., c], peak) for c in range(x.shape[2])]))


def _ms_ssim_plane(first: NDArray[Any], second: NDArray[Any], peak: float) -> float:
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    # Half the peak less changes no variance and costs them less of float32's precision.
    x, y = ((plane - np.float64(peak / 2)).astype(np.float32) for plane in (first, second))
    product = 1.0
    for scale, weight in enumerate(_MS_SSIM_WEIGHTS):
        mean_x, mean_y, mean_xy, mean_squares = map(_blur, (x, y, x * y, x * x + y * y))
        means_product, means_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
        contrast = (2 * (mean_xy - means_product) + c2) / (mean_squares - means_squares + c2)
        if scale == len(_MS_SSIM_WEIGHTS) - 1:
            mean_x += peak / 2
            mean_y += peak / 2
            contrast *= (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
        else:
            x, y = _halve(x, -peak / 2), _halve(y, -peak / 2)
        product *= max(float(contrast.mean(dtype=np.float64)), 0.0) ** weight
    return min(product, 1.0)


def _blur(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W) -> (H - 10, W - 10): the Gaussian window along both axes, valid samples only."""
    for _ in range(2):  # filter along the first axis, transpose, and again
        n = plane.shape[0] - 10
        total = _GAUSSIAN[5] * plane[5 : 5 + n]
        pair = np.empty_like(total)
        for k in range(5):
            np.add(plane[k : k + n], plane[10 - k : 10 - k + n], out=pair)
            pair *= _GAUSSIAN[k]
            total += pair
        plane = np.ascontiguousarray(total.T)
    return plane


def _halve(plane: NDArray[np.float32], zero: float) -> NDArray[np.float32]:
    """Means of 2 x 2 samples; an odd side gets a row of `zero` in front, as avg_pool2d(padding=1) gives it."""
    height, width = plane.shape
    padded = np.pad(plane, ((height % 2, 0), (width % 2, 0)), constant_values=zero)
    rows: NDArray[np.float32] = padded[::2] + padded[1::2]
    return (rows[:, ::2] + rows[:, 1::2]) * np.float32(0.25)


def ms_ssim_decibels(value: float) -> float:
    """MS-SSIM on the scale of rate-distortion plots, -10 log10(1 - value) in dB; `inf` for 1, `nan` for `nan`.

    Raises CAEConfigurationError for a value above 1.
    """
    if value > 1.0:
        raise CAEConfigurationError(f"cae: {value} is no MS-SSIM, which is at most 1")
    return math.inf if value == 1.0 else -10.0 * math.log10(1.0 - value)


_SRGB_TO_XYZ = np.array(  # IEC 61966-2-1, D65; its row sums are the white point
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def cie76(a: ArrayLike, b: ArrayLike) -> float:
    """Mean CIE 1976 colour difference (Euclidean distance in CIELAB, D65) of two sRGB images.

    (H, W, 3) uint8, or (H, W) uint8 taken as R = G = B. About 2.3 is a just noticeable difference.
    Raises CAEConfigurationError for other shapes or dtypes.
    """
    x, y = _pair(a, b)
    if x.dtype != np.uint8 or y.dtype != np.uint8 or not (x.ndim == 2 or (x.ndim == 3 and x.shape[2] == 3)):
        raise CAEConfigurationError(
            f"cae: CIE76 is of uint8 (H, W, 3) or (H, W) images, not of {x.dtype} {x.shape} and {y.dtype} {y.shape}"
        )
    return float(np.mean(np.linalg.norm(_lab(x) - _lab(y), axis=-1)))


def _lab(image: NDArray[np.uint8]) -> Floats:
    """Convert sRGB uint8 (H, W, 3) or (H, W) to CIELAB (H, W, 3), L in 0 to 100."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    code = np.arange(256) / 255.0
    linear = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    xyz = linear[image] @ (_SRGB_TO_XYZ / _SRGB_TO_XYZ.sum(axis=1, keepdims=True)).T
    delta = 6 / 29
    f = np.where(xyz > delta**3, np.cbrt(xyz), xyz / (3 * delta**2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def bits_per_pixel(nbytes: int, height: int, width: int) -> float:
    """Bits of `nbytes` bytes for each of height x width positions, all channels of a position together.

    Raises CAEConfigurationError unless both sides are positive and `nbytes` is not negative.
    """
    if height < 1 or width < 1 or nbytes < 0:
        raise CAEConfigurationError(f"cae: no bits per pixel of {nbytes} bytes for {height} x {width} pixels")
    return 8.0 * nbytes / (height * width)


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    x, y = np.asarray(a), np.asarray(b)
    if x.shape != y.shape or x.size == 0:
        raise CAEConfigurationError(f"cae: images to compare must have one shape, these have {x.shape} and {y.shape}")
    return x, y


@dataclass(frozen=True)
class Point:
    """One image coded once (or, from `average`, the means over images).

    `setting` is the codec's own quality number; psnr in dB, ms_ssim as it is (`nan` for images of 160 px and less),
    delta_e the mean CIE76 difference, times in wall-clock seconds.
    """

    codec: str
    setting: float
    image: str
    bpp: float
    psnr: float
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

    def quality(self, metric: Metric) -> tuple[float, ...]:
        """Give the curve's PSNR or its MS-SSIM, either in dB. Raises CAEConfigurationError for any other metric."""
        if metric == "psnr":
            return self.psnr
        if metric == "ms_ssim":
            return tuple(map(ms_ssim_decibels, self.ms_ssim))
        raise CAEConfigurationError(f"cae: a curve has 'psnr' and 'ms_ssim', not {metric!r}")

    def bd_rate(self, anchor: Curve, metric: Metric = "psnr") -> float:
        """Compare rates at equal quality: percent above the anchor's, negative below. See, and raises as, `bd_rate`."""
        return bd_rate(anchor.bpp, anchor.quality(metric), self.bpp, self.quality(metric))


def measure(
    codec: str,
    setting: float,
    image: str,
    original: NDArray[np.uint8],
    decoded: NDArray[np.uint8],
    *,
    nbytes: int,
    encode_seconds: float,
    decode_seconds: float,
) -> Point:
    """Measure one image, (H, W, 3) or (H, W) uint8, that was coded to `nbytes` bytes and decoded again.

    Raises CAEConfigurationError for other shapes or dtypes.
    """
    delta_e = cie76(original, decoded)  # checks shapes and dtypes
    height, width = original.shape[:2]
    bpp = bits_per_pixel(nbytes, height, width)
    similarity = ms_ssim(original, decoded) if min(height, width) > _MS_SSIM_SMALLEST else math.nan
    decibels = psnr(original, decoded)
    return Point(codec, setting, image, bpp, decibels, similarity, delta_e, encode_seconds, decode_seconds)


def average(points: Iterable[Point]) -> list[Point]:
    """One point for each (codec, setting): plain means over its images (of dB for PSNR), `image` their number.

    In order of the codecs' first appearance, then of rate. Raises CAEConfigurationError if an image comes twice, or
    if the settings of a codec were not all measured on the same images, whose means could not be compared.
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
            Point(codec, setting, f"mean of {len(group)}", *np.mean([_measures(p) for p in group], axis=0).tolist())
            for setting, group in settings.items()
        ]
        averages += sorted(means, key=lambda point: point.bpp)
    return averages


_NAMES = tuple(field.name for field in fields(Point))


def _measures(point: Point) -> list[float]:
    return [getattr(point, name) for name in _NAMES[3:]]


def to_curves(points: Iterable[Point]) -> dict[str, Curve]:
    """Average the points of every codec to its curve, by name. Raises as `average` does."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in average(points):
        groups[point.codec].append(point)
    return {
        name: Curve(name, *(tuple(getattr(point, axis) for point in group) for axis in ("bpp", "psnr", "ms_ssim")))
        for name, group in groups.items()
    }


def load_published(path: str | Path) -> dict[str, Curve]:
    """Load curves, by name, from JSON: {"curves": {name: {"bpp": [...], "psnr": [...], "ms_ssim": [...]}}}.

    Points may be in any order. Raises CAEConfigurationError if the file cannot be read or is of another form.
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
    """Points as CSV with a header line, one row a point, numbers in full precision."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_NAMES)
        writer.writerows([point.codec, point.setting, point.image, *_measures(point)] for point in points)


def read_csv(path: str | Path) -> list[Point]:
    """Read what `write_csv` wrote. Raises CAEConfigurationError if the file cannot be read or is of another form."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        points = [Point(codec, float(setting), image, *map(float, rest)) for codec, setting, image, *rest in rows]
    except (OSError, ValueError, TypeError) as error:
        raise CAEConfigurationError(f"cae: {path} is not a table of points: {error}") from error
    if tuple(header) != _NAMES:
        raise CAEConfigurationError(f"cae: {path} is not a table of points: its columns are not {', '.join(_NAMES)}")
    return points


def plot(curves: Iterable[Curve], path: str | Path) -> None:
    """Draw PSNR and MS-SSIM (dB) over bits per pixel (log 2 axis), to PNG, PDF or SVG by the path's suffix.

    Curves named `cae...` are drawn thicker. No pyplot state is touched. Raises CAEConfigurationError without curves
    or without matplotlib.
    """
    curves = list(curves)
    if not curves:
        raise CAEConfigurationError("cae: there are no curves to plot")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullLocator
    except ImportError as error:
        raise CAEConfigurationError("cae: plots need matplotlib: pip install 'zarr-cae[compare]'") from error
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    metrics: tuple[tuple[Metric, str], ...] = (("psnr", "PSNR, dB"), ("ms_ssim", "MS-SSIM, -10 log10(1 - x), dB"))
    for axes, (metric, label) in zip(panels, metrics, strict=True):
        for i, curve in enumerate(curves):
            look = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "label": curve.name}
            ours = {"marker": "o", "linewidth": 2.5, "zorder": 3} if curve.name.startswith("cae") else {"marker": "."}
            axes.plot(curve.bpp, curve.quality(metric), **look, **ours)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="bits per pixel", ylabel=label)
        axes.grid(visible=True, alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=130)
