"""Corrections of tiles through zarr: written with whole chunks, read whole and in windows, kept by partial writes."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from archives import chunks_of, coder_of, write

import zarr_cae
from zarr_cae import CAECodec, StreamError, open_bottleneck
from zarr_cae.coder.correction import SCALES, Correction, decode_correction, encode_correction
from zarr_cae.coder.frame import pack, parse_frame, parse_index
from zarr_cae.coder.tiles import tiles
from zarr_cae.networks.pieces import HALO

REACH = 16 * 2 * HALO + 3
"""Pixels around the latent positions of a write beyond which nothing changes: the networks, then 7 x 7 means."""


@pytest.fixture(autouse=True)
def on_cpu():
    with zarr_cae.configure(device="cpu"):
        yield


@pytest.fixture(scope="module")
def strip(photograph):
    """Return (96, 1100, 3): two tiles and a part of a third."""
    parts = [photograph[100:196], photograph[300:396], photograph[:96, :76]]
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def create(pixels, *, effort=1, shape=None, chunks=None, fill_value=0, **options):
    array = zarr.create_array(
        {}, shape=shape or pixels.shape, chunks=chunks or pixels.shape, dtype=pixels.dtype, fill_value=fill_value,
        compressors=None, serializer=CAECodec(**{"quality": 6, **options}),
    )  # fmt: skip
    with zarr_cae.configure(effort=effort):
        array[...] = pixels
    return array


def frame_of(array):
    """Return key and frame of the only chunk."""
    ((key, content),) = chunks_of(array.store).items()
    return key, parse_frame(content, coder_of(array).header)


def corrections_of(array):
    """Return the corrections of the only chunk, by number of the tile."""
    _, frame = frame_of(array)
    found = tiles(frame.header)
    return {
        number: decode_correction(section, frame.header.components, found[number].patch.shape)
        for number, section in frame.corrections.items()
    }


def squares(found, pixels):
    return np.square(found.astype(np.float64) - pixels).sum()


def with_corrections(array, *, partial=False):
    """Replace the corrections of a chunk by strong ones, with all that a section can hold."""
    random = np.random.default_rng(0)
    key, frame = frame_of(array)
    sections = {}
    for tile in tiles(frame.header):
        components = frame.header.components
        numbers = random.integers(-250, 251, (components, 11 + components))
        numbers[:, 9:] = random.integers(-60, 61, numbers[:, 9:].shape)
        where = random.random(tile.patch.shape) < 0.6 if partial else None
        sections[tile.number] = encode_correction(Correction(SCALES[tile.number % 2], 60, numbers, where))
    content = pack(
        coder_of(array).exact_header, frame.streams, exact=frame.exact, mask=frame.mask, corrections=sections
    )
    write(array.store, key, content)


def test_tiles_get_corrections_that_lower_the_error(strip, pipeline):
    before, after = create(strip, effort=0), create(strip)
    found = corrections_of(after)
    assert len(found) >= 2
    assert not corrections_of(before)
    _, plain = frame_of(before)
    _, frame = frame_of(after)
    assert (plain.header.version, frame.header.version) == (2, 3)
    assert list(map(bytes, plain.streams)) == list(map(bytes, frame.streams))
    one, other = before[...], after[...]
    for number in range(3):
        part = np.s_[:, 512 * number : 512 * number + 512]
        if number in found:
            assert squares(other[part], strip[part]) < squares(one[part], strip[part])
        else:
            assert np.abs(other[part].astype(int) - one[part]).max() <= 1


def test_the_setting_through_zarr(strip):
    pixels = strip[..., 0].copy()
    for effort, wanted in ((0, False), (1, True)):
        with zarr.config.set({"cae.effort": effort}):
            array = zarr.create_array(
                {}, shape=pixels.shape, chunks=pixels.shape, dtype="uint8", compressors=None, serializer=CAECodec(6)
            )
            array[...] = pixels
        assert bool(corrections_of(array)) == wanted


def test_weights_for_ms_ssim_write_none(strip):
    for effort in (0, 1):
        assert not corrections_of(create(strip, effort=effort, metric="ms-ssim"))


def test_latents_are_those_without_corrections(strip):
    arrays = [create(strip, effort=effort) for effort in (0, 1)]
    assert corrections_of(arrays[1])
    views = [open_bottleneck(array.store)[...] for array in arrays]
    np.testing.assert_array_equal(*views)


WINDOWS = {
    "across tiles": np.s_[:, 500:530], "beside a border": np.s_[40:60, 512:515], "one pixel": np.s_[95:96, 511:512],
    "first pixel": np.s_[:1, :1], "last pixels": np.s_[90:, 1090:], "a row": np.s_[33:34],
    "strided": np.s_[::7, 3::101], "one tile": np.s_[:, 512:1024],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["fitted", "strong", "strong in parts", "grey"])
def test_windows_are_parts_of_the_whole(strip, pipeline, kind):
    array = create(strip[..., 1].copy() if kind == "grey" else strip)
    if kind != "fitted":
        with_corrections(array, partial=kind == "strong in parts")
    whole = array[...].astype(int)
    for name, window in WINDOWS.items():
        found = array[window].astype(int)
        assert np.abs(found - whole[window]).max() <= 1, name
        assert (found != whole[window]).mean() <= 0.02, name


def test_windows_of_channels_beside_the_colours(strip):
    pixels = np.dstack([strip[:, :600, ::-1], strip[:, :600, 0] // 2])
    array = create(pixels, channel_axis=-1, colour=(0, 1, 2))
    _, frame = frame_of(array)
    assert {number // 2 for number in frame.corrections} == {0, 1}  # both planes
    whole = array[...].astype(int)
    assert squares(whole, pixels) < squares(create(pixels, effort=0, channel_axis=-1, colour=(0, 1, 2))[...], pixels)
    for window in (np.s_[10:30, 500:520], np.s_[10:30, 500:520, 3], np.s_[5:9, :40, 1], np.s_[:, 590:, 2:]):
        assert np.abs(array[window].astype(int) - whole[window]).max() <= 1


@pytest.mark.filterwarnings("ignore::zarr_cae.CAEWearWarning")
@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize(
    "window", [np.s_[20:40, 60:70], np.s_[:20, 505:513], np.s_[95:, 1099:], np.s_[:, 512:1024]], ids=str
)
def test_partial_writes(strip, pipeline, window, strong):
    """Positions under new pixels are no longer corrected; all that the write does not reach stays as it was."""
    array = create(strip)
    if strong:
        with_corrections(array)
    before, old = array[...], corrections_of(array)
    _, first = frame_of(array)
    array[window] = 255 - before[window]
    after, new = array[...], corrections_of(array)
    _, frame = frame_of(array)
    under = np.zeros((96 // 16, -(-1100 // 16)), bool)
    y, x = (part.indices(length) for part, length in zip(window, strip.shape, strict=False))
    under[y[0] // 16 : -(-y[1] // 16), x[0] // 16 : -(-x[1] // 16)] = True
    for tile in tiles(frame.header):
        here = under[tile.patch.rows, tile.patch.columns]
        if tile.number not in old or here.all():
            assert tile.number not in new
        elif not here.any():
            assert bytes(frame.corrections[tile.number]) == bytes(first.corrections[tile.number])
        else:
            np.testing.assert_array_equal(new[tile.number].where, ~here)
            np.testing.assert_array_equal(new[tile.number].numbers, old[tile.number].numbers)
    far = np.ones(strip.shape[:2], bool)
    top, left = (max(0, 16 * (part[0] // 16) - REACH) for part in (y, x))
    far[top : -(-y[1] // 16) * 16 + REACH, left : -(-x[1] // 16) * 16 + REACH] = False
    assert far.any()
    np.testing.assert_array_equal(after[far], before[far])
    inner = np.abs(after[window].astype(int) - (255 - before[window].astype(int)))
    assert inner.mean() < 40


@pytest.mark.filterwarnings("ignore::zarr_cae.CAEWearWarning")
def test_what_was_read_is_written_back_without_a_change(strip, pipeline):
    array = create(strip)
    with_corrections(array, partial=True)
    stored = chunks_of(array.store)
    for window in WINDOWS.values():
        array[window] = array[window]
    assert chunks_of(array.store) == stored


def test_padding_does_not_take_part(strip):
    """A chunk beyond the array's end: its corrections are for pixels of the array."""
    pixels = np.ascontiguousarray(strip[:90, :1030])
    errors = []
    for effort in (0, 1):
        array = create(pixels, effort=effort, chunks=(128, 1100, 3), fill_value=255)
        errors.append(squares(array[...], pixels))
    assert corrections_of(array)
    assert errors[1] < errors[0]
    assert np.abs(array[60:, 500:].astype(int) - array[...][60:, 500:]).max() <= 1


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_pixels_without_data_do_not_take_part(strip, dtype):
    nodata = np.nan if dtype == "float32" else 0
    pixels = np.maximum(strip, 1)[..., 1].astype(dtype)
    hole = np.hypot(*(np.indices(pixels.shape) - [[[40]], [[300]]])) < 70
    pixels[hole] = nodata
    options = {"nodata": nodata, "fill_value": nodata}
    if dtype == "float32":
        options["value_range"] = (0, 255)
    arrays = [create(pixels, effort=effort, **options) for effort in (0, 1)]
    assert corrections_of(arrays[1])
    whole = [array[...] for array in arrays]
    for found in whole:
        np.testing.assert_array_equal(np.isnan(found) if dtype == "float32" else found == 0, hole)
    assert squares(whole[1][~hole], pixels[~hole]) < squares(whole[0][~hole], pixels[~hole])


