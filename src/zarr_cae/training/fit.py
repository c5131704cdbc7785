"""Fit weights to a collection in minutes: `fit`, and `fit_weights`, which also returns the bytes saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, from_numpy

from zarr_cae.coder import rans
from zarr_cae.config import process_settings
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.networks.device import choose_device
from zarr_cae.networks.engine import Engine
from zarr_cae.pixels.layout import Mask
from zarr_cae.training.data import Crops, read_images
from zarr_cae.training.export import export
from zarr_cae.training.loss import SMALLEST_CROP, multiscale_dissimilarity
from zarr_cae.training.model import RANGES, GainedAutoencoder
from zarr_cae.training.sampling import (
    EDGE,
    ImageSource,
    ImageStack,
    Window,
    filled,
    large_enough,
    sample_windows,
    some_padded,
)  # fmt: skip
from zarr_cae.training.start import Start
from zarr_cae.training.trainer import Points, Recipe, Trainer, measure
from zarr_cae.training.unlike import draw_unlike, pictures_to_check
from zarr_cae.weights import registry
from zarr_cae.weights.file import DEFAULT_MODEL, Metric, Weights, WeightsInfo

_RATE = 1e-3
"""Peak learning rate: half of that from a KLT, which would first undo the start weights."""
_UNLIKE = 0.1
"""Share of the crops that are generated pictures."""
_LARGEST_LOSS = 0.1
"""Largest share of additional bytes, at equal PSNR, for pictures unlike the collection."""
_LEAST_GAIN = 0.01
"""Share of bytes that fitted weights must save on held-out windows. Less may be chance."""
_SHARES = (1.0, 0.75, 0.5, 0.25)
"""Shares of the way from the start to the fitted weights, tried if the fitted ones forget too much. Networks between
the two ends of a fine-tuning keep most of both (Wortsman et al. 2022, arXiv:2109.01903)."""
_TABLE_WINDOWS = 150
"""Windows that the tables are fitted to: as many as take some ten seconds on one core."""
_CHECK_COST = 20
"""Measure again once the steps since then took this many times as long as measuring."""
_NEAREST_WINDOWS = 8
_CROPS = (128, 96, 64, 32)

RateCurve = tuple[Sequence[float], Sequence[float]]
"""Logarithm of the bytes, and quality of the pixels in dB, by ascending quality of the codec, of one picture."""


@dataclass(frozen=True)
class FitProgress:
    """The state of a fit after a step."""

    fraction: float
    """Share of the time that is over, 0 to 1."""
    step: int
    saved: float
    """Share of bytes saved on held-out windows at equal PSNR, as last measured; estimated by the density, whereas the
    end result counts real bytes."""


class Fit(NamedTuple):
    """The result of a fit."""

    digest: str
    """The weights to use: the fitted ones if they need fewer bytes, otherwise those that the fit started from."""
    saved: float
    """Share of the bytes of the start that the weights to use save at equal PSNR on held-out windows; 0 for the
    start."""
    start: str
    """The digest of the weights that the fit started from."""
    reason: str = ""
    """Why the fitted weights are not used; empty if they are."""
    file_bytes: int = 0
    """Size of the fitted weights file."""
    held_out: str = ""
    """What was held out for the comparison, such as "4 of 40 images"."""


def fit_weights(
    source: npt.NDArray[Any] | Any,
    minutes: float = 10,
    *,
    quality: int = 5,
    metric: Metric = "mse",
    crop: int = 128,
    seed: int = 0,
    report: Callable[[FitProgress], None] | None = None,
) -> Fit:
    """Fit the weights to a collection, and keep them only if they save 1 % of the bytes on images that were held out.

    Starts from those named weights on this machine that need the fewest bytes on the collection. Trains the
    densities, then the decoder, then all. The fitted weights go to the cache folder. They serve all qualities of the
    range, 1 to 5 or 6 to 8.

    Of four images or more, a tenth is held out whole. These are neighbours in the order of the collection, because
    neighbours are often of one patient or one flight. Of fewer images, neighbouring rows of windows are held out.
    A fourth of the windows get padding, like chunks at the edges of an array.

    So that the weights do not forget, a tenth of the crops are generated pictures. Before the result is taken, it is
    checked on others, and on a photograph: they must decode to more than their mean colour, and need at most a tenth
    more bytes at equal PSNR. Otherwise the result lies between the start and the fitted weights.

    Parameters
    ----------
    source
        An array of uint8 pixels, (H, W, 3) or (N, H, W, 3), of NumPy or zarr, or a list of such arrays; a list of image
        files, folders and tar files; or a list of `ImageSource` for anything else.
    minutes
        How long to train. Reading the sample and the comparisons take up to a minute more.
    quality
        A quality of the range to fit.
    metric
        "mse" or "ms-ssim". For the latter, bytes are compared at equal MS-SSIM.
    crop
        Largest edge of the training crops in pixels.
    seed
        Of all random choices.
    report
        Called after each step.

    Returns
    -------
    Fit
        The digest of the weights to use, and the share of bytes saved.

    Raises
    ------
    CAEConfigurationError
        If the source is not uint8, has another shape, or is too small.
    """
    if not minutes > 0:
        raise CAEConfigurationError(f"cae: a fit needs a time in minutes, more than 0, got {minutes}")
    sample = sample_windows(_parts(source), seed)
    qualities = next((qualities for qualities in RANGES.values() if quality in qualities), None)
    if qualities is None:
        raise CAEConfigurationError(f"cae: quality must be from 1 to 8, got {quality}")
    if metric == "ms-ssim":
        sample = large_enough(sample, SMALLEST_CROP)
    start = Start.find(_nearest(metric, qualities, sample.windows[:_NEAREST_WINDOWS]).digest)
    recipe = Recipe(
        start.rates, metric, minutes=minutes, crop=_crop(sample.windows, crop, metric), rate=_RATE, seed=seed,
        lambdas=start.lambdas, schedule="fit", unlike=_UNLIKE,
    )  # fmt: skip
    torch.set_flush_denormal(True)
    crops = Crops.of([*map(filled, sample.windows)], recipe, [*map(filled, sample.held_out)])
    trainer = Trainer(recipe, crops, device=str(choose_device(process_settings().device)))
    start.put_into(trainer)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    _train(trainer, crops, report or (lambda _: None))

    unlike = pictures_to_check()
    model = _that_remembers(trainer, before, unlike)
    if model is None:
        reason = "the fitted weights are much worse for other pictures"
        return Fit(start.name, 0.0, start.name, reason, held_out=sample.description)
    provenance = {
        "recipe": asdict(recipe), "steps": trainer.step, "minutes": round(trainer.seconds / 60, 1),
        "windows": len(sample.windows), "held out": sample.description, "fitted from": start.name,
        "torch": version("torch"),
    }  # fmt: skip
    content = export(model, metric, provenance, _tensors(_for_tables(sample.windows, seed)))
    assert start.exported is not None
    old = registry.load(start.exported.path)
    with registry.temporary(content) as fitted:
        held_out = some_padded(sample.held_out, np.random.default_rng(seed))
        saved, reason = _compared(old, fitted, held_out, unlike)
    if reason:
        return Fit(start.name, 0.0, start.name, reason, held_out=sample.description)
    digest = registry.store(content).digest
    return Fit(digest, saved, start.name, file_bytes=len(content), held_out=sample.description)


def fit(source: npt.NDArray[Any] | Any, minutes: float = 10, **options: Any) -> str:
    """Fit the weights to a collection and return their digest, for `CAECodec(quality, weights=...)`.

    If the fitted weights do not save 1 % of the bytes on held-out images, the digest is that of the weights it started
    from.

    Parameters
    ----------
    source, minutes, options
        As for `fit_weights`.

    Returns
    -------
    str
        `sha256:...` of the weights to use.

    Raises
    ------
    CAEConfigurationError
        If the source is not uint8, has another shape, or is too small.

    Examples
    --------
    >>> digest = zarr_cae.fit(["slides/"], minutes=10, quality=5)  # doctest: +SKIP
    """
    return fit_weights(source, minutes, **options).digest


def _parts(source: Any) -> list[ImageSource]:
    """Return the source of a fit as parts of a collection."""
    if isinstance(source, list | tuple):
        if all(isinstance(one, ImageSource) for one in source):
            return list(source)
        if all(isinstance(one, str | Path) for one in source):
            source = read_images([Path(one) for one in source])
        return [_part(array) for array in source]
    return [_part(source)]


def _part(source: Any) -> ImageSource:
    if getattr(source, "dtype", None) != np.uint8 or source.shape[-1] != 3 or source.ndim not in (3, 4):
        raise CAEConfigurationError(
            f"cae: a fit needs uint8 pixels (H, W, 3) or (N, H, W, 3), got {getattr(source, 'dtype', type(source))} "
            f"{getattr(source, 'shape', '')}"
        )
    return ImageSource(math.prod(source.shape), lambda: ImageStack(source, source.ndim - 1))


def _crop(windows: Sequence[Window], largest: int, metric: Metric) -> int:
    """Return the largest edge of crops for which most windows are large enough."""
    sides = sorted(min(window.shape[:2]) for window in windows)
    least = SMALLEST_CROP if metric == "ms-ssim" else _CROPS[-1]
    return max(
        edge for edge in {least, largest, *_CROPS} if least <= edge <= max(least, min(largest, sides[len(sides) // 4]))
    )


def _nearest(metric: Metric, qualities: tuple[int, ...], windows: Sequence[Window]) -> WeightsInfo:
    """Return the named weights that need the fewest bytes for some windows."""
    known = [
        info
        for info in registry.available()
        if (info.model, info.metric, info.qualities) == (DEFAULT_MODEL, metric, qualities)
        and registry.is_named(info)
    ]  # fmt: skip
    if len(known) == 1:
        return known[0]
    curves = [coded_curves(registry.load(info.path), windows) for info in known]
    return known[max(range(len(known)), key=lambda one: archive_saved(curves[0], curves[one]))]


def _train(trainer: Trainer, crops: Crops, report: Callable[[FitProgress], None]) -> None:
    """Train to the end of the schedule, and report the bytes saved so far."""
    held_out = list(crops.held_out(8, 128).to(trainer.device))
    metric = trainer.recipe.metric

    def measured() -> tuple[list[RateCurve], float]:
        begin = trainer.clock()
        curves = estimated_curves(measure(trainer.averaged(), held_out, metric))
        return curves, trainer.clock() - begin

    first, cost = measured()
    saved, last = 0.0, trainer.seconds
    while trainer.fraction < 1:
        step = trainer.train_step()
        if trainer.seconds - last > _CHECK_COST * cost:
            curves, cost = measured()
            saved, last = archive_saved(first, curves), trainer.seconds
        report(FitProgress(step.fraction, step.step, saved))


def estimated_curves(points: Points) -> list[RateCurve]:
    """Return the curve of each picture by the network's density."""
    bits = points.bits_per_pixel.clamp(min=1e-6).log()
    distortion = points.error if points.dissimilarity is None else points.dissimilarity
    levels = -10 * distortion.clamp(min=1e-10).log10()
    return list(zip(bits.tolist(), levels.tolist(), strict=True))


