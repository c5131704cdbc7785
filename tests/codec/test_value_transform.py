"""The value transform "sqrt", from metadata to pixels."""

import json

import numpy as np
import pytest
import zarr
from archives import read

from zarr_cae import CAECodec
from zarr_cae.codec.cae import loaded
from zarr_cae.coder import tiles
from zarr_cae.coder.frame import FrameHeader
from zarr_cae.config import Settings
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.measures import psnr
from zarr_cae.networks.engine import engine_for
from zarr_cae.pixels.convert import from_root, to_chunk
from zarr_cae.pixels.layout import Layout


def create(pixels, quality=4, **keywords):
    array = zarr.create_array(
        {}, shape=pixels.shape, chunks=pixels.shape, dtype=pixels.dtype, compressors=None,
        serializer=CAECodec(quality, **keywords),
    )  # fmt: skip
    array[...] = pixels
    return array


@pytest.fixture
def photons():
    """Sparse photon counts (96, 96) uint16: bright spots on a dark background, with shot noise."""
    y, x = np.indices((96, 96))
    rate = 2 + 900 * np.exp(-((x - 40) ** 2 + (y - 50) ** 2) / 60)
    return rate, np.random.default_rng(0).poisson(rate).astype("u2")


def test_metadata():
    codec = CAECodec(4, value_transform="sqrt")
    stored = json.loads(json.dumps(codec.to_dict()))
    assert stored["configuration"]["value_transform"] == "sqrt"
    assert CAECodec.from_dict(stored) == codec
    assert eval(repr(codec)) == codec
    assert "value_transform" not in CAECodec(4).to_dict()["configuration"]
    for bad in ("log", True, 1):
        with pytest.raises(CAEConfigurationError, match="value_transform"):
            CAECodec(value_transform=bad)


def test_pixels_are_those_of_the_specification(photons):
    """The frame, decoded here step by step, gives what zarr reads."""
    _, counts = photons
    array = create(counts, value_range=(0, 1000), value_transform="sqrt")
    codec = array.metadata.codecs[-1]
    weights = loaded(codec)
    tables = weights.tables[weights.row(4)]
    header = FrameHeader(1, 96, 96, grey=True, version=tables.frame_version)
    symbols = tiles.decode(read(array.store, "c/0/0"), header, tables)
    settings = Settings(device="cpu")
    planes = engine_for(weights, settings).synthesise(symbols, 4, 1, settings).result()
    expected = to_chunk(from_root(planes, (0, 1000)), Layout((96, 96), None), np.dtype("u2"), (0, 1000))
    assert np.abs(array[:].astype(int) - expected).max() <= 4
    assert np.abs(array[10:20, 70:].astype(int) - expected[10:20, 70:]).max() <= 4


def test_dark_pixels_are_finer(photons):
    """The background of photon counts comes out closer to the counts than without the transform."""
    rate, counts = photons
    dark = rate < 3
    errors = [
        np.abs(create(counts, 6, value_range=(0, 1000), value_transform=name)[:].astype(float) - counts)[dark].mean()
        for name in ("sqrt", None)
    ]
    assert errors[0] < errors[1]


def test_partial_writes_and_nodata(photons):
    _, counts = photons
    counts[:9, :9] = 65535
    array = create(counts, value_range=(0, 1000), value_transform="sqrt", nodata=65535)
    assert np.array_equal(array[:] == 65535, counts == 65535)
    before = read(array.store, "c/0/0")
    array[40:60, 30:50] = array[40:60, 30:50]
    assert read(array.store, "c/0/0") == before
    array[40:60, 30:50] = counts[40:60, 30:50] // 2
    assert array[50, 40] == pytest.approx(450, abs=120)


def test_photons_that_are_written_into_the_dark_are_kept():
    """Eighteen of 65,535 are little in units of the data, but not where the dark has two."""
    random = np.random.default_rng(0)
    array = create(random.poisson(2, (64, 64)).astype("u2"), 8, value_range=(0, 65535), value_transform="sqrt")
    array[16:48, 16:48] = random.poisson(20, (32, 32)).astype("u2")
    assert 17 < array[16:48, 16:48].mean() < 23


def test_a_small_range_of_large_integers():
    low, high = 2**64 - 51, 2**64 - 1
    pixels = (low + np.arange(32 * 32, dtype="u8").reshape(32, 32) // 21).astype("u8")
    array = zarr.create_array(
        {}, shape=(32, 32), chunks=(32, 32), dtype="u8", compressors=None, fill_value=low,
        serializer=CAECodec(8, value_range=(low, high), value_transform="sqrt", min_psnr=20),
    )  # fmt: skip
    array[...] = pixels
    assert psnr((array[:] - low).astype(float), (pixels - low).astype(float), 50) >= 20
