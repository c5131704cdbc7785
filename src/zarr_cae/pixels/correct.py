"""Correct synthesised planes by a few numbers for each tile, and find these numbers.

A network is trained for the mean of many images. For one image, the mean of the original values where a pixel decodes
to v is not quite v: an image may be darker, sharper or of fewer colours than those. The encoder knows the original, so
it can store how they differ: a curve of the values, the shares of differences between colours, and the shares of
differences from the pixels nearby. They come from linear regression on the pixels of the tile, and take 14 to 50 bytes.
Video coders do the same after their transforms (sample adaptive offset and adaptive loop filter: Fu et al. 2012, Tsai
et al. 2013).

The section "Correction" of spec/cae.md defines what a decoder does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_cae.coder.correction import (
    CURVE_UNIT,
    KNOTS,
    LARGEST_LIMIT,
    SCALES,
    SHARE_UNIT,
    SOFT_LIMIT,
    Correction,
    Scale,
    numbers_of,
)
from zarr_cae.coder.frame import STRIDE

Floats = npt.NDArray[np.float32]

GREY_LEVELS = 255
"""Grey levels of the value range."""
_REACH = 3
"""Pixels on each side that take part in the correction of a pixel."""
_SAMPLES = 7000
"""Least number of pixels for the regression, if the tile has them."""
_CURVE_RIDGE, _SHARE_RIDGE = 1.0, 400.0
"""Penalties of the regression. They keep numbers small that few pixels determine: each counts like one more pixel, at a
knot or with a difference of 20 grey levels, that needs no correction."""
_PLACES = 512
"""Entries between two knots in a table of a curve: an error of at most 1/1,024 of the step between the knots."""
_STEEP = 0.25
"""Step between two knots, in units of the value range, from which on a table is too coarse."""
_LARGEST_SHARE = 8 * SHARE_UNIT
_LARGEST_CURVE = LARGEST_LIMIT * CURVE_UNIT


class Area(NamedTuple):
    """A part of synthesised planes and its correction."""

    plane: int
    rows: slice
    columns: slice
    correction: Correction


def correct(planes: Any, areas: Iterable[Area]) -> None:
    """Correct areas of synthesised planes in place.

    Parameters
    ----------
    planes
        (N, C, H, W), nominally in [0, 1]: an array or a tensor. The pixels around an area must be synthesised, too, as
        far as they lie within the plane.
    areas
        The areas. An area whose correction has one component is grey: its components become equal.
    """
    by_plane: dict[int, list[Area]] = {}
    for area in areas:
        by_plane.setdefault(area.plane, []).append(area)
    for plane, some in by_plane.items():
        values = planes[plane]
        if some[0].correction.components == 1 < len(values):
            values = values.mean(0)[None]
        values = np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values.contiguous()
        values = values.clip(0, 1)
        around = _differences_around(values)
        for area in some:
            part = (slice(None), area.rows, area.columns)
            near = [[one[part[1:]] for one in kind] for kind in around]
            result = _corrected(values[part], near, area.correction)
            for rows, columns in _rectangles(area):
                inside = (slice(None), slice(*rows), slice(*columns))
                planes[plane][part][inside] = result[inside]


def _rectangles(area: Area) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield the first and last rows and columns of the corrected parts of an area, relative to it."""
    where = area.correction.where
    if where is None:
        yield (0, area.rows.stop - area.rows.start), (0, area.columns.stop - area.columns.start)
        return
    for row, line in enumerate(where):
        edges = np.flatnonzero(np.diff(line.astype(np.int8), prepend=0, append=0)).tolist()
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            yield (row * STRIDE, (row + 1) * STRIDE), (begin * STRIDE, end * STRIDE)


def _corrected(values: Any, around: list[Any], correction: Correction) -> Any:
    """Return values (C, H, W) in [0, 1] with their correction; `around` is from `_differences_around`."""
    result = values + 0.0
    positions = _positions(values, correction.scale)
    most = correction.limit / GREY_LEVELS
    for own, numbers in enumerate(correction.numbers.tolist()):
        curve = [number / (CURVE_UNIT * GREY_LEVELS) for number in numbers[:KNOTS]]
        change = _on_curve(positions[own], curve)
        for share, difference in zip(numbers[KNOTS:], _differences(values, around, own), strict=True):
            if share:
                change += difference * (share / SHARE_UNIT)
        result[own] += change.clip(-most, most)
    return result


