"""Temporary names, files left by killed processes, and outputs that are replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from zarr_cae.cli import main, replacing
from zarr_cae.errors import CAEConfigurationError


def left_behind(path: Path, purpose: str = "partial") -> Path:
    """Return a temporary name of `path` of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own = replacing._temporary(path, purpose).name.split("-")
    own[-2] = str(ended.pid)
    return path.with_name("-".join(own))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("zarr-cae ")


def test_next_run_removes_files_of_ended_processes(tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    stale, file = left_behind(out), left_behind(out)
    stale.mkdir()
    file.touch()
    mine, other = replacing._temporary(out, "partial"), left_behind(tmp_path / "other.zarr")
    mine.mkdir()
    other.mkdir()
    with replacing.replacing_zarr(out, overwrite=False) as partial:
        zarr.create_group(partial)
    assert sorted(tmp_path.iterdir()) == sorted([mine, other, out])


def test_an_output_that_was_moved_away_last_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    zarr.create_group(left_behind(out, "old"), attributes={"kept": True})
    with pytest.raises(CAEConfigurationError, match="no pixels"), replacing.replacing_zarr(out, overwrite=False):
        raise CAEConfigurationError("no pixels")
    assert zarr.open_group(out, mode="r").attrs["kept"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_leaves_the_new_one_alone(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(replacing, "_exchange", lambda one, other: False)
    out = tmp_path / "out.zarr"
    for number in range(3):
        with replacing.replacing_zarr(out, overwrite=True) as partial:
            zarr.create_group(partial, attributes={"number": number})
        assert zarr.open_group(out, mode="r").attrs["number"] == number
        assert list(tmp_path.iterdir()) == [out]


def test_npy_on_a_full_disk_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = replacing.create_npy(tmp_path / "a.npy", np.dtype("u2"), (300, 50))
    array[...] = 7
    assert (np.load(tmp_path / "a.npy") == 7).all()
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        replacing.create_npy(tmp_path / "b.npy", np.dtype("u2"), (300, 50))


def test_interrupt_while_packages_are_imported() -> None:
    code = """
import sys

class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "zarr_cae.cli.archive":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
from zarr_cae.cli import main
assert "zarr" not in sys.modules and "numpy" not in sys.modules
sys.exit(main(["--help"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "zarr-cae: interrupted\n")


def test_all_public_names_are_there() -> None:
    import zarr_cae

    assert {"CAECodec", "configure", "__version__"} <= set(dir(zarr_cae))
    for name in zarr_cae.__all__:
        assert getattr(zarr_cae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        zarr_cae.nothing  # noqa: B018
