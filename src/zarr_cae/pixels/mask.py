"""Pixels without data: find them, fill them smoothly before the analysis, set them after the synthesis.

A pixel (a sample, where there are channels) is masked if it is equal to the nodata value, which is a number or NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_cae.pixels.layout import Chunk, Mask, Planes, ValueRange
from zarr_cae.pixels.smooth import enlarged


def find_mask(chunk: Chunk, nodata: float) -> Mask:
    """Return a boolean array, true where a chunk has the nodata value. NaN is equal to NaN here."""
    if math.isnan(nodata):
        return np.isnan(chunk) if chunk.dtype.kind == "f" else np.zeros(chunk.shape, bool)
    found: Mask = np.equal(chunk, chunk.dtype.type(nodata))
    return found


def fill(planes: Planes, mask: Mask) -> None:
    """Replace masked samples of planes, in place, by a smooth continuation of the samples around them.

    This is push-pull interpolation: each level of a pyramid has the means of the unmasked samples of 2 x 2 blocks of
    the level below, and masked samples are interpolated from the level above. It takes time and memory in proportion
    to the planes. (Gortler et al., The Lumigraph, SIGGRAPH 1996.)

    Parameters
    ----------
    planes
        (N, C, H, W) float32. The values under the mask do not matter; they may be NaN.
    mask
        A boolean array of the same shape. Planes without any unmasked sample become 0.
    """
    for index in np.ndindex(planes.shape[:2]):
        planes[index][mask[index]] = 0
        _fill_image(planes[index], mask[index])


def _fill_image(image: npt.NDArray[np.float32], holes: Mask) -> None:
    """Fill one image (H, W), in place. Its samples in holes are 0."""
    if holes.all() or not holes.any():
        return
    rows, columns = (-(-side // 2) for side in image.shape)
    padding = [(0, 2 * rows - image.shape[0]), (0, 2 * columns - image.shape[1])]
    blocks = (rows, 2, columns, 2)
    sums = np.pad(image, padding).reshape(blocks).sum((1, 3))
    counts = np.pad(~holes, padding).reshape(blocks).sum((1, 3), dtype=np.float32)
    above = sums / np.maximum(counts, 1)
    _fill_image(above, counts == 0)
    np.copyto(image, enlarged(enlarged(above, 0), 1)[: image.shape[0], : image.shape[1]], where=holes)


def apply_mask(chunk: Chunk, mask: Mask, nodata: float, value_range: ValueRange) -> None:
    """Set the masked samples of a decoded chunk to the nodata value, in place, and no others.

    Unmasked samples that happen to have the value get the next one above, or below at the end of the value range.

    Parameters
    ----------
    chunk
        Decoded samples within the value range.
    mask
        A boolean array of the same shape.
    nodata
        The nodata value; inside or outside the value range.
    value_range
        (lowest, highest) value of the data. They differ, so that another value is always left.
    """
    if not math.isnan(nodata):
        value = chunk.dtype.type(nodata)
        chance = np.equal(chunk, value) & ~mask
        if chance.any():
            up = value < value_range[1]
            if chunk.dtype.kind == "f":
                chunk[chance] = _next_value(value, up=up, value_range=value_range)
            else:
                chunk[chance] = int(value) + (1 if up else -1)
    chunk[mask] = nodata


def _next_value(value: np.floating[Any], *, up: bool, value_range: ValueRange) -> np.floating[Any]:
    """Return the next float above or below a value.

    Beside 0 this is the smallest normal number, if it lies in the range: a process in which a library makes the
    processor flush subnormal numbers to zero could not tell one of these from 0.
    """
    dtype = value.dtype.type
    found: np.floating[Any] = np.nextafter(value, dtype(np.inf if up else -np.inf))
    tiny = np.finfo(dtype).tiny
    smallest: np.floating[Any] = dtype(tiny if up else -tiny)
    return smallest if abs(found) < tiny and value_range[0] <= smallest <= value_range[1] else found
