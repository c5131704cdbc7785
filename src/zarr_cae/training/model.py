"""The trained network: one analysis and one synthesis transform, gains and densities for several qualities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from zarr_cae.networks.transforms import GDN, HIGH_RATE, LOW_RATE, Analysis, Synthesis, Widths
from zarr_cae.training.density import Density
from zarr_cae.weights.file import LAMBDAS, Metric

Range = Literal["low", "high"]

RANGES: dict[Range, tuple[int, ...]] = {"low": (1, 2, 3, 4, 5), "high": (6, 7, 8)}
"""The qualities that one network serves."""
WIDTHS: dict[Range, Widths] = {"low": LOW_RATE, "high": HIGH_RATE}


def default_lambdas(metric: Metric, rates: Range) -> tuple[float, ...]:
    """Return the lambdas in `LAMBDAS` for the qualities of one range."""
    return tuple(LAMBDAS[metric][quality - 1] for quality in RANGES[rates])


@dataclass(frozen=True)
class Pass:
    """The result of one pass, for crops grouped by quality."""

    pixels: Tensor
    """(Q, n, 3, H, W)"""
    bits_per_pixel: Tensor
    """(Q, n), ideal code length under the density"""


class GainedAutoencoder(nn.Module):
    """Several qualities in one network through gains at the latents (Cui et al. 2021, arXiv:2003.02012)."""

    def __init__(self, rates: Range) -> None:
        super().__init__()
        self.low_precision = False
        """Multiply in bfloat16 where the transforms say that it does little harm."""
        self.qualities, self.widths = RANGES[rates], WIDTHS[rates]
        count, latent = len(self.qualities), self.widths.latent
        self.analysis, self.synthesis = Analysis(self.widths), Synthesis(self.widths)
        self.log_gain = nn.Parameter(torch.zeros(count, latent))
        """Latents times exp(log_gain) are what is rounded."""
        self.log_step = nn.Parameter(torch.zeros(count, latent))
        """Symbols times exp(log_step) are what the synthesis transform receives."""
        self.density = Density(count, latent)

    def start_gains(self, scale: float) -> None:
        """Set gains: a unit step of an orthonormal transform times `scale` then has the slope -1/lambda at high rate.

        With distortion 255^2 lambda step^2 / 36 per coefficient (three samples a pixel, step^2 / 12 each) and rate
        -log2(step): step^2 = 36 / (2 ln 2 255^2 lambda).
        """
        for row, quality in enumerate(self.qualities):
            gain = 1.5 / scale * (LAMBDAS["mse"][quality - 1] / 4e-4) ** 0.5
            nn.init.constant_(self.log_gain[row], torch.tensor(gain).log().item())
            nn.init.constant_(self.log_step[row], -torch.tensor(gain).log().item())

    @torch.no_grad()
    def move(self, old: tuple[float, ...], new: tuple[float, ...]) -> None:
        """Give each quality, trained with one lambda of `old`, the gains and the density for that of `new`.

        Their logarithms are interpolated, as Cui et al. do for rates between the trained ones, here over the logarithm
        of lambda. Beyond the ends the line through the last two is continued.
        """
        known, wanted = (torch.tensor(lambdas, device=self.log_gain.device).log() for lambdas in (old, new))
        below = (torch.searchsorted(known, wanted) - 1).clamp(0, len(known) - 2)
        share = (wanted - known[below]) / (known[below + 1] - known[below])
        for parameter in (self.log_gain, self.log_step, *self.density.parameters()):
            along = share.reshape(-1, *[1] * (parameter.dim() - 1))
            parameter.copy_(torch.lerp(parameter[below], parameter[below + 1], along))

    def scaled(self, pixels: Tensor) -> Tensor:
        """Return latents before rounding (Q, n, M, h, w) of pixels (Q n, 3, H, W) that are grouped by quality."""
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.low_precision):
            features = self.analysis.fine(pixels)
        flat: Tensor = self.analysis.coarse(features.float())
        latents: Tensor = flat.unflatten(0, (len(self.qualities), -1))  # type: ignore[no-untyped-call]
        return latents * self.log_gain.exp()[:, None, :, None, None]

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Return the pixels (Q, n, 3, H, W) of rounded latents (Q, n, M, h, w)."""
        received = latents * self.log_step.exp()[:, None, :, None, None]
        features = self.synthesis.coarse(received.flatten(0, 1))
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.low_precision):
            flat: Tensor = self.synthesis.fine(features)
        pixels: Tensor = flat.unflatten(0, latents.shape[:2])  # type: ignore[no-untyped-call]
        return pixels

    def forward(self, pixels: Tensor, *, noisy: bool, straight_through: bool, tune_decoder: bool) -> Pass:
        """Code and decode crops (Q n, 3, H, W), with rounding or with uniform noise in its place."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not tune_decoder):
            latents = self.scaled(pixels)
        rounded = latents + (latents.round() - latents).detach()
        noise = torch.rand_like(latents) - 0.5
        bits = self.density.bits(latents + noise if noisy else rounded, rounded)
        decoded = self.reconstruct(rounded if straight_through else latents + noise)
        return Pass(decoded, bits / (pixels.shape[-1] * pixels.shape[-2]))

    def project(self) -> None:
        """Put every constrained parameter back into its range."""
        for module in self.modules():
            if isinstance(module, GDN):
                module.project()