def _differences(values: Any, around: list[Any], own: int) -> Iterator[Any]:
    """Yield the differences of the other components from one, and then its differences from pixels nearby."""
    for number, other in enumerate(values):
        if number != own:
            yield other - values[own]
    for difference in around:
        yield difference[own]


def _on_curve(positions: Any, curve: list[float]) -> Any:
    """Return the values of a curve, given at the knots, at positions in [0, 8]."""
    if isinstance(positions, np.ndarray):
        if max(abs(after - before) for before, after in pairwise(curve)) > _STEEP:
            return np.interp(positions, range(KNOTS), curve).astype(np.float32)
        places = np.linspace(0, KNOTS - 1, _PLACES * (KNOTS - 1) + 1)
        table = np.interp(places, range(KNOTS), curve).astype(np.float32)
        nearest = positions * np.float32(_PLACES)
        nearest += np.float32(0.5)
        return table.take(nearest.astype(np.intp), mode="clip")
    slopes = [after - before for before, after in pairwise(curve)]
    values = positions * slopes[0] + curve[0]
    for knot, (before, after) in enumerate(pairwise(slopes), 1):
        values += (positions - knot).clip(0, None) * (after - before)
    return values


def _positions(values: Any, scale: Scale) -> Any:
    """Return where values in [0, 1] lie between the knots, in [0, 8]."""
    return (values if scale == "uniform" else values**0.5) * (KNOTS - 1)


def _differences_around(values: Any) -> list[Any]:
    """Return how values (C, H, W) differ from pixels nearby: three kinds of differences, (H, W) for each component.

    The first two are the means of the 3 x 3 and of the 7 x 7 pixels around each pixel, less its value. The third is the
    sum of the differences to the four neighbours, each limited to a few grey levels, so that edges count little. The
    edges of the plane are continued.
    """
    return [list(kinds) for kinds in zip(*(_around(one[None]) for one in values), strict=True)]


def _around(values: Any) -> list[Any]:
    """Return the differences of one component (1, H, W), each (H, W). One at a time fits into the cache of a core."""
    height, width = values.shape[1:]
    padded = _continued(values)
    threes, sevens = _sums(padded, height, 1)
    small, _ = _sums(threes, width, 2)
    _, large = _sums(sevens, width, 2)
    small *= 1 / 3**2
    small -= values
    large *= 1 / 7**2
    large -= values
    limited = values * 0
    most = SOFT_LIMIT / GREY_LEVELS
    for down, across in ((-1, 0), (0, -1), (0, 1), (1, 0)):
        top, left = _REACH + down, _REACH + across
        difference = padded[:, top : top + height, left : left + width] - values
        limited += difference.clip(-most, most)
    return [small[0], large[0], limited[0]]


def _continued(values: Any) -> Any:
    """Return values (1, H, W) with three more at each side, which repeat the edge."""
    if isinstance(values, np.ndarray):
        return np.pad(values, ((0, 0), (_REACH, _REACH), (_REACH, _REACH)), mode="edge")
    from torch.nn.functional import pad

    return pad(values[None], (_REACH,) * 4, mode="replicate")[0]


def _sums(padded: Any, length: int, axis: int) -> tuple[Any, Any]:
    """Return the sums of 3 and of 7 neighbours along an axis with three more values at each end."""

    def shifted(values: Any, begin: int, count: int) -> Any:
        return values[:, begin : begin + count] if axis == 1 else values[:, :, begin : begin + count]

    around = length + 2 * _REACH - 2
    threes = shifted(padded, 0, around) + shifted(padded, 1, around)
    threes += shifted(padded, 2, around)
    sevens = shifted(threes, 0, length) + shifted(threes, 4, length)
    sevens += shifted(padded, _REACH, length)
    return shifted(threes, 2, length) + 0.0, sevens


class Fit(NamedTuple):
    """The correction of a tile, and sums of squared differences in grey levels."""

    correction: Correction
    before: float
    """Of the values without the correction."""
    after: float
    """Of the values with it."""
    spread: float
    """Of the mean of each component."""


