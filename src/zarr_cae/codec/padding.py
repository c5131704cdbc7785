"""Find the padding of a chunk at the edge of an array.

zarr fills such a chunk with the fill value beyond the array, and no reader sees that part. Its latents would cost
bytes, and an error that it takes part in looks better than what readers see. The codec does not know where in the array
a chunk lies. It takes planes, and rows and columns at the end, for padding if they hold nothing but the fill value. So
what it stores for them must come back as the fill value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_cae.coder.frame import STRIDE
from zarr_cae.pixels.convert import to_planes
from zarr_cae.pixels.layout import RGB, Mask
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

    @property
    def is_wide(self) -> bool:
        """Whether there is a latent position, or a plane, of nothing but padding."""
        rows, columns = (
            -(-side // STRIDE) < -(-whole // STRIDE)
            for side, whole in zip((self.height, self.width), self.samples.shape[1:], strict=True)
        )
        return rows or columns or bool(self.samples.all((1, 2)).any())


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


def counting_samples(
    coder: ChunkCoder, pixels: Any, mask: Mask | None, *, some_padding: bool = False
) -> npt.NDArray[np.bool_]:
    """Return which samples of the planes (N, 3 or 1, H, W) of a whole chunk have data and are not padding.

    Parameters
    ----------
    coder
        Codes the chunks of the array.
    pixels
        The chunk.
    mask
        Sample planes (S, H, W), true for samples without data; None if there are none.
    some_padding
        Whether to add at most as many samples of the padding: it may be an image that ends with the fill value.
    """
    layout, padding = coder.layout, find_padding(coder, pixels)
    if padding is not None and some_padding:
        data = int(np.count_nonzero(~padding.samples))
        beyond = np.flatnonzero(padding.samples)
        padding.samples.reshape(-1)[beyond[:: -(-len(beyond) // data)]] = False
    if mask is None and padding is None:
        shape = (
            layout.planes,
            1 if layout.grey else RGB,
            *(-(-side // STRIDE) * STRIDE for side in (layout.height, layout.width)),
        )
        counts = np.ones(shape, np.bool_)
    else:
        holes = np.logical_or.reduce([one for one in (mask, padding and padding.samples) if one is not None])
        counts = to_planes(coder.from_samples((~holes).view(np.uint8), layout), layout, (0, 1)) > 0.5
    counts[:, :, layout.height :] = False
    counts[:, :, :, layout.width :] = False
    return counts


def holds_only(pixels: Any, fill: Any) -> bool:
    """Return whether all pixels have the fill value. An array on a GPU stays there."""
    return bool((pixels != pixels if fill != fill else pixels == fill).all())  # noqa: PLR0124 - NaN is not NaN


def _used(filled: Any) -> int:
    """Return the length of a line without the True ones at its end."""
    return len(filled) - int(np.argmin(filled[::-1]))
