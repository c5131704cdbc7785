"""Windows of a collection."""

import re

import numpy as np
import pytest
import zarr
from archives import coder_of

from zarr_cae import CAECodec, CAEConfigurationError
from zarr_cae.training.sampling import ImageSource, ImageStack, filled, sample_windows, some_padded


def part(array, axis=2, value_range=None, **options):
    return ImageSource(array.shape[0] * array.shape[1], lambda: ImageStack(array, axis, value_range, **options))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_windows_come_from_the_whole_picture_and_few_are_glass():
    picture = np.full((2048, 2048, 3), 240, np.uint8)
    picture[:1024, :1024], picture[1024:, 1024:] = noise(1024, 1024, 3), 255 - noise(1024, 1024, 3, seed=1) // 4
    sample = sample_windows([part(picture)], 0)
    windows = [*sample.windows, *sample.held_out]
    assert {window.shape for window in windows} == {(256, 256, 3)}
    glass = [window for window in windows if window.std() == 0]
    assert len(windows) - len(glass) == 32
    assert 1 <= len(glass) <= 3


def test_no_pixel_of_a_held_out_window_is_trained_on():
    places = np.arange(1024 * 1024, dtype=np.uint32).reshape(1024, 1024)
    sample = sample_windows([part(places, None, (0, 2**20 - 1))], 3)
    trained, held_out = (
        set(np.concatenate([window[..., 0].ravel() for window in windows]).tolist())
        for windows in (sample.windows, sample.held_out)
    )
    assert trained
    assert held_out
    assert not trained & held_out


def numbered(count, side=64):
    """Return pictures of noise whose values tell their number, from 0 to 126."""
    return [noise(side, side, 3, seed=value) % 2 + np.uint8(2 * value) for value in range(count)]


