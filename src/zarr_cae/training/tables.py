"""Contexts and integer tables from the symbols of real images; the last step of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_cae.coder.contexts import LARGEST_ACTIVITY, LARGEST_WEIGHTS, Contexts, around, scores, to_differences
from zarr_cae.coder.frame import Symbols
from zarr_cae.coder.frequencies import trimmed_frequencies
from zarr_cae.coder.tables import PRECISION

CLASSES = 16
SOURCES = 16
"""On held-out images, 8 of each took more bytes at nearly the same speed; more than 16 saved almost nothing."""
_WIDEST = 1023
"""Symbols beyond this are coded as escapes."""
_MARGIN = 16
"""How far beyond the largest symbol seen a table may reach."""
_PRIOR = 4.0
"""The smoothed histogram of all classes counts like this many symbols in the table of each class."""
_TAIL = 1e-3
_RIDGE = 1e-4

Sources = tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]
"""The sources of one channel: earlier channels and their weights, (SOURCES,) each, as in `Contexts`."""


class Fitted(NamedTuple):
    """Contexts, and the K rows of each channel: minimum (M K,), length (M K,), frequency (sum of lengths,)."""

    contexts: Contexts
    minimum: npt.NDArray[np.int32]
    length: npt.NDArray[np.int32]
    frequency: npt.NDArray[np.uint16]


def fit_tables(tiles: Sequence[Symbols], predicted: npt.NDArray[np.bool_], mix: npt.NDArray[np.float32]) -> Fitted:
    """Return contexts and tables for symbols like those of the tiles.

    Parameters
    ----------
    tiles
        int16 (M, h, w) each.
    predicted
        bool (M,): which channels are coded as differences.
    mix
        float32 (M, M): weight of each channel's activity (second axis) in the score of a later one, as `Density` has
        learned it. A channel takes these weights or those of a least-squares fit, whichever needs fewer bits. The fit
        alone took up to 1.5 % more bytes: it follows the busiest positions, but the many quiet ones hold the gain.
    """
    coded = [to_differences(tile, predicted) for tile in tiles]
    flat = np.concatenate([tile.reshape(len(tile), -1) for tile in coded], 1)
    activities = [np.minimum(np.abs(tile.astype(np.int32)), LARGEST_ACTIVITY).astype(np.uint8) for tile in coded]
    surroundings = np.concatenate([around(values).reshape(len(values), -1) for values in activities], 1)
    targets = np.concatenate([values.reshape(len(values), -1) for values in activities], 1)
    candidates = zip(_learned_sources(mix, surroundings), _regressed_sources(surroundings, targets), strict=True)
    chosen: list[Sources] = []
    threshold = np.full((len(flat), CLASSES - 1), np.iinfo(np.uint16).max, np.uint16)
    rows: list[tuple[int, npt.NDArray[np.uint32]]] = []
    for channel, (symbols, options) in enumerate(zip(flat, candidates, strict=True)):
        tried = []
        for one in options:
            score = scores(surroundings, *one)
            found = _thresholds(score)
            tried.append((one, found, _counts(symbols, np.searchsorted(found, score, "right"))))
        best, found, counts = min(tried, key=lambda one: _entropy(one[2]))
        chosen.append(best)
        threshold[channel, : len(found)] = found
        rows += _rows(counts)
    source, weight = (np.stack(part) for part in zip(*chosen, strict=True))
    zero = np.floor((flat == 0).mean(1) * (1 << PRECISION)).astype(np.uint16)
    return Fitted(
        Contexts(source, weight, threshold, predicted, zero),
        np.array([minimum for minimum, _ in rows], np.int32),
        np.array([len(row) for _, row in rows], np.int32),
        np.concatenate([row for _, row in rows]).astype(np.uint16),
    )


def _learned_sources(mix: npt.NDArray[np.float32], surroundings: npt.NDArray[np.uint8]) -> list[Sources]:
    """Return, for each channel, the few earlier channels that most change its learned score."""
    deviation = np.array([around_one.std() for around_one in surroundings])
    found = []
    for channel, row in enumerate(mix):
        values = row[:channel].clip(min=0)
        chosen = np.sort((-values * deviation[:channel]).argsort(kind="stable")[:SOURCES])
        found.append(_in_integers(chosen, values[chosen]))
    return found


def _regressed_sources(surroundings: npt.NDArray[np.uint8], targets: npt.NDArray[np.uint8]) -> list[Sources]:
    """Return, for each channel, the few earlier channels that best predict its activity by least squares."""
    channels = len(targets)
    normal, right = np.zeros((channels, channels)), np.zeros((channels, channels))
    for begin in range(0, targets.shape[1], 1 << 16):
        piece = surroundings[:, begin : begin + (1 << 16)].astype(np.float32)
        normal += piece @ piece.T
        right += piece @ targets[:, begin : begin + (1 << 16)].T.astype(np.float32)
    normal += np.eye(channels) * (_RIDGE * np.trace(normal) / channels + 1e-9)
    return [_in_integers(*_sparse_weights(normal[:c, :c], right[:c, c])) for c in range(channels)]


def _sparse_weights(
    normal: npt.NDArray[np.float64], right: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Solve non-negative least squares with at most SOURCES weights: drop the least important ones, a few at a time."""
    chosen = np.arange(len(right))
    while len(chosen):
        values: npt.NDArray[Any] = np.linalg.solve(normal[np.ix_(chosen, chosen)], right[chosen])
        if (values <= 0).any():
            chosen = chosen[values > 0]
        elif len(chosen) > SOURCES:
            importance = values**2 * normal.diagonal()[chosen]
            drop = max(1, int(0.3 * (len(chosen) - SOURCES)))
            chosen = np.sort(chosen[importance.argsort()[drop:]])
        else:
            return chosen, values
    return chosen, np.empty(0)


