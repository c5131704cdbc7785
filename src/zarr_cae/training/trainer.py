"""A network in training: one step, validation, checkpoints. `training.run` has the loop around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.files import atomic_write
from zarr_cae.training.data import Crops
from zarr_cae.training.export import restore
from zarr_cae.training.klt import start_from_klt
from zarr_cae.training.loss import SMALLEST_CROP, mean_squared_error, multiscale_dissimilarity, rate_distortion
from zarr_cae.training.model import RANGES, GainedAutoencoder, Range, default_lambdas
from zarr_cae.training.schedule import DENSITY_ONLY, FIT_PHASES, PHASES, Phase, Schedule, learning_rate, phase_at
from zarr_cae.training.soap import Soap
from zarr_cae.weights.file import Metric, Weights, WeightsInfo


@dataclass(frozen=True)
class Recipe:
    """How to train one network: all that its weights depend on besides the images and the start."""

    rates: Range
    metric: Metric = "mse"
    steps: int = 20_000
    minutes: float | None = None
    """If given, the schedule runs by the clock instead of by steps."""
    crop: int = 128
    crops_per_quality: int = 3
    rate: float = 2e-3
    """Peak learning rate of the convolutions; GDN has a tenth of it."""
    seed: int = 0
    holdout: float = 0.05
    """Share of the images that is kept out of training: at least one, at most every other."""
    bfloat16: bool = False
    """Multiply in bfloat16, except around the latents and while only the decoder is tuned."""
    lambdas: tuple[float, ...] = ()
    """Weight of the distortion at each quality of the range, ascending; by default `default_lambdas`."""
    density_only: bool = False
    """Leave the transforms and the gains as they are, and fit the density alone to really rounded latents."""
    patterns: float = 0.03
    """Share of the crops that become patterns of period 2 or 4, or noise; see `training.patterns`."""
    schedule: Schedule = "train"
    """"train", or "fit" for a network that is trained already; see `training.schedule`."""
    unlike: float = 0.0
    """Share of the crops that are generated pictures instead, so that a fit does not forget; see `training.unlike`."""

    def __post_init__(self) -> None:
        if not 0 < self.holdout <= 0.5:
            raise CAEConfigurationError(f"cae: holdout must be a share of at most 0.5, got {self.holdout}")
        if not 0 <= self.patterns <= 1:
            raise CAEConfigurationError(f"cae: patterns must be a share from 0 to 1, got {self.patterns}")
        if not 0 <= self.unlike < 1:
            raise CAEConfigurationError(f"cae: unlike must be a share from 0 to below 1, got {self.unlike}")
        qualities = RANGES[self.rates]
        object.__setattr__(self, "lambdas", tuple(self.lambdas) or default_lambdas(self.metric, self.rates))
        ascending = all(low < high for low, high in pairwise((0.0, *self.lambdas, math.inf)))
        if len(self.lambdas) != len(qualities) or not ascending:
            raise CAEConfigurationError(
                f"cae: lambdas must be {len(qualities)} ascending positive numbers, for qualities {qualities[0]} to "
                f"{qualities[-1]}, got {', '.join(map(str, self.lambdas))}"
            )
        if self.crop % 16 or self.crop < 32:
            raise CAEConfigurationError(f"cae: crop must be a multiple of 16 and at least 32, got {self.crop}")
        if self.metric == "ms-ssim" and self.crop < SMALLEST_CROP:
            raise CAEConfigurationError(
                f"cae: MS-SSIM needs crops of at least {SMALLEST_CROP} px, got {self.crop}; try --crop 160"
            )


@dataclass(frozen=True)
class Progress:
    """The state of a run after a step or a validation. Lists have an entry for each quality of the network."""

    step: int
    fraction: float
    """Share of the schedule that is done, 0 to 1."""
    seconds: float
    qualities: tuple[int, ...]
    loss: float
    """Not a number for validations."""
    bits_per_pixel: list[float]
    psnr: list[float]
    ms_ssim: list[float] | None
    validation: bool


class Points(NamedTuple):
    """Rates and distortions of a network on n images at Q qualities: (n, Q) each."""

    bits_per_pixel: Tensor
    error: Tensor
    """Mean squared error of pixels in [0, 1], of 8 bits."""
    dissimilarity: Tensor | None
    """1 - MS-SSIM, if that is the metric."""


@torch.no_grad()
def measure(model: GainedAutoencoder, images: Iterable[Tensor], metric: Metric) -> Points:
    """Measure a network with real rounding, and rates by its density, on images float32 (3, H, W) in [0, 1]."""
    bits: list[Tensor] = []
    errors: list[Tensor] = []
    dissimilarities: list[Tensor] = []
    for image in images:
        pixels = image[None].expand(len(model.qualities), -1, -1, -1)
        coded = model(pixels, noisy=False, straight_through=True, tune_decoder=True)
        decoded = (coded.pixels.clamp(0, 1) * 255).round() / 255
        bits.append(coded.bits_per_pixel[:, 0])
        errors.append(mean_squared_error(decoded, pixels[:, None])[:, 0])
        if metric == "ms-ssim":
            dissimilarities.append(multiscale_dissimilarity(decoded, pixels[:, None])[:, 0])
    return Points(
        torch.stack(bits), torch.stack(errors), torch.stack(dissimilarities) if dissimilarities else None
    )  # fmt: skip


class Trainer:
    """A network in training, with its optimiser, averaged weights and checkpoint."""

    clock: Callable[[], float] = staticmethod(time.monotonic)
    """Clock, in seconds, for the `minutes` of a recipe."""

    def __init__(self, recipe: Recipe, crops: Crops, *, device: str = "cpu") -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.crops, self.device = recipe, crops, torch.device(device)
        self.model = GainedAutoencoder(recipe.rates)
        start_from_klt(self.model, crops.batch(96))
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        normalisation = [p for name, p in self.model.named_parameters() if "gdn" in name]
        entropy = list(self.model.density.parameters())
        gains = [self.model.log_gain, self.model.log_step]
        last = list(self.model.synthesis.conv1.parameters())  # small weights, straight into the pixels
        taken = {id(p) for p in (*normalisation, *entropy, *gains, *last)}
        groups = [
            {"params": [p for p in self.model.parameters() if id(p) not in taken], "share": 1.0, "rotate": True},
            {"params": last, "share": 0.25, "rotate": True},
            {"params": normalisation, "share": 0.1},
            {"params": entropy, "share": 2.5},
            {"params": gains, "share": 1.5},
        ]
        self.optimiser = Soap(groups, recipe.rate)
        self.step, self.seconds = 0, 0.0

    @property
    def fraction(self) -> float:
        """The share of the schedule that is done, 0 to 1."""
        if self.recipe.minutes is not None:
            return min(1.0, self.seconds / (60 * self.recipe.minutes))
        return min(1.0, self.step / self.recipe.steps)

    def train_step(self) -> Progress:
        """Take one optimiser step over `crops_per_quality` crops at each quality."""
        started, fraction = self.clock(), self.fraction
        qualities = self.model.qualities
        phase = self._phase(fraction)
        decoder_only = phase.trains != "all"
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate * group["share"] * learning_rate(fraction, self.step, self.recipe.schedule)
        self.model.low_precision = self.recipe.bfloat16 and phase.trains != "decoder"
        self.model.requires_grad_(requires_grad=phase.trains != "densities")
        self.model.density.requires_grad_(requires_grad=True)
        pixels = self.crops.batch(len(qualities) * self.recipe.crops_per_quality)
        pixels = pixels.to(self.device).contiguous(memory_format=torch.channels_last)
        coded = self.model(
            pixels,
            noisy=not decoder_only,
            straight_through=phase.straight_through,
            tune_decoder=decoder_only,
        )
        target = pixels.reshape(len(qualities), -1, *pixels.shape[1:])
        loss = rate_distortion(coded, target, self.recipe.metric, self.recipe.lambdas)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not loss.isfinite():
            raise CAEConfigurationError(f"cae: the loss is {loss.item()} at step {self.step}; lower --rate and resume")
        self.optimiser.step()
        self.model.project()
        self._follow()
        self.step += 1
        self.seconds += self.clock() - started
        with torch.no_grad():
            error = mean_squared_error(coded.pixels, target).mean(1)
        return Progress(
            self.step, self.fraction, self.seconds, qualities, loss.item(), coded.bits_per_pixel.mean(1).tolist(),
            (-10 * error.log10()).tolist(), None, validation=False,
        )  # fmt: skip

    def _phase(self, fraction: float) -> Phase:
        if self.recipe.density_only:
            return DENSITY_ONLY
        return phase_at(fraction, FIT_PHASES if self.recipe.schedule == "fit" else PHASES)

    @torch.no_grad()
    def _follow(self) -> None:
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - keep)

    def averaged(self) -> GainedAutoencoder:
        """Return a copy of the network that has the averaged weights."""
        model = GainedAutoencoder(self.recipe.rates)
        model.load_state_dict(self.average)
        model.project()
        return model.to(self.device).eval()

    def validate(self, count: int = 16) -> Progress:
        """Return rates and distortions of the averaged network with real rounding, on images kept out of training."""
        images = self.crops.held_out(count, 192).to(self.device)
        points = measure(self.averaged(), images, self.recipe.metric)
        similarities = points.dissimilarity
        return Progress(
            self.step, self.fraction, self.seconds, self.model.qualities, math.nan,
            points.bits_per_pixel.mean(0).tolist(), (-10 * points.error.log10()).mean(0).tolist(),
            None if similarities is None else (1 - similarities).mean(0).tolist(), validation=True,
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state: dict[str, Any] = {
            "recipe": asdict(self.recipe), "model": self.model.state_dict(), "average": self.average,
            "optimiser": self.optimiser.state_dict(), "step": self.step, "seconds": self.seconds,
        }  # fmt: skip
        with atomic_write(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of this recipe."""
        state = read_checkpoint(path)
        self._check_range(path, state)
        self.model.load_state_dict(state["model"])
        self.average = {name: value.to(self.device, copy=True) for name, value in state["average"].items()}
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]

    def start_from_checkpoint(self, path: Path) -> None:
        """Start from the averaged weights of a checkpoint instead of the KLT."""
        state = read_checkpoint(path)
        self._check_range(path, state)
        self.model.load_state_dict(state["average"])
        before = Recipe(**state["recipe"])
        self._start(before.metric, before.lambdas)

    def start_from(self, weights: Weights) -> None:
        """Start from an exported network instead of the KLT."""
        restore(self.model, weights)
        self._start(weights.info.metric, trained_lambdas(weights.info))

    def _check_range(self, path: Path, state: dict[str, Any]) -> None:
        if state["recipe"]["rates"] != self.recipe.rates:
            raise CAEConfigurationError(
                f"cae: {path} holds a {state['recipe']['rates']!r} network, not {self.recipe.rates!r}"
            )

    def _start(self, metric: Metric, lambdas: tuple[float, ...]) -> None:
        """Start training from the present parameters, which were trained for this metric with these lambdas."""
        if metric == self.recipe.metric:
            self.model.move(lambdas, self.recipe.lambdas)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def trained_lambdas(info: WeightsInfo) -> tuple[float, ...]:
    """Return the lambdas that an exported network was trained with, from its provenance; otherwise the default.

    Raises
    ------
    CAEConfigurationError
        If the provenance holds lambdas that cannot be.
    """
    recipe = info.provenance.get("recipe")
    found = recipe.get("lambdas") if isinstance(recipe, Mapping) else None
    rates = next(name for name, qualities in RANGES.items() if qualities == info.qualities)
    return Recipe(rates, info.metric, lambdas=tuple(found) if isinstance(found, list) else ()).lambdas


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what `Trainer.save` wrote, with tensors on the CPU.

    Raises
    ------
    CAEConfigurationError
        If the file is not a checkpoint of this package.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # for bytes that are no pickle, torch raises whatever it trips over
        raise CAEConfigurationError(f"cae: {path} is not a checkpoint: {error}") from error
    if not isinstance(state, dict) or not {"recipe", "model", "average", "optimiser"} <= set(state):
        raise CAEConfigurationError(f"cae: {path} is not a checkpoint of `zarr-cae train`")
    return state
