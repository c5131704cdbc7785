"""Plots of curves."""

from __future__ import annotations

import math
import sys

import pytest
from PIL import Image

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.curves import Curve
from zarr_cae.evaluation.plot import plot


def test_plot_writes_a_picture_and_leaves_pyplot_alone(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = [Curve(f"codec {i}", (0.1, 0.5, 2.0), (28.0 + i, 33.0, 40.0), (0.9, 0.97, 0.99)) for i in range(12)]
    drawn.append(Curve("cae", (0.1, 1.0), (30.0, math.inf), (math.nan, 1.0)))
    path = tmp_path / "rd.png"
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot(drawn, path)
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 1200
        assert image.height > 500
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    with pytest.raises(CAEConfigurationError, match="no curves"):
        plot([], path)


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CAEConfigurationError, match=r"^cae: .*zarr-cae\[compare\]"):
        plot([Curve("a", (1.0,), (30.0,), (0.9,))], tmp_path / "rd.png")
