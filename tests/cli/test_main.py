"""The command line as a whole: fresh processes, interrupts, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import left_over, load, on_a_terminal, run, save

from zarr_cae.cli import main
from zarr_cae.evaluation.measures import psnr


def test_png_there_and_back_in_fresh_processes(here: Path, photo: np.ndarray) -> None:
    save(photo[:200, :300], "photo.png")
    encoded = run("encode", "photo.png", "photo.zarr", "-q", "6")
    assert (encoded.returncode, encoded.stderr) == (0, "")  # no progress bar when piped
    assert "bpp" in encoded.stdout
    decoded = run("decode", "photo.zarr", "back.png")
    assert (decoded.returncode, decoded.stderr, decoded.stdout) == (0, "", "")
    back = load("back.png")
    assert back.shape == (200, 300, 3)
    assert psnr(photo[:200, :300], back) > 30
    assert not left_over(here)


def test_progress_on_a_terminal(here: Path, photo: np.ndarray) -> None:
    save(photo, "photo.png")
    commands = {
        "encode": ["encode", "photo.png", "photo.zarr", "-q", "1", "--chunks", "128"],
        "decode": ["decode", "photo.zarr", "back.png"],
        "bottleneck": ["bottleneck", "photo.zarr", "latents.npy"],
    }
    for name, arguments in commands.items():
        assert f"{name}:   0%|" in on_a_terminal(arguments)


def test_help_and_info_import_nothing_heavy(here: Path, photo: np.ndarray) -> None:
    save(photo[:32, :32], "photo.png")
    assert main(["encode", "photo.png", "photo.zarr"]) == 0
    code = """
import sys
from zarr_cae.cli import main
for line in ("--help", "train --help", "weights list", "info photo.zarr"):
    try:
        assert main(line.split()) == 0
    except SystemExit as stop:
        assert stop.code == 0
    heavy = {"torch", "numba", "compressai", "matplotlib", "imagecodecs", "scipy"} & set(sys.modules)
    assert not heavy, (line, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("arguments", "started"),
    [(["encode", "LARGE", "out.zarr"], ".out.zarr.partial-*/c/*/*/*"),
     (["encode", "LARGE", "out.zarr", "--overwrite"], ".out.zarr.partial-*/c/*/*/*"),
     (["decode", "LARGE", "out.npy"], ".out.npy.partial-*"),
     (["bottleneck", "LARGE", "out.npy"], ".out.npy.partial-*"),
     (["bottleneck", "LARGE", "out.zarr"], ".out.zarr.partial-*/c/*/*/*")],
    ids=["encode", "overwrite", "decode", "latents to npy", "latents to zarr"],
)  # fmt: skip
def test_interrupted_work_leaves_nothing(here: Path, large: Path, arguments: list[str], started: str) -> None:
    before = {}
    if "--overwrite" in arguments:
        zarr.create_group("out.zarr")
        before = {path.name: path.read_bytes() for path in Path("out.zarr").iterdir()}
    command = [str(large) if word == "LARGE" else word for word in arguments]
    process = subprocess.Popen(
        [sys.executable, "-m", "zarr_cae", *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(here.glob(started)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "zarr-cae: interrupted\n")
    assert [path.name for path in here.iterdir()] == (["out.zarr"] if before else [])
    assert {path.name: path.read_bytes() for path in here.glob("out.zarr/*")} == before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_closed_pipe_is_no_traceback(here: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "zarr_cae", "weights", "list"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("arguments", [[], ["shrink"], ["encode"], ["encode", "a", "b.zarr", "-q", "9"], ["demo", "x"]])
def test_wrong_usage_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: zarr-cae" in capsys.readouterr().err


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("zarr_cae.weights.registry.cache_folder", lambda: bug(None))
    with pytest.raises(ZeroDivisionError):
        main(["weights", "path"])
