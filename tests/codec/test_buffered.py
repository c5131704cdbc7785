"""Write in pieces: every chunk is encoded once, no pixel is lost, and memory stays bounded."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import dask.array
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore

from zarr_cae import CAECodec, CAEConfigurationError, CAEDataError, buffered
from zarr_cae.codec import buffered as module
from zarr_cae.codec import pending
from zarr_cae.evaluation.measures import psnr


class LoggingStore(MemoryStore):
    """Records the key of each chunk that is written or deleted; fails for keys in `broken`."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.written = []
        self.broken = set()

    def note(self, key):
        if key in self.broken:
            raise OSError(f"no space for {key}")
        if "zarr.json" not in key:
            self.written.append(key)

    async def set(self, key, value, byte_range=None):
        self.note(key)
        await super().set(key, value, byte_range)

    def set_sync(self, key, value):
        self.note(key)
        super().set_sync(key, value)


def create(shape, chunks, dtype="uint8", store=None, **keywords):
    options = {"compressors": None, "fill_value": 0, "store": LoggingStore() if store is None else store, **keywords}
    return zarr.create_array(shape=shape, chunks=chunks, dtype=dtype, **options)


@pytest.fixture
def photo(photograph):
    return photograph[100:356, 100:356]


@pytest.fixture
def whole(photo):
    """The quality of a photograph that is written at once."""
    array = create(photo.shape, photo.shape, serializer=CAECodec(quality=4))
    array[...] = photo
    return psnr(array, photo)


# Each chunk is encoded once