@torch.no_grad()
def _that_remembers(
    trainer: Trainer, before: Mapping[str, Tensor], unlike: Sequence[Window]
) -> GainedAutoencoder | None:
    """Return the fitted network, or the farthest one on the way to it that is good enough for other pictures."""
    model = trainer.averaged()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    images = [image[0].to(trainer.device) for image in _tensors(unlike)]
    floor = torch.stack([image.flatten(1).var(1, unbiased=False).mean() for image in images])[:, None]
    model.load_state_dict(before)
    old = estimated_curves(measure(model, images, trainer.recipe.metric))
    for share in _SHARES:
        model.load_state_dict({name: torch.lerp(value, after[name], share) for name, value in before.items()})
        model.project()
        points = measure(model, images, trainer.recipe.metric)
        if bool((points.error < floor).all()) and archive_saved(old, estimated_curves(points)) >= -_LARGEST_LOSS:
            return model
    return None


def _compared(old: Weights, fitted: Weights, held_out: Sequence[Window], unlike: Sequence[Window]) -> tuple[float, str]:
    """Return the share of bytes that fitted weights save on held-out windows, and why not to use them, or ""."""
    saved = archive_saved(coded_curves(old, held_out), coded_curves(fitted, held_out))
    lost = -archive_saved(coded_curves(old, unlike), coded_curves(fitted, unlike))
    if saved < _LEAST_GAIN:
        change = f"{saved:.1%} fewer" if saved > 0 else f"{-saved:.1%} more"
        return saved, f"held-out crops need {change} bytes with the fitted weights"
    if lost > _LARGEST_LOSS:
        return saved, f"other pictures need {lost:.0%} more bytes with the fitted weights"
    return saved, ""


