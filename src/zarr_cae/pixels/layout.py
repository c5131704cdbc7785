"""Map the axes of a chunk to planes.

A chunk has a channel axis or none. Of its other axes the last two are an image's rows and columns, and all before
them are batch axes. A channel axis of length 3 is coded as RGB, one plane of three components; any other length, or
no channel axis, as independent grey planes of one component. The codec's `colour` names three channels of a longer axis
that are coded as RGB, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zarr_cae.coder.frame import STRIDE
from zarr_cae.errors import CAEConfigurationError

RGB = 3
_IMAGE_ASPECT = 4
"""An axis that is so many times shorter than its neighbours may hold channels."""

Pixels = npt.NDArray[Any]
"""Pixels of an image, or of any part of an array."""
Mask = npt.NDArray[np.bool_]
Chunk = npt.NDArray[Any]
Planes = npt.NDArray[np.float32]
ValueRange = tuple[float, float]
ValueTransform = Literal["sqrt"] | None


@dataclass(frozen=True)
class Layout:
    """How the axes of a chunk map to planes.

    An image of the chunk has one plane of three components for its colours, if it has any, and then one plane of one
    component for each other channel. A *sample plane* (H, W) is one channel of one image; sample planes are numbered
    by image, then by channel.
    """

    shape: tuple[int, ...]
    """The chunk's shape."""
    channel_axis: int | None
    colour: tuple[int, ...] | None = None
    """The three channels that are coded together as RGB, as positions along the channel axis; () if there are none.
    None becomes (0, 1, 2) if there are three channels, and otherwise ()."""

    def __post_init__(self) -> None:
        axis, needed = self.channel_axis, 2 if self.channel_axis is None else 3
        if len(self.shape) < needed:
            with_channels = "" if axis is None else " and a channel axis"
            raise CAEConfigurationError(
                f"cae: shape {self.shape} has {len(self.shape)} axes; rows and columns{with_channels} need "
                f"at least {needed}"
            )
        if axis is not None and not 0 <= axis < len(self.shape):
            raise CAEConfigurationError(
                f"cae: channel_axis {axis} does not exist in shape {self.shape}; expected 0 to {len(self.shape) - 1}"
            )
        if self.colour is None:
            object.__setattr__(self, "colour", tuple(range(RGB)) if self.channels == RGB else ())
        elif self.colour and (axis is None or max(self.colour) >= self.channels):
            held = "there is no channel axis" if axis is None else f"channel axis {axis} has length {self.channels}"
            raise CAEConfigurationError(
                f"cae: colour {self.colour} does not fit shape {self.shape}, where {held}; give the positions of red, "
                "green and blue along channel_axis, each chunk with all channels"
            )

    @property
    def channels(self) -> int:
        """Length of the channel axis; 1 without one."""
        return 1 if self.channel_axis is None else self.shape[self.channel_axis]

    @property
    def grey(self) -> bool:
        """Whether all planes have one component."""
        return not self.colour

    @property
    def mixed(self) -> bool:
        """Whether planes must be put together channel by channel, as they are not the chunk's own axes reshaped."""
        return bool(self.colour) and (self.channels != RGB or self.colour != (0, 1, 2))

    @property
    def separate(self) -> Layout:
        """The layout in which each channel is a grey plane, so that planes are sample planes."""
        return replace(self, colour=())

    @property
    def spatial_axes(self) -> tuple[int, int]:
        """The axes of the image's rows and columns."""
        rows, columns = [axis for axis in range(len(self.shape)) if axis != self.channel_axis][-2:]
        return rows, columns

    @property
    def height(self) -> int:
        """Rows of a plane in pixels, before padding."""
        return self.shape[self.spatial_axes[0]]

    @property
    def width(self) -> int:
        """Columns of a plane in pixels, before padding."""
        return self.shape[self.spatial_axes[1]]

    @property
    def images(self) -> int:
        """Number of images: the product of the lengths of the batch axes."""
        return math.prod(self.shape) // (self.height * self.width * self.channels)

    @property
    def planes(self) -> int:
        """Number of planes of all images."""
        return self.images * self.planes_per_image

    @property
    def planes_per_image(self) -> int:
        """Number of planes of one image."""
        return self.channels - RGB + 1 if self.colour else self.channels

    @property
    def greys(self) -> list[int]:
        """The channels that are not coded together as RGB, in ascending order."""
        return [channel for channel in range(self.channels) if channel not in (self.colour or ())]

    def samples_of(self, plane: int) -> list[int]:
        """Return the numbers of the sample planes that are the components of a plane."""
        image, channel = divmod(plane, self.planes_per_image)
        if self.colour and channel == 0:
            return [image * self.channels + one for one in self.colour]
        channel -= 1 if self.colour else 0
        for one in sorted(self.colour or ()):
            channel += one <= channel
        return [image * self.channels + channel]

    def plane_of(self, sample: int) -> int:
        """Return the plane of which a sample plane is a component: the inverse of `samples_of`."""
        image, channel = divmod(sample, self.channels)
        if self.colour:
            channel = 0 if channel in self.colour else 1 + channel - sum(one < channel for one in self.colour)
        return image * self.planes_per_image + channel

    @property
    def channels_first(self) -> tuple[int, ...]:
        """The permutation that puts batch axes first, then channels if there are any, rows, columns."""
        rows, columns = self.spatial_axes
        batch = [axis for axis in range(len(self.shape)) if axis not in (self.channel_axis, rows, columns)]
        return (*batch, *(() if self.channel_axis is None else (self.channel_axis,)), rows, columns)