PIECES = {
    "rows": [(row,) for row in range(256)],
    "sixteen rows": [slice(row, row + 16) for row in range(0, 256, 16)],
    "columns": [(slice(None), column) for column in range(256)],
    "colours": [(..., colour) for colour in range(3)],
    "every third row": [slice(first, None, 3) for first in range(3)],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_a_chunk_in_pieces_equals_the_chunk_at_once(pipeline, photo, whole, pieces):
    array = create(photo.shape, photo.shape, serializer=CAECodec(quality=4))
    with buffered(array) as target:
        for piece in pieces:
            target[piece] = photo[piece]
        assert array.store.written == ["c/0/0/0"]  # before the end
    assert array.store.written == ["c/0/0/0"]
    assert psnr(array, photo) == pytest.approx(whole, abs=0.01)


def test_planes_of_colour_are_collected_over_many_chunks(pipeline, photo, whole):
    array = create(photo.shape, (128, 128, 3), serializer=CAECodec(quality=4))
    with buffered(array) as target:
        for colour in range(3):
            target[..., colour] = photo[..., colour]
    assert sorted(array.store.written) == [f"c/{row}/{column}/0" for row, column in product(range(2), repeat=2)]
    assert psnr(array, photo) > whole - 0.5


def test_a_shard_is_written_once_and_whole(pipeline, photo, whole):
    array = create(photo.shape, (64, 64, 3), shards=(128, 256, 3), serializer=CAECodec(quality=4))
    with buffered(array) as target:
        for row in range(0, 256, 32):
            target[row : row + 32] = photo[row : row + 32]
    assert array.store.written == ["c/0/0/0", "c/1/0/0"]
    assert psnr(array, photo) > whole - 0.7


def test_an_array_with_a_compressor_behind_the_codec(photo, whole):
    array = create(photo.shape, photo.shape, serializer=CAECodec(quality=4), compressors=[ZstdCodec()])
    with buffered(array) as target:
        for row in range(0, 256, 16):
            target[row : row + 16] = photo[row : row + 16]
    assert psnr(array, photo) == pytest.approx(whole, abs=0.01)


def test_incomplete_chunks_are_written_at_the_end_with_the_fill_value(photo):
    array = create((256, 256, 3), (128, 256, 3), serializer=CAECodec(quality=4), fill_value=7)
    with buffered(array) as target:
        for row in range(0, 64, 8):
            target[row : row + 8] = photo[row : row + 8]
        assert array.store.written == []
    assert array.store.written == ["c/0/0/0"]
    assert 10 * np.log10(255**2 / np.mean((array[:48].astype(float) - photo[:48]) ** 2)) > 28
    assert np.abs(array[96:128].astype(int) - 7).max() <= 8  # the fill value, decoded
    assert (array[128:] == 7).all()


def test_stored_pixels_of_a_chunk_lose_at_most_one_encoding(pipeline, photo):
    array = create(photo.shape, photo.shape, serializer=CAECodec(quality=4))
    array[...] = photo
    before = array[...]
    again = create(photo.shape, photo.shape, serializer=CAECodec(quality=4))
    again[...] = before
    once_more = np.abs(again[...].astype(float) - photo)[60:]
    with buffered(array) as target:
        for row in range(40):
            target[row] = 255 - photo[row]
    assert array.store.written == ["c/0/0/0"] * 2
    assert np.mean(np.abs(array[60:].astype(float) - photo[60:])) <= np.mean(once_more) + 0.1
    assert np.array_equal(array[200:], before[200:])  # far away nothing changes


def test_masked_pixels_stay_exact(photo):
    data = photo[:128, :128].astype("float32")
    data[10:30, 40:90] = np.nan
    data[100, 7, 1] = np.nan
    array = create(
        (128, 128, 3), (128, 128, 3), "float32", fill_value=np.nan,
        serializer=CAECodec(quality=4, value_range=(0, 255), nodata=np.nan),
    )  # fmt: skip
    with buffered(array) as target:
        for row in range(0, 100, 4):
            target[row : row + 4] = data[row : row + 4]
    assert np.array_equal(np.isnan(array[:100]), np.isnan(data[:100]))
    assert np.isnan(array[100:]).all()
    with buffered(array) as target:
        target[100:] = data[100:]
    assert np.array_equal(np.isnan(array[...]), np.isnan(data))


def test_a_sparse_shard_keeps_the_chunks_without_new_pixels(pipeline):
    data = np.arange(64 * 64, dtype="uint16").reshape(64, 64)
    array = create((64, 64), (16, 16), "uint16", shards=(64, 64), serializer=BytesCodec())
    array[...] = data
    with buffered(array) as target:
        target[3, 5] = 9
        target[60:63, 50] = 8
    data[3, 5] = 9
    data[60:63, 50] = 8
    assert np.array_equal(array[...], data)


# The same as NumPy


def selections(shape):
    """Basic selections: integers, slices of any positive step, and the ellipsis."""
    return nps.basic_indices(shape, allow_newaxis=False, allow_ellipsis=True).filter(
        lambda one: all(
            not isinstance(part, slice) or (part.step or 1) > 0 for part in (one if isinstance(one, tuple) else (one,))
        )
    )


@st.composite
def arrays_and_writes(draw):
    shape = draw(nps.array_shapes(min_dims=1, max_dims=5, max_side=7))
    chunks = tuple(draw(st.integers(1, length)) for length in shape)
    shards = draw(st.none() | st.just(tuple(2 * one for one in chunks)))
    dtype = draw(st.sampled_from(["u1", "i2", ">u4", "f4", "f8", "c8", "bool"]))
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["basic", "orthogonal", "flush", "read"]))
        if kind == "orthogonal":
            axes = [
                st.lists(
                    st.integers(-length, length - 1), min_size=1, max_size=4, unique_by=lambda one, n=length: one % n
                )
                | st.integers(-length, length - 1)
                | nps.arrays(bool, length)
                | st.just(slice(None))
                for length in shape
            ]
            selection = tuple(draw(axis) for axis in axes)
        else:
            selection = draw(selections(shape))
        steps.append((kind, selection))
    return shape, chunks, shards, dtype, steps, draw(st.sampled_from([1, 200, 10**6]))


def orthogonal_index(selection, shape):
    """A NumPy index with the meaning of zarr's orthogonal selection, that keeps all axes."""
    return np.ix_(*(np.atleast_1d(np.arange(length)[part]) for part, length in zip(selection, shape, strict=True)))