def _for_tables(windows: Sequence[Window], seed: int) -> list[Window]:
    """Return windows to fit the tables to: some of the collection, also with padding, and a few generated ones."""
    random = np.random.default_rng(seed)
    some = some_padded(windows[:: math.ceil(len(windows) / _TABLE_WINDOWS)], random)
    return [*some, *(draw_unlike(EDGE, random) for _ in range(math.ceil(_UNLIKE * len(some))))]


def _tensors(windows: Sequence[Window]) -> Iterator[Tensor]:
    """Yield windows as float32 (1, 3, H, W) in [0, 1]."""
    for window in windows:
        yield from_numpy(np.array(filled(window))).permute(2, 0, 1)[None].float().div(255)


def coded_curves(weights: Weights, windows: Sequence[Window]) -> list[RateCurve]:
    """Return the curve of real bytes of each window. Samples without data do not count in the quality."""
    settings = process_settings()
    engine = Engine(weights, choose_device(settings.device))
    found: list[RateCurve] = []
    for window in windows:
        sizes, levels = [], []
        channels = 1 if window.strides[2] == 0 else 3
        planes, known = (
            pixels.transpose(2, 0, 1)[None, :channels].astype(np.float32) / np.float32(255)
            for pixels in (filled(window), window)
        )
        data = ~np.isnan(known)
        for tables, quality in zip(weights.tables, weights.info.qualities, strict=True):
            symbols = engine.analyse(planes, quality, settings).result()
            decoded = engine.synthesise(symbols, quality, planes.shape[1], settings).result().clip(0, 1)
            if window.dtype == np.uint8:
                decoded = np.rint(decoded * 255) / 255
            sizes.append(math.log(len(rans.encode(symbols[0], tables, tables.frame_version))))
            levels.append(-10 * math.log10(max(_distortion(planes, decoded, data, weights.info.metric), 1e-10)))
        found.append((sizes, levels))
    return found