def _in_integers(chosen: npt.NDArray[np.intp], values: npt.NDArray[np.floating[Any]]) -> Sources:
    whole = np.floor(values * (LARGEST_WEIGHTS / max(values.sum(), 1e-30))).clip(max=255)
    kept = np.flatnonzero(whole)
    source, weight = np.full(SOURCES, -1, np.int16), np.zeros(SOURCES, np.uint8)
    source[: len(kept)], weight[: len(kept)] = chosen[kept], whole[kept]
    return source, weight


def _thresholds(score: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Return ascending thresholds that divide the scores into up to CLASSES classes; busy classes are smaller."""
    positive = score[score > 0]
    if len(positive) < CLASSES:
        return np.empty(0, np.uint16)
    if len(positive) < len(score) * (1 - 1 / CLASSES):
        found = np.append(1.0, np.quantile(positive, np.linspace(0, 1, CLASSES)[1:-1] ** 0.75))
    else:
        found = np.quantile(score, np.linspace(0, 1, CLASSES + 1)[1:-1] ** 0.75)
    return np.unique(np.ceil(found).clip(1, 65535).astype(np.uint16))


def _counts(symbols: Symbols, classes: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Count how often each class has each symbol from -n to n: (CLASSES, 2 n + 1). The ends count those beyond, too."""
    limit = min(_WIDEST, int(np.abs(symbols.astype(np.int32)).max()) + _MARGIN)
    size = 2 * limit + 1
    index = symbols.astype(np.int64).clip(-limit, limit) + limit
    return np.bincount(classes * size + index, minlength=CLASSES * size).reshape(CLASSES, size).astype(float)


def _entropy(counts: npt.NDArray[np.float64]) -> float:
    """Return the bits of all symbols under one ideal table for each class."""
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    return -float((counts * np.log2(share, where=counts > 0, out=np.zeros_like(counts))).sum())


def _rows(counts: npt.NDArray[np.float64]) -> list[tuple[int, npt.NDArray[np.uint32]]]:
    """Return a trimmed table for each class, made of its counts and of the smoothed counts of all classes."""
    limit = counts.shape[1] // 2
    magnitude = np.abs(np.arange(-limit, limit + 1))
    everything = counts.sum(0)
    scale = (everything * magnitude).sum() / everything.sum() + 0.2
    tail = np.exp(-magnitude / scale)
    smooth: npt.NDArray[Any] = np.convolve(everything, [0.25, 0.5, 0.25], "same")
    prior = (1 - _TAIL) * smooth / smooth.sum() + _TAIL * tail / tail.sum()
    return [trimmed_frequencies((row + _PRIOR * prior) / (row.sum() + _PRIOR), -limit) for row in counts]
