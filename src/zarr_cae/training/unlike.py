"""Generated pictures unlike any collection: a fit trains on some of them, and is checked on others.

Dead leaves are shapes that cover one another, with sizes by a power law. Networks that were trained on nothing else
treat photographs well (Achddou, Gousseau, Ladjal 2023, "Synthetic images as a regularity prior for image restoration
neural networks"): they have edges, flat areas and textures of all sizes, and nothing else.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Uint8Pixels = npt.NDArray[np.uint8]
_LEAVES = 500
_SMALLEST, _LARGEST = 2.0, 0.4
"""Radii of the leaves: pixels, and a share of the edge."""
_CHECK_SEED, _CHECK_PICTURES, _CHECK_EDGE = 2**31 - 1, 3, 256


def draw_unlike(edge: int, random: np.random.Generator) -> Uint8Pixels:
    """Return dead leaves with a texture: uint8 (edge, edge, 3)."""
    large = 2 * edge  # drawn at twice the size, so that edges are smooth
    picture = Image.new("RGB", (large, large), _colour(random))
    draw = ImageDraw.Draw(picture)
    least, most = 2 * _SMALLEST, _LARGEST * large
    radii = (least**-2 - random.random(_LEAVES) * (least**-2 - most**-2)) ** -0.5
    for radius, (x, y) in zip(radii, random.uniform(0, large, (_LEAVES, 2)), strict=True):
        if random.random() < 0.5:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(random))
        else:
            draw.regular_polygon((x, y, radius), int(random.integers(3, 6)), random.uniform(0, 360), _colour(random))
    leaves = np.asarray(picture.resize((edge, edge), Image.Resampling.BOX), np.float32)
    found = leaves + random.uniform(0, 15) * _texture(edge, random)
    return np.asarray(np.rint(found.clip(0, 255)), np.uint8)


def _colour(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (random.uniform(0, 255) + random.normal(0, 30, 3)).clip(0, 255).astype(int).tolist()
    return red, green, blue


def _texture(edge: int, random: np.random.Generator) -> npt.NDArray[Any]:
    """Return grey noise whose amplitude falls with the frequency, with deviation 1: (edge, edge, 1)."""
    rows, columns = np.meshgrid(np.fft.fftfreq(edge), np.fft.rfftfreq(edge), indexing="ij")
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / edge)
    spectrum = amplitude * np.exp(2j * np.pi * random.random(amplitude.shape))
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, (edge, edge))
    return np.asarray((noise / noise.std())[..., None])


def pictures_to_check() -> list[Uint8Pixels]:
    """Return the pictures that no fit trains on: the four quarters of the package's photograph, and dead leaves."""
    with resources.as_file(resources.files("zarr_cae") / "data" / "astronaut.png") as path, Image.open(path) as image:
        photograph = np.asarray(image.convert("RGB"))
    half = _CHECK_EDGE
    quarters = [photograph[top : top + half, left : left + half] for top in (0, half) for left in (0, half)]
    random = np.random.default_rng(_CHECK_SEED)
    return [*quarters, *(draw_unlike(half, random) for _ in range(_CHECK_PICTURES))]
