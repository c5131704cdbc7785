"""Patterns of period 2 and 4, and noise: content that photographs do not have and archives do.

Raw camera data, dithered pages and sparse microscopy have most of their energy at the highest frequencies. A network
that saw only photographs decodes them to something worse than a grey picture. A few per cent of them among the crops
are enough to prevent that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_BAYER_2 = np.array([[0, 2], [3, 1]])
_BAYER_4 = np.block([[4 * _BAYER_2, 4 * _BAYER_2 + 2], [4 * _BAYER_2 + 3, 4 * _BAYER_2 + 1]])
"""Thresholds of ordered dither (Bayer 1973), as ranks."""


def draw_pattern(crop: npt.NDArray[Any], random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return a pattern that is made from a crop: a mosaic, a dither, a checkerboard, stripes or shot noise.

    Parameters
    ----------
    crop
        (H, W, 3) or (H, W, 1), values from 0 to 255.
    random
        Chooses the kind of pattern, its phase and its colours.

    Returns
    -------
    uint8 (H, W, 3)
    """
    colour = np.broadcast_to(crop, (*crop.shape[:2], 3)).astype(np.float32)
    rows, columns = np.indices(crop.shape[:2]) + random.integers(4, size=2)[:, None, None]
    kinds = ["dither 2", "dither 4", "checkerboard", "stripes", "noise", "mosaic"]
    kind = random.choice(kinds if crop.shape[2] == 3 else kinds[:-1])  # the mosaic of a grey crop is the crop
    if kind == "mosaic":  # red and blue at one position of four each, green at two
        component = np.array([[0, 1], [1, 2]])[rows % 2, columns % 2]
        found = np.take_along_axis(colour, component[..., None], 2)
    elif kind.startswith("dither"):
        ranks = _BAYER_2 if kind == "dither 2" else _BAYER_4
        edge = len(ranks)
        threshold = (ranks[rows % edge, columns % edge] + 0.5) * 255 / edge**2
        found = np.where(colour.mean(2) > threshold, 255, 0)[..., None]
    elif kind == "noise":  # of light that is so weak that single photons count
        photons = random.uniform(0.5, 20)
        found = random.poisson(colour.mean(2, keepdims=True) / 255 * photons) * (255 / photons)
    else:
        width = random.integers(1, 3)
        rows, columns = rows // width, columns // width
        on = (rows + columns if kind == "checkerboard" else columns) % 2 == 1
        dark, bright = random.uniform(0, 256, (2, 3)) if random.random() < 0.5 else np.array([[0.0], [255.0]])
        found = np.where(on[..., None], bright, dark)
    return np.broadcast_to(np.rint(found).clip(0, 255), colour.shape).astype(np.uint8)
