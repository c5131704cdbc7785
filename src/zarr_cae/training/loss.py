"""Rate-distortion losses of gained networks: MSE or MS-SSIM, over several qualities at once."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, from_numpy, nn

from zarr_cae.training.model import Pass
from zarr_cae.weights.file import Metric

_SEAMS = 0.25
"""Weight of the bias along borders, where the squared error has weight 1."""
_RUN, _DEPTH = 16, 2
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_RADIUS, _SIGMA = 5, 1.5
SMALLEST_CROP = 96
"""Edge in pixels below which the coarsest scale of MS-SSIM is smaller than its window."""


def mean_squared_error(coded: Tensor, pixels: Tensor) -> Tensor:
    """Return the mean squared error of each crop for pixels in [0, 1]: (Q, n, 3, H, W) to (Q, n)."""
    return (coded - pixels).square().mean((2, 3, 4))


def border_bias(coded: Tensor, pixels: Tensor) -> Tensor:
    """Average the error over 16 x 2 pixels along the borders, and return the mean square: (Q, n, 3, H, H) to (Q, n).

    Chunks meet there. A step in a smooth area is visible although it adds little to the mean squared error.
    """
    error = coded - pixels
    sides = [side for way in (error, error.mT) for side in (way[..., :_DEPTH, :], way[..., -_DEPTH:, :])]
    means = torch.stack(sides, 3).unflatten(-1, (-1, _RUN)).mean((4, 6))  # type: ignore[no-untyped-call]
    bias: Tensor = means.square().mean((2, 3, 4))
    return bias


def multiscale_dissimilarity(coded: Tensor, pixels: Tensor) -> Tensor:
    """Return 1 - MS-SSIM of each crop: (Q, n, 3, H, H) to (Q, n), pixels in [0, 1], H a multiple of 16 and at least 96.

    Wang et al. 2003, "Multiscale structural similarity for image quality assessment", with the usual window (Gaussian
    of sigma 1.5, 11 x 11) and weights of five scales, but images are mirrored beyond their borders. The usual MS-SSIM
    leaves out 80 pixels at each border of the coarsest scale, the only one that sees brightness; networks trained with
    it gave chunks borders of another brightness.
    """
    first, second = coded.flatten(0, 2), pixels.flatten(0, 2)
    similarity = torch.ones((), device=pixels.device)
    for scale, weight in enumerate(_SCALES):
        if scale:
            first, second = (nn.functional.avg_pool2d(one, 2) for one in (first, second))
        luminance, structure = _similarities(first, second)
        value = structure if scale + 1 < len(_SCALES) else luminance * structure
        similarity = similarity * value.mean((1, 2)).clamp(min=1e-4) ** weight
    return 1 - similarity.reshape(coded.shape[:3]).mean(2)


def _similarities(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the luminance term, and the product of contrast and structure, at each pixel of (N, H, H)."""
    blur = _blur(first.shape[-1]).to(first.device)
    moments = torch.stack([first, second, first * first + second * second, first * second])
    mean1, mean2, squares, product = (blur @ moments @ blur.T).unbind()
    power, both = mean1 * mean1 + mean2 * mean2, 2 * mean1 * mean2
    c1, c2 = 0.01**2, 0.03**2
    return (both + c1) / (power + c1), (2 * product - both + c2) / (squares - power + c2)


@lru_cache
def _blur(length: int) -> Tensor:
    """Return the Gaussian blur of an axis, mirrored at its ends, as a matrix: the fastest form at these lengths."""
    window = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    mirrored = np.pad(np.arange(length), _RADIUS, mode="symmetric")
    matrix = np.zeros((length, length), np.float32)
    for row in range(length):
        np.add.at(matrix[row], mirrored[row : row + len(window)], window / window.sum())
    return from_numpy(matrix)


def rate_distortion(coded: Pass, pixels: Tensor, metric: Metric, weights: tuple[float, ...]) -> Tensor:
    """Return the loss, averaged over crops; pixels are (Q, n, 3, H, W), `weights` holds the lambda of each quality.

    The Lagrangian of each quality is multiplied by lambda^-1/2; otherwise the highest rates would have nearly all of
    the gradient.
    """
    lambdas = torch.tensor(weights, device=pixels.device)
    if metric == "mse":
        error = mean_squared_error(coded.pixels, pixels) + _SEAMS * border_bias(coded.pixels, pixels)
        distortion = lambdas[:, None] * 255**2 * error
    else:
        distortion = lambdas[:, None] * multiscale_dissimilarity(coded.pixels, pixels)
    weight = lambdas.rsqrt() / lambdas.rsqrt().mean()
    return (weight[:, None] * (distortion + coded.bits_per_pixel)).mean()