@dataclass(frozen=True)
class PixelFormat:
    """The pixels of a whole chunk: how they map to planes, their dtype and value range."""

    layout: Layout
    dtype: np.dtype[Any]
    value_range: ValueRange
    stays: bool = False
    """Whether decoded pixels stay on the device of the network, as a tensor."""
    transform: ValueTransform = None
    """The value transform between pixels and planes: "sqrt" or none."""

    @property
    def plane_shape(self) -> tuple[int, int, int]:
        """Components, rows and columns of a plane, padded."""
        rows, columns = (-(-side // STRIDE) * STRIDE for side in (self.layout.height, self.layout.width))
        return 1 if self.layout.grey else RGB, rows, columns

    @property
    def pixels(self) -> int:
        """The number of pixels of all planes, padding included."""
        return self.layout.planes * self.plane_shape[1] * self.plane_shape[2]


def resolve_channel_axis(shape: tuple[int, ...], channel_axis: int | str | None, *, colour: bool = False) -> int | None:
    """Return the channel axis of an array of this shape, as a non-negative number or None.

    Parameters
    ----------
    shape
        The shape of the array.
    channel_axis
        The number of the axis, from the front or (negative) from the end; None if there is none; or "auto", which
        takes the last axis of an array of three or more axes if its length is 3, otherwise none. It refuses shapes
        that can be read in two ways:

        - another axis of length 3 before rows and columns, or the middle one of three, which may hold colours or
          slices, time steps or stains. Only the z axis of five (t, c, z, y, x) is taken for slices, as levels of a
          pyramid have fewer and fewer.
        - one of the last two axes that is at most a quarter of its two neighbours, like 4 in (512, 512, 4).
    colour
        Whether the user has named three channels as colours. Then "auto" takes the last axis, if its length is 3, or
        more but at most a quarter of its two neighbours.

    Returns
    -------
    int or None

    Raises
    ------
    CAEConfigurationError
        If "auto" refuses the shape, the axis does not exist, or no rows and columns are left.
    """
    count = len(shape)
    if channel_axis != "auto":
        if isinstance(channel_axis, str):
            raise CAEConfigurationError(f"cae: channel_axis must be an integer, None or 'auto', got {channel_axis!r}")
        if channel_axis is not None and -count <= channel_axis < 0:
            channel_axis += count
        return Layout(shape, channel_axis).channel_axis
    if count <= 2:
        return Layout(shape, None).channel_axis
    if shape[-1] == RGB or colour:
        _check_last_axis(shape)
        return count - 1
    for axis, length in enumerate(shape[:-1]):
        if length == RGB and (axis < count - 2 or count == 3) and not (count == 5 and axis == 2):
            raise CAEConfigurationError(
                f"cae: channel_axis 'auto' is ambiguous for shape {shape}: axis {axis} has length 3; give "
                f"channel_axis={axis - count} if these are red, green and blue, or channel_axis=None if they are "
                "slices, time steps or stains, which are coded each by itself"
            )
    before, rows, columns = shape[-3:]
    for axis, short, others in ((-1, columns, (before, rows)), (-2, rows, (before, columns))):
        if _IMAGE_ASPECT * short <= min(others):
            raise CAEConfigurationError(
                f"cae: channel_axis 'auto' is ambiguous for shape {shape}: images of {rows} x {columns} (the last two "
                f"axes) may not be meant; give channel_axis={axis} if that axis holds channels, or channel_axis=None "
                "if there are no channels; colours need chunks that hold all three, also within shards"
            )
    return None


def _check_last_axis(shape: tuple[int, ...]) -> None:
    """Refuse a last axis that is neither one of three colours nor much shorter than the axes before it."""
    if shape[-1] != RGB and not RGB < shape[-1] <= min(shape[-3:-1]) // _IMAGE_ASPECT:
        raise CAEConfigurationError(
            f"cae: colour needs the channel axis of shape {shape}, and 'auto' takes only a last axis of a few "
            "channels; give channel_axis=<number of the axis>"
        )
