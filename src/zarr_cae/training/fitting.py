"""Contexts and integer tables from the symbols of real images; the last step of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_cae.contexts import LARGEST_ACTIVITY, LARGEST_WEIGHTS, Contexts, around, scores, to_differences
from zarr_cae.tables import PRECISION, trimmed_frequencies

CLASSES = 16
SOURCES = 16
"""On held-out images 8 of each took more bytes at nearly the same speed; more than 16 gained next to nothing."""
_WIDEST = 1023
"""Symbols beyond this are left to the escape."""
_MARGIN = 16
"""How far beyond the largest symbol seen a table may reach."""
_PRIOR = 4.0
"""Symbols that the smoothed histogram of all classes counts for in the table of one."""
_TAIL = 1e-3

Symbols = npt.NDArray[np.int16]


class Fitted(NamedTuple):
    """Contexts, and the K rows of each channel: minimum (M K,), length (M K,), frequency (sum of lengths,)."""

    contexts: Contexts
    minimum: npt.NDArray[np.int32]
    length: npt.NDArray[np.int32]
    frequency: npt.NDArray[np.uint16]


def fit(tiles: Sequence[Symbols], predicted: npt.NDArray[np.bool_], mix: npt.NDArray[np.float32]) -> Fitted:
    """Contexts and tables for symbols like those of the tiles.

    Parameters
    ----------
    tiles
        int16 (M, h, w) each.
    predicted
        bool (M,): which channels are coded as differences.
    mix
        float32 (M, M): weight of each channel's activity (second axis) in the score of a later one, as `Density` has
        learned it. Weights by least squares instead, from activities alone, took 1.5 % more bytes: the busiest
        positions decide them, and the many quiet ones hold the gain.
    """
    coded = [to_differences(tile, predicted) for tile in tiles]
    flat = np.concatenate([tile.reshape(len(tile), -1) for tile in coded], 1)
    activities = [np.minimum(np.abs(tile.astype(np.int32)), LARGEST_ACTIVITY).astype(np.uint8) for tile in coded]
    surroundings = np.concatenate([around(values).reshape(len(values), -1) for values in activities], 1)
    source, weight = _sources(mix, surroundings)
    threshold = np.full((len(flat), CLASSES - 1), np.iinfo(np.uint16).max, np.uint16)
    rows: list[tuple[int, npt.NDArray[np.uint32]]] = []
    for channel, symbols in enumerate(flat):
        score = scores(surroundings, source[channel], weight[channel])
        found = _thresholds(score)
        threshold[channel, : len(found)] = found
        rows += _rows(symbols, np.searchsorted(found, score, "right"))
    zero = np.floor((flat == 0).mean(1) * (1 << PRECISION)).astype(np.uint16)
    return Fitted(
        Contexts(source, weight, threshold, predicted, zero),
        np.array([minimum for minimum, _ in rows], np.int32),
        np.array([len(row) for _, row in rows], np.int32),
        np.concatenate([row for _, row in rows]).astype(np.uint16),
    )


def _sources(
    mix: npt.NDArray[np.float32], surroundings: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """For each channel the few earlier ones that move its score most, and their weights in integers."""
    channels = len(mix)
    deviation = np.array([around_one.std() for around_one in surroundings])
    source = np.full((channels, SOURCES), -1, np.int16)
    weight = np.zeros((channels, SOURCES), np.uint8)
    for channel in range(1, channels):
        values = mix[channel, :channel].clip(min=0)
        chosen = np.sort((-values * deviation[:channel]).argsort(kind="stable")[:SOURCES])
        values = values[chosen]
        whole = np.floor(values * (LARGEST_WEIGHTS / max(values.sum(), 1e-30))).clip(max=255)
        kept = whole > 0
        source[channel, : kept.sum()], weight[channel, : kept.sum()] = chosen[kept], whole[kept]
    return source, weight


def _thresholds(score: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Ascending thresholds that part the scores into up to CLASSES classes, the busy ones smaller."""
    positive = score[score > 0]
    if len(positive) < CLASSES:
        return np.empty(0, np.uint16)
    if len(positive) < len(score) * (1 - 1 / CLASSES):
        found = np.append(1.0, np.quantile(positive, np.linspace(0, 1, CLASSES)[1:-1] ** 0.75))
    else:
        found = np.quantile(score, np.linspace(0, 1, CLASSES + 1)[1:-1] ** 0.75)
    return np.unique(np.ceil(found).clip(1, 65535).astype(np.uint16))


def _rows(symbols: Symbols, classes: npt.NDArray[np.intp]) -> list[tuple[int, npt.NDArray[np.uint32]]]:
    """A trimmed table for each class, from its histogram and a smoothed one of all classes."""
    limit = min(_WIDEST, int(np.abs(symbols.astype(np.int32)).max()) + _MARGIN)
    size = 2 * limit + 1
    index = symbols.astype(np.int64).clip(-limit, limit) + limit
    counts = np.bincount(classes * size + index, minlength=CLASSES * size).reshape(CLASSES, size).astype(float)
    everything = counts.sum(0)
    scale = np.abs(symbols.astype(np.float64)).mean() + 0.2
    tail = np.exp(-np.abs(np.arange(size) - limit) / scale)
    smooth: npt.NDArray[Any] = np.convolve(everything, [0.25, 0.5, 0.25], "same")
    prior = (1 - _TAIL) * smooth / smooth.sum() + _TAIL * tail / tail.sum()
    return [trimmed_frequencies((row + _PRIOR * prior) / (row.sum() + _PRIOR), -limit) for row in counts]
