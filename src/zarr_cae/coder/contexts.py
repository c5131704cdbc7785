"""Contexts: which row of a channel's frequency tables codes a symbol.

A factorized prior treats all positions of a channel alike. But channels tend to be large at the same positions. So
each channel has K rows, and the magnitudes of earlier channels around a position choose the row; the decoder knows
them already. A few slowly varying channels are coded as differences from their neighbours. All of it is integer
arithmetic, exact on every machine. Within a channel no position waits for another.

The section "Contexts" of spec/cae.md defines the arithmetic.
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
"""Largest sum of the weights of one channel. Scores are at most 16 * 15 per unit of weight, so they stay below 2^16."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """The contexts of M channels with S sources and K classes each. It holds read-only copies of the arrays.

    Parameters
    ----------
    source
        int16 (M, S): earlier channels, or -1 for none.
    weight
        uint8 (M, S): weights of the sources; those of a channel sum to at most 273.
    threshold
        uint16 (M, K - 1): thresholds of each channel's scores.
    predicted
        bool (M,): whether a channel is coded as differences.
    zero
        uint16 (M,): how many of 2^12 coded symbols are zero, over all classes; for the zero flags of streams.

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
        """Number of rows of each channel, K."""
        return int(self.threshold.shape[1]) + 1

    def class_of(self, channel: int, around_of: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the class at each position of a channel, from `around` (>= channel, ...) of earlier channels."""
        score = scores(around_of, self.source[channel], self.weight[channel])
        return np.asarray((score[..., None] >= self.threshold[channel]).sum(-1), np.uint8)


def scores(around_of: NDArray[np.uint8], source: NDArray[np.int16], weight: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return the scores (...) of one channel from `around` (n, ...) of n channels."""
    used = source >= 0
    total = np.tensordot(weight[used].astype(np.float32), around_of[source[used]].astype(np.float32), 1)
    return np.asarray(total).astype(np.uint16)


def around(activity: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """Return the weighted sum of activities (..., h, w) in [0, 15] around each position: uint8, same shape."""
    padded = np.pad(activity.astype(np.uint8), [(0, 0)] * (activity.ndim - 2) + [(1, 1), (1, 1)])
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return np.asarray(rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:], np.uint8)


def to_differences(symbols: Symbols, predicted: NDArray[np.bool_]) -> Symbols:
    """Return the coded symbols of a tile (M, h, w), which is not changed. `kernels.restore` is the inverse."""
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
