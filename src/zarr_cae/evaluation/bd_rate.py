"""BD-rate: one number for the distance of two rate-distortion curves (Bjøntegaard, VCEG-M33)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zarr_cae.errors import CAEConfigurationError

Floats = NDArray[np.float64]


def bd_rate(anchor_rate: ArrayLike, anchor_quality: ArrayLike, rate: ArrayLike, quality: ArrayLike) -> float:
    """Bjøntegaard rate difference in percent: what `rate` costs beyond `anchor_rate` at equal quality; less is better.

    The mean difference of log rate over the interval of qualities (in dB) that both curves reach, each log rate
    interpolated over quality by a monotone piecewise cubic (PCHIP) instead of VCEG-M33's single cubic, which
    oscillates when points are many or unevenly spread (Bjøntegaard, VCEG-M33, 2001; JVET-T0062).
    All four are one-dimensional, two points or more a curve, in any order; convert MS-SSIM with `ms_ssim_decibels`.
    Raises CAEConfigurationError if a curve is too short, not finite or not strictly rising in quality with rate, or if
    the curves share no interval of quality.
    """
    anchor_q, anchor_log = _rising("the anchor", anchor_rate, anchor_quality)
    tested_q, tested_log = _rising("the tested curve", rate, quality)
    low, high = max(anchor_q[0], tested_q[0]), min(anchor_q[-1], tested_q[-1])
    if low >= high:
        raise CAEConfigurationError(
            f"cae: no BD-rate: qualities {anchor_q[0]:.3f} to {anchor_q[-1]:.3f} dB of the anchor and "
            f"{tested_q[0]:.3f} to {tested_q[-1]:.3f} dB of the tested curve do not overlap"
        )
    integral = _pchip_integral(tested_q, tested_log, low, high) - _pchip_integral(anchor_q, anchor_log, low, high)
    return 100.0 * math.expm1(integral / (high - low))


def _rising(whose: str, rate: ArrayLike, quality: ArrayLike) -> tuple[Floats, Floats]:
    """Quality and log rate as float64 in order of rate, checked."""
    r, q = np.asarray(rate, np.float64), np.asarray(quality, np.float64)
    if r.ndim != 1 or r.shape != q.shape or r.size < 2:
        raise CAEConfigurationError(
            f"cae: BD-rate needs two or more points, as many rates as qualities; {whose} has {r.shape} and {q.shape}"
        )
    order = np.argsort(r)
    r, q = r[order], q[order]
    if not (np.isfinite(r).all() and np.isfinite(q).all() and r[0] > 0):
        raise CAEConfigurationError(f"cae: BD-rate needs finite positive rates and finite qualities; see {whose}")
    if not ((np.diff(r) > 0).all() and (np.diff(q) > 0).all()):
        raise CAEConfigurationError(f"cae: BD-rate needs quality that rises strictly with rate; {whose} does not")
    return q, np.log(r)


def _pchip_integral(x: Floats, y: Floats, low: float, high: float) -> float:
    """Integrate the PCHIP interpolant of y(x) from low to high, both inside x.

    Two Gauss-Legendre nodes a segment integrate a cubic exactly.
    """
    slope = _pchip_slopes(x, y)
    left, width = x[:-1], np.diff(x)
    a, b = np.clip(x[:-1], low, high), np.clip(x[1:], low, high)
    total = 0.0
    for node in (-1 / math.sqrt(3), 1 / math.sqrt(3)):
        t = ((a + b) / 2 + node * (b - a) / 2 - left) / width
        hermite = (
            (1 + 2 * t) * (1 - t) ** 2 * y[:-1]
            + t * (1 - t) ** 2 * width * slope[:-1]
            + t * t * (3 - 2 * t) * y[1:]
            + t * t * (t - 1) * width * slope[1:]
        )
        total += float(np.sum((b - a) / 2 * hermite))
    return total


def _pchip_slopes(x: Floats, y: Floats) -> Floats:
    """Slopes at the knots that keep the cubic monotone (Fritsch & Butland 1984); three-point formula at the ends."""
    h = np.diff(x)
    d = np.diff(y) / h
    if d.size == 1:
        return np.repeat(d, 2)
    w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    inner = (w1 + w2) / (w1 / d[:-1] + w2 / d[1:])  # every d > 0: rates and qualities rise strictly
    first, last = (
        np.clip(((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1), 0.0, 3 * d0)
        for h0, h1, d0, d1 in ((h[0], h[1], d[0], d[1]), (h[-1], h[-2], d[-1], d[-2]))
    )
    return np.concatenate([[first], inner, [last]])