def fit(values: Floats, known: Floats, counts: npt.NDArray[np.bool_]) -> Fit | None:
    """Return the correction that brings values nearest to known ones, by linear regression on a part of them.

    Parameters
    ----------
    values
        (C, H, W), the synthesised values of a tile.
    known
        (C, H, W), the original values.
    counts
        A boolean array of the same shape: which values count.

    Returns
    -------
    Fit or None
        None if nothing would change.
    """
    values = np.ascontiguousarray(values).clip(0, 1)
    around = _differences_around(values)
    step = math.isqrt(max(1, values[0].size // _SAMPLES))
    step -= 1 - step % 2  # odd, because the transforms have a period of 16
    sparse = (slice(None), slice(None, None, step), slice(None, None, step))
    some, near = values[sparse], [[one[sparse[1:]] for one in kind] for kind in around]
    wanted, here = known[sparse], counts[sparse]
    tried = [found for scale in SCALES if (found := _solved(some, near, wanted, here, scale)) is not None]
    if not tried:
        return None
    errors = [_squared_error(_corrected(some, near, one), wanted, here) for one in tried]
    best = tried[int(np.argmin(errors))]
    inside = [one[here] for one, here in zip(known, counts, strict=True)]
    means = [float(one.mean()) if one.size else 0.0 for one in inside]
    spread = GREY_LEVELS**2 * sum(float(one.var()) * one.size for one in inside if one.size)
    before, after = (_squared_error(one, known, counts) for one in (values, _corrected(values, around, best)))
    if after > spread:
        best = _to_mean(means)
        after = _squared_error(_corrected(values, around, best), known, counts)
    return Fit(best, before, after, spread)


def _to_mean(means: list[float]) -> Correction:
    """Return the correction that turns each component into its mean."""
    numbers = np.zeros((len(means), numbers_of(len(means))), np.int64)
    knots = np.linspace(0, GREY_LEVELS, KNOTS)
    numbers[:, :KNOTS] = np.rint(CURVE_UNIT * (GREY_LEVELS * np.array(means)[:, None] - knots))
    return Correction("uniform", LARGEST_LIMIT, numbers)


def _solved(
    values: Floats, around: list[Any], known: Floats, counts: npt.NDArray[np.bool_], scale: Scale
) -> Correction | None:
    """Return the correction with knots on one scale; None if all its numbers are 0."""
    positions = _positions(values, scale)
    numbers = np.zeros((len(values), numbers_of(len(values))), np.int64)
    largest = 0.0
    for own, value in enumerate(values):
        here = counts[own]
        shares = [difference[here] * GREY_LEVELS for difference in _differences(values, around, own)]
        features = np.concatenate([_hats(positions[own][here]), np.stack(shares, 1)], axis=1)
        solution = _solve(features, (known[own][here] - value[here]) * GREY_LEVELS)
        numbers[own, :KNOTS] = _rounded(solution[:KNOTS] * CURVE_UNIT, _LARGEST_CURVE)
        numbers[own, KNOTS:] = _rounded(solution[KNOTS:] * SHARE_UNIT, _LARGEST_SHARE)
        if numbers[own].any():
            largest = max(largest, float(np.abs(features @ solution.astype(np.float32)).max()))
    return Correction(scale, min(max(1, math.ceil(largest)), LARGEST_LIMIT), numbers) if numbers.any() else None


def _hats(positions: Floats) -> Floats:
    """Return the shares of the knots in each position, (n, 9): linear interpolation."""
    shares = np.zeros((len(positions), KNOTS), np.float32)
    below = np.minimum(positions.astype(np.intp), KNOTS - 2)
    every = np.arange(len(positions))
    shares[every, below] = below + 1 - positions
    shares[every, below + 1] = positions - below
    return shares


def _solve(features: Floats, wanted: Floats) -> npt.NDArray[np.float64]:
    """Return the least squares solution, with penalties."""
    gram = (features.T @ features).astype(np.float64)
    ridge = np.full(len(gram), _SHARE_RIDGE)
    ridge[:KNOTS] = _CURVE_RIDGE
    gram[np.diag_indices_from(gram)] += ridge
    return np.asarray(np.linalg.solve(gram, (features.T @ wanted).astype(np.float64)), np.float64)


def _rounded(numbers: npt.NDArray[np.float64], most: int) -> npt.NDArray[np.int64]:
    """Return the nearest integers, at most `most` from 0."""
    return np.rint(numbers).clip(-most, most).astype(np.int64)


def _squared_error(values: Floats, known: Floats, counts: npt.NDArray[np.bool_]) -> float:
    differences = values.clip(0, 1)
    differences -= known
    if not counts.all():
        differences *= counts
    return GREY_LEVELS**2 * float(np.vdot(differences, differences))
