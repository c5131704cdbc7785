"""Masks of pixels without data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_cae.pixels.mask import apply_mask, fill, find_mask

CASES = [
    ("uint8", 0, (0, 255)), ("uint8", 255, (0, 255)), ("uint8", 7, (0, 255)), ("uint16", 65535, (0, 4095)),
    ("int16", -32768, (-100, 100)), ("int64", 2**62, (0, 2**62)), ("uint64", 2**64 - 1, (0, 2**64 - 1)),
    ("float32", float("nan"), (0.0, 1.0)), ("float32", 0.1, (0.0, 1.0)), ("float64", 1.0, (0.0, 1.0)),
    ("float16", -9999.0, (0.0, 1.0)), ("float32", float("inf"), (0.0, 1.0)), ("float32", 0.0, (-1.0, 1.0)),
    ("float32", 0.0, (0.0, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "nodata", "value_range"), CASES)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1 << 30), share=st.sampled_from([0, 0.01, 0.5, 1]))
def test_nothing_masked_comes_back_as_data_nor_data_as_masked(dtype, nodata, value_range, seed, share):
    random = np.random.default_rng(seed)
    low, high = value_range
    mask = random.random((9, 13)) < share
    inside = np.array([low, high, nodata if low <= nodata <= high else low], dtype)
    decoded = random.choice(inside, mask.shape)
    kept = decoded.copy()
    apply_mask(decoded, mask, nodata, value_range)
    np.testing.assert_array_equal(find_mask(decoded, nodata), mask)
    data = decoded[~mask]
    assert ((data >= low) & (data <= high)).all()
    others = ~mask & ~find_mask(kept, nodata)
    np.testing.assert_array_equal(decoded[others], kept[others])
    moved = ~mask & find_mask(kept, nodata)
    if np.dtype(dtype).kind != "f":
        assert all(abs(int(a) - int(b)) == 1 for a, b in zip(decoded[moved], kept[moved], strict=True))


@pytest.mark.parametrize(("value_range", "sign"), [((0.0, 1.0), 1), ((-1.0, 0.0), -1)])
def test_data_beside_zero_are_normal_numbers(value_range, sign):
    """Subnormal numbers equal 0 in a process that flushes them to zero."""
    chunk = np.zeros((2, 3), np.float32)
    apply_mask(chunk, np.zeros((2, 3), bool), 0.0, value_range)
    assert (chunk == sign * np.finfo(np.float32).tiny).all()


def test_integers_have_no_nan():
    assert not find_mask(np.zeros((3, 4), "uint8"), float("nan")).any()


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1 << 30), height=st.integers(1, 40), width=st.integers(1, 40),
    share=st.sampled_from([0, 0.05, 0.5, 0.99, 1]),
)  # fmt: skip
def test_filling_keeps_data_and_stays_between_its_ends(seed, height, width, share):
    random = np.random.default_rng(seed)
    # Components side by side in memory, as `to_planes` makes them.
    planes = random.random((2, height, width, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    mask = random.random(planes.shape) < share
    expected = planes.copy()
    planes[mask] = np.nan
    fill(planes, mask)
    np.testing.assert_array_equal(planes[~mask], expected[~mask])
    for image, holes, before in zip(*(x.reshape(6, height, width) for x in (planes, mask, expected)), strict=True):
        data = before[~holes] if not holes.all() else np.zeros(1, np.float32)
        assert data.min() - 1e-6 <= image.min()
        assert image.max() <= data.max() + 1e-6


def test_a_hole_in_a_slope_becomes_a_slope():
    slope = np.linspace(0, 1, 64, dtype=np.float32)[None, None, None].repeat(64, 2)
    mask = np.zeros(slope.shape, bool)
    mask[..., 20:40, 20:40] = True
    filled = slope.copy()
    filled[mask] = 0
    fill(filled, mask)
    assert np.abs(filled - slope).max() < 0.2
    assert np.abs(np.diff(filled[0, 0], axis=1)).max() < 0.1
