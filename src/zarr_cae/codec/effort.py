"""Refine the symbols of a whole chunk, if the setting `cae.effort` asks for it (see `networks.refine`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zarr_cae.codec.exact import whole_pixels
from zarr_cae.codec.floor import poor_tiles, reaches
from zarr_cae.coder.frame import Symbols
from zarr_cae.pixels.convert import to_planes
from zarr_cae.pixels.layout import Mask

if TYPE_CHECKING:
    from zarr_cae.codec.chunk import ChunkCoder
    from zarr_cae.codec.plan import Plan


def refined(
    coder: ChunkCoder, pixels: npt.NDArray[Any], symbols: Symbols, decoded: Any, mask: Mask | None
) -> Plan[tuple[Symbols, Any]]:
    """Return the symbols to store for a whole chunk, and what they decode to.

    Parameters
    ----------
    coder
        Codes the chunks of the array.
    pixels
        The chunk.
    symbols
        (N, M, h, w), of these pixels.
    decoded
        The pixels that the symbols decode to, or None if they were not decoded. No tile of them must be stored exactly.
    mask
        Sample planes (S, H, W), true for samples without data, which do not count; None if there are none.

    Returns
    -------
    symbols, decoded
        Those that were given, if refined ones miss the PSNR that the array demands, or have a tile that is worse than
        its mean.
    """
    from zarr_cae.networks.refine import refine, trade_off

    if trade_off(coder.weights.info, coder.quality) is None:
        return symbols, decoded
    planes = coder.to_planes(pixels, coder.layout)
    counts = _counts(coder, mask)
    work = refine(coder.engine, planes, counts, symbols, coder.quality, coder.settings)
    try:
        better = yield work
    finally:
        work.cancel()  # ends the steps if the runner was interrupted, or its task cancelled
    if decoded is None:
        return better, None
    now = whole_pixels(coder, (yield coder.synthesise(better)), mask)
    demanded = coder.min_psnr is None or reaches(coder, pixels, now, mask)
    if demanded and not poor_tiles(coder, coder.geometry, pixels, now, mask):
        return better, now
    return symbols, decoded


def _counts(coder: ChunkCoder, mask: Mask | None) -> npt.NDArray[np.bool_]:
    """Return which samples of the planes (N, 3 or 1, H, W) count: those with data, without padding."""
    layout = coder.layout
    data = np.ones(layout.shape, np.uint8) if mask is None else coder.from_samples((~mask).view(np.uint8), layout)
    counts = to_planes(data, layout, (0, 1)) > 0.5
    counts[:, :, layout.height :] = False
    counts[:, :, :, layout.width :] = False
    return counts
