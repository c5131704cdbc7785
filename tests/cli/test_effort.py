"""`--effort` of `encode` and `convert`: it holds for the command, and is not stored."""

import numpy as np
import pytest
import zarr
from commands import refused, save

from zarr_cae.cli import main


def test_encode_and_convert_take_an_effort(here, photo, monkeypatch):
    save(photo[:96, :96], "photo.png")
    monkeypatch.setenv("ZARR_CAE__DEVICE", "cpu")
    sizes, images = [], []
    for number, effort in enumerate([[], ["--effort", "0"], ["--effort", "5"]]):
        assert main(["encode", "photo.png", f"{number}.zarr", "-q", "2", *effort]) == 0
        array = zarr.open_array(f"{number}.zarr", mode="r")
        sizes.append((here / f"{number}.zarr/c/0/0/0").stat().st_size)
        images.append(array[...].astype(float))
        assert "effort" not in (here / f"{number}.zarr/zarr.json").read_text()
    assert sizes[0] == sizes[1]
    errors = [np.square(image - photo[:96, :96]).mean() for image in images]
    assert (sizes[2] < sizes[0], errors[2] < 1.1 * errors[0]) == (True, True)
    assert "effort" not in zarr.config.get("cae", {})
    one = ["convert", "photo.png", "-q", "2", "--chunks", "96", "--shards", "none", "--levels", "1"]
    assert main([*one, "out.zarr", "--effort", "5"]) == 0
    (chunk,) = (path for path in (here / "out.zarr/0/c").rglob("*") if path.is_file())
    assert chunk.stat().st_size == sizes[2]


@pytest.mark.parametrize("effort", ["-1", "1001"])
@pytest.mark.parametrize("command", ["encode", "convert"])
def test_efforts_out_of_range_are_wrong_usage(here, capsys, command, effort):
    with pytest.raises(SystemExit) as stop:
        main([command, "photo.png", "out.zarr", "--effort", effort])
    assert stop.value.code == 2
    assert f"argument --effort: expected an integer from 0 to 1000, got '{effort}'" in capsys.readouterr().err


def test_workers_of_dask_have_settings_of_their_own(here, photo, capsys):
    save(photo[:32, :32], "photo.png")
    message = refused(capsys, "convert", "photo.png", "out.zarr", "--effort", "3", "--dask", "tcp://127.0.0.1:1")
    assert "ZARR_CAE__EFFORT" in message
