"""The windows in which an array is written."""

from __future__ import annotations

import numpy as np
import pytest

from zarr_cae.cli.writing import slabs


@pytest.mark.parametrize("samples", [1, 1000, 10**6])
def test_slabs_cover_an_array_once_in_whole_blocks(samples: int) -> None:
    shape, block = (3, 70, 50, 3), (1, 16, 20, 3)
    seen = np.zeros(shape, int)
    for window in slabs(shape, block, samples):
        seen[window] += 1
        assert all(s.start % b == 0 for s, b in zip(window, block, strict=True))
        assert seen[window].size <= max(samples, np.prod(block))
    assert (seen == 1).all()
