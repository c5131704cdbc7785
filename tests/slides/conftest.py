"""Small slides for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tifffile = pytest.importorskip("tifffile")


@pytest.fixture(scope="session")
def tissue(photograph: np.ndarray) -> np.ndarray:
    """Return (300, 420, 3) uint8: a part of the photograph on white."""
    pixels = np.full((300, 420, 3), 255, np.uint8)
    pixels[70:240, 60:330] = photograph[100:270, 100:370]
    return pixels


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a TIFF file: `write(name, pixels, tile=..., ...)`."""

    def written(name: str, pixels: np.ndarray, **options: Any) -> Path:
        tifffile.imwrite(tmp_path / name, pixels, **{"photometric": "rgb", "tile": (64, 64), **options})
        return tmp_path / name

    return written
