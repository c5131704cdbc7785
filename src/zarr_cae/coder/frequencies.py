"""Make integer frequencies from probabilities, for the tables of a weights file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zarr_cae.coder.tables import TOTAL, escape_bytes
from zarr_cae.errors import CAEConfigurationError

__all__ = ["frequencies", "trimmed_frequencies"]


def frequencies(probability: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Return the integer frequencies with the least expected code length.

    The expected length is a sum of convex functions, each of one frequency. So the function exchanges single units
    until no exchange helps; the result is optimal (Fox, "Discrete optimization via marginal analysis", 1966).

    Parameters
    ----------
    probability
        float64 (n,), finite and not negative, 2 <= n <= 2^PRECISION; the last is the probability of the escape. The
        sum need not be 1.

    Returns
    -------
    uint32 (n,), each at least 1, of sum 2^PRECISION

    Raises
    ------
    CAEConfigurationError
        If `probability` has another shape, or values that are negative, not finite or all zero.
    """
    p = _probabilities(probability, 2, TOTAL)
    frequency = np.maximum(np.rint(p * (TOTAL / p.sum())), 1.0)
    while True:
        gain = p * np.log2((frequency + 1) / frequency)
        with np.errstate(divide="ignore", invalid="ignore"):
            loss = np.where(frequency > 1, p * np.log2(frequency / (frequency - 1)), np.inf)
        best, least = int(gain.argmax()), int(loss.argmin())
        missing = TOTAL - int(frequency.sum())
        if missing == 0 and gain[best] <= loss[least]:
            return np.asarray(frequency, np.uint32)
        if missing >= 0:
            frequency[best] += 1
        if missing <= 0:
            frequency[least] -= 1


def trimmed_frequencies(probability: NDArray[np.float64], first: int) -> tuple[int, NDArray[np.uint32]]:
    """Return an alphabet for one channel with nearly the least expected code length, and its row.

    Every symbol of the alphabet takes at least one slot from the others. Every other symbol costs the escape and 1 to 3
    bytes. The function compares ranges that grow from the most probable symbol, each time by the likelier neighbour.

    Parameters
    ----------
    probability
        float64 (n,): probabilities of the integers first, first + 1, ...; all others share the remainder up to 1.
    first
        The smallest integer, within int16.

    Returns
    -------
    minimum, frequency
        The alphabet's smallest symbol, and its row: uint32, escape last.

    Raises
    ------
    CAEConfigurationError
        If `probability` is not valid for `frequencies`, or its integers leave [-32768, 32766].
    """
    p = _probabilities(probability, 1, 1 << 16)
    if first < -(1 << 15) or first + p.size - 1 > (1 << 15) - 2:
        raise CAEConfigurationError(
            f"cae: symbols must lie in [-32768, 32766]; got {first} to {first + p.size - 1}: give fewer probabilities"
        )
    p = p / max(p.sum(), 1.0)
    low = high = int(p.argmax())
    order = [low]
    while len(order) < min(p.size, TOTAL - 1):
        down = p[low - 1] if low > 0 else -1.0
        up = p[high + 1] if high + 1 < p.size else -1.0
        if up >= down:
            high += 1
            order.append(high)
        else:
            low -= 1
            order.append(low)
    grown = p[order]
    escape = np.maximum(1.0 - grown.cumsum(), 0.0)
    escape_bits = 8.0 * escape_bytes(np.arange(p.size) + first)
    outside = 24.0 * max(1.0 - p.sum(), 0.0) + (p * escape_bits).sum() - (grown * escape_bits[order]).cumsum()
    slots, escape_slots = np.maximum(grown * TOTAL, 1.0), np.maximum(escape * TOTAL, 1.0)
    inside = -(grown * np.log2(slots)).cumsum() - escape * np.log2(escape_slots)
    bits = inside + np.log2(slots.cumsum() + escape_slots) + outside
    size = int(bits.argmin()) + 1
    low = min(order[:size])
    return first + low, frequencies(np.append(p[low : low + size], escape[size - 1]))


def _probabilities(given: NDArray[np.float64], least: int, most: int) -> NDArray[np.float64]:
    p = np.asarray(given, np.float64)
    if p.ndim != 1 or not least <= p.size <= most or not np.isfinite(p).all() or (p < 0).any() or p.sum() <= 0:
        raise CAEConfigurationError(
            f"cae: probability must be {least} to {most} finite values >= 0, not all zero; got shape {p.shape}"
        )
    return p
