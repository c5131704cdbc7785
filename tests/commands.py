"""Run commands of `zarr-cae` in tests, and make their files."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zarr_cae.cli import main


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zarr_cae", *arguments], capture_output=True, text=True, check=False, **options
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line on stderr of a command that fails with exit code 1."""
    capsys.readouterr()
    assert main(arguments) == 1
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("zarr-cae: ")
    assert error.count("\n") == 1
    return error


def on_a_terminal(arguments: list[str]) -> str:
    """Return the output of a command on a terminal of 200 columns."""
    termios = pytest.importorskip("termios", reason="this platform has no pseudo-terminals")
    seeing, shown = os.openpty()
    termios.tcsetwinsize(shown, (24, 200))
    done = subprocess.run([sys.executable, "-m", "zarr_cae", *arguments], stderr=shown, check=False)
    os.close(shown)
    screen = b""
    with contextlib.suppress(OSError):  # raised at the end of a terminal without a writer
        while piece := os.read(seeing, 1 << 16):
            screen += piece
    os.close(seeing)
    assert done.returncode == 0, screen
    assert b"Traceback" not in screen
    return screen.decode()


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if "partial" in path.name or "old" in path.name]


def load(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def save(pixels: np.ndarray, path: str) -> None:
    Image.fromarray(pixels).save(path)
