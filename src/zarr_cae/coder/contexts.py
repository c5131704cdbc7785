"""Contexts: which of a channel's frequency tables codes a symbol, known to the decoder from what it has decoded.

A factorized prior takes all positions of a channel for alike. They are not: where the channels before it are busy, a
channel is busy too. So each channel has K tables, and the one for a position is chosen by the magnitudes of earlier
channels around it; a few slowly varying channels are coded as differences from their neighbours. All of it is integer
arithmetic, exact on every machine, and within a channel no position waits for another, so they decode in parallel.

The arithmetic, which is part of the format
-------------------------------------------
A tile has channels c = 0, 1, ... of h x w symbols, in [-2^15, 2^15).

    coded       of a predicted channel, v - ((left + upper + 1) >> 1) modulo 2^16, in [-2^15, 2^15); left and upper are
                the symbols beside and above v. In the first row it is v - left, in the first column v - upper, in the
                corner v. The coded symbols of other channels are the symbols themselves.
    activity    of a coded symbol, min(|coded|, 15); one that takes its table's escape counts as the table's largest
                symbol plus one
    around      4 times a position's activity, plus 2 times those of its four neighbours, plus those of its four
                diagonal ones; outside the tile they are 0
    score       of channel c at a position, the sum of weight[c, s] * around of channel source[c, s] over s
    class       the number of thresholds of channel c that are <= the score
    table       row c * K + class
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarr_cae.coder.frame import Symbols
from zarr_cae.errors import CAEConfigurationError

__all__ = ["LARGEST_ACTIVITY", "LARGEST_WEIGHTS", "Contexts", "around", "scores", "to_differences"]

LARGEST_ACTIVITY = 15
LARGEST_WEIGHTS = 273
"""Most that the weights of one channel may sum to: then scores, at 16 * 15 a unit of weight, stay below 2^16."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """The contexts of M channels with S sources each and K classes; read-only copies of the arrays given.

    Parameters
    ----------
    source
        int16 (M, S): an earlier channel each, or -1 for none.
    weight
        uint8 (M, S): of the sources; each channel's sum to at most 273.
    threshold
        uint16 (M, K - 1): of each channel's scores.
    predicted
        bool (M,): whether a channel is coded as differences.
    zero
        uint16 (M,): how many of 2^12 coded symbols are zero, over all classes, for the flags of `rans`.

    Raises
    ------
    CAEConfigurationError
        If an array has another shape or breaks a rule above.
    """

    source: NDArray[np.int16]
    weight: NDArray[np.uint8]
    threshold: NDArray[np.uint16]
    predicted: NDArray[np.bool_]
    zero: NDArray[np.uint16]

    def __post_init__(self) -> None:
        channels = len(self.predicted)
        for name, axes, kind, dtype in (
            ("source", 2, "i", np.int16), ("weight", 2, "u", np.uint8), ("threshold", 2, "u", np.uint16),
            ("predicted", 1, "bu", np.bool_), ("zero", 1, "u", np.uint16),
        ):  # fmt: skip
            given = np.asarray(getattr(self, name))
            if given.ndim != axes or given.dtype.kind not in kind or len(given) != channels:
                raise CAEConfigurationError(
                    f"cae: contexts.{name} must have {axes} axes and {channels} rows; got {given.dtype} {given.shape}"
                )
            array: NDArray[Any] = np.ascontiguousarray(given.astype(dtype))
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.source.shape != self.weight.shape:
            raise CAEConfigurationError(
                f"cae: contexts need one weight a source; got {self.weight.shape} and {self.source.shape}"
            )
        late = (self.source < -1) | (self.source >= np.arange(channels)[:, None])
        heavy = self.weight.sum(1, dtype=np.int64) > LARGEST_WEIGHTS
        if late.any() or heavy.any():
            channel = int((late.any(1) | heavy).argmax())
            raise CAEConfigurationError(
                f"cae: contexts of channel {channel} need earlier channels as sources, and weights that sum to at most "
                f"{LARGEST_WEIGHTS}; got {self.source[channel].tolist()}, {self.weight[channel].tolist()}"
            )

    @property
    def classes(self) -> int:
        """K."""
        return int(self.threshold.shape[1]) + 1

    def class_of(self, channel: int, around_of: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The class at each position of a channel, for `around` (>= channel, ...) of the channels before it."""
        score = scores(around_of, self.source[channel], self.weight[channel])
        return np.asarray((score[..., None] >= self.threshold[channel]).sum(-1), np.uint8)


def scores(around_of: NDArray[np.uint8], source: NDArray[np.int16], weight: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """The scores of one channel: `around` of all channels (n, ...) to (...)."""
    used = source >= 0
    total = np.tensordot(weight[used].astype(np.float32), around_of[source[used]].astype(np.float32), 1)
    return np.asarray(total).astype(np.uint16)


def around(activity: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """Activities (..., h, w) in [0, 15], weighed over each position's neighbourhood."""
    padded = np.pad(activity.astype(np.uint8), [(0, 0)] * (activity.ndim - 2) + [(1, 1), (1, 1)])
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return np.asarray(rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:], np.uint8)


def to_differences(symbols: Symbols, predicted: NDArray[np.bool_]) -> Symbols:
    """The coded symbols of a tile (M, h, w), which is not changed; `rans` has the way back."""
    if not predicted.any():
        return symbols
    chosen = symbols[predicted].astype(np.int32)
    guess = np.zeros_like(chosen)
    guess[:, 1:, 1:] = (chosen[:, 1:, :-1] + chosen[:, :-1, 1:] + 1) >> 1
    guess[:, 0, 1:] = chosen[:, 0, :-1]
    guess[:, 1:, 0] = chosen[:, :-1, 0]
    coded = symbols.copy()
    coded[predicted] = (chosen - guess).astype(np.int16)
    return coded
