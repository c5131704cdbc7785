"""Measures of distortion and rate for one image: PSNR, SSIM, MS-SSIM, CIE76 and bits per pixel.

SSIM and CIE76 come from scikit-image, MS-SSIM from pytorch-msssim, both in the extra `compare`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.extra import import_extra

SMALLEST_SSIM = 11
"""Shortest side in pixels that SSIM's window of 11 x 11 fits into."""
SMALLEST_MS_SSIM = 161
"""Shortest side in pixels for MS-SSIM: the window must fit into the fifth scale."""


def psnr(a: ArrayLike, b: ArrayLike, peak: float = 255.0) -> float:
    """Return the peak signal-to-noise ratio, 10 log10(peak^2 / MSE).

    It is computed here, so that `demo` needs no extra. A test compares it with scikit-image's.

    Parameters
    ----------
    a, b
        Two arrays of one shape, any real dtype.
    peak
        The largest possible value: 255 for uint8.

    Returns
    -------
    float
        In dB; `inf` for equal arrays. The MSE is taken over all samples together.

    Raises
    ------
    CAEConfigurationError
        If the shapes differ or the arrays are empty.
    """
    x, y = _same_shape(a, b)
    mse = float(np.mean(np.square(x.astype(np.float64) - y)))
    return 10.0 * math.log10(peak * peak / mse) if mse else math.inf


def ssim(a: ArrayLike, b: ArrayLike, peak: float = 255.0) -> float:
    """Return the structural similarity of two images, 1 if they are equal.

    As in the paper: a Gaussian window of 11 x 11 with sigma 1.5, K = (0.01, 0.03), the mean over the image without a
    border of 5 pixels; for colours the mean over the channels.

    Parameters
    ----------
    a, b
        (H, W) or (H, W, C) of one shape, any real dtype, both sides at least 11 pixels.
    peak
        The largest possible value: 255 for uint8.

    Returns
    -------
    float

    Raises
    ------
    CAEConfigurationError
        If the arrays differ in shape, are not images or are too small; if scikit-image is missing.

    References
    ----------
    Wang, Bovik, Sheikh & Simoncelli, "Image quality assessment", IEEE Trans. Image Processing 13 (4), 2004.
    """
    x, y = _two_images("SSIM", a, b, SMALLEST_SSIM)
    metrics = import_extra("skimage.metrics", "SSIM and CIE76")
    return float(
        metrics.structural_similarity(
            x, y, data_range=peak, channel_axis=2 if x.ndim == 3 else None, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
    )  # fmt: skip


def ms_ssim(a: ArrayLike, b: ArrayLike, peak: float = 255.0) -> float:
    """Return the multi-scale structural similarity of two images, 1 if they are equal.

    Parameters
    ----------
    a, b
        (H, W) or (H, W, C) of one shape, any real dtype, both sides at least 161 pixels.
    peak
        The largest possible value: 255 for uint8.

    Returns
    -------
    float
        The mean over the channels.

    Raises
    ------
    CAEConfigurationError
        If the arrays differ in shape, are not images or are too small; if pytorch-msssim is missing.

    References
    ----------
    Wang, Simoncelli & Bovik, "Multiscale structural similarity for image quality assessment", Asilomar 2003.
    """
    images = _two_images("MS-SSIM", a, b, SMALLEST_MS_SSIM)
    library = import_extra("pytorch_msssim", "MS-SSIM values")
    import torch

    planes = [np.atleast_3d(image).transpose(2, 0, 1)[None] for image in images]
    with torch.inference_mode():
        value = library.ms_ssim(*(torch.from_numpy(plane.astype(np.float32)) for plane in planes), data_range=peak)
    return min(float(value), 1.0)  # float32 rounds a little above 1


def ms_ssim_decibels(value: float) -> float:
    """Return an MS-SSIM on the scale of rate-distortion plots, -10 log10(1 - value), in dB.

    Returns
    -------
    float
        `inf` for 1, `nan` for `nan`.

    Raises
    ------
    CAEConfigurationError
        If the value is above 1.
    """
    if value > 1.0:
        raise CAEConfigurationError(f"cae: {value} is not an MS-SSIM, which is at most 1")
    return math.inf if value == 1.0 else -10.0 * math.log10(1.0 - value)


def cie76(a: ArrayLike, b: ArrayLike) -> float:
    """Return the mean CIE 1976 colour difference of two sRGB images: the Euclidean distance in CIELAB (D65).

    Parameters
    ----------
    a, b
        (H, W, 3) uint8, or (H, W) uint8, which is taken as R = G = B.

    Returns
    -------
    float
        The mean over the pixels. About 2.3 is a just noticeable difference.

    Raises
    ------
    CAEConfigurationError
        For other shapes or dtypes; if scikit-image is missing.
    """
    return float(np.mean(colour_difference(a, b)))


def colour_difference(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return the CIE 1976 colour difference of each pixel, (H, W). Parameters and errors are those of `cie76`."""
    x, y = _same_shape(a, b)
    if x.dtype != np.uint8 or y.dtype != np.uint8 or not (x.ndim == 2 or (x.ndim == 3 and x.shape[2] == 3)):
        raise CAEConfigurationError(
            f"cae: CIE76 needs uint8 (H, W, 3) or (H, W) images, got {x.dtype} {x.shape} and {y.dtype} {y.shape}"
        )
    color = import_extra("skimage.color", "SSIM and CIE76")
    first, second = (color.rgb2lab(np.repeat(image[..., None], 3, 2) if x.ndim == 2 else image) for image in (x, y))
    difference: NDArray[np.float64] = color.deltaE_cie76(first, second)
    return difference


def bits_per_pixel(nbytes: int, height: int, width: int) -> float:
    """Return the bits of `nbytes` bytes for each of height x width pixels, all channels of a pixel together.

    Raises
    ------
    CAEConfigurationError
        If a side is not positive or `nbytes` is negative.
    """
    if height < 1 or width < 1 or nbytes < 0:
        raise CAEConfigurationError(f"cae: no bits per pixel of {nbytes} bytes for {height} x {width} pixels")
    return 8.0 * nbytes / (height * width)


def _same_shape(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    x, y = np.asarray(a), np.asarray(b)
    if x.shape != y.shape or x.size == 0:
        raise CAEConfigurationError(f"cae: images to compare must have one shape, these have {x.shape} and {y.shape}")
    return x, y


def _two_images(name: str, a: ArrayLike, b: ArrayLike, smallest: int) -> tuple[NDArray[Any], NDArray[Any]]:
    x, y = _same_shape(a, b)
    if x.ndim not in {2, 3}:
        raise CAEConfigurationError(f"cae: {name} is of (H, W) or (H, W, C) images, not of shape {x.shape}")
    if min(x.shape[:2]) < smallest:
        raise CAEConfigurationError(
            f"cae: {name} needs both sides of {smallest} px or more, the image is {x.shape[0]} x {x.shape[1]}"
        )
    return x, y
