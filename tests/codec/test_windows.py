"""Boxes, patches, tiles and bytes of a selection."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_cae.codec.windows import assembled, enclosing, runs
from zarr_cae.coder.frame import FrameHeader
from zarr_cae.coder.tiles import Patch, tiles
from zarr_cae.networks.pieces import HALO, LEAST_COLUMNS, pieces
from zarr_cae.pixels.convert import to_planes
from zarr_cae.pixels.layout import Layout

LAYOUTS = [((40, 50), None), ((40, 50, 3), 2), ((3, 40, 50), 0), ((4, 40, 50), 0), ((2, 5, 40, 3, 50), 3),
           ((2, 40, 5, 50), 2), ((6, 33, 17), None)]  # fmt: skip


def parts(length):
    number = st.integers(-length, length - 1)
    return st.one_of(
        number,
        number.map(np.int64),
        st.tuples(st.integers(0, length - 1), st.integers(1, length), st.integers(1, 4)).map(
            lambda t: slice(t[0], t[0] + t[1], t[2])
        ),
        st.just(slice(None)),
    )


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_boxes_hold_the_selection_of_numpy(shape, axis, data):
    chunk = Layout(shape, axis)
    selection = tuple(data.draw(parts(length)) for length in shape[: data.draw(st.integers(1, len(shape)))])
    check(chunk, selection)


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_boxes_hold_the_selection_of_index_arrays(shape, axis, data):
    chunk, count = Layout(shape, axis), data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    points = tuple(rng.integers(-length, length, count) for length in shape)
    check(chunk, points)
    check(chunk, np.ix_(*points))
    mask = rng.random(shape[0]) < 0.5
    mask[-1] = True
    check(chunk, (mask, slice(2, 4)))
    check(chunk, (list(points[0]), slice(None)))


def check(chunk, selection):
    pixels = np.arange(np.prod(chunk.shape), dtype=np.float64).reshape(chunk.shape)
    box = enclosing(selection, chunk)
    found = pixels[np.ix_(*box.indices)]
    assert found.shape == box.layout.shape
    np.testing.assert_array_equal(found[box.inside], pixels[selection])
    assert found[box.inside].shape == pixels[selection].shape
    # Its planes and patch are those of the chunk under it.
    whole = to_planes(pixels, chunk, (0, pixels.size))
    rows, columns = (box.indices[axis] for axis in chunk.spatial_axes)
    own = to_planes(found, box.layout, (0, pixels.size))
    own = own.reshape(-1, whole.shape[1], *own.shape[2:])[:, :, : len(rows), : len(columns)]
    cut = box.cut(whole[box.planes], Patch(slice(0, 99), slice(0, 99)))[:, :, : len(rows), : len(columns)]
    np.testing.assert_array_equal(own, cut)
    assert box.patch.rows.start * 16 <= rows[0] < (box.patch.rows.start + 1) * 16
    assert (box.patch.columns.stop - 1) * 16 <= columns[-1] < box.patch.columns.stop * 16
    # With more around it, it holds the same.
    grown = box.grown(Patch(slice(0, 99), slice(0, 99)))
    np.testing.assert_array_equal(pixels[np.ix_(*grown.indices)][grown.inside], pixels[selection])


@pytest.mark.parametrize(
    "selection",
    [np.s_[::-1], np.s_[5:5], np.s_[40], np.s_[..., 0], np.s_[None], "abc", np.s_[[]], np.zeros((40, 50), bool),
     np.s_[:, :, :], np.s_[[0.5]], True, np.s_[-41]],
    ids=repr,
)  # fmt: skip
def test_the_box_of_other_selections_is_the_whole_chunk(selection):
    box = enclosing(selection, Layout((40, 50), None))
    assert box.layout.shape == (40, 50)
    assert box.inside is selection
    assert not box.complete


def test_a_window_of_a_long_axis_takes_no_memory():
    box = enclosing(np.s_[5:15, 2**40 - 3 :], Layout((2**45, 2**40), None))
    assert box.layout.shape == (10, 3)
    assert box.grown(box.patch).layout.shape == (16, 16)


def test_complete_boxes():
    chunk = Layout((40, 50, 3), 2)
    assert enclosing((), chunk).complete
    assert enclosing(np.s_[0:40, :, :3], chunk).complete
    for selection in (np.s_[:39], np.s_[::2], np.s_[:, 1:], np.s_[:, :, 0], (np.arange(40),)):
        assert not enclosing(selection, chunk).complete
    assert not enclosing(np.s_[0, :, :], Layout((1, 50, 3), 2)).complete


def rectangles(header):
    """Return rows and columns of each tile of a plane, in the order of the frame."""
    rows, columns = header.latent_shape
    edge = header.tile
    return [
        (slice(top, min(top + edge, rows)), slice(left, min(left + edge, columns)))
        for top in range(0, rows, edge)
        for left in range(0, columns, edge)
    ]


@given(
    st.integers(1, 4), st.integers(1, 400), st.integers(1, 400), st.sampled_from([1, 4, 32]), st.integers(0, 999)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_tiles_give_back_a_patch(planes, height, width, tile, seed):
    header = FrameHeader(planes, height, width, grey=True, tile=tile)
    rng = np.random.default_rng(seed)
    symbols = rng.integers(-9, 9, (planes, 2, *header.latent_shape)).astype(np.int16)
    streams = [symbols[plane][:, rows, columns] for plane in range(planes) for rows, columns in rectangles(header)]
    wanted = np.sort(rng.choice(planes, rng.integers(1, planes + 1), replace=False))
    patch = Patch(*(slice(a, rng.integers(a, n) + 1) for n in header.latent_shape for a in [rng.integers(0, n)]))
    found = tiles(header, wanted, patch)
    assert len({one.number for one in found}) == len(found)
    assert all(one.patch.meets(patch) for one in found)
    got = assembled([(one, streams[one.number]) for one in found], len(wanted), patch)
    np.testing.assert_array_equal(got, symbols[wanted][:, :, patch.rows, patch.columns])
    wide = patch.widened(HALO, header.latent_shape)
    assert wide.rows == slice(max(0, patch.rows.start - HALO), min(header.latent_shape[0], patch.rows.stop + HALO))


@given(st.sets(st.integers(0, 30), min_size=1))
def test_runs_of_neighbours(numbers):
    found = list(runs(list(numbers)))
    assert [n for first, last in found for n in range(first, last + 1)] == sorted(numbers)
    assert all(left[1] + 1 < right[0] for left, right in itertools.pairwise(found))


@given(rows=st.integers(1, 200), columns=st.integers(1, 200), edge=st.integers(1, 80))
def test_pieces_make_up_the_plane_and_see_enough_around_them(rows, columns, edge):
    seen = np.zeros((rows, columns), int)
    for outer, inner in pieces((rows, columns), edge):
        seen[inner.rows, inner.columns] += 1
        for side, around, length in ((inner.rows, outer.rows, rows), (inner.columns, outer.columns, columns)):
            assert around.start <= max(0, side.start - HALO)
            assert around.stop >= min(length, side.stop + HALO)
        assert outer.rows.stop <= rows
        assert outer.columns.stop <= columns
        assert outer.shape[0] <= edge + 2 * HALO
        assert min(columns, LEAST_COLUMNS) <= outer.shape[1] <= max(edge + 2 * HALO, LEAST_COLUMNS)
    assert (seen == 1).all()


def test_a_plane_that_fits_is_one_piece():
    whole = Patch(slice(0, 64), slice(0, 64))
    assert list(pieces((64, 64), 64)) == [(whole, whole)]
    narrow = Patch(slice(0, 8), slice(0, LEAST_COLUMNS))
    assert list(pieces((8, LEAST_COLUMNS), 8)) == [(narrow, narrow)]