@settings(max_examples=25, deadline=None)
@given(case=arrays_and_writes(), seed=st.integers(0, 2**32 - 1))
def test_any_sequence_of_writes_equals_numpy(case, seed):
    compare_with_numpy(case, seed)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(case=arrays_and_writes(), seed=st.integers(0, 2**32 - 1))
def test_more_sequences_of_writes_equal_numpy(case, seed):
    compare_with_numpy(case, seed)


def compare_with_numpy(case, seed):
    shape, chunks, shards, dtype, steps, memory = case
    random = np.random.default_rng(seed)
    array = create(shape, chunks, dtype, shards=shards)
    plain = np.zeros(shape, dtype)
    with buffered(array, memory) as target:
        for kind, selection in steps:
            if kind == "flush":
                target.flush()
                assert np.array_equal(array[...], plain)
            elif kind == "read":
                got = target[selection]
                assert np.array_equal(got, plain[selection])
                assert np.shape(got) == np.shape(plain[selection])
            elif kind == "basic":
                values = random.integers(0, 100, np.shape(plain[selection])).astype(dtype)
                target[selection] = plain[selection] = values
            else:
                place = orthogonal_index(selection, shape)
                values = random.integers(0, 100, plain[place].shape).astype(dtype)
                plain[place] = values
                kept = tuple(0 if isinstance(part, int) else slice(None) for part in selection)
                target.set_orthogonal_selection(selection, values[kept])
                assert np.array_equal(target.get_orthogonal_selection(selection), values[kept])
            assert target._held == sum(one.held for one in target._waiting.values())
    assert np.array_equal(array[...], plain)
    assert np.array_equal(array.dtype, plain.dtype)


@pytest.mark.parametrize("value", [5, 5.0, np.uint16(5), [5, 6, 7], [[5], [6]], np.ones((1, 2, 3))])
def test_values_are_broadcast_as_in_numpy(value):
    array = create((4, 3), (3, 2))
    plain = np.zeros((4, 3), "uint8")
    with buffered(array) as target:
        target[1:3] = value
    plain[1:3] = value
    assert np.array_equal(array[...], plain)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (4, "index 4 lies outside axis 0 of length 4"),
        ((0, -4), "index -4 lies outside axis 1"),
        ((0, 0, 0), "3 parts"),
        ((..., ...), "only one ellipsis"),
        (slice(None, None, -1), "positive step"),
        ([0, 1], "set_orthogonal_selection"),
        (np.ones((4, 3), bool), "set_orthogonal_selection"),
        (None, "set_orthogonal_selection"),
        (True, "set_orthogonal_selection"),
    ],
)
def test_other_selections_are_refused(selection, message):
    with buffered(create((4, 3), (3, 2))) as target:
        with pytest.raises(IndexError, match=message):
            target[selection] = 1
        with pytest.raises(IndexError, match=message):
            target[selection]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (([0, 4],), "indices 0 to 4 lie outside axis 0"),
        ((np.ones(3, bool),), "mask of length 4"),
        ((np.ones((4, 3), bool),), "masks of the whole array"),
        (([0.5],), "axis of integers"),
    ],
)
def test_other_orthogonal_selections_are_refused(selection, message):
    with buffered(create((4, 3), (3, 2))) as target, pytest.raises(IndexError, match=message):
        target.set_orthogonal_selection(selection, 1)


def test_values_of_another_shape_are_refused():
    with buffered(create((4, 3), (3, 2))) as target, pytest.raises(ValueError, match=r"\(2,\) can't be assigned"):
        target[0] = [1, 2]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["uint8", ">i8", "float16", "complex128", "bool"])
