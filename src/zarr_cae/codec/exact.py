"""Samples that a frame holds exactly: put masks and exact tiles in the place of synthesised pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zarr_cae.codec.windows import Box
from zarr_cae.coder.frame import STRIDE, Frame, FrameHeader
from zarr_cae.coder.lossless import decode_mask, decode_pixels, encode_mask
from zarr_cae.coder.tiles import Patch, Tile, tiles
from zarr_cae.pixels.layout import Layout, Mask, Planes
from zarr_cae.pixels.mask import apply_mask

if TYPE_CHECKING:
    from zarr_cae.codec.chunk import ChunkCoder


@dataclass(frozen=True)
class Parts:
    """The checked parts of a stored frame: all of them, or those that a window needs."""

    header: FrameHeader
    streams: Mapping[int, bytes | memoryview]
    """The streams of tiles, by number."""
    mask: memoryview | None
    """The mask section."""
    exact: Mapping[int, memoryview]
    """The pixel sections of exact tiles, by number."""
    corrections: Mapping[int, memoryview]
    """The correction sections of corrected tiles, by number."""

    @classmethod
    def of(cls, frame: Frame) -> Parts:
        """Return all parts of a frame."""
        return cls(frame.header, dict(enumerate(frame.streams)), frame.mask, frame.exact, frame.corrections)


def restore(coder: ChunkCoder, pixels: npt.NDArray[Any], box: Box, parts: Parts) -> npt.NDArray[Any]:
    """Return the pixels of a box, with exact tiles and the mask in place of synthesised pixels.

    Parameters
    ----------
    coder
        Codes the chunks of the array.
    pixels
        The synthesised pixels, with the layout of the box.
    box
        The part of the chunk.
    parts
        The mask, and the exact tiles that hold pixels of the box.

    Raises
    ------
    FrameError, StreamError
        If a section is malformed.
    """
    if coder.nodata is None and parts.mask is None and not parts.exact:
        return pixels
    samples = coder.to_samples(pixels, box.layout)
    inside = box_pixels(box)
    for tile in tiles(parts.header, box.planes, box.patch):
        if tile.number in parts.exact:
            values = tile_samples(coder, parts, tile)
            own = tile_pixels(parts.header, tile)
            samples[box.layout.samples_of(tile.plane), *own.within(inside)] = values[:, *inside.within(own)]
    mask = stored_mask(coder, parts)
    if coder.nodata is not None:
        apply_mask(samples, mask[box.samples, inside.rows, inside.columns], coder.nodata, coder.value_range)
    elif parts.mask is not None:
        samples[mask[box.samples, inside.rows, inside.columns]] = coder.spec.fill_value
    return coder.from_samples(samples, box.layout)


def whole_pixels(coder: ChunkCoder, planes: Planes, mask: Mask | None) -> npt.NDArray[Any]:
    """Return the pixels of a whole chunk without exact tiles, as readers will see them, from synthesised planes.

    Padding that is stored as a mask does not count, and stays as it is synthesised.

    Parameters
    ----------
    coder
        Codes the chunks of the array.
    planes
        (N, 3 or 1, H, W), as from the synthesis transform.
    mask
        Sample planes (S, H, W), true for samples without data; None if there are none.
    """
    pixels = coder.to_pixels(planes, coder.layout)
    if coder.nodata is None:
        return pixels
    samples = coder.to_samples(pixels, coder.layout)
    holes = np.broadcast_to(np.False_, samples.shape) if mask is None else mask
    apply_mask(samples, holes, coder.nodata, coder.value_range)
    return coder.from_samples(samples, coder.layout)


def stored_mask(coder: ChunkCoder, parts: Parts) -> Mask:
    """Return the mask of a chunk as sample planes (S, H, W), read only. Nothing is masked if the frame has no mask.

    Raises
    ------
    FrameError, StreamError
        If the section is malformed.
    """
    layout = coder.layout
    shape = (layout.images * layout.channels, layout.height, layout.width)
    if parts.mask is None:
        return np.broadcast_to(np.False_, shape)
    return decode_mask(parts.mask, _mask_shape(layout)).reshape(shape)


def mask_section(coder: ChunkCoder, mask: Mask | None) -> bytes | None:
    """Return the mask section of a mask of sample planes (S, H, W); None if nothing is masked."""
    return None if mask is None or not mask.any() else encode_mask(mask.reshape(_mask_shape(coder.layout)))


def _mask_shape(layout: Layout) -> tuple[int, int, int, int]:
    """Return the shape of the mask in its section: the channels of an image are coded together if it has colours."""
    planes = (layout.images, layout.channels) if layout.colour else (layout.images * layout.channels, 1)
    return (*planes, layout.height, layout.width)


def tile_samples(coder: ChunkCoder, parts: Parts, tile: Tile) -> npt.NDArray[Any]:
    """Return the samples (C, rows, columns) of an exact tile. Raises StreamError if its section is malformed."""
    down, across = parts.header.tile_grid
    components = len(coder.layout.samples_of(tile.number // (down * across)))
    return decode_pixels(parts.exact[tile.number], (components, *tile_pixels(parts.header, tile).shape), coder.dtype)


def tile_pixels(header: FrameHeader, tile: Tile) -> Patch:
    """Return the rectangle of pixels of its plane that a tile covers."""
    rows, columns = (
        slice(side.start * STRIDE, min(side.stop * STRIDE, length))
        for side, length in ((tile.patch.rows, header.height), (tile.patch.columns, header.width))
    )
    return Patch(rows, columns)


def box_pixels(box: Box) -> Patch:
    """Return the rectangle of pixels of each of its planes that a box covers."""
    rows, columns = (
        slice(int(box.indices[axis][0]), int(box.indices[axis][-1]) + 1) for axis in box.chunk.spatial_axes
    )
    return Patch(rows, columns)
