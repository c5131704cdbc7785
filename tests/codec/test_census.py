"""Counts from the headers of frames: qualities, masks, exact tiles and the worst PSNR."""

import numpy as np
import pytest
import zarr
from archives import chunks_of, read, write
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, TransposeCodec, ZstdCodec

from zarr_cae import CAECodec
from zarr_cae.codec.census import take_census


def make(pixels, codec, **keywords):
    options = {"chunks": (64, 64), "compressors": None, **keywords}
    array = zarr.create_array({}, shape=pixels.shape, dtype=pixels.dtype, serializer=codec, **options)
    array[...] = pixels
    return array


@pytest.fixture(scope="module")
def pixels(photograph):
    grey = photograph[100:300, 100:300, 1].copy()
    y, x = np.indices((64, 64))
    grey[:64, :64] = (x + y) % 2 * 255
    return grey


def worst(array, pixels, edge=64):
    errors = [
        np.mean(np.square(array[y : y + edge, x : x + edge].astype(float) - pixels[y : y + edge, x : x + edge]))
        for y in range(0, pixels.shape[0] - edge + 1, edge)
        for x in range(0, pixels.shape[1] - edge + 1, edge)
    ]
    return 10 * np.log10(255**2 / max(errors))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("location", ["start", "end"])
def test_counts(pixels, sharded, location):
    pixels = pixels[:192, :192]
    codec = CAECodec(6, min_psnr=37, nodata=255)
    if sharded:
        codec = ShardingCodec(
            chunk_shape=(64, 64), codecs=[codec], index_codecs=[BytesCodec(), Crc32cCodec()], index_location=location
        )
    array = make(pixels, codec, **({"chunks": (128, 128)} if sharded else {}))
    census = take_census(array)
    assert census.chunks == census.qualities.total() == 9
    assert set(census.qualities) <= {6, 7, 8}
    assert census.tiles == 9
    assert census.masked >= 1
    assert census.exact_chunks == census.exact_tiles < 9
    assert (census.unmeasured, census.damaged, census.complete) == (0, 0, True)
    assert 37 <= census.lowest_psnr / 100 <= worst(array, pixels) + 0.02
    array[0:3, 0:3] = 9
    assert take_census(array).unmeasured == 1
    few = take_census(array, most=4)
    assert (few.chunks, few.complete) == (4, False)


def test_transposed_and_plain_arrays(pixels):
    array = make(pixels, CAECodec(4), filters=[TransposeCodec(order=(1, 0))])
    census = take_census(array)
    assert (census.chunks, dict(census.qualities), census.lowest_psnr) == (16, {4: 16}, None)


def test_damaged_chunks_are_counted(pixels):
    array = make(pixels[:64, :192], CAECodec(4))
    stored = chunks_of(array.store)
    write(array.store, "c/0/0", stored["c/0/0"][:9])
    write(array.store, "c/0/1", b"nothing")
    assert read(array.store, "c/0/2") == stored["c/0/2"]
    census = take_census(array)
    assert (census.chunks, census.damaged) == (1, 2)


def test_arrays_whose_headers_cannot_be_read():
    data = np.zeros((64, 64), "u1")
    assert take_census(zarr.create_array({}, data=data)) is None
    assert take_census(make(data, CAECodec(4), compressors=[ZstdCodec()])) is None
