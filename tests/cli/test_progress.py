"""Progress on a terminal: pixels done of all, megapixels a second and the time left."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from commands import on_a_terminal


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_file_shows_progress_before_its_end(photograph: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.tile(photograph, (2, 4, 1)))
    source, plain, slide = (str(tmp_path / name) for name in ("a.npy", "a.zarr", "a.ome.zarr"))
    for arguments, total in (
        (["encode", source, plain, "-q", "1"], 2.1),
        (["decode", plain, str(tmp_path / "b.npy")], 2.1),
        (["convert", source, slide, "-q", "1", "--chunks", "256", "--shards", "1024"], 2.8),
        (["decode", f"{slide}/0", str(tmp_path / "c.npy")], 2.1),
    ):
        lines = re.split(r"[\r\n]+", on_a_terminal(arguments))
        form = rf"{arguments[0]}: +\d+%\|.*\| ([0-9.]+)/{total} MP \[[0-9:]+<([0-9:?]+), +([0-9.?]+)MP/s\]"
        shown = [match for match in (re.search(form, line) for line in lines) if match]
        done = [float(match[1]) for match in shown]
        assert done[0] == 0
        assert any(0 < number < total for number in done), lines
        assert any("?" not in match[2] + match[3] for match in shown), lines