@pytest.mark.parametrize("demand", [30, 60])
def test_a_least_psnr_is_that_of_corrected_pixels(strip, demand):
    pixels = np.ascontiguousarray(strip[:, :512])
    array = create(pixels, min_psnr=demand)
    key, frame = frame_of(array)
    error = squares(array[...], pixels) / pixels.size
    reached = 10 * np.log10(255**2 / max(error, 1e-9))
    assert reached >= demand - 0.01
    assert not set(frame.corrections) & set(frame.exact)
    if demand == 60:
        assert frame.exact
    else:
        assert frame.corrections
        index = parse_index(chunks_of(array.store)[key], coder_of(array).header)
        assert index.psnr / 100 == pytest.approx(reached, abs=0.03)


@pytest.mark.parametrize("window", [np.s_[...], np.s_[:9, :9]])
def test_malformed_sections_are_refused(strip, pipeline, window):
    array = create(strip[..., 1].copy())
    key, frame = frame_of(array)
    for section in (b"\x00", bytes([9, 1]) + bytes(12), bytes([0, 1]) + bytes(42), b"\xff" * 40):
        write(array.store, key, pack(frame.header, frame.streams, corrections={0: section}))
        with pytest.raises(StreamError, match="cae: correction"):
            array[window]
        with pytest.raises(StreamError, match="cae: correction"):
            array[4:6, 4:6] = 3