def _distortion(planes: npt.NDArray[Any], decoded: npt.NDArray[Any], data: Mask, metric: Metric) -> float:
    """Return the distortion of the samples that have data."""
    if metric == "mse":
        return float(np.mean((decoded - planes) ** 2, where=data))
    decoded = np.where(data, decoded, planes)
    side = min(planes.shape[2:])
    squares = (from_numpy(one[:, :, :side, :side].astype(np.float32))[:, None] for one in (decoded, planes))
    return float(multiscale_dissimilarity(*squares))


def archive_saved(old: Sequence[RateCurve], new: Sequence[RateCurve]) -> float:
    """Return the share of the bytes of an archive that new weights save, at equal quality of each picture.

    A picture counts by its bytes, so that savings on many small ones do not hide a loss on few large ones.
    """
    sizes = [float(np.mean(np.exp(curve[0]))) for curve in old]
    return float(np.average([bytes_saved(*pair) for pair in zip(old, new, strict=True)], weights=sizes))


def bytes_saved(old: RateCurve, new: RateCurve) -> float:
    """Return the share of bytes that the second curve saves over the first at equal quality of the pixels.

    The logarithms are interpolated over the decibels where both curves have some; if they have none in common the
    result is 0.
    """
    low, high = max(old[1][0], new[1][0]), min(old[1][-1], new[1][-1])
    if low >= high:
        return 0.0
    at = np.linspace(low, high, 50)
    sizes = [np.interp(at, np.maximum.accumulate(levels), logarithms) for logarithms, levels in (old, new)]
    return float(1 - np.exp(np.mean(sizes[1] - sizes[0])))
