"""Generated pictures."""

import numpy as np

from zarr_cae.training.unlike import draw_unlike, pictures_to_check


def test_leaves_are_pictures_with_edges_and_colours_and_of_their_seed():
    picture = draw_unlike(128, np.random.default_rng(1))
    assert picture.shape == (128, 128, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 20
    assert (picture[..., 0] != picture[..., 2]).any()
    np.testing.assert_array_equal(picture, draw_unlike(128, np.random.default_rng(1)))
    assert (picture != draw_unlike(128, np.random.default_rng(2))).any()
    differences = np.abs(np.diff(picture.astype(int), axis=1)).max(2)
    assert np.median(differences) < 0.3 * np.percentile(differences, 99)  # flat areas and edges


def test_the_check_has_the_photograph_and_is_always_the_same(photograph):
    first, second = pictures_to_check(), pictures_to_check()
    np.testing.assert_array_equal(np.stack(first), np.stack(second))
    np.testing.assert_array_equal(first[0], photograph[:256, :256])