def test_both_formats_and_an_array_without_axes(tmp_path, dtype, zarr_format):
    group = zarr.open_group(tmp_path / "g.zarr", mode="w", zarr_format=zarr_format)
    array = group.create_array("a/b", shape=(5, 7), chunks=(2, 3), dtype=dtype)
    single = group.create_array("c", shape=(), chunks=(), dtype=dtype)
    with buffered(array, 1) as target, buffered(single) as one:
        target[::2] = 1
        target[:, 2] = 0
        one[()] = 1
        assert one[...] == 1
    expected = np.zeros((5, 7), dtype)
    expected[::2] = 1
    expected[:, 2] = 0
    assert np.array_equal(group["a/b"][...], expected)
    assert group["c"][()] == 1


def test_numpy_takes_a_buffer_for_an_array():
    array = create((4, 3), (3, 2))
    with buffered(array) as target:
        target[1] = 5
        plain = np.asarray(target)
        assert plain.dtype == array.dtype
        assert plain.tolist() == [[0] * 3, [5] * 3, [0] * 3, [0] * 3]
        assert np.array(target, "float32").dtype == "float32"
        assert len(target) == len(list(target)) == 4
        with pytest.raises(ValueError, match="without a copy"):
            np.array(target, copy=False)
    with buffered(create((), ())) as single, pytest.raises(TypeError, match="no length"):
        len(single)


def test_an_empty_array():
    with buffered(create((0, 3), (1, 3))) as target:
        target[...] = 4
        assert target[...].shape == (0, 3)


@pytest.mark.skipif(not hasattr(zarr.Array, "write_chunk_sizes"), reason="zarr has chunks of several sizes from 3.2 on")
def test_chunks_of_several_sizes():
    with zarr.config.set({"array.rectilinear_chunks": True}):
        array = create((10, 7), ((3, 5, 2), (4, 3)))
        plain = np.arange(70, dtype="uint8").reshape(10, 7)
        with buffered(array) as target:
            for row in range(10):
                target[row] = plain[row]
        assert np.array_equal(array[...], plain)
        assert len(array.store.written) == 6


# Memory and disk


def test_pixels_beyond_the_memory_wait_on_disk(tmp_path):
    data = np.random.default_rng(0).integers(0, 4, (16, 64, 64)).astype("uint16")
    array = create(data.shape, (16, 32, 32), "uint16")
    with buffered(array, 50_000, folder=tmp_path) as target:
        for plane in range(15):
            target[plane] = data[plane]
            assert target._held <= 50_000
        (folder,) = tmp_path.iterdir()
        stored = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        assert stored < data.nbytes / 2  # compressed
        assert array.store.written == []
        assert np.array_equal(target[:15, ::3], data[:15, ::3])
        target[15] = data[15]
        assert len(array.store.written) == 4
        assert not list(folder.iterdir())  # nothing waits any more
    assert np.array_equal(array[...], data)
    del target
    assert not list(tmp_path.iterdir())


def test_large_pieces_share_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(pending, "_LARGEST_ARRAY", 1000)
    data = np.arange(40 * 300, dtype="uint16").reshape(40, 300)
    array = create(data.shape, (40, 150), "uint16")
    with buffered(array, 1500, folder=tmp_path) as target:
        for row in range(39):
            target[row] = data[row]
        (folder,) = tmp_path.iterdir()
        assert len(list(folder.iterdir())) > 10
    assert np.array_equal(array[:39], data[:39])


def test_a_folder_that_cannot_be_written_loses_no_pixel(tmp_path):
    array = create((40, 300), (40, 150))
    with buffered(array, 3000, folder=tmp_path / "absent") as target:
        for row in range(39):
            with contextlib.suppress(FileNotFoundError) if row < 30 else pytest.raises(FileNotFoundError):
                target[row] = 1
        assert (target[:39] == 1).all()
    assert (array[:39] == 1).all()


def test_many_single_pixels_take_no_more_memory_than_the_chunk():
    array = create((64, 64), (64, 64))
    with buffered(array) as target:
        for row, column in product(range(64), range(63)):
            target[row, column] = row
        assert target._held < 50_000  # 4,096 pieces by themselves need 2 MB
    assert np.array_equal(array[:, :63], np.arange(64)[:, None].repeat(63, 1))


