"""Refine the symbols of a whole chunk, if the setting `cae.effort` asks for it (see `networks.refine`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from zarr_cae.codec.correct import Decoding, decoding
from zarr_cae.codec.floor import poor_tiles, reaches
from zarr_cae.codec.padding import counting_samples
from zarr_cae.coder.frame import Symbols
from zarr_cae.pixels.layout import Mask
from zarr_cae.weights.file import trade_off

if TYPE_CHECKING:
    from zarr_cae.codec.chunk import ChunkCoder
    from zarr_cae.codec.plan import Plan


def refined(
    coder: ChunkCoder, pixels: npt.NDArray[Any], symbols: Symbols, found: Decoding | None, mask: Mask | None
) -> Plan[tuple[Symbols, Decoding | None]]:
    """Return the symbols to store for a whole chunk, and what they decode to.

    Parameters
    ----------
    coder
        Codes the chunks of the array.
    pixels
        The chunk.
    symbols
        (N, M, h, w), of these pixels.
    found
        What the symbols decode to, or None if they were not decoded. No tile of it must be stored exactly.
    mask
        Sample planes (S, H, W), true for samples without data, which do not count; None if there are none.

    Returns
    -------
    symbols, found
        Those that were given, if refined ones miss the PSNR that the array demands, or have a tile that is worse than
        its mean.
    """
    from zarr_cae.networks.refine import refine

    if trade_off(coder.weights.info, coder.quality) is None:
        return symbols, found
    planes = coder.to_planes(pixels, coder.layout)
    counts = counting_samples(coder, pixels, mask)
    work = refine(coder.engine, planes, counts, symbols, coder.quality, coder.settings)
    try:
        better = yield work
    finally:
        work.cancel()  # ends the steps if the runner was interrupted, or its task cancelled
    if found is None:
        return better, None
    now = yield from decoding(coder, pixels, better, mask)
    demanded = coder.min_psnr is None or reaches(coder, pixels, now.pixels, mask)
    if demanded and not poor_tiles(coder, coder.geometry, pixels, now.pixels, mask):
        return better, now
    return symbols, found
