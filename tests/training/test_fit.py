"""A fit to a collection."""

import numpy as np
import pytest
import torch

from zarr_cae import CAEConfigurationError
from zarr_cae.training.fit import bytes_saved, fit_weights, sample_windows
from zarr_cae.weights import registry


def test_windows_come_from_the_whole_source_and_leave_out_what_is_flat(photograph):
    source = np.full((1024, 2048, 3), 240, np.uint8)  # glass
    source[:512, :512] = source[512:, 1536:] = photograph
    windows = sample_windows(source, 0)
    assert {window.shape for window in windows} == {(256, 256, 3)}
    assert np.mean([window.std() > 1 for window in windows]) > 0.3  # a quarter of the area
    stack = sample_windows(np.stack([photograph] * 3), 0)
    assert len(stack) == 12
    for wrong in (source.astype(np.uint16), source[..., 0], "x"):
        with pytest.raises(CAEConfigurationError, match="a fit needs uint8"):
            sample_windows(wrong, 0)


def test_bytes_saved_at_equal_psnr():
    old = ([1.0, 2.0, 3.0], [30.0, 33.0, 36.0])
    assert bytes_saved(old, old) == 0
    assert bytes_saved(old, ([value + np.log(0.8) for value in old[0]], old[1])) == pytest.approx(0.2)
    assert bytes_saved(old, (old[0], [value - 1 for value in old[1]])) < 0
    assert bytes_saved(old, (old[0], [50.0, 51.0, 52.0])) == 0


@pytest.mark.slow
def test_a_fit_that_brings_nothing_keeps_the_start(photograph, tmp_path, monkeypatch):
    monkeypatch.setenv("ZARR_CAE_WEIGHTS", str(tmp_path))
    threads = torch.get_num_threads()
    found = fit_weights(photograph[:256, :256], minutes=0.01, crop=64)
    torch.set_num_threads(threads)
    if found.saved > 0:
        assert registry.find_digest(found.digest).path.parent == tmp_path
    else:
        assert found.digest == registry.default_digest("cae-v1", 5, "mse")
        assert not list(tmp_path.iterdir())
