"""Blocks come after their children, windows cover every level once, and means are exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from zarr_cae.slides.pyramid import Pyramid, level_sizes, reduced, reduced_data

SIDES = st.integers(1, 90)


@given(SIDES, SIDES, st.sampled_from([2, 8, 14]), st.sampled_from([4, 16]), st.booleans())
@settings(deadline=None)
def test_blocks_cover_every_level_once_and_follow_their_children(rows, columns, down, across, by_rows):
    sizes = tuple(level_sizes(rows, columns, 12))
    pyramid = Pyramid(sizes, (2,), (down, across))
    covered = [np.zeros((2, *size), int) for size in sizes]
    done = set()
    for block in pyramid.blocks(by_rows=by_rows):
        children = pyramid.children(block)
        assert set(children) <= done
        assert all(child.parent == block for child in children)
        assert bool(children) == (block.level > 0)
        covered[block.level][(*block.plane, *pyramid.window(block))] += 1
        done.add(block)
    assert all((level == 1).all() for level in covered)


def test_levels():
    assert level_sizes(1000, 700, 512) == [(1000, 700), (500, 350)]
    assert level_sizes(1001, 3, 256) == [(1001, 3), (501, 2), (251, 1)]
    assert level_sizes(5, 5, 512) == [(5, 5)]
    assert level_sizes(5, 5, 512, 3) == [(5, 5), (3, 3), (2, 2)]


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_means_of_integers_are_rounded_half_up(dtype, data):
    pixels = data.draw(arrays(dtype, st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7))))
    found = reduced(pixels)
    assert found.dtype == pixels.dtype
    padded = np.pad(pixels, [(0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2)], mode="edge")
    for place in np.ndindex(*found.shape):
        plane, row, column = place
        values = padded[plane, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel().tolist()
        assert int(found[place]) == (sum(values) + 2) // 4


def test_means_of_floats_and_nearest():
    pixels = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(reduced(pixels), [[2.5, 4.5], [8.5, 10.5]])
    np.testing.assert_array_equal(reduced(pixels, "nearest"), [[0, 2], [8, 10]])


@pytest.mark.parametrize(("dtype", "nodata"), [("u1", 0), ("u1", 7), ("i8", -(2**63)), ("f4", np.nan), ("f8", -9999)])
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
    share=st.floats(0, 1, allow_subnormal=False),
)
@settings(deadline=None, max_examples=40)
def test_pixels_without_data_do_not_count(dtype, nodata, shape, seed, share):
    random = np.random.default_rng(seed)
    data = random.integers(0, 20, shape).astype(dtype)
    data[data == nodata] += 1
    holes = random.random(shape) < share
    data[holes] = nodata
    small = reduced_data(data, "mean", nodata, (0, 30))
    rows, columns = small.shape
    for y, x in np.ndindex(rows, columns):
        block, empty = (one[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] for one in (data, holes))
        if empty.all():
            assert small[y, x] == nodata or (np.isnan(nodata) and np.isnan(small[y, x]))
        else:
            known = block[~empty]
            assert float(known.min()) - 1 <= small[y, x] <= float(known.max()) + 1
            assert small[y, x] != nodata
    if not np.isnan(nodata) and not holes.any() and not (reduced(data) == nodata).any():
        np.testing.assert_array_equal(small, reduced(data))
