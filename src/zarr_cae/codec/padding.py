"""Find the padding of a chunk at the edge of an array.

zarr fills such a chunk with the fill value beyond the array, and no reader sees that part. It is coded almost without
error, so an error that it takes part in looks better than what readers see. The codec does not know where in the array
a chunk lies. It takes planes, and rows and columns at the end, for padding if they hold nothing but the fill value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zarr_cae.pixels.layout import Mask
from zarr_cae.pixels.mask import find_mask

if TYPE_CHECKING:
    from zarr_cae.codec.chunk import ChunkCoder


class Padding(NamedTuple):
    """The padding of a chunk."""

    samples: Mask
    """Sample planes (S, H, W), true in the padding."""
    height: int
    """Rows of pixels before the padding."""
    width: int
    """Columns of pixels before the padding."""


def find_padding(coder: ChunkCoder, pixels: Any) -> Padding | None:
    """Return the padding of a whole chunk, an array on any device; None if there is none, or nothing else."""
    from zarr_cae.codec.chunk import on_host

    layout, fill = coder.layout, coder.spec.fill_value
    axes = [axis for axis in range(len(layout.shape)) if axis != layout.channel_axis]
    ends = (pixels[(*(slice(None),) * axis, slice(-1, None))] for axis in axes)
    if not any(holds_only(end, fill) for end in ends):  # most chunks have no padding
        return None
    filled = find_mask(coder.to_samples(on_host(pixels, coder.spec), layout), fill)
    empty = np.asarray(filled.all((1, 2)))
    if empty.all():
        return None
    height, width = (_used(np.all(filled[~empty], axis=(0, axis))) for axis in (2, 1))
    filled[:] = empty[:, None, None]
    filled[:, height:] = True
    filled[:, :, width:] = True
    return Padding(filled, height, width)


def holds_only(pixels: Any, fill: Any) -> bool:
    """Return whether all pixels have the fill value. An array on a GPU stays there."""
    return bool((pixels != pixels if fill != fill else pixels == fill).all())  # noqa: PLR0124 - NaN is not NaN


def _used(filled: Any) -> int:
    """Return the length of a line without the True ones at its end."""
    return len(filled) - int(np.argmin(filled[::-1]))