def test_a_row_that_is_written_again_and_again_takes_its_memory_once():
    array = create((8, 100), (8, 100))
    with buffered(array) as target:
        for value in range(200):
            target[3] = value
        assert target._held < 10_000
        assert array.store.written == []
    assert (array[3] == 199).all()
    assert (array[4] == 0).all()


@pytest.mark.parametrize(
    ("memory", "expected"), [("1 GiB", 2**30), ("1.5kB", 1500), (" 2 mib ", 2**21), ("7", 7), (9, 9), (np.int64(9), 9)]
)
def test_memory_is_read(memory, expected):
    assert module._bytes(memory) == expected


@pytest.mark.parametrize("memory", ["", "many", "-1 GiB", 0, -5, 1.5, None, True, "1 XiB"])
def test_memory_that_is_no_number_is_refused(memory):
    with (
        pytest.raises(CAEConfigurationError, match="memory must be a positive number"),
        buffered(create((2,), (2,)), memory),
    ):
        pass


# Errors


def write_and_break(array, rows):
    with buffered(array) as target:
        target[rows] = 5
        raise RuntimeError("broken scanner")


def test_the_block_writes_all_after_an_exception_too():
    array = create((8, 8), (4, 8))
    with pytest.raises(RuntimeError, match="broken scanner"):
        write_and_break(array, slice(6))
    assert (array[:6] == 5).all()
    assert (array[6:] == 0).all()


def test_the_exception_of_the_block_names_what_could_not_be_written():
    array = create((8, 8), (4, 8))
    array.store.broken.add("c/0/0")
    with pytest.raises(RuntimeError, match="broken scanner") as caught:
        write_and_break(array, slice(3))
    assert "no space for c/0/0" in caught.value.__notes__[0]


def test_a_chunk_that_could_not_be_written_stays_in_the_buffer(pipeline):
    array = create((8, 8), (4, 8))
    array.store.broken.add("c/0/0")
    values = np.full((4, 8), 5, "uint8")
    kept = []

    def write():
        with buffered(array) as target:
            kept.append(target)
            with pytest.raises(OSError, match="no space"):
                target[:4] = values
            values[:] = 99  # the caller's memory
            target[4:7] = 6
            assert (target[:4] == 5).all()

    with pytest.raises(OSError, match="no space") as caught:
        write()
    assert "array[0:4, 0:8]" in caught.value.__notes__[0]
    assert (array[4:7] == 6).all()
    array.store.broken.clear()
    kept[0].flush()
    assert (array[:4] == 5).all()


def test_pixels_outside_the_value_range_lose_no_other_chunk(photo):
    data = photo.astype("float32")
    array = create(data.shape, (128, 256, 3), "float32", serializer=CAECodec(quality=4, value_range=(0, 255)))

    def write():
        with buffered(array) as target:
            target[:100] = 300
            target[128:250] = data[128:250]

    with pytest.raises(CAEDataError, match="300"):
        write()
    assert np.abs(array[128:240] - data[128:240]).mean() < 10


def test_arrays_that_cannot_be_buffered_are_refused(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(4,), chunks=(2,), dtype="uint8")
    with pytest.raises(CAEConfigurationError, match=r"takes a zarr\.Array, got ndarray"), buffered(np.zeros(3)):
        pass
    with pytest.raises(CAEConfigurationError, match="mode"), buffered(zarr.open_array(tmp_path / "a.zarr", mode="r")):
        pass
    with buffered(array) as target:
        array.resize((6,))
        with pytest.raises(CAEConfigurationError, match=r"resized from \(4,\) to \(6,\)"):
            target[0] = 1


def test_the_buffer_is_closed_behind_the_block():
    with buffered(create((4,), (2,))) as target:
        target[0] = 1
    with pytest.raises(ValueError, match="closed"):
        target[0] = 1
    with pytest.raises(ValueError, match="closed"):
        target[0]


# Threads and processes


