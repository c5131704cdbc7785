"""Fit weights to a collection in minutes: `fit`, and `fit_weights`, which says how much that saves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_cae.coder import rans
from zarr_cae.config import Settings
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.networks.device import choose_device
from zarr_cae.networks.engine import Engine
from zarr_cae.training.data import Pixels, read_images
from zarr_cae.training.model import RANGES
from zarr_cae.training.run import train_network
from zarr_cae.training.start import Start
from zarr_cae.training.trainer import Progress, Recipe
from zarr_cae.weights import registry
from zarr_cae.weights.file import DEFAULT_MODEL, Metric, Weights

_WINDOW = 256
_WINDOWS = 400
_FEWEST = 8
_HELD_OUT_SHARE = 0.1
_MOST_HELD_OUT = 16
_RATE = 4e-4
"""Peak learning rate: a higher one would first undo the weights to start from."""


class Fit(NamedTuple):
    """The result of a fit."""

    digest: str
    """The weights to use: the fitted ones if they need fewer bytes, otherwise those that the fit started from."""
    saved: float
    """Share of the bytes of the start that the fitted weights save at equal PSNR; negative if they need more."""


def fit_weights(
    source: npt.NDArray[Any] | Any,
    minutes: float = 10,
    *,
    quality: int = 5,
    metric: Metric = "mse",
    crop: int = 128,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> Fit:
    """Fit the weights to a collection, and keep them only if they need fewer bytes on images that were held out.

    Starts from those weights on this machine that need the fewest bytes on the collection. The fitted weights go to
    the cache folder. They serve all qualities of the range, 1 to 5 or 6 to 8.

    Parameters
    ----------
    source
        An array of uint8 pixels, (H, W, 3) or (N, H, W, 3), of NumPy or zarr; or a list of image files, folders and
        tar files.
    minutes
        How long to train. The comparison takes some seconds more.
    quality
        A quality of the range to fit.
    metric
        "mse" or "ms-ssim".
    crop
        Edge of the training crops in pixels.
    seed
        Of all random choices.
    report
        Called after each step and each validation of the training.

    Returns
    -------
    Fit
        The digest of the weights to use, and the share of bytes saved.

    Raises
    ------
    CAEConfigurationError
        If the source is not uint8, has another shape, or is too small.
    """
    windows = sample_windows(source, seed)
    every = max(2, round(1 / _HELD_OUT_SHARE))
    held_out, sample = windows[::every][:_MOST_HELD_OUT], [w for i, w in enumerate(windows) if i % every]
    qualities = next(qualities for qualities in RANGES.values() if quality in qualities)
    known = [
        registry.load(info.path)
        for info in registry.available()
        if (info.model, info.metric, info.qualities) == (DEFAULT_MODEL, metric, qualities) and info.architecture
    ]
    curves = [_curve(weights, held_out) for weights in known]
    nearest = min(range(len(known)), key=lambda one: -bytes_saved(curves[0], curves[one]))
    start = Start.find(known[nearest].info.digest)
    recipe = Recipe(
        start.rates, metric, minutes=minutes, crop=crop, rate=_RATE, seed=seed, lambdas=start.lambdas
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        info = train_network(sample, Path(scratch) / "fit", recipe, start, report=report)
        fitted = registry.load(info.path)
        saved = bytes_saved(curves[nearest], _curve(fitted, held_out))
        if saved <= 0:
            return Fit(start.name, saved)
        return Fit(registry.store(info.path.read_bytes()).digest, saved)


def fit(source: npt.NDArray[Any] | Any, minutes: float = 10, **options: Any) -> str:
    """Fit the weights to a collection and return their digest, for `CAECodec(quality, weights=...)`.

    If the fitted weights need more bytes on held-out images, the digest is that of the weights it started from.

    Parameters
    ----------
    source, minutes, options
        As for `fit_weights`.

    Examples
    --------
    >>> digest = zarr_cae.fit(["slides/"], minutes=10, quality=5)  # doctest: +SKIP
    """
    return fit_weights(source, minutes, **options).digest


def sample_windows(source: Any, seed: int) -> list[Pixels]:
    """Return windows from all over a collection, uint8 (H, W, 3) of up to 256 pixels a side.

    Flat windows, such as the glass around tissue, are drawn less often: those with the larger deviation of two random
    ones are taken.
    """
    if isinstance(source, list | tuple):
        images: Sequence[Any] = read_images([Path(one) for one in source])
    elif getattr(source, "dtype", None) != np.uint8 or source.shape[-1] != 3 or source.ndim not in (3, 4):
        raise CAEConfigurationError(
            f"cae: a fit needs uint8 pixels (H, W, 3) or (N, H, W, 3), got {getattr(source, 'dtype', type(source))} "
            f"{getattr(source, 'shape', '')}"
        )
    else:
        images = [source] if source.ndim == 3 else [_Page(source, index) for index in range(source.shape[0])]
    random = np.random.default_rng(seed)
    areas = np.array([image.shape[0] * image.shape[1] for image in images], float)
    count = int(np.clip(areas.sum() / _WINDOW**2, _FEWEST, _WINDOWS))

    def draw() -> Pixels:
        image = images[random.choice(len(images), p=areas / areas.sum())]
        sides = [min(_WINDOW, side) // 16 * 16 for side in image.shape[:2]]
        top, left = (random.integers(whole - side + 1) for whole, side in zip(image.shape[:2], sides, strict=True))
        return np.asarray(image[top : top + sides[0], left : left + sides[1]])

    return [max((draw(), draw()), key=lambda window: float(window.std())) for _ in range(count)]


class _Page:
    """One picture of a stack that may be larger than memory."""

    def __init__(self, stack: Any, index: int) -> None:
        self._stack, self._index, self.shape = stack, index, stack.shape[1:]

    def __getitem__(self, window: tuple[slice, slice]) -> Any:
        return self._stack[(self._index, *window)]


def _curve(weights: Weights, images: Sequence[Pixels]) -> tuple[list[float], list[float]]:
    """Return the mean logarithm of the bytes, and the mean PSNR, of images at each quality."""
    settings = Settings()
    engine = Engine(weights, choose_device(settings.device))
    sizes, ratios = [], []
    for row, quality in enumerate(weights.info.qualities):
        bits, decibels = [], []
        for image in images:
            planes = image.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
            symbols = engine.analyse(planes, quality, settings).result()
            decoded = engine.synthesise(symbols, quality, 3, settings).result()
            error = np.mean((np.rint(decoded.clip(0, 1) * 255) / 255 - planes) ** 2)
            tables = weights.tables[row]
            bits.append(np.log(len(rans.encode(symbols[0], tables, tables.frame_version))))
            decibels.append(-10 * np.log10(max(float(error), 1e-10)))
        sizes.append(float(np.mean(bits)))
        ratios.append(float(np.mean(decibels)))
    return sizes, ratios


def bytes_saved(old: tuple[list[float], list[float]], new: tuple[list[float], list[float]]) -> float:
    """Return the share of bytes that the second curve saves over the first at equal PSNR.

    Both are (logarithms of bytes, PSNR) by ascending quality. The logarithms are interpolated over the PSNR where both
    curves have one; if they have none in common the result is 0.
    """
    low, high = max(old[1][0], new[1][0]), min(old[1][-1], new[1][-1])
    if low >= high:
        return 0.0
    at = np.linspace(low, high, 50)
    return float(1 - np.exp(np.mean(np.interp(at, new[1], new[0]) - np.interp(at, old[1], old[0]))))
