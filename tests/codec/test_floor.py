"""No chunk decodes to something worse than its mean, and each reaches the PSNR that was asked for."""

import numpy as np
import pytest
import zarr
from archives import coder_of, read

from zarr_cae import CAECodec, open_bottleneck
from zarr_cae.codec.padding import find_padding
from zarr_cae.coder.frame import Frame, parse_frame
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.measures import psnr
from zarr_cae.networks.pieces import HALO

Y, X = np.mgrid[:128, :128]


def create(pixels, quality=4, *, chunks=None, **keywords):
    array = zarr.create_array(
        {}, shape=pixels.shape, chunks=chunks or pixels.shape, dtype=pixels.dtype, compressors=None,
        serializer=CAECodec(quality, **keywords),
    )  # fmt: skip
    array[...] = pixels
    return array


def frame_of(array, key="c/0/0") -> Frame:
    stored = read(array.store, key)
    return parse_frame(stored, coder_of(array).header)


@pytest.fixture(scope="session")
def patterns(photograph):
    photo = photograph[100:228, 100:228]
    grey = photo.astype(int).mean(2)
    even, odd = (Y % 2 == 0) & (X % 2 == 0), (Y % 2 == 1) & (X % 2 == 1)
    return {
        "Bayer mosaic": np.where(even, photo[..., 0], np.where(odd, photo[..., 2], photo[..., 1])),
        "dither 2 x 2": (grey + np.tile([[-96, 32], [96, -32]], (64, 64)) > 127).astype("u1") * 255,
        "dither 4 x 4": (
            grey + np.tile([[-120, 8, -88, 40], [72, -56, 104, -24], [-72, 56, -104, 24], [120, -8, 88, -40]], (32, 32))
            > 127
        ).astype("u1")
        * 255,
        "checkerboard": ((X + Y) % 2 * 255).astype("u1"),
        "checkerboard 2": ((X // 2 + Y // 2) % 2 * 255).astype("u1"),
        "rows": (Y % 2 * 255).astype("u1"),
        "columns": (X % 2 * 255).astype("u1"),
        "a part": np.where((X < 32) & (Y < 32), (X + Y) % 2 * 255, grey).astype("u1"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
@pytest.mark.parametrize("quality", range(1, 9))
def test_patterns_are_never_worse_than_their_mean(patterns, metric, quality):
    for name, image in patterns.items():
        got, floor = (
            psnr(create(image, quality, metric=metric)[:], image),
            psnr(np.full(image.shape, image.mean()), image),
        )
        assert got > floor - 0.1, name


@pytest.mark.parametrize("period", [2, 3, 4, 5])
@pytest.mark.parametrize("amplitude", [3, 12, 60])
def test_faint_patterns_are_never_worse_than_their_mean(period, amplitude):
    """Their symbols are usual, so only decoding shows them."""
    image = (120 + amplitude * ((X + 2 * Y) % period < period / 2)).astype("u1")
    errors = np.square(create(image, 1)[:].astype(float) - image).mean()
    assert errors <= 1.02 * image.var() + 1


@pytest.mark.parametrize("size", [(8, 8), (3, 40), (1, 1), (17, 5)])
@pytest.mark.parametrize("quality", [1, 5])
def test_small_images_in_large_chunks(size, quality):
    image = np.random.default_rng(0).integers(90, 130, size).astype("u1")
    array = create(image, quality, chunks=(256, 256))
    errors = np.square(array[:].astype(float) - image).mean()
    assert errors <= 1.02 * image.var() + 1


def test_a_checkerboard_is_stored_exactly(patterns):
    array = create(patterns["checkerboard"], 8)
    assert np.array_equal(array[:], patterns["checkerboard"])
    assert set(frame_of(array).exact) == {0}
    assert np.isfinite(open_bottleneck(array.store)[:]).all()


def test_exact_patterns_cost_little_and_have_usual_latents(patterns):
    """The latents of a checkerboard took 17 bits a pixel; now they are those of a smoothed one."""
    array = create(patterns["checkerboard"], 8)
    usual = np.abs(open_bottleneck(create(np.full((128, 128), 127, "u1"), 8).store)[:]).max()

    def check():
        frame = frame_of(array)
        assert 8 * sum(map(len, [*frame.streams, *frame.exact.values()])) < 0.5 * 128**2
        assert np.abs(open_bottleneck(array.store)[:]).max() < 3 * usual + 1

    check()
    pixels = array[:]
    pixels[20:70, 30:60] = 255 - pixels[20:70, 30:60]
    array[20:70, 30:60] = pixels[20:70, 30:60]
    assert np.array_equal(array[:], pixels)
    check()


def test_latents_that_other_tiles_need_are_not_smoothed():
    y, x = np.mgrid[:64, :1100]
    pixels = np.where(x < 512, (x + y) % 2 * 255, 100 + 50 * np.sin(x / 9)).astype("u1")
    array = create(pixels, 8)
    assert set(frame_of(array).exact) == {0}
    largest = np.abs(open_bottleneck(array.store)[:]).max((0, 2))
    assert largest[: 32 - HALO].max() < 3
    assert largest[32 - HALO : 32].min() > 6
    assert psnr(array[:, 600:], pixels[:, 600:]) > 40


@pytest.mark.usefixtures("fastest")
def test_photographs_stay_as_they_were(photograph):
    array = create(photograph[:128, :128, 0], 8)
    assert frame_of(array).header.version == 2


@pytest.mark.usefixtures("fastest")
def test_patterns_written_in_parts(patterns):
    """Also what a partial write makes of a frame of version 2 is looked at."""
    array = create((X + Y).astype("u1"), 8)
    assert frame_of(array).header.version == 2
    pattern = patterns["checkerboard"][:64]
    array[:64] = pattern
    assert np.array_equal(array[:64], pattern)
    assert psnr(array[64:], (X + Y)[64:]) > 25
    assert frame_of(array).header.version == 3


def test_only_bad_tiles_are_exact():
    """Of three tiles one is a pattern, which may spoil its neighbour too, but not the last one."""
    y, x = np.mgrid[:64, :1300]
    pixels = np.where(x < 512, (x + y) % 2 * 255, 100 + 50 * np.sin(x / 9)).astype("u1")
    array = create(pixels, 8)
    assert {0} <= set(frame_of(array).exact) <= {0, 1}
    assert np.array_equal(array[:, :512], pixels[:, :512])
    assert np.array_equal(array[50:60, 300:400], pixels[50:60, 300:400])
    assert psnr(array[:, 1024:], pixels[:, 1024:]) > 40


@pytest.mark.parametrize(("least", "quality", "row"), [(20, 2, 1), (33, 1, None), (60, 4, 4)])
def test_least_psnr(photograph, least, quality, row):
    pixels = photograph[100:228, 100:228]
    array = create(pixels, quality, min_psnr=least)
    frame = frame_of(array, "c/0/0/0")
    assert psnr(array[...], pixels) >= least
    if row == quality - 1:
        assert frame.header.row == row
    elif row is None:
        assert frame.header.row > quality - 1
        assert not frame.exact
        cheaper = create(pixels, frame.header.row)  # the quality before: rows count from 0
        assert psnr(cheaper[...], pixels) < least
    else:
        assert frame.header.row == row
        assert set(frame.exact) == {0}
        assert np.array_equal(array[...], pixels)


def test_least_psnr_of_written_parts(photograph):
    pixels = photograph[100:228, 100:228].copy()
    array = create(pixels, 1, min_psnr=28)
    pixels[:40, 20:90] = np.random.default_rng(0).integers(0, 256, (40, 70, 3))
    array[:40, 20:90] = pixels[:40, 20:90]
    assert psnr(array[:40, 20:90], pixels[:40, 20:90]) >= 28


def test_least_psnr_and_nodata(photograph):
    pixels = (photograph[:64, :64, 0] / np.float32(255)).astype("f4")
    pixels[10:30, 5:50] = np.nan
    array = create(pixels, 1, min_psnr=30, value_range=(0, 1), nodata=np.nan)
    assert np.array_equal(np.isnan(array[:]), np.isnan(pixels))
    valid = ~np.isnan(pixels)
    assert psnr(array[:][valid], pixels[valid], 1) >= 30


@pytest.mark.parametrize(("shape", "chunks", "least"), [
    ((40, 40), (256, 256), 30), ((70, 70), (64, 64), 38), ((5, 40, 40), (8, 64, 64), 30), ((40, 40, 3), (64, 64, 3), 25)
])  # fmt: skip
def test_least_psnr_is_that_of_the_pixels_inside_the_array(shape, chunks, least):
    noise = np.random.default_rng(0).normal(128, 20, shape)
    pixels = noise.clip(1, 255).astype("u1")
    array = create(pixels, 2, chunks=chunks, min_psnr=least)
    for corner in np.ndindex(*(-(-length // chunk) for length, chunk in zip(shape, chunks, strict=True))):
        place = tuple(slice(at * chunk, (at + 1) * chunk) for at, chunk in zip(corner, chunks, strict=True))
        assert psnr(array[place], pixels[place]) >= least


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_a_small_pattern_in_a_padded_chunk_is_no_worse_than_its_mean(metric):
    y, x = np.mgrid[:24, :24]
    mosaic = np.where((y % 2 == 0) & (x % 2 == 0), 200, np.where((y % 2 == 1) & (x % 2 == 1), 40, 110)).astype("u1")
    array = create(mosaic, 5, chunks=(256, 256), metric=metric)
    assert np.square(array[:].astype(float) - mosaic).mean() <= 1.02 * mosaic.astype(float).var() + 1


def test_padding():
    array = create(np.full((2, 40, 50), 7, "u1"), chunks=(4, 64, 64))
    pixels = np.zeros((4, 64, 64), "u1")
    assert find_padding(coder_of(array), pixels) is None
    pixels[:2, :40, :50] = 7
    pixels[0, 3:9] = 0  # rows and columns of the fill value inside are no padding
    found = find_padding(coder_of(array), pixels)
    assert (found.height, found.width) == (40, 50)
    expected = np.ones((4, 64, 64), bool)
    expected[:2, :40, :50] = False
    assert np.array_equal(found.samples, expected)
    pixels[:, -1, -1] = pixels[-1] = 7
    assert find_padding(coder_of(array), pixels) is None


@pytest.mark.parametrize("least", [15, 18, 20])
def test_least_psnr_counts_samples_that_move_off_the_nodata_value(least):
    pixels = np.clip(np.rint(1.5 + np.sin(5 * X / 128) + np.random.default_rng(0).normal(0, 0.3, X.shape)), 0, 3)
    pixels[pixels == 1] = 2
    pixels[:10] = 1
    array = create(pixels.astype("u1"), 3, value_range=(0, 3), nodata=1, min_psnr=least)
    assert np.array_equal(array[:] == 1, pixels == 1)
    valid = pixels != 1
    assert psnr(array[:][valid], pixels[valid], 3) >= least


@pytest.mark.parametrize(("dtype", "least"), [("u1", 60), ("u2", 90), ("f4", 90)])
def test_small_changes_to_exact_tiles_are_kept(dtype, least):
    limits = (0, 1) if dtype == "f4" else (0, np.iinfo(dtype).max)
    waves = 0.5 + 0.4 * np.sin(X / 9) * np.cos(Y / 7) + np.random.default_rng(0).normal(0, 0.02, X.shape)
    pixels = (waves.clip(0, 1) * limits[1]).astype(dtype)
    array = create(pixels, 5, value_range=limits, min_psnr=least)
    assert np.array_equal(array[:], pixels)
    pixels[10:40:9, 10:40:9] += np.float32(1e-6) if dtype == "f4" else 1
    array[10:40, 10:40] = pixels[10:40, 10:40]
    assert np.array_equal(array[:], pixels)


@pytest.mark.parametrize("bad", [0, -1, np.nan, np.inf, "38", True, 201])
def test_what_is_no_psnr(bad):
    with pytest.raises(CAEConfigurationError, match="min_psnr must be"):
        CAECodec(min_psnr=bad)


def test_metadata():
    codec = CAECodec(4, min_psnr=38.5)
    assert codec.to_dict()["configuration"]["min_psnr"] == 38.5
    assert CAECodec.from_dict(codec.to_dict()) == codec
    assert "min_psnr" not in CAECodec(4).to_dict()["configuration"]
