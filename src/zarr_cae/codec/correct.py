"""Corrections of the tiles of a chunk: find those that are worth their bytes, and put stored ones in their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_cae.codec.exact import whole_pixels
from zarr_cae.codec.padding import counting_samples
from zarr_cae.coder.correction import decode_correction, encode_correction
from zarr_cae.coder.frame import STRIDE, FrameHeader, Symbols
from zarr_cae.coder.tiles import Patch, Tile, tiles
from zarr_cae.pixels.correct import Area, correct, fit
from zarr_cae.pixels.layout import Mask, Planes
from zarr_cae.threads import over_cores
from zarr_cae.weights.file import trade_off

if TYPE_CHECKING:
    from zarr_cae.codec.chunk import ChunkCoder
    from zarr_cae.codec.plan import Plan


def stored_areas(
    coder: ChunkCoder,
    header: FrameHeader,
    corrections: Mapping[int, bytes | memoryview],
    planes: Sequence[int] | npt.NDArray[np.intp] | None = None,
    patch: Patch | None = None,
) -> list[Area]:
    """Return the corrected areas of the planes that a patch synthesises.

    Parameters
    ----------
    coder
        Codes the chunks of the array.
    header
        The header of the frame.
    corrections
        The correction sections of its tiles, by number.
    planes
        The planes of the chunk; by default all.
    patch
        The latent positions; by default those of a whole plane.

    Raises
    ------
    StreamError
        If a section is malformed.
    """
    if not corrections:
        return []
    rows, columns = header.latent_shape
    patch = Patch(slice(0, rows), slice(0, columns)) if patch is None else patch
    areas = []
    for tile in tiles(header, planes, patch):
        if tile.number in corrections:
            correction = decode_correction(corrections[tile.number], _components(coder, header, tile), tile.patch.shape)
            if correction.where is not None:
                correction = replace(correction, where=correction.where[patch.within(tile.patch)])
            areas.append(Area(tile.plane, *Patch(*tile.patch.within(patch)).scaled(STRIDE), correction))
    return areas


def without(
    coder: ChunkCoder,
    header: FrameHeader,
    corrections: Mapping[int, bytes | memoryview],
    planes: Sequence[int] | npt.NDArray[np.intp],
    patch: Patch,
) -> dict[int, bytes | memoryview]:
    """Return the correction sections of a chunk without some latent positions: those of new pixels.

    A correction holds for the pixels that it was made for. The arguments are those of `stored_areas`.
    """
    left = dict(corrections)
    for tile in tiles(header, planes, patch):
        if tile.number in left:
            old = decode_correction(left.pop(tile.number), _components(coder, header, tile), tile.patch.shape)
            where = np.ones(tile.patch.shape, np.bool_) if old.where is None else old.where.copy()
            where[patch.within(tile.patch)] = False
            if where.any():
                left[tile.number] = encode_correction(replace(old, where=where))
    return left


class Decoding(NamedTuple):
    """What the symbols of a whole chunk decode to."""

    pixels: Any
    plain: Any
    """The pixels without corrections."""
    corrections: Mapping[int, bytes]
    """The correction sections of its tiles, by number."""


def decoding(coder: ChunkCoder, pixels: Any, symbols: Symbols, mask: Mask | None) -> Plan[Decoding]:
    """Return what the symbols (N, M, h, w) of a whole chunk decode to, without exact tiles.

    The other arguments are those of `worthwhile`.
    """
    planes = yield coder.synthesise(symbols)
    corrections = worthwhile(coder, pixels, planes, mask) if coder.corrects else {}
    plain = now = whole_pixels(coder, planes, mask)
    if corrections:
        correct(planes, stored_areas(coder, coder.geometry, corrections))
        now = whole_pixels(coder, planes, mask)
    return Decoding(now, plain, corrections)


def worthwhile(coder: ChunkCoder, pixels: Any, synthesised: Planes, mask: Mask | None) -> dict[int, bytes]:
    """Return the correction sections of the tiles of a chunk that gain by one, by number.

    A correction must lower the error by more than its bytes are worth at the trade-off that the weights were trained
    for, or mend a tile that is worse than its mean.

    Parameters
    ----------
    coder
        Codes the chunks of the array.
    pixels
        The chunk.
    synthesised
        The planes (N, 3 or 1, H, W) that its symbols decode to.
    mask
        Sample planes (S, H, W), true for samples without data, which do not count; None if there are none.
    """
    header = coder.geometry
    known, counts = coder.to_planes(pixels, coder.layout), counting_samples(coder, pixels, mask, some_padding=True)
    worth = trade_off(coder.weights.info, coder.quality)
    assert worth is not None, "weights for MS-SSIM have no corrections"

    def best(tile: Tile) -> tuple[int, bytes]:
        part = (slice(None), *tile.patch.scaled(STRIDE))
        components = _components(coder, header, tile)
        values = synthesised[tile.plane][part]
        if components < len(values):
            values = values.mean(0, keepdims=True)
        found = fit(values, known[tile.plane][part][:components], counts[tile.plane][part][:components])
        if found is None:
            return tile.number, b""
        section = encode_correction(found.correction)
        saved = worth * (found.before - found.after) / components
        return tile.number, section if saved > 8 * len(section) or found.before > found.spread else b""

    found = dict(over_cores(best, tiles(header)))
    return {number: section for number, section in found.items() if section}


def _components(coder: ChunkCoder, header: FrameHeader, tile: Tile) -> int:
    """Return the components of a tile's plane: 3 for colours, 1 for grey."""
    down, across = header.tile_grid
    return len(coder.layout.samples_of(tile.number // (down * across)))
