"""Repeated writes of parts of a chunk warn once; writes of whole chunks, planes and arrays don't."""

import warnings

import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from zarr_cae import CAECodec, CAEWearWarning, buffered
from zarr_cae.codec import wear

CODECS = pytest.mark.parametrize("compressors", [None, [ZstdCodec()]], ids=["cae alone", "cae and zstd"])


@pytest.fixture
def photo(photograph):
    return photograph[100:228, 100:228]


def create(data, compressors=None, chunks=None, **keywords):
    return zarr.create_array(
        MemoryStore(), shape=data.shape, chunks=chunks or data.shape, dtype=data.dtype, fill_value=0,
        serializer=CAECodec(quality=3, **keywords), compressors=compressors,
    )  # fmt: skip


def told(array, data, pieces):
    """Write pieces of the data, and return the messages of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for piece in pieces:
            array[piece] = data[piece]
    assert all(one.category is CAEWearWarning for one in caught)
    return [str(one.message) for one in caught]


def rows(step, end=128):
    return [slice(row, row + step) for row in range(0, end, step)]


@CODECS
@pytest.mark.parametrize(
    "pieces",
    [
        rows(4, 48),
        rows(32),
        [(slice(None), piece) for piece in rows(32)],
        [(..., colour) for colour in range(3)],
        [(first, second) for first in rows(64) for second in rows(64)],
    ],
    ids=["narrow rows", "rows", "columns", "colours", "squares"],
)
def test_repeated_writes_of_parts_warn_once(pipeline, photo, compressors, pieces):
    (message,) = told(create(photo, compressors), photo, pieces)
    assert "a chunk (128, 128, 3) of uint8, quality 3," in message
    assert "zarr_cae.buffered(array)" in message


@CODECS
def test_changes_of_a_stored_chunk_warn_at_the_second_one(pipeline, photo, compressors):
    array = create(photo, compressors)
    array[...] = photo
    array[20:40] = 255 - photo[20:40]
    with pytest.warns(CAEWearWarning, match="loses? quality"):
        array[70:90] = 255 - photo[70:90]
    array[50:70] = 9  # says it no more


@CODECS
@pytest.mark.parametrize(
    ("pieces", "chunks"),
    [
        ([...] * 4, None),
        ([...] * 4, (100, 100, 3)),  # those at the end are cut
        ([...] * 4, (200, 200, 3)),
        (rows(64), None),  # the first half can't be worn, and the second wears it once
        (rows(64), (64, 128, 3)),
        ([(slice(0, 16), slice(0, 16)), (slice(100, 116), slice(100, 116))], None),
    ],
    ids=["whole", "ends", "larger than the array", "halves", "chunks", "far away"],
)
def test_other_writes_do_not_warn(pipeline, photo, compressors, pieces, chunks):
    assert told(create(photo, compressors, chunks), photo, pieces) == []


def test_grey_planes_do_not_warn(pipeline, photo):
    data = np.concatenate([photo, photo[..., :2]], axis=-1)
    assert told(create(data, channel_axis=-1), data, [(..., channel) for channel in range(5)] * 2) == []


def test_pixels_that_are_read_and_written_back_do_not_warn(pipeline, photo):
    array = create(photo)
    array[...] = photo
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for piece in rows(16) * 2:
            array[piece] = array[piece]


@CODECS
def test_arrays_that_are_filled_with_nan_warn(photo, compressors):
    data = photo.astype("float32")
    array = zarr.create_array(
        MemoryStore(), shape=data.shape, chunks=data.shape, dtype="float32", fill_value=np.nan,
        serializer=CAECodec(quality=3, nodata=np.nan, value_range=(0, 255)), compressors=compressors,
    )  # fmt: skip
    assert len(told(array, data, rows(16))) == 1


@CODECS
def test_the_buffer_does_not_warn(photo, compressors):
    array = create(photo, compressors)
    with warnings.catch_warnings(), buffered(array) as target:
        warnings.simplefilter("error")
        for piece in rows(4):
            target[piece] = photo[piece]


@CODECS
def test_inner_chunks_of_shards_warn(pipeline, photo, compressors):
    array = zarr.create_array(
        MemoryStore(), shape=photo.shape, chunks=(64, 64, 3), shards=photo.shape, dtype="uint8",
        serializer=CAECodec(quality=3), compressors=compressors,
    )  # fmt: skip
    (message,) = told(array, photo, rows(16))
    assert "(64, 64, 3)" in message


def test_chunks_with_the_same_masks_are_told_apart(photo):
    """Masked pixels are the same in all chunks, so they don't say that one was made from another."""
    data = photo.astype("float32")
    data[:100] = np.nan
    array = create(data, [ZstdCodec()], nodata=np.nan, value_range=(0, 255))
    for shift in range(4):
        moved = np.roll(data, 7 * shift, axis=1)
        array[...] = moved
        assert np.isnan(array[:100]).all()


def test_new_pictures_in_place_of_decoded_ones_do_not_warn(pipeline, photo):
    array = create(photo, [ZstdCodec()])
    for shift in range(5):
        array[...] = np.roll(photo, shift, axis=0)
        assert array[...].shape == photo.shape


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(wear, "_MOST", 3)
    entries = wear._recoded
    for number in range(10):
        wear._put(entries, number, None)
    assert list(entries) == [7, 8, 9]


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 1), None), ((5, 300), None), ((300, 5, 3), 2), ((3, 40, 50), 0), ((2, 4, 3, 30, 20), 2)]
)
def test_samples_lie_in_chunks_of_any_shape(shape, axis):
    layout = wear.Layout(shape, axis)
    pixels = np.random.default_rng(0).integers(0, 256, shape)
    found = pixels[wear._places(layout)]
    assert found.shape == (24, 16)
    if min(shape) > 4:
        assert len(np.unique(found)) > 50
