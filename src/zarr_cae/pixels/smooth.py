"""Enlarge images by linear interpolation, and smooth planes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from zarr_cae.pixels.layout import Planes


def smoothed(planes: Planes, levels: int) -> Planes:
    """Return planes without detail finer than 2^levels samples.

    Each block of 2^levels x 2^levels samples becomes its mean, and these are interpolated linearly.

    Parameters
    ----------
    planes
        (N, C, H, W) float32; 2^levels divides H and W.
    levels
        At least 0.
    """
    edge = 1 << levels
    *outer, rows, columns = planes.shape
    images = planes.reshape(-1, rows // edge, edge, columns // edge, edge).mean((2, 4), dtype=np.float32)
    for _ in range(levels):
        images = enlarged(enlarged(images, 1), 2)
    result: Planes = images.reshape(*outer, rows, columns)
    return result


def enlarged(image: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Return an image with twice as many samples along an axis, interpolated linearly between their centres."""
    image = image.swapaxes(0, axis)
    padded = np.concatenate([image[:1], image, image[-1:]])
    both = np.stack([0.75 * image + 0.25 * padded[:-2], 0.75 * image + 0.25 * padded[2:]], 1)
    return both.reshape(-1, *image.shape[1:]).astype(np.float32, copy=False).swapaxes(0, axis)