def test_threads_write_pieces_of_the_same_chunks(pipeline, tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (64, 60, 4)).astype("uint8")
    array = create(data.shape, (16, 30, 4))
    pieces = [(slice(row, row + 5), slice(None), colour) for row in range(0, 64, 5) for colour in range(4)]
    pieces = [pieces[one] for one in np.random.default_rng(1).permutation(len(pieces))]
    with buffered(array, 8000, folder=tmp_path) as target, ThreadPoolExecutor(8) as executor:

        def write(piece):
            target[piece] = data[piece]
            assert np.array_equal(target[piece], data[piece])

        for done in [executor.submit(write, piece) for piece in pieces] + [executor.submit(target.flush)]:
            done.result()
    assert np.array_equal(array[...], data)


def test_a_chunk_written_during_its_own_encoding_keeps_the_newer_pixels():
    began, go_on = threading.Event(), threading.Event()

    class SlowStore(LoggingStore):
        async def set(self, key, value, byte_range=None):
            if key == "c/0" and not began.is_set():
                began.set()
                await asyncio.to_thread(go_on.wait, 10)
            await super().set(key, value, byte_range)

    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
        array = create((8,), (4,), store=SlowStore())
        with buffered(array) as target, ThreadPoolExecutor(1) as executor:
            first = executor.submit(target.__setitem__, slice(0, 4), 1)
            began.wait(10)
            target[1] = 2
            assert target._being_written
            go_on.set()
            first.result()
        assert array[...].tolist() == [1, 2, 1, 1, 0, 0, 0, 0]


def test_dask_stores_blocks_that_fit_no_chunk():
    data = np.random.default_rng(0).integers(0, 256, (50, 40)).astype("uint8")
    array = create(data.shape, (16, 16))
    with buffered(array) as target:
        dask.array.store(dask.array.from_array(data, chunks=(7, 11)), target, lock=False, scheduler="threads")
    assert np.array_equal(array[...], data)
    assert len(array.store.written) == len(set(array.store.written)) == 12


DYING = """
import os, sys, zarr, zarr_cae
array = zarr.open_array(sys.argv[1], mode="r+")
with zarr_cae.buffered(array, folder=sys.argv[2]) as target:
    target[:4] = 1      # a whole chunk
    target[4:6] = 2     # a part, flushed
    target.flush()
    target[8:10] = 3    # waits
    os._exit(3)
"""


def test_what_was_flushed_outlives_the_process(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(12, 4), chunks=(4, 4), dtype="uint8")
    done = subprocess.run([sys.executable, "-c", DYING, tmp_path / "a.zarr", tmp_path], check=False)
    assert done.returncode == 3
    assert (array[:4] == 1).all()
    assert (array[4:6] == 2).all()
    assert (array[6:] == 0).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_forked_process_leaves_the_buffer_to_its_parent(tmp_path):
    code = (
        "import os, sys, zarr, zarr_cae\n"
        "array = zarr.open_array(sys.argv[1], mode='r+')\n"
        "with zarr_cae.buffered(array, 1, folder=sys.argv[2]) as target:\n"
        "    target[0] = 1\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        try: target[1] = 2\n"
        "        except zarr_cae.CAEConfigurationError: sys.exit(0)\n"
        "        os._exit(1)\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "    target[1] = 3\n"
    )
    array = zarr.create_array(tmp_path / "a.zarr", shape=(4,), chunks=(4,), dtype="uint8")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "a.zarr", tmp_path], check=True, timeout=60)
    assert array[...].tolist() == [1, 3, 0, 0]


def test_an_array_in_a_local_store_in_a_group(tmp_path, photo, whole):
    group = zarr.open_group(LocalStore(tmp_path / "g.zarr"), mode="w")
    array = group.create_array(
        "photo", shape=photo.shape, chunks=photo.shape, dtype="uint8", compressors=None, serializer=CAECodec(quality=4)
    )
    with buffered(array) as target:
        target[::2] = photo[::2]
        target[1::2] = photo[1::2]
    assert psnr(zarr.open_group(tmp_path / "g.zarr")["photo"], photo) == pytest.approx(whole, abs=0.01)
