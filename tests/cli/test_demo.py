"""`zarr-cae demo`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import left_over, refused
from PIL import Image

from zarr_cae.cli import main
from zarr_cae.evaluation.extra import LIBRARIES
from zarr_cae.evaluation.measures import psnr


@pytest.fixture
def without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIBRARIES:
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_extras")
def test_demo(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    Path("demo.zarr").mkdir()
    Path("demo.zarr/thesis.txt").write_text("text")
    assert "not a zarr" in refused(capsys, "demo")
    Path("demo.zarr/thesis.txt").unlink()
    Path("demo.zarr").rmdir()
    zarr.create_group("demo.zarr")  # output of an earlier demo
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "public domain" in out
    rows = [line.split() for line in out.splitlines() if re.match(r"[148] ", line)]
    assert [row[0] for row in rows] == ["1", "4", "8"]
    rates, decibels = ([float(row[column]) for row in rows] for column in (1, 5))  # a ratio is three words: 1 : N
    assert rates == sorted(rates)
    assert decibels == sorted(decibels)
    assert 0.05 < rates[0] < 0.5 < rates[2] < 8
    group = zarr.open_group("demo.zarr", mode="r")
    quality = [psnr(group[f"q{level}"][...], photo) for level in (1, 4, 8)]
    assert quality == sorted(quality)
    assert quality[0] > 22
    with Image.open("demo.png") as picture:
        assert picture.width > 4 * 512
    assert not left_over(here)
