"""Which axes of a chunk are channels, rows and columns."""

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
        ((512, 512, 3), "auto", 2), ((64, 64), "auto", None), ((1, 1, 1, 16, 16), "auto", None),
        ((10, 64, 64), "auto", None), ((2, 3), "auto", None), ((3, 3), "auto", None), ((1000, 600, 900), "auto", None),
        ((512, 512, 4), 2, 2), ((512, 512, 4), -1, 2), ((512, 512, 4), None, None), ((5, 17, 31), None, None),
        ((1, 1, 3), "auto", 2), ((17, 31, 3), "auto", 2), ((10, 64, 4, 3), "auto", 3), ((3, 512, 3), "auto", 2),
        ((1, 1, 1, 1, 1), "auto", None), ((2, 6, 64, 5, 3), "auto", 4), ((3, 512, 512), -3, 0),
        ((3, 256, 256, 4), 0, 0), ((3, 256, 256, 4), -1, 3),
    ],
)  # fmt: skip
def test_channel_axis(shape, asked, axis):
    assert resolve_channel_axis(shape, asked) == axis


@pytest.mark.parametrize(
    ("shape", "asked", "message"),
    [
        ((512, 512, 4), "auto", r"ambiguous.*512 x 4"), ((512, 512, 13), "auto", "ambiguous"),
        ((3, 512, 512), "auto", r"channel_axis=-3 if .*channel_axis=None if"), ((512, 512, 100), "auto", "ambiguous"),
        ((9, 3, 64, 64), "auto", r"channel_axis=-3 if .*channel_axis=None if"),
        ((512, 512, 3), 3, "does not exist"), ((512, 512, 3), -4, "does not exist"), ((512, 512), 0, "at least 3"),
        ((3, 256, 256, 4), "auto", "ambiguous.*axis -4 has length 3"), ((3, 512, 512, 2), "auto", "ambiguous"),
        ((10, 3, 64, 64, 4), "auto", "ambiguous.*axis -4"), ((3, 100, 100, 13), "auto", "ambiguous"),
        ((3, 64, 60, 15), "auto", "ambiguous"), ((64, 3, 64, 1), "auto", "ambiguous"),
        ((512,), "auto", "at least 2"), ((), None, "at least 2"), ((512, 512, 3), "last", "'auto'"),
    ],
)  # fmt: skip
def test_channel_axis_refused(shape, asked, message):
    with pytest.raises(CAEConfigurationError, match=message):
        resolve_channel_axis(shape, asked)