def numbers(windows):
    return {int(window.min()) // 2 for window in windows}


def test_of_many_parts_neighbours_are_held_out_whole():
    sample = sample_windows([part(picture) for picture in numbered(100)], 0)
    held_out = {*range(22, 27), *range(72, 77)}
    assert numbers(sample.held_out) == held_out
    assert numbers(sample.windows) == {*range(100)} - held_out
    assert sample.description == "10 of 100 images"


@pytest.mark.parametrize(("count", "held_out"), [(4, {1}), (7, {3}), (12, {5, 6}), (40, {9, 10, 29, 30})])
@pytest.mark.parametrize("stack", [False, True])
def test_of_few_parts_or_images_of_a_stack_the_middle_ones_are_held_out_whole(count, held_out, stack):
    pictures = numbered(count, side=128)
    for seed in range(3):
        parts = [part(np.stack(pictures), 3)] if stack else [part(picture) for picture in pictures]
        sample = sample_windows(parts, seed)
        assert numbers(sample.held_out) == held_out
        assert numbers(sample.windows) == {*range(count)} - held_out
        assert sample.description == f"{len(held_out)} of {count} images"


def test_a_part_with_most_of_the_pixels_is_never_held_out_whole():
    large = noise(1024, 1024, 3) % 2 + np.uint8(40)
    small = numbered(12, side=256)
    sample = sample_windows([*map(part, small[:6]), part(large), *map(part, small[6:])], 0)
    assert sample.description == "3 of 13 images"
    assert numbers(sample.held_out) == {3, 4, 5}
    assert 20 in numbers(sample.windows)
    sample = sample_windows([part(noise(2048, 2048, 3)), *map(part, small[:3])], 0)
    assert re.fullmatch(r"\d+ of 67 windows, side by side", sample.description)
    assert {window.shape for window in sample.windows} == {(256, 256, 3)}


def test_of_one_picture_neighbouring_rows_of_windows_are_held_out():
    places = np.arange(1024 * 1024, dtype=np.uint32).reshape(1024, 1024)
    sample = sample_windows([part(places, None, (0, 2**20 - 1))], 0)
    rows = [
        {round(float(window.min()) / 255 * (2**20 - 1)) // 1024 // 256 for window in windows}
        for windows in (sample.windows, sample.held_out)
    ]
    assert len(rows[1]) == 1
    assert not rows[0] & rows[1]
    assert sample.description == "4 of 16 windows, side by side"


def test_the_smallest_collections_hold_out_single_windows():
    for picture, axis in ((noise(128, 128, 3), 2), (noise(5, 64, 64), None)):
        sample = sample_windows([part(picture, axis, same_place=(0,))], 0)
        assert len(sample.held_out) == 1
        assert len(sample.windows) in (3, 4)
        assert sample.description == f"1 of {len(sample.windows) + 1} windows"


def test_windows_of_a_large_stack_come_from_all_of_it():
    stack = np.stack([np.tile(noise(64, 64) % 2, (40, 40)) + np.uint8(2 * number) for number in range(6)])
    sample = sample_windows([part(stack, None)], 0)
    assert numbers([*sample.windows, *sample.held_out]) == {*range(6)}


def test_other_values_and_axes_become_three_channels_from_0_to_255():
    stack = np.linspace(100, 4095, 2 * 4 * 256 * 256, dtype=np.float32).reshape(2, 4, 256, 256).astype(np.uint16)
    sample = sample_windows([part(stack, 1, (0, 4095))], 0)
    window = sample.windows[0]
    assert window.dtype == np.float32
    assert window.shape[2] == 3
    np.testing.assert_array_equal(window[..., 0], window[..., 2])
    assert 0 < window.min() < window.max() <= 255
    colours = sample_windows([part(noise(3, 512, 512), 0)], 0).windows[0]
    assert colours.dtype == np.uint8
    assert (colours[..., 0] != colours[..., 1]).any()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("nodata", [None, 1])
def test_windows_have_the_values_that_the_codec_codes_under_a_value_transform(dtype, nodata):
    pixels = np.random.default_rng(0).poisson(6, (64, 64)).astype(dtype)
    codec = CAECodec(2, value_range=(0, 200), value_transform="sqrt", nodata=nodata, channel_axis=None)
    coder = coder_of(zarr.create_array({}, data=pixels, chunks=pixels.shape, serializer=codec, compressors=None))
    coded = 255 * coder.to_planes(pixels, coder.layout)[0, 0]
    same = part(np.stack([pixels] * 4), None, (0, 200), nodata=nodata, value_transform="sqrt")
    for window in sample_windows([same], 0).windows:
        assert window.dtype == np.float32
        data = ~np.isnan(window[..., 0])
        assert data.all() == (nodata is None)
        np.testing.assert_allclose(window[..., 0][data], coded[data], atol=1e-4)
    assert coded.mean() > 2 * 255 * 6 / 200  # much brighter than without the transform


@pytest.mark.parametrize("channels", [1, 3])
def test_every_fourth_window_ends_in_padding(channels):
    windows = [np.broadcast_to(1 + noise(64, 48, channels, seed=seed) % 200, (64, 48, 3)) for seed in range(17)]
    found = some_padded(windows, np.random.default_rng(0))
    for place, (window, same) in enumerate(zip(windows, found, strict=True)):
        changed = (window != same).any(2)
        assert changed.any() == (place % 4 == 3)
        assert (same.shape, same.dtype, same.strides[2] == 0) == (window.shape, window.dtype, channels == 1)
        rows, columns = changed.any(1), changed.any(0)
        assert changed.sum() == rows.sum() * columns.sum()  # a rectangle at the end
        if changed.any():
            assert changed[-1, -1]
            assert not changed[0, 0]
    assert [int(found[place][-1, -1, 0]) for place in (3, 7, 11, 15)] == [0, 0, 255, 255]


def test_pictures_are_closed_and_too_few_pixels_are_refused():
    closed = []
    sample_windows([part(noise(256, 256, 3), close=lambda: closed.append(1))], 0)
    assert closed
    for picture in (noise(64, 64, 3), noise(20, 4096, 3)):
        with pytest.raises(CAEConfigurationError, match="at least 4 windows"):
            sample_windows([part(picture)], 0)


@pytest.mark.parametrize(("dtype", "nodata"), [("float32", np.nan), ("uint16", 65535), ("uint8", 0)])
@pytest.mark.parametrize("axis", [None, 2])
def test_pixels_without_data_are_filled_in_and_windows_without_any_left_out(dtype, nodata, axis):
    pixels = (1 + noise(512, 512, 3) // 2).astype(dtype)
    pixels = pixels if axis == 2 else pixels[..., 0]
    pixels[:256] = nodata
    pixels[300:310, 20:500] = nodata
    sample = sample_windows([part(pixels, axis, (0, 255), nodata=nodata)], 0)
    windows = [*sample.windows, *sample.held_out]
    holes = [np.isnan(window) for window in windows if window.dtype.kind == "f"]
    assert any(mask.any() for mask in holes)
    assert not any(mask.all() for mask in holes)
    for window in windows:
        whole, data = filled(window), ~np.isnan(window)
        assert whole.shape == window.shape
        assert (whole.strides[2] == 0) == (window.strides[2] == 0)
        np.testing.assert_array_equal(whole[data], window[data])
        assert 0 < whole.min() <= whole.max() <= 128.001
