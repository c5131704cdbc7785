"""Three of a longer channel axis are coded together as RGB: from metadata to windows, writes, shards and latents."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from archives import chunks_of, coder_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zarr_cae import CAECodec, open_bottleneck
from zarr_cae.codec.verify import verify
from zarr_cae.coder.frame import parse_frame
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.latents.metadata import ATTRIBUTE
from zarr_cae.serve.store import DecodedStore


@pytest.fixture(scope="module")
def five(photograph):
    """A photograph with near infrared before and alpha behind its colours: (90, 84, 5)."""
    crop = np.maximum(photograph[40:130, 180:264], 1)  # no black pixels: only the padding has the fill value
    return np.dstack([crop[..., 1] // 2 + 60, crop, np.where(crop[..., 2] > 99, 255, 1).astype("u1")])


def create(pixels, colour=(1, 2, 3), *, chunks=(64, 64), axis=-1, quality=3, store=None, **keywords):
    shape = [*chunks]
    shape.insert(axis % 3, pixels.shape[axis])
    options = {name: keywords.pop(name) for name in ("shards", "fill_value") if name in keywords}
    array = zarr.create_array(
        {} if store is None else store, shape=pixels.shape, chunks=tuple(shape), dtype=pixels.dtype, compressors=None,
        serializer=CAECodec(quality, channel_axis=axis, colour=colour, **keywords), **options,
    )  # fmt: skip
    array[...] = pixels
    return array


def stored(array):
    return chunks_of(array.store)


def test_metadata():
    codec = CAECodec(4, channel_axis=-1, colour=[np.int64(2), 1, 0])
    entry = json.loads(json.dumps(codec.to_dict()))
    assert entry["configuration"]["colour"] == [2, 1, 0]
    assert CAECodec.from_dict(entry) == codec
    assert eval(repr(codec)) == codec
    assert "colour" not in CAECodec(4).to_dict()["configuration"]


@pytest.mark.parametrize("bad", [(0, 1), (0, 1, 1), (0, 1, -1), (0, 1, 2.0), (0, 1, 2, 3), "012", 3, (0, True, 2)])
def test_other_colours_are_refused(bad):
    with pytest.raises(CAEConfigurationError, match="colour"):
        CAECodec(channel_axis=-1, colour=bad)


def test_colours_must_fit_the_array():
    def make(shape, chunks=None, **keywords):
        codec = CAECodec(3, colour=(0, 1, 2), **keywords)
        return zarr.create_array({}, shape=shape, chunks=chunks or shape, dtype="u1", serializer=codec)

    with pytest.raises(CAEConfigurationError, match="channel_axis"):
        CAECodec(channel_axis=None, colour=(0, 1, 2))
    with pytest.raises(CAEConfigurationError, match="colour"):
        make((32, 32, 2), channel_axis=-1)
    for shape in ((4, 32, 32), (32, 32), (12, 12, 4)):
        with pytest.raises(CAEConfigurationError, match=r"give channel_axis|no channel axis"):
            make(shape)
    for chunks in ((32, 32, 3), (32, 32, 4), (32, 32, 1)):
        with pytest.raises(CAEConfigurationError, match="32, 32, 5"):
            make((32, 32, 5), chunks, channel_axis=-1)
    assert make((32, 32, 5)).metadata.codecs[0].channel_axis == -1
    assert make((5, 32, 32), channel_axis=0).metadata.codecs[0].channel_axis == -3


def test_colours_and_other_channels_are_coded_as_they_are_by_themselves(five):
    both = create(five)[...]
    np.testing.assert_allclose(both[..., 1:4].astype(int), create(five[..., 1:4], None)[...], atol=1)
    for channel in (0, 4):
        grey = create(five[..., [channel]], None)[..., 0]
        np.testing.assert_allclose(both[..., channel].astype(int), grey, atol=1)
    swapped = create(five, (3, 2, 1))[...]
    np.testing.assert_allclose(
        swapped[..., 3:0:-1].astype(int), create(np.ascontiguousarray(five[..., 3:0:-1]), None)[...], atol=1
    )


def test_the_bytes_are_those_of_the_planes(five):
    def size(pixels, colour=None):
        return sum(map(len, stored(create(pixels, colour)).values()))

    parts = size(five[..., 1:4]) + size(five[..., :1]) + size(five[..., 4:])
    assert size(five, (1, 2, 3)) < parts < 0.8 * size(five)


def test_three_channels_in_another_order(five):
    blue_first = np.ascontiguousarray(five[..., 3:0:-1])
    pixels = create(blue_first, (2, 1, 0))[...]
    np.testing.assert_allclose(pixels[..., ::-1].astype(int), create(five[..., 1:4], None)[...], atol=1)


def test_arrays_without_colour_do_not_change(five):
    rgb = np.ascontiguousarray(five[..., 1:4])
    assert stored(create(rgb, None)) == stored(create(rgb, (0, 1, 2)))


ALONG = st.one_of(
    st.integers(0, 4),
    st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True).map(sorted),
    st.builds(slice, st.integers(0, 3), st.just(5), st.integers(1, 3)),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(channel=ALONG, row=st.integers(0, 80), column=st.integers(0, 70), first=st.booleans())
def test_windows(five, channel, row, column, first):
    pixels = five.transpose(2, 0, 1) if first else five
    array = create(pixels, (3, 1, 2), axis=0 if first else -1)
    where = (slice(row, row + 9), slice(column, column + 11))
    where = (channel, *where) if first else (*where, channel)
    found = array.oindex[where]
    np.testing.assert_allclose(found.astype(int), zarr.array(array[...]).oindex[where], atol=1)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(channel=ALONG, row=st.integers(0, 80), column=st.integers(0, 70))
def test_writes_of_parts(five, channel, row, column):
    array = create(five, quality=5)
    before = array[...]
    where = (slice(row, row + 9), slice(column, column + 11), channel)
    expected = zarr.array(before)
    value = 255 - expected.oindex[where]
    expected.oindex[where] = value
    array.oindex[where] = value
    after = array[...].astype(int)
    here = np.zeros(after.shape, bool)
    marked = zarr.array(here)
    marked.oindex[where] = True
    here = marked[...]
    assert np.abs(after - expected[...])[here].mean() < 70
    own = here.any((0, 1))
    if own[1:4].any():
        own[1:4] = True
    np.testing.assert_array_equal(after[..., ~own], before[..., ~own])


@pytest.mark.filterwarnings("ignore::zarr_cae.errors.CAEWearWarning")
def test_writing_one_channel_after_the_other(five):
    array = create(np.zeros_like(five), quality=6)
    for channel in range(5):
        array[..., channel] = five[..., channel]
    assert np.abs(array[...].astype(int) - five)[..., [0, 4]].mean() < 6


def test_shards_and_the_least_psnr_and_the_root(five):
    values = five.astype("u2") * 16
    array = create(
        values, chunks=(32, 32), shards=(64, 64, 5), min_psnr=32, value_range=(0, 4095), value_transform="sqrt"
    )
    error = 1e-9 + np.mean(np.square(array[...] - values.astype(float)))
    assert 20 * np.log10(4095 / np.sqrt(error)) >= 31.9
    assert not verify(array, deep=True).bad


@pytest.mark.filterwarnings("ignore::zarr_cae.CAEWearWarning")  # writes parts on purpose
def test_masks_are_exact(five):
    pixels = np.maximum(five, 1)
    holes = np.random.default_rng(1).random(five.shape) < 0.2
    holes[20:40, 30:50] = True
    pixels[holes] = 0
    array = create(pixels, nodata=0)
    np.testing.assert_array_equal(array[...] == 0, holes)
    np.testing.assert_array_equal(array[10:70, 5:40, [2, 4]] == 0, holes[10:70, 5:40, [2, 4]])
    array[30:50, 10:20, 4] = 0
    holes[30:50, 10:20, 4] = True
    array[0:5, 0:80, 1:3] = 7
    holes[0:5, 0:80, 1:3] = False
    np.testing.assert_array_equal(array[...] == 0, holes)
    parsed = [parse_frame(memoryview(frame), coder_of(array).header) for frame in stored(array).values()]
    assert all(one.mask is not None for one in parsed)


def test_exact_tiles_have_the_components_of_their_plane(five):
    y, x = np.indices((64, 64))
    pixels = five[:64, :64].copy()
    pixels[..., 4] = (x + y) % 2 * 255
    pixels[..., 1:4] = ((x + y) % 2 * 255)[..., None]
    array = create(pixels, quality=8)
    (frame,) = stored(array).values()
    assert set(parse_frame(memoryview(frame), coder_of(array).header).exact) == {0, 2}
    np.testing.assert_array_equal(array[..., 1:], pixels[..., 1:])
    np.testing.assert_array_equal(array[3:40, 7:30, 4], pixels[3:40, 7:30, 4])
    array[5:9, 5:9, 4] = 77
    pixels[5:9, 5:9, 4] = 77
    np.testing.assert_array_equal(array[..., 1:], pixels[..., 1:])


def test_latents_are_plane_after_plane(five):
    array = create(five)
    latents = open_bottleneck(array.store)
    count = latents.attrs[ATTRIBUTE]["latent_channels"]
    assert latents.attrs[ATTRIBUTE]["planes"] == "rgb and grey"
    assert latents.attrs[ATTRIBUTE]["colour"] == [1, 2, 3]
    assert latents.shape == (6, 6, 3 * count)
    for plane, part in enumerate((five[..., 1:4], five[..., :1], five[..., 4:])):
        own = open_bottleneck(create(part, None).store)[...]
        np.testing.assert_array_equal(latents[..., plane * count : (plane + 1) * count], own)


def test_other_readers(five, tmp_path: Path):
    array = create(five, store=tmp_path / "a.zarr")
    decoded = zarr.open_array(DecodedStore(tmp_path / "a.zarr"), mode="r")
    np.testing.assert_array_equal(decoded[...], array[...])
