"""The axes of channels, rows and columns of a chunk."""

import pytest

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.pixels.layout import Layout, resolve_channel_axis


@pytest.mark.parametrize(
    ("shape", "axis", "planes", "grey", "image"),
    [
        ((5, 7), None, 1, True, (5, 7)),
        ((5, 7, 3), 2, 1, False, (5, 7)),
        ((3, 5, 7), 0, 1, False, (5, 7)),
        ((5, 3, 7), 1, 1, False, (5, 7)),
        ((5, 7, 4), 2, 4, True, (5, 7)),
        ((13, 5, 7), 0, 13, True, (5, 7)),
        ((2, 6, 3, 5, 7), 2, 12, False, (5, 7)),
        ((2, 6, 5, 7), None, 12, True, (5, 7)),
        ((2, 5, 7, 1), 3, 2, True, (5, 7)),
    ],
)
def test_layout(shape, axis, planes, grey, image):
    layout = Layout(shape, axis)
    assert (layout.planes, layout.grey, (layout.height, layout.width)) == (planes, grey, image)


@pytest.mark.parametrize(
    ("shape", "asked", "axis"),
    [
        ((512, 512, 3), "auto", 2), ((64, 64), "auto", None), ((10, 64, 64), "auto", None), ((2, 3), "auto", None),
        ((3, 3), "auto", None), ((1000, 600, 900), "auto", None), ((512, 512, 4), 2, 2), ((512, 512, 4), -1, 2),
        ((512, 512, 4), None, None), ((5, 17, 31), None, None), ((1, 1, 3), "auto", 2), ((17, 31, 3), "auto", 2),
        ((3, 40, 3), "auto", 2), ((9, 3, 64, 64, 3), "auto", 4), ((10, 64, 4, 3), "auto", 3),
        ((2, 6, 64, 5, 3), "auto", 4), ((3, 256, 256, 4), 0, 0), ((3, 256, 256, 4), -1, 3), ((3, 64, 64), -3, 0),
        ((1, 1, 3, 64, 64), "auto", None), ((1, 1, 1, 16, 16), "auto", None), ((1, 1, 1, 1, 2), "auto", None),
        ((1, 1, 1, 3, 5), "auto", None), ((1, 1, 4, 64, 64), "auto", None), ((13, 512, 512), "auto", None),
    ],
)  # fmt: skip
def test_channel_axis(shape, asked, axis):
    assert resolve_channel_axis(shape, asked) == axis


@pytest.mark.parametrize(
    ("shape", "asked", "message"),
    [
        ((512, 512, 4), "auto", r"512 x 4.*channel_axis=-1 .*channel_axis=None"), ((512, 512, 13), "auto", "ambiguous"),
        ((512, 512, 100), "auto", "ambiguous"), ((64, 64, 1), "auto", "ambiguous"), ((64, 64, 2), "auto", "ambiguous"),
        ((3, 512, 512), "auto", r"axis 0 has length 3.*channel_axis=-3 .*channel_axis=None"),
        ((48, 3, 64), "auto", r"axis 1 has length 3.*channel_axis=-2 "), ((9, 3, 64, 64), "auto", "channel_axis=-3 "),
        ((3, 40, 256, 256), "auto", "channel_axis=-4 "), ((1, 3, 9, 64, 64), "auto", "channel_axis=-4 "),
        ((512, 4, 512), "auto", r"4 x 512.*channel_axis=-2 "), ((3, 256, 256, 4), "auto", "axis 0 has length 3"),
        ((512, 512, 3), 3, "does not exist"), ((512, 512, 3), -4, "does not exist"), ((512, 512), 0, "at least 3"),
        ((512,), "auto", "at least 2"), ((), None, "at least 2"), ((512, 512, 3), "last", "'auto'"),
    ],
)  # fmt: skip
def test_channel_axis_refused(shape, asked, message):
    with pytest.raises(CAEConfigurationError, match=message):
        resolve_channel_axis(shape, asked)
