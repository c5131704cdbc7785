"""The rate-distortion loss: bits per pixel plus lambda times the distortion, over several qualities at once."""

from __future__ import annotations

import torch
from torch import Tensor

from zarr_cae.training.model import LAMBDAS, Coded, Metric


def mean_squared_error(coded: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error of each crop for pixels in [0, 1]: (Q, n, 3, H, W) to (Q, n)."""
    return (coded - pixels).square().mean((2, 3, 4))


def multiscale_dissimilarity(coded: Tensor, pixels: Tensor) -> Tensor:
    """1 - MS-SSIM of each crop, which must be over 160 px on both sides: (Q, n, 3, H, W) to (Q, n)."""
    from pytorch_msssim import ms_ssim

    similarity: Tensor = ms_ssim(coded.flatten(0, 1), pixels.flatten(0, 1), data_range=1.0, size_average=False)
    return 1 - similarity.reshape(coded.shape[:2])


def rate_distortion(coded: Coded, pixels: Tensor, metric: Metric, qualities: tuple[int, ...]) -> Tensor:
    """The loss, averaged over crops; pixels (Q, n, 3, H, W).

    Each quality's Lagrangian is weighed by lambda^-1/2, or the top rates would have nearly all of the gradient.
    """
    lambdas = torch.tensor([LAMBDAS[metric][quality - 1] for quality in qualities], device=pixels.device)
    if metric == "mse":
        distortion = lambdas[:, None] * 255**2 * mean_squared_error(coded.pixels, pixels)
    else:
        distortion = lambdas[:, None] * multiscale_dissimilarity(coded.pixels, pixels)
    weight = lambdas.rsqrt() / lambdas.rsqrt().mean()
    return (weight[:, None] * (distortion + coded.bits_per_pixel)).mean()
