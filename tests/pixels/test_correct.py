"""Corrections of synthesised planes: their values, and the numbers that a fit finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_cae.coder.correction import SCALES, Correction
from zarr_cae.pixels.correct import Area, correct, fit

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]
ALL = slice(None)


def corrected_slowly(plane, rows, columns, correction):
    """Return a plane (C, H, W) with the correction of an area, pixel by pixel as the section "Correction" says."""
    values, result = np.clip(plane.astype(np.float64), 0, 1), plane.astype(np.float64)
    count, height, width = values.shape
    padded = np.pad(values, ((0, 0), (3, 3), (3, 3)), "edge")
    for y in range(rows.start, min(rows.stop, height)):
        for x in range(columns.start, min(columns.stop, width)):
            if correction.where is not None and not correction.where[(y - rows.start) // 16, (x - columns.start) // 16]:
                continue
            for c, numbers in enumerate(correction.numbers):
                v = values[c, y, x]
                u = 8 * (np.sqrt(v) if correction.scale == "root" else v)
                k = min(int(u), 7)
                change = (numbers[k] + (numbers[k + 1] - numbers[k]) * (u - k)) / (8 * 255)
                others = [values[d, y, x] for d in range(count) if d != c]
                others += [padded[c, y + 3 - r : y + 4 + r, x + 3 - r : x + 4 + r].mean() for r in (1, 3)]
                change += sum(share / 64 * (other - v) for share, other in zip(numbers[9:-1], others, strict=True))
                near = [padded[c, y + 3 + dy, x + 3 + dx] for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))]
                change += numbers[-1] / 64 * sum(min(max(other - v, -3 / 255), 3 / 255) for other in near)
                result[c, y, x] = v + min(max(change, -correction.limit / 255), correction.limit / 255)
    return result


def random_correction(random, components, shape, *, scale="uniform", largest=400, partial=False):
    numbers = random.integers(-largest, largest + 1, (components, 11 + components))
    where = random.random(shape) < 0.5 if partial else None
    if where is not None:
        where.flat[0] = True
    return Correction(scale, int(random.integers(1, 256)), numbers, where)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), components=st.sampled_from([1, 3]), scale=st.sampled_from(SCALES),
    partial=st.booleans(), largest=st.sampled_from([0, 20, 400, 32767]),
)  # fmt: skip
def test_values_are_those_of_the_document(seed, components, scale, partial, largest):
    random = np.random.default_rng(seed)
    planes = random.normal(0.5, 0.4, (2, components, 32, 48)).astype(np.float32)
    rows, columns = slice(0, 32), slice(16, 48)
    one = random_correction(random, components, (2, 2), scale=scale, largest=largest, partial=partial)
    found = planes.copy()
    correct(found, [Area(1, rows, columns, one)])
    expected = corrected_slowly(planes[1], rows, columns, one)
    np.testing.assert_array_equal(found[0], planes[0])
    np.testing.assert_array_equal(found[1, :, :, :16], planes[1, :, :, :16])
    np.testing.assert_allclose(found[1], expected, rtol=0, atol=0.1 / 255 if largest <= 400 else 0.5 / 255)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("numbers", [[-32767, 32767] * 6, [32767, -32767] * 6, [-2040, 2040] * 6, [0] * 8 + [2040] * 4])
def test_steep_curves(scale, numbers):
    plane = np.linspace(-0.1, 1.1, 16 * 64, dtype=np.float32).reshape(1, 1, 16, 64)
    one = Correction(scale, 255, np.array([[*numbers[:9], 0, 0, 0]]))
    found = plane.copy()
    correct(found, [Area(0, slice(0, 16), slice(0, 64), one)])
    expected = corrected_slowly(plane[0], slice(0, 16), slice(0, 64), one)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=0.1 / 255)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("stored", "components"), [(3, 3), (3, 1), (1, 1)])
def test_tensors_give_the_same_as_arrays(device, scale, stored, components):
    random = np.random.default_rng(1)
    planes = random.normal(0.5, 0.3, (3, stored, 48, 64)).astype(np.float32)
    areas = [
        Area(0, slice(0, 32), slice(0, 32), random_correction(random, components, (2, 2), scale=scale)),
        Area(0, slice(0, 32), slice(32, 64), random_correction(random, components, (2, 2), scale=scale, partial=True)),
        Area(2, slice(32, 48), slice(0, 64), random_correction(random, components, (1, 4), scale=scale, partial=True)),
    ]
    tensors = torch.from_numpy(planes.copy()).to(device)
    correct(planes, areas)
    correct(tensors, areas)
    np.testing.assert_allclose(tensors.cpu().numpy(), planes, rtol=0, atol=0.3 / 255)


def test_areas_do_not_see_each_others_corrections():
    random = np.random.default_rng(2)
    planes = random.random((1, 3, 32, 64), np.float32)
    areas = [
        Area(0, slice(0, 32), slice(n, n + 32), random_correction(random, 3, (2, 2), partial=n == 0)) for n in (0, 32)
    ]
    at_once, expected = planes.copy(), planes.copy()
    correct(at_once, areas)
    for area in areas:
        alone = planes.copy()
        correct(alone, [area])
        expected[..., area.columns] = alone[..., area.columns]
        np.testing.assert_array_equal(
            np.delete(alone, np.r_[area.columns], 3), np.delete(planes, np.r_[area.columns], 3)
        )
    np.testing.assert_array_equal(at_once, expected)
    swapped = planes.copy()
    correct(swapped, areas[::-1])
    np.testing.assert_array_equal(swapped, expected)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 2**12 - 1))
def test_only_the_chosen_positions_change(bits):
    where = np.array([bits >> n & 1 for n in range(12)], bool).reshape(3, 4)
    numbers = np.array([[80] * 9 + [0] * 3])
    planes = np.full((1, 1, 64, 80), 0.5, np.float32)
    correct(planes, [Area(0, slice(16, 64), slice(0, 64), Correction("uniform", 255, numbers, where))])
    changed = np.zeros((64, 80), bool)
    changed[16:, :64] = where.repeat(16, 0).repeat(16, 1)
    np.testing.assert_allclose(planes[0, 0], 0.5 + changed * 10 / 255, atol=1e-6)


def test_a_grey_correction_of_three_components():
    """The mean is corrected as a grey plane is, and pixels without a correction keep their components."""
    random = np.random.default_rng(3)
    planes = random.random((1, 3, 32, 32), np.float32)
    one = random_correction(random, 1, (2, 2))
    one = Correction(one.scale, one.limit, one.numbers, np.eye(2, dtype=bool))
    found, mean = planes.copy(), planes.mean(1, keepdims=True)
    for some in (found, mean):
        correct(some, [Area(0, slice(0, 32), slice(0, 32), one)])
    np.testing.assert_allclose(found.mean(1, keepdims=True), mean, atol=1e-5)
    np.testing.assert_array_equal(found[..., :16, 16:], planes[..., :16, 16:])
    assert np.ptp(found[0, :, :16, :16], axis=0).max() == 0


def natural(random, components, height=96, width=112):
    """Return known values, smooth and noisy, and what a poor decoder may make of them."""
    y, x = np.mgrid[:height, :width] / 60
    known = np.stack([0.5 + 0.4 * np.sin(3 * x + c) * np.cos(2 * y - c) for c in range(components)])
    known = (known + random.normal(0, 0.02, known.shape)).clip(0, 1).astype(np.float32)
    return known, (known**1.1 * 0.9 + 0.03 + random.normal(0, 0.01, known.shape)).astype(np.float32)


def squares(values, known, where=ALL):
    return float(np.square(255 * (values.clip(0, 1).astype(np.float64) - known))[where].sum())


@pytest.mark.parametrize("components", [1, 3])
def test_a_fit_lowers_the_error_and_says_by_how_much(components):
    known, values = natural(np.random.default_rng(4), components)
    kept = values.copy()
    found = fit(values, known, np.ones(known.shape, bool))
    np.testing.assert_array_equal(values, kept)
    planes = values[None].copy()
    correct(planes, [Area(0, slice(0, 96), slice(0, 112), found.correction)])
    assert found.correction.components == components
    assert found.before == pytest.approx(squares(values, known), rel=1e-3)
    assert found.after == pytest.approx(squares(planes[0], known), rel=1e-3)
    assert found.spread == pytest.approx(squares(known.mean((1, 2))[:, None, None], known), rel=1e-3)
    assert found.after < 0.5 * found.before


def test_roots_where_the_dark_differs():
    """A curve that bends in the dark takes knots of square roots."""
    known = np.linspace(0, 1, 96 * 96, dtype=np.float32).reshape(1, 96, 96) ** 3
    values = known + 0.06 * np.exp(-known * 40).astype(np.float32)
    assert fit(values, known, np.ones(known.shape, bool)).correction.scale == "root"
    brighter = known + 0.06 * np.exp(-np.square(known - 0.8) * 60).astype(np.float32)
    assert fit(brighter, known, np.ones(known.shape, bool)).correction.scale == "uniform"


def test_values_that_do_not_count():
    random = np.random.default_rng(5)
    known, values = natural(random, 3)
    counts = np.ones(known.shape, bool)
    counts[:, 40:, 50:] = False
    spoiled, wild = known.copy(), values.copy()
    spoiled[~counts] = random.random(int((~counts).sum()))
    found, again = fit(values, known, counts), fit(wild, spoiled, counts)
    np.testing.assert_array_equal(found.correction.numbers, again.correction.numbers)
    assert (again.before, again.after) == (found.before, found.after)
    assert found.before == pytest.approx(squares(values, known, counts), rel=1e-3)


@pytest.mark.parametrize("components", [1, 3])
def test_nothing_to_correct(components):
    known, _ = natural(np.random.default_rng(6), components)
    assert fit(known.copy(), known, np.ones(known.shape, bool)) is None
    assert fit(1 - known, known, np.zeros(known.shape, bool)) is None


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("kind", ["noise", "far outside", "constant"])
def test_a_tile_that_decodes_to_garbage_becomes_its_mean(components, kind):
    random = np.random.default_rng(7)
    known = (0.3 + random.normal(0, 0.01, (components, 64, 64))).clip(0, 1).astype(np.float32)
    garbage = {
        "noise": random.random(known.shape, np.float32), "far outside": random.normal(0, 1e6, known.shape),
        "constant": np.ones(known.shape),
    }[kind].astype(np.float32)  # fmt: skip
    found = fit(garbage, known, np.ones(known.shape, bool))
    planes = garbage[None].copy()
    correct(planes, [Area(0, slice(0, 64), slice(0, 64), found.correction)])
    assert squares(planes[0], known) <= 1.2 * found.spread
    assert found.before > 100 * found.spread
    np.testing.assert_allclose(planes[0].mean((1, 2)), known.mean((1, 2)), atol=1 / 255)


@pytest.mark.parametrize("shape", [(16, 16), (16, 512), (512, 16), (32, 48)])
def test_fits_of_small_tiles(shape):
    known, values = natural(np.random.default_rng(8), 3, *shape)
    found = fit(values, known, np.ones(known.shape, bool))
    assert found.after < found.before
