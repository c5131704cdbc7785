"""BD-rate: the mean difference in rate between two rate-distortion curves, as one number."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.extra import import_extra

Floats = NDArray[np.float64]


def bd_rate(anchor_rate: ArrayLike, anchor_quality: ArrayLike, rate: ArrayLike, quality: ArrayLike) -> float:
    """Return the Bjøntegaard rate difference in percent.

    Positive: `rate` is that much above `anchor_rate` at equal quality. Negative: it is below. This is the mean
    difference of log rate over the interval of qualities that both curves reach. Log rate is interpolated over quality
    by a monotone piecewise cubic (PCHIP), as in JVET-T0062; the single cubic of VCEG-M33 oscillates when points are
    many or unevenly spaced.

    Parameters
    ----------
    anchor_rate, anchor_quality, rate, quality
        One-dimensional, two points or more for each curve, in any order. Rates in any unit, the same for both curves;
        qualities in dB (for MS-SSIM see `ms_ssim_decibels`).

    Returns
    -------
    float
        Percent.

    Raises
    ------
    CAEConfigurationError
        If a curve has too few points, is not finite, or its quality does not rise strictly with rate; if the curves
        have no interval of quality in common; if scipy is missing.

    References
    ----------
    Bjøntegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33, 2001.
    """
    interpolate = import_extra("scipy.interpolate", "BD-rates")
    anchor_q, anchor_log = _sorted_curve("the anchor", anchor_rate, anchor_quality)
    tested_q, tested_log = _sorted_curve("the tested curve", rate, quality)
    low, high = max(anchor_q[0], tested_q[0]), min(anchor_q[-1], tested_q[-1])
    if low >= high:
        raise CAEConfigurationError(
            f"cae: no BD-rate: qualities {anchor_q[0]:.3f} to {anchor_q[-1]:.3f} dB of the anchor and "
            f"{tested_q[0]:.3f} to {tested_q[-1]:.3f} dB of the tested curve do not overlap"
        )
    anchor, tested = (
        interpolate.PchipInterpolator(q, log).integrate(low, high)
        for q, log in ((anchor_q, anchor_log), (tested_q, tested_log))
    )
    return 100.0 * math.expm1(float(tested - anchor) / float(high - low))


def _sorted_curve(name: str, rate: ArrayLike, quality: ArrayLike) -> tuple[Floats, Floats]:
    """Check a curve and return its qualities and log rates in order of rate, as float64."""
    r, q = np.asarray(rate, np.float64), np.asarray(quality, np.float64)
    if r.ndim != 1 or r.shape != q.shape or r.size < 2:
        raise CAEConfigurationError(
            f"cae: BD-rate needs two or more points, as many rates as qualities; {name} has {r.shape} and {q.shape}"
        )
    order = np.argsort(r)
    r, q = r[order], q[order]
    if not (np.isfinite(r).all() and np.isfinite(q).all() and r[0] > 0):
        raise CAEConfigurationError(f"cae: BD-rate needs finite positive rates and finite qualities; see {name}")
    if not ((np.diff(r) > 0).all() and (np.diff(q) > 0).all()):
        raise CAEConfigurationError(f"cae: BD-rate needs quality that rises strictly with rate; {name} does not")
    return q, np.log(r)
