"""Images for the benchmarks: the files that the command line names, and large pictures made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
PHOTOGRAPH = Path(str(resources.files("zarr_cae") / "data" / "astronaut.png"))
"""The photograph in the package, (512, 512, 3)."""


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files among the paths and the images in the folders among them, or else the packaged photograph."""
    suffixes = Image.registered_extensions()
    files: list[Path] = []
    for path in paths:
        inside = path.iterdir() if path.is_dir() else [path]
        files += sorted(file for file in inside if file.suffix.lower() in suffixes)
    return files or [PHOTOGRAPH]


def read_rgb(file: Path) -> Pixels:
    """Return an image as (H, W, 3) uint8."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def middle(pixels: NDArray[Any], edge: int) -> NDArray[Any]:
    """Return the square of `edge` pixels in the middle of (H, W) or (H, W, C), less where an axis is shorter."""
    rows, columns = (slice(start, start + edge) for start in (max(0, (n - edge) // 2) for n in pixels.shape[:2]))
    return np.ascontiguousarray(pixels[rows, columns])


def cut(pixels: Pixels, edge: int) -> Iterator[Pixels]:
    """Yield the squares of `edge` pixels, row after row; those at the far borders are cut off."""
    for top in range(0, pixels.shape[0], edge):
        for left in range(0, pixels.shape[1], edge):
            yield pixels[top : top + edge, left : left + edge]


def mosaic(files: list[Path], edge: int) -> Pixels:
    """Return (edge, edge, 3): the images side by side, each repeated with its mirror images to fill a square."""
    images = [read_rgb(file) for file in files]
    count = int(np.ceil(len(images) ** 0.5))
    side = -(-edge // count)
    rows = []
    for row in range(count):
        cells: list[Any] = [images[(row * count + column) % len(images)] for column in range(count)]
        padded = [
            np.pad(cell[:side, :side], [(0, max(0, side - n)) for n in cell.shape[:2]] + [(0, 0)], mode="symmetric")
            for cell in cells
        ]
        rows.append(np.concatenate(padded, 1))
    return np.ascontiguousarray(np.concatenate(rows)[:edge, :edge])
