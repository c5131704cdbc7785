"""Progress on a terminal: pixels done of all, megapixels a second and the time left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


def on_a_terminal(*arguments: str) -> list[str]:
    """Run `zarr-cae` with a terminal as its stderr, and return the lines that it shows there."""
    import fcntl
    import pty
    import struct
    import termios

    reading, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "-m", "zarr_cae", *arguments]
    process = subprocess.Popen(command, stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    seen = b""
    while True:
        try:
            part = os.read(reading, 4096)
        except OSError:  # Linux, after the last process closed the terminal
            break
        if not part:
            break
        seen += part
    os.close(reading)
    assert process.wait() == 0, seen
    return [line for line in re.split(r"[\r\n]+", seen.decode()) if line.strip()]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_file_shows_progress_before_its_end(photograph: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.tile(photograph, (4, 4, 1)))
    source, plain, slide = (str(tmp_path / name) for name in ("a.npy", "a.zarr", "a.ome.zarr"))
    for arguments, total in (
        (["encode", source, plain, "-q", "1"], 4.2),
        (["decode", plain, str(tmp_path / "b.npy")], 4.2),
        (["convert", source, slide, "-q", "1", "--chunks", "256", "--shards", "1024"], 5.6),
        (["decode", f"{slide}/0", str(tmp_path / "c.npy")], 4.2),
    ):
        lines = on_a_terminal(*arguments)
        form = rf"{arguments[0]}: +\d+%\|.*\| ([0-9.]+)/{total} MP \[[0-9:]+<([0-9:?]+), +([0-9.?]+)MP/s\]"
        shown = [match for match in (re.search(form, line) for line in lines) if match]
        done = [float(match[1]) for match in shown]
        assert done[0] == 0
        assert any(0 < number < total for number in done), lines
        assert any("?" not in match[2] + match[3] for match in shown), lines
