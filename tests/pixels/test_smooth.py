"""Smoothed planes keep means and slopes, and lose what is finer than their blocks."""

import numpy as np
import pytest

from zarr_cae.pixels.smooth import smoothed


@pytest.mark.parametrize("levels", range(5))
def test_smoothed(levels):
    y, x = np.mgrid[:64, :48].astype(np.float32)
    slope = np.broadcast_to(0.01 * x + 0.005 * y, (2, 3, 64, 48)).copy()
    out = smoothed(slope, levels)
    inner = (..., slice(16, -16), slice(16, -16))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[inner], slope[inner], atol=1e-6)
    checkerboard = ((x + y) % 2)[None, None]
    np.testing.assert_allclose(smoothed(checkerboard, levels), 0.5 if levels else checkerboard)
