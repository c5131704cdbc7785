"""`zarr-cae bottleneck`."""

import argparse
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from archives import fill
from commands import refused, save

from zarr_cae import CAEConfigurationError, as_torch_dataset
from zarr_cae.cli import bottleneck, main


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_copying_latents_out(photograph, tmp_path, suffix, capsys):
    pixels = photograph[150:214, 200:296]
    folder = tmp_path / "g.zarr"
    expected = fill(folder, pixels)
    out = tmp_path / f"latents{suffix}"
    arguments = argparse.Namespace(array=folder / "photo", latents=out, overwrite=False)
    bottleneck.bottleneck(arguments)
    assert "4 x 6" in capsys.readouterr().out
    if suffix == ".npy":
        assert np.load(out).tobytes() == expected.tobytes()
        return
    copied = zarr.open_array(out, mode="r")
    assert copied[...].tobytes() == expected.tobytes()
    assert np.array_equal(as_torch_dataset(copied, 2)[5], expected[2:4, 4:6].transpose(2, 0, 1))
    for array, message in ((folder, "name one"), (folder / "mask", "not stored with"), (folder / "none", "exist")):
        with pytest.raises(CAEConfigurationError, match=message):
            bottleneck.bottleneck(argparse.Namespace(array=array, latents=out, overwrite=True))
    with pytest.raises(CAEConfigurationError, match="overwrite"):
        bottleneck.bottleneck(arguments)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system can't reserve space")
def test_a_full_disk_is_an_error_before_anything_is_written(photograph, tmp_path, monkeypatch):
    fill(tmp_path / "g.zarr", photograph[:64, :64])

    def full(descriptor, offset, length):
        assert length == os.fstat(descriptor).st_size
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    arguments = argparse.Namespace(array=tmp_path / "g.zarr" / "photo", latents=tmp_path / "out.npy", overwrite=False)
    with pytest.raises(OSError, match="No space"):
        bottleneck.bottleneck(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.zarr"]


def test_bottleneck_copies_an_array_of_the_announced_shape(
    here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    save(photo, "photo.png")
    assert main(["encode", "photo.png", "photo.zarr", "-q", "2"]) == 0
    assert main(["info", "photo.zarr"]) == 0
    rows, columns = (-(-side // 16) for side in photo.shape[:2])
    assert f"latents  {rows} x {columns} x 192 float32" in capsys.readouterr().out
    assert main(["bottleneck", "photo.zarr", "latents.npy"]) == 0
    assert main(["bottleneck", "photo.zarr", "latents.zarr"]) == 0
    copied = np.load("latents.npy")
    assert copied.shape == (rows, columns, 192)
    np.testing.assert_array_equal(zarr.open_array("latents.zarr", mode="r")[:], copied)
    assert "exists; give --overwrite" in refused(capsys, "bottleneck", "photo.zarr", "latents.zarr")
