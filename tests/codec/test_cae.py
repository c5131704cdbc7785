"""`CAECodec` through zarr, on every pipeline of the installed zarr."""

import asyncio
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import zarr
from archives import chunks_of, contents, read, write
from zarr.codecs import Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.core.array_spec import ArrayConfig, ArraySpec
from zarr.storage import LocalStore, MemoryStore, ObjectStore, ZipStore

from zarr_cae import CAECodec, CAEConfigurationError, CAEDataError, CAEError, WeightsNotFoundError
from zarr_cae.evaluation.measures import ms_ssim, psnr

MISSING = "sha256:" + "0" * 64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def create(data, *, codec=None, chunks=None, store=None, **keywords):
    codec = CAECodec(quality=8) if codec is None else codec
    array = zarr.create_array(
        MemoryStore() if store is None else store, shape=data.shape, chunks=data.shape if chunks is None else chunks,
        dtype=data.dtype, serializer=codec, **{"compressors": None, **keywords},
    )  # fmt: skip
    array[...] = data
    return array


def stored_bytes(array):
    return sum(map(len, chunks_of(array.store).values()))


@pytest.mark.parametrize("device", DEVICES)
def test_create_with_codecs(photograph, pipeline, device):
    array = zarr.create(shape=(512, 512, 3), chunks=(256, 256, 3), dtype="uint8", codecs=[CAECodec(quality=8)])
    with zarr.config.set({"cae.device": device}):
        array[:] = photograph
        assert psnr(array[:], photograph) > 34
    assert stored_bytes(array) < photograph.nbytes / 5


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_sixteen_configurations(photograph, metric):
    rates, errors, similarities = [], [], []
    for quality in range(1, 9):
        array = create(photograph, codec=CAECodec(quality=quality, metric=metric))
        rates.append(stored_bytes(array))
        errors.append(psnr(array[:], photograph))
        similarities.append(ms_ssim(array[:], photograph))
    for figures in (rates, errors, similarities):
        assert figures == sorted(set(figures))


@pytest.mark.parametrize(
    "chain",
    [{"compressors": Crc32cCodec()}, {"compressors": ZstdCodec()}, {"compressors": [ZstdCodec(), Crc32cCodec()]},
     {"shards": (512, 256, 3)}, {"shards": (512, 512, 3), "compressors": Crc32cCodec()}, {"filters": "transpose"},
     {"filters": "transpose", "shards": (512, 512, 3)}, {"compressors": "auto"}],
    ids=str,
)  # fmt: skip
def test_chains(photograph, pipeline, chain):
    transposed = chain.get("filters") == "transpose"
    if transposed:
        chain = {**chain, "filters": [TransposeCodec(order=(2, 0, 1))], "codec": CAECodec(channel_axis=-3)}
    plain = create(photograph, chunks=(128, 128, 3))[:]
    array = create(photograph, chunks=(128, 128, 3), **chain)
    reopened = zarr.open_array(array.store, mode="r")
    # The bytes do not depend on what else is in a batch; floats may make a grey level's difference in the pixels.
    assert np.abs(reopened[:].astype(int) - plain).max() <= 1
    codec = json.dumps(reopened.metadata.to_dict(), default=str)
    assert ('"channel_axis": -3' if transposed else '"channel_axis": -1') in codec


@pytest.mark.parametrize("kind", ["memory", "local", "zip", "fsspec", "obstore"])
def test_stores(photograph, tmp_path, pipeline, kind):
    data = photograph[:128, :128]
    if kind == "obstore":
        memory = pytest.importorskip("obstore.store").MemoryStore()
    if kind == "fsspec":
        pytest.importorskip("fsspec")
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
        from fsspec.implementations.local import LocalFileSystem
        from zarr.storage import FsspecStore

        files = AsyncFileSystemWrapper(LocalFileSystem(auto_mkdir=True), asynchronous=True)
        store = FsspecStore(files, path=str(tmp_path / "f.zarr"))
    else:
        store = {"memory": MemoryStore, "local": lambda: LocalStore(tmp_path / "l.zarr"),
                 "zip": lambda: ZipStore(tmp_path / "z.zip", mode="w"),
                 "obstore": lambda: ObjectStore(memory)}[kind]()  # fmt: skip
    sharded = kind in {"zip", "obstore"}
    array = create(data, chunks=(64, 64, 3), shards=(128, 128, 3) if sharded else None, store=store)
    written = array[:]
    assert psnr(written, data) > 30
    if kind == "zip":
        store.close()
        store = ZipStore(tmp_path / "z.zip", mode="r")
    assert np.abs(zarr.open_array(store, mode="r")[:].astype(int) - written).max() <= 1


FRESH = """
import sys
import zarr
array = zarr.open(sys.argv[1], mode="r")
assert "torch" not in sys.modules
print(int(array[...].sum()))
assert "compressai" not in sys.modules
"""


def test_fresh_process_that_never_imported_the_package(photograph, tmp_path, pipeline):
    array = create(photograph[:64, :64], store=LocalStore(tmp_path / "a.zarr"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, str(tmp_path / "a.zarr")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "ZARR_CODEC_PIPELINE__PATH": pipeline},
    )
    assert abs(int(done.stdout) - int(array[...].sum())) <= array.size  # floats: a grey level at most


OFFLINE = """
import sys

def refuse(event, arguments):
    if event in {"socket.connect", "socket.getaddrinfo", "urllib.Request"}:
        raise ConnectionRefusedError(event, arguments)

sys.addaudithook(refuse)
import numpy as np, zarr
from zarr_cae import CAECodec, open_bottleneck
data = np.add.outer(np.arange(32, dtype="uint8") * 4, np.arange(32, dtype="uint8") * 3)
digests = set()
for metric in ("mse", "ms-ssim"):
    for quality in range(1, 9):
        codec = CAECodec(quality, metric=metric, channel_axis=None)
        array = zarr.create_array({}, data=data, chunks=(32, 32), serializer=codec, compressors=None)
        assert np.abs(array[...].astype(int) - data).mean() < 20, (metric, quality)
        assert np.isfinite(open_bottleneck(array.store)[...]).all()
        digests.add(codec.weights)
try:
    __import__("urllib.request").request.urlopen("http://127.0.0.1:9/")
except OSError as error:
    assert "ConnectionRefusedError" in repr(error) or "urllib.Request" in repr(error), error
else:
    raise SystemExit("the network was not cut off")
print(len(digests))
"""


def test_sixteen_configurations_from_bundled_weights_without_a_network(tmp_path):
    environment = {**os.environ, "ZARR_CAE_WEIGHTS": str(tmp_path / "empty")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", OFFLINE], check=True, capture_output=True, text=True, env=environment
    )
    assert 1 <= int(done.stdout) <= 16
    assert not (tmp_path / "empty").exists()


WITHOUT_COMPRESSAI = """
import sys
sys.modules["compressai"] = None
sys.modules["torchvision"] = None
import numpy as np, zarr
from zarr_cae import CAECodec
array = zarr.create_array({}, shape=(32, 32, 3), dtype="uint8", serializer=CAECodec(), compressors=None)
array[:] = np.full((32, 32, 3), 90, "uint8")
assert abs(int(array[3, 4, 1]) - 90) < 8, array[3, 4]
"""


def test_works_where_compressai_cannot_be_imported():
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_COMPRESSAI], check=True)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((48, 64, 3), "auto"), ((3, 48, 64), 0), ((48, 3, 64), -2), ((48, 64), "auto"), ((48, 64, 1), 2),
     ((4, 48, 64), 0), ((48, 64, 4), -1), ((48, 13, 64), 1), ((2, 3, 48, 64, 3), 4), ((2, 3, 48, 64), 1),
     ((5, 2, 48, 64), "auto"), ((1, 1), "auto"), ((1, 1, 3), "auto"), ((17, 31), "auto"), ((17, 31, 3), "auto"),
     ((250, 250, 3), "auto"), ((7, 17, 31), None)],
)  # fmt: skip
def test_axes_and_sizes(photograph, pipeline, shape, axis):
    data = np.resize(np.moveaxis(photograph[:64, :64], 2, 0), shape) if len(shape) != 3 else smooth(shape)
    array = create(data, codec=CAECodec(quality=8, channel_axis=axis))
    assert array[:].shape == shape
    assert psnr(array[:], data) > 15
    assert zarr.open_array(array.store, mode="r").metadata.codecs == array.metadata.codecs


def smooth(shape, low=0.0, high=255.0, dtype="uint8"):
    grids = np.meshgrid(*(np.linspace(0, 2, length) for length in shape), indexing="ij")
    wave = np.sin(sum(grids) + np.pi * grids[0] * grids[-1]) * 0.4 + 0.5
    return (low + wave * (high - low)).astype(dtype)


@pytest.mark.parametrize("place", range(3))
def test_channel_axis_may_be_anywhere(photograph, place):
    last = create(photograph[:64, :96], codec=CAECodec(quality=5))
    codec = CAECodec(quality=5, channel_axis=place)
    moved = create(np.ascontiguousarray(np.moveaxis(photograph[:64, :96], 2, place)), codec=codec)
    assert list(chunks_of(moved.store).values()) == [read(last.store, "c/0/0/0")]
    assert np.abs(np.moveaxis(moved[:], place, 2).astype(int) - last[:]).max() <= 1


@pytest.mark.parametrize(("shape", "axis"), [((48, 64, 4), 2), ((13, 48, 64), 0), ((2, 2, 48, 64), None)])
def test_grey_planes_are_coded_each_by_itself(photograph, shape, axis):
    planes = np.stack([photograph[n * 9 :, n * 20 :, n % 3][:48, :64] for n in range(13)])
    data = np.moveaxis(planes[: shape[axis]], 0, axis) if axis is not None else planes[:4].reshape(shape)
    found = create(data, codec=CAECodec(4, channel_axis=axis))[:]
    found = found.reshape(4, 48, 64) if axis is None else np.moveaxis(found, axis, 0)
    for plane, pixels in zip(planes[: len(found)], found, strict=True):
        alone = create(np.ascontiguousarray(plane), codec=CAECodec(4, channel_axis=None))[:]
        assert np.abs(pixels.astype(int) - alone).max() <= 1


def test_images_of_batch_axes_are_coded_each_by_itself(photograph):
    images = np.stack([photograph[n * 40 :, n * 20 :][:48, :64] for n in range(6)])
    found = create(images.reshape(2, 3, 48, 64, 3), codec=CAECodec(4, channel_axis=4))[:].reshape(images.shape)
    first = create(images.transpose(3, 0, 1, 2), codec=CAECodec(4, channel_axis=0))[:].transpose(1, 2, 3, 0)
    for image, pixels, other in zip(images, found, first, strict=True):
        alone = create(image, codec=CAECodec(4))[:].astype(int)
        assert np.abs(pixels - alone).max() <= 1
        assert np.abs(other - alone).max() <= 1


def test_inside_shards_auto_sees_the_inner_chunk(photograph):
    stack = np.stack([photograph[n * 9 :, n * 20 :, 1][:64, :64] for n in range(6)])
    with pytest.raises(CAEConfigurationError, match=r"channel_axis=-3 if .*channel_axis=None if"):
        create(stack, chunks=(3, 32, 32), shards=(6, 64, 64))
    told = create(stack, chunks=(3, 32, 32), shards=(6, 64, 64), codec=CAECodec(channel_axis=None))
    assert np.abs(told[:].astype(int) - create(stack, chunks=(3, 32, 32))[:]).max() <= 1


def test_arrays_with_an_axis_in_front_of_those_that_were_written(photograph):
    """Virtual stacks put a new axis before the others, and leave codecs and chunks as they are."""
    array = create(photograph[:64, :64], codec=CAECodec(4))
    metadata = json.loads(read(array.store, "zarr.json"))
    metadata["shape"].insert(0, 1)
    metadata["chunk_grid"]["configuration"]["chunk_shape"].insert(0, 1)
    stacked = MemoryStore()
    write(stacked, "zarr.json", json.dumps(metadata).encode())
    write(stacked, "c/0/0/0/0", read(array.store, "c/0/0/0"))
    assert np.abs(zarr.open_array(stacked, mode="r")[0].astype(int) - array[:]).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("uint16", 0, 65535), ("uint16", 100, 4095), ("float32", -1.0, 1.0), ("float32", 0, 0.1), ("int16", -500, 500),
     ("float64", 0.1, 0.7), ("uint8", 0, 100), ("int16", -32768, 32767), ("int32", 10**9, 10**9 + 1000),
     (">u2", 0, 4095), ("float16", 0, 1)],
)  # fmt: skip
def test_dtypes_with_a_value_range(pipeline, dtype, low, high):
    data = smooth((100, 90), low, high, dtype)
    array = create(data, chunks=(64, 64), codec=CAECodec(value_range=(low, high)), fill_value=low)
    back = array[:]
    assert back.dtype == data.dtype
    apart = np.abs(back.astype(float) - data.astype(float))
    assert apart[:-4, :-4].max() < 0.06 * (high - low)
    # The error is larger beside the step to the fill value, which pads the last chunks.
    assert apart.max() < 0.08 * (high - low)
    array[10:20] = back[10:20]  # decoded values can be written again
    if data.dtype.kind == "f" or high < np.iinfo(data.dtype).max:  # otherwise no value lies outside
        with pytest.raises(CAEDataError, match="value_range"):
            array[0, 0] = high + 1


def test_uint8_and_scaled_uint16_are_the_same_image(photograph):
    grey = photograph[:64, :64, 1]
    eight = create(grey, codec=CAECodec(quality=4))[:]
    sixteen = create(grey.astype("uint16") * 257, codec=CAECodec(quality=4, value_range=(0, 65535)))[:]
    assert np.abs(sixteen / 257 - eight).max() <= 0.51


def test_not_divisible_missing_and_partial(photograph, pipeline):
    data = photograph[:300, :401]
    array = zarr.create_array(
        MemoryStore(), shape=(600, 401, 3), chunks=(128, 128, 3), dtype="uint8", fill_value=7,
        serializer=CAECodec(), compressors=None,
    )  # fmt: skip
    array[:300] = data
    assert psnr(array[:300], data) > 32
    assert (array[400:] == 7).all()  # chunks never written
    array[10:30, 10:30] = 200
    assert np.abs(array[12:28, 12:28].astype(int) - 200).max() < 40
    assert psnr(array[64:300], data[64:]) > 30
    array.resize((700, 401, 3))
    assert (array[600:] == 7).all()


@pytest.mark.parametrize("shards", [None, (500, 750, 3)])
def test_chunks_that_are_no_multiple_of_sixteen(photograph, pipeline, shards):
    data = photograph[:510, :501]
    array = create(data, chunks=(250, 250, 3), shards=shards, codec=CAECodec(4))
    assert array.nchunks == 9 if shards is None else array.shards == shards
    whole = array[...]
    assert psnr(whole, data) > 28
    assert psnr(whole[500:], data[500:]) > 22  # ten rows of a chunk that is padded for the rest
    alone = create(np.ascontiguousarray(data[250:500, :250]), codec=CAECodec(4))
    assert np.abs(whole[250:500, :250].astype(int) - alone[...]).max() <= 1


def test_channels_may_lie_in_several_chunks(photograph, pipeline):
    """They are then coded as independent grey planes."""
    array = create(photograph[:64, :64], chunks=(64, 64, 1), codec=CAECodec(4, channel_axis=-1))
    alone = create(np.ascontiguousarray(photograph[:64, :64, 1]), codec=CAECodec(4))[...]
    assert np.abs(array[..., 1].astype(int) - alone).max() <= 1
    assert psnr(array[...], photograph[:64, :64]) > 26


@pytest.mark.parametrize("axis", ["auto", -1])
def test_chunks_that_cut_colours_in_two_are_refused(photograph, axis):
    with pytest.raises(CAEConfigurationError, match=r"use chunks=\(64, 64, 3\), or give .* chunks=\(64, 64, 1\)"):
        create(photograph[:64, :64], chunks=(64, 64, 2), codec=CAECodec(4, channel_axis=axis))


def test_whole_colours_before_a_transpose_are_not_refused():
    array = zarr.create_array(
        {}, shape=(3, 64, 64), chunks=(3, 32, 32), dtype="uint8", serializer=CAECodec(4), compressors=None,
        filters=[TransposeCodec(order=(1, 2, 0))],
    )  # fmt: skip
    assert array.metadata.codecs[1].channel_axis == -1


def test_every_selection_of_zarr(photograph, pipeline):
    data = photograph[:128, :96]
    array = create(data, chunks=(64, 48, 3))
    whole = array[:].astype(int)
    mask = np.zeros(data.shape, bool)
    mask[[5, 100], [60, 3], [0, 2]] = True
    for found, expected in (
        (array.oindex[[1, 70], [3, 90], :], whole[np.ix_([1, 70], [3, 90], range(3))]),
        (array.vindex[mask], whole[mask]), (array.blocks[1, 1], whole[64:, 48:]), (array[::7, -1], whole[::7, -1]),
    ):  # fmt: skip
        assert np.abs(found - expected).max() <= 1
    array[::2] = data[::2]
    array.oindex[[1, 70], :, [0]] = 9
    array.append(data)
    assert array.shape == (256, 96, 3)
    assert psnr(array[128:], data) > 32
    assert array.metadata.codecs[0].channel_axis == -1


def test_memory_of_the_user_is_not_changed_and_may_lie_in_any_order(photograph, pipeline):
    expected = create(np.array(photograph[:64, :96]))[:].astype(int)
    for data in (np.asfortranarray(photograph[:64, :96]), photograph[:64, :192][:, ::2][:, :96],
                 photograph[63::-1, :96]):  # fmt: skip
        kept = data.copy()
        array = create(data, config={"order": "F"})
        np.testing.assert_array_equal(data, kept)
        assert psnr(array[:], data) > 30
        if data.flags.f_contiguous:
            assert np.abs(array[:] - expected).max() <= 1


def test_cancelled_reads_spare_the_others(photograph):
    array = create(photograph[:128, :128], chunks=(32, 32, 3))
    expected = array[:].astype(int)

    async def read():
        opened = await zarr.api.asynchronous.open_array(store=array.store, mode="r")
        tasks = [asyncio.create_task(opened.getitem(...)) for _ in range(12)]
        await asyncio.sleep(0.005)
        for task in tasks[::2]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(read())
    assert any(isinstance(pixels, asyncio.CancelledError) for pixels in found[::2])
    assert all(np.abs(pixels - expected).max() <= 1 for pixels in found[1::2])


def test_batches_may_contain_none(photograph):
    array = create(photograph[:64, :64])
    prototype = zarr.core.buffer.default_buffer_prototype()
    spec = ArraySpec((64, 64, 3), array.metadata.dtype, np.uint8(0), ArrayConfig("C", False), prototype)
    chunk = prototype.nd_buffer.from_numpy_array(np.array(photograph[:64, :64]))
    (codec,) = array.metadata.codecs

    async def both():
        frame, nothing = await codec.encode([(chunk, spec), (None, spec)])
        assert nothing is None
        nothing, pixels = await codec.decode([(None, spec), (frame, spec)])
        assert nothing is None
        return pixels

    assert np.abs(asyncio.run(both()).as_numpy_array().astype(int) - array[:]).max() <= 1


def test_the_bytes_of_a_chunk_do_not_depend_on_its_batch(photograph):
    alone = create(photograph[64:128, 64:128])
    beside = create(photograph, chunks=(64, 64, 3))
    assert read(beside.store, "c/1/1/0") == read(alone.store, "c/0/0/0")


def test_a_codec_is_a_frozen_hashable_value():
    codec = CAECodec(quality=3, metric="ms-ssim", channel_axis=None, value_range=[0, 10])
    assert codec == CAECodec(3, metric="ms-ssim", channel_axis=None, value_range=(0.0, 10))
    assert hash(codec) == hash(pickle.loads(pickle.dumps(codec)))
    assert CAECodec.from_dict(json.loads(json.dumps(codec.to_dict()))) == codec
    assert codec != CAECodec(quality=4)
    numpy = CAECodec(np.int64(3), metric="ms-ssim", channel_axis=np.int8(2), value_range=np.array([0, 10], np.uint16))
    assert json.loads(json.dumps(numpy.to_dict())) == json.loads(json.dumps(replace(codec, channel_axis=2).to_dict()))
    with pytest.raises(AttributeError):
        codec.quality = 5


def test_metadata_holds_all_that_decoding_needs_and_no_settings_of_the_machine(photograph):
    with zarr.config.set({"cae.device": "cpu", "cae.threads": 1}):
        array = create(photograph[:32, :32], codec=CAECodec(quality=2))
    (stored,) = json.loads(read(array.store, "zarr.json"))["codecs"]
    assert stored["name"] == "cae"
    assert set(stored["configuration"]) == {"model", "quality", "metric", "weights", "channel_axis"}
    assert stored["configuration"]["weights"] == CAECodec(quality=2).weights
    assert stored["configuration"]["channel_axis"] == -1


def test_arrays_pickle_and_serve_threads(photograph, tmp_path):
    array = create(photograph, chunks=(128, 128, 3), store=LocalStore(tmp_path / "a.zarr"))
    copy = pickle.loads(pickle.dumps(array))
    expected = array[:]
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda row: copy[row * 64 : row * 64 + 64], range(8)))
    assert np.abs(np.concatenate(rows).astype(int) - expected).max() <= 1
    frames = [path.read_bytes() for path in sorted((tmp_path / "a.zarr/c").glob("*/*/0"))]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda place: copy.blocks.__setitem__(place, 0), np.ndindex(4, 4)))
        corners = [(row, column) for row in range(0, 512, 128) for column in range(0, 512, 128)]

        def write(corner):
            window = tuple(slice(start, start + 128) for start in corner)
            copy[window] = photograph[window]

        list(pool.map(write, corners))
    assert [path.read_bytes() for path in sorted((tmp_path / "a.zarr/c").glob("*/*/0"))] == frames


def _sum_in_child(path, queue):
    pixels = zarr.open_array(path, mode="r")[:]
    create(pixels, chunks=(64, 64, 3), store=LocalStore(path.with_name("child.zarr")))
    queue.put(int(pixels.sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_after_fork(photograph, tmp_path):
    array = create(photograph[:128, :128], chunks=(64, 64, 3), store=LocalStore(tmp_path / "a.zarr"))
    expected = int(array[:].sum())  # the parent's engines, batchers and pools are all running
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_sum_in_child, args=(tmp_path / "a.zarr", queue))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork with threads
        child.start()
    total = queue.get(timeout=120)
    child.join(60)
    assert child.exitcode == 0
    assert abs(total - expected) <= array.size
    assert psnr(zarr.open_array(tmp_path / "child.zarr", mode="r")[:], photograph[:128, :128]) > 30
    assert abs(int(array[:].sum()) - expected) <= array.size  # the parent goes on


def test_several_event_loops(photograph):
    array = create(photograph[:128, :128], chunks=(64, 64, 3))
    expected, found = array[:].astype(int), {}

    async def read():
        opened = await zarr.api.asynchronous.open_array(store=array.store, mode="r")
        return await opened.getitem(...)

    threads = [threading.Thread(target=lambda n=n: found.update({n: asyncio.run(read())})) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(np.abs(np.asarray(pixels).astype(int) - expected).max() <= 1 for pixels in found.values())


@pytest.mark.parametrize(
    ("keywords", "shape", "dtype", "message"),
    [
        ({}, (64, 64, 3), "complex64", "dtype complex64"), ({}, (64, 64, 3), "uint16", "needs value_range"),
        ({}, (64, 64, 3), "bool", "dtype bool"), ({}, (512, 512, 4), "uint8", "ambiguous"),
        ({}, (64, 64, 3), "datetime64[s]", "dtype datetime64"),
        ({"channel_axis": 3}, (64, 64, 3), "uint8", "channel_axis 3"), ({}, (64,), "uint8", "at least 2"),
        ({"value_range": (10, 20)}, (64, 64, 3), "uint8", "fill_value 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sharded", [False, True])
def test_refused_at_creation(keywords, shape, dtype, message, sharded):
    with pytest.raises(CAEConfigurationError, match=message):
        zarr.create_array(
            MemoryStore(), shape=shape, chunks=shape, shards=shape if sharded else None, dtype=dtype,
            serializer=CAECodec(**keywords), compressors=None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("configuration", "message"),
    [({"quality": 9}, "quality"), ({"metric": "x"}, "metric"), ({"weights": "x"}, "sha256")],
)
def test_refused_at_creation_from_metadata(configuration, message):
    with pytest.raises(CAEConfigurationError, match=message):
        zarr.create_array(
            {}, shape=(32, 32, 3), dtype="uint8", serializer={"name": "cae", "configuration": configuration},
            compressors=None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"quality": 0}, "quality must be one of"), ({"quality": 9}, "quality"), ({"quality": True}, "quality"),
        ({"quality": "8"}, "quality"), ({"metric": "psnr"}, "metric"), ({"model": "vgg"}, "model"),
        ({"channel_axis": "last"}, "channel_axis"), ({"channel_axis": 1.5}, "channel_axis"),
        ({"value_range": 3}, "value_range"), ({"value_range": (0, float("inf"))}, "value_range"),
        ({"value_range": (0, 1, 2)}, "value_range"), ({"weights": "../evil"}, "sha256"),
        ({"quality": 8.0}, "quality"), ({"quality": np.array([1, 2])}, "quality"),
        ({"channel_axis": True}, "channel_axis"), ({"value_range": (0, 10**400)}, "value_range"),
        ({"weights": "http://x/y"}, "sha256"), ({"weights": MISSING[:-1] + "G"}, "sha256"),
    ],
)  # fmt: skip
def test_refused_parameters(keywords, message):
    with pytest.raises(CAEConfigurationError, match=message):
        CAECodec(**keywords)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"quality": 8}, "qualities .*1, 2, 3, 4, 5.*, not for .*quality 8"),
     ({"metric": "ms-ssim"}, "not for .*'ms-ssim'"),
     ({"model": "bmshj2018-factorized"}, "not for model 'bmshj2018-factorized'")],
    ids=["quality", "metric", "model"],
)  # fmt: skip
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_another_configuration_are_refused_when_an_array_is_created_or_opened(change, message, sharded):
    known = CAECodec(quality=1).to_dict()
    wrong = {"name": "cae", "configuration": {**known["configuration"], **change}}
    shards = (64, 64, 3) if sharded else None

    def make(serializer):
        return zarr.create_array(
            MemoryStore(), shape=(64, 64, 3), chunks=(32, 32, 3), shards=shards, dtype="uint8", serializer=serializer,
            compressors=None,
        )  # fmt: skip

    with pytest.raises(CAEConfigurationError, match=message):
        make(wrong)
    store = make(known).store
    metadata = json.loads(read(store, "zarr.json"))
    (codec,) = metadata["codecs"][0]["configuration"]["codecs"] if sharded else metadata["codecs"]
    codec["configuration"] |= change
    write(store, "zarr.json", json.dumps(metadata).encode())
    with pytest.raises(CAEConfigurationError, match=message):
        zarr.open_array(store, mode="r")


def test_weights_in_a_folder_that_cannot_be_read_do_not_hinder_opening(monkeypatch):
    def denied(*_, **__):
        raise PermissionError

    monkeypatch.setattr("zarr_cae.codec.cae.find", denied)
    serializer = {"name": "cae", "configuration": {"weights": MISSING}}
    array = zarr.create_array({}, shape=(32, 32, 3), dtype="uint8", serializer=serializer, compressors=None)
    with pytest.raises(PermissionError):
        array[...] = 5


def test_nothing_is_stored_where_weights_are_unknown(photograph, pipeline):
    for shards, window in ((None, slice(None)), (None, slice(3, 9)), ((64, 64, 3), slice(None))):
        array = zarr.create_array(
            MemoryStore(), shape=(64, 64, 3), chunks=(32, 32, 3), shards=shards, dtype="uint8", compressors=None,
            serializer={"name": "cae", "configuration": {"weights": MISSING}},
        )  # fmt: skip
        with pytest.raises(WeightsNotFoundError, match=r"0000.*weights import"):
            array[window] = photograph[:64, :64][window]
        assert list(contents(array.store)) == ["zarr.json"]


@pytest.mark.parametrize("shards", [None, (64, 64, 3)])
def test_unknown_weights_are_refused_when_an_array_is_created(shards):
    store = MemoryStore()
    with pytest.raises(WeightsNotFoundError, match=r"sha256:0{64}.*cae-v1.*quality 8.*mse.*weights import"):
        zarr.create_array(
            store, shape=(64, 64, 3), chunks=(32, 32, 3), shards=shards, dtype="uint8", compressors=None,
            serializer=CAECodec(weights=MISSING),
        )  # fmt: skip
    assert asyncio.run(store.is_empty(""))


def test_repr_can_be_pasted_and_values_replaced():
    for codec, text in (
        (CAECodec(4), "CAECodec(quality=4)"),
        (CAECodec(8, channel_axis=-1), "CAECodec(quality=8, channel_axis=-1)"),
        (
            CAECodec(1, metric="ms-ssim", value_range=(0, 4095)),
            "CAECodec(quality=1, metric='ms-ssim', value_range=(0, 4095))",
        ),
        (CAECodec(4, weights=MISSING), f"CAECodec(quality=4, weights='{MISSING}')"),
    ):
        assert repr(codec) == text
        assert eval(text) == codec
    assert replace(CAECodec(4), channel_axis=None) == CAECodec(4, channel_axis=None)
    with pytest.raises(TypeError):
        CAECodec(4, "mse")


@pytest.mark.parametrize("change", [{"quality": 7}, {"metric": "ms-ssim"}, {"quality": 7, "metric": "ms-ssim"}])
def test_replaced_values_find_the_weights_of_the_same_family(change):
    for codec in (CAECodec(4), CAECodec.from_dict(CAECodec(4).to_dict())):
        assert replace(codec, **change) == CAECodec(**{"quality": 4, **change})
        assert repr(replace(codec, **change)) == repr(CAECodec(**{"quality": 4, **change}))
    array = zarr.create_array(
        {}, shape=(16, 16, 3), dtype="uint8", serializer=replace(CAECodec(4), **change), compressors=None
    )
    assert array.metadata.codecs[0].weights == CAECodec(**{"quality": 4, **change}).weights


def test_replaced_values_keep_weights_of_a_name():
    dark = CAECodec(4, weights="microscopy")
    assert replace(dark, quality=3).weights == dark.weights
    assert replace(dark, quality=7) == CAECodec(7, weights="microscopy")
    other = replace(dark, metric="ms-ssim")  # there are none of this family
    assert other.weights == dark.weights
    with pytest.raises(CAEConfigurationError, match=r'for a new array give weights="", the name of a family'):
        zarr.create_array({}, shape=(16, 16), dtype="uint8", serializer=other, compressors=None)
    assert replace(dark, metric="ms-ssim", weights="") == CAECodec(4, metric="ms-ssim")


def test_chunks_that_cut_three_colours_are_refused_in_new_arrays(photograph):
    def make(chunks, axis="auto"):
        return create(photograph[:64, :64], chunks=chunks, codec=CAECodec(4, channel_axis=axis))

    for chunks in ((32, 32, 2), (64, 64, 1), (32, 32, 4)):
        wanted = re.escape(str((*chunks[:2], 3)))
        with pytest.raises(CAEConfigurationError, match=rf"use chunks={wanted}, or give channel_axis=-1"):
            make(chunks)
        if chunks[2] > 1:
            with pytest.raises(CAEConfigurationError, match=rf"use chunks={wanted}"):
                make(chunks, 2)
        array = make((*chunks[:2], 1), 2)
        assert zarr.open_array(array.store, mode="r").metadata.codecs[0].channel_axis == -1
        stored = json.loads(read(array.store, "zarr.json"))
        stored["chunk_grid"]["configuration"]["chunk_shape"] = list(chunks)
        write(array.store, "zarr.json", json.dumps(stored).encode())
        assert zarr.open_array(array.store, mode="r").chunks == chunks  # what earlier builds wrote still opens


def test_arrays_whose_weights_are_missing_can_be_opened_but_not_read(photograph):
    array = create(photograph[:32, :32])
    text = read(array.store, "zarr.json").decode().replace(CAECodec().weights, MISSING)
    write(array.store, "zarr.json", text.encode())
    opened = zarr.open_array(array.store, mode="r")
    assert opened.shape == (32, 32, 3)
    with pytest.raises(WeightsNotFoundError, match="0000"):
        opened[:]


@pytest.mark.parametrize("configuration", [None, [1], "x", {"quality": 3.5}, {"channel_axis": {}}, {"weights": "/x"}])
def test_metadata_that_make_no_sense_are_refused(configuration):
    with pytest.raises(CAEConfigurationError, match="cae: "):
        CAECodec.from_dict({"name": "cae", "configuration": configuration})


def test_metadata_of_a_newer_version_is_refused():
    data = CAECodec().to_dict()
    data["configuration"]["classes"] = 4
    with pytest.raises(CAEConfigurationError, match=r"unknown fields \['classes'\]"):
        CAECodec.from_dict(data)


def test_settings_that_do_not_exist_are_refused(photograph):
    for setting in (
        {"cae.device": "abacus"}, {"cae.device": "cuda:99"}, {"cae.device": None}, {"cae.sped": 9}, {"cae.threads": 0},
        {"cae.threads": 1.5}, {"cae.threads": "2"}, {"cae.tile": "abc"}, {"cae.tile": 64.5}, {"cae.tile": 15},
        {"cae": 5},
    ):  # fmt: skip
        with zarr.config.set(setting), pytest.raises(CAEConfigurationError, match=next(iter(setting))[:4]):
            create(photograph[:32, :32])


def test_settings_come_from_the_environment():
    code = "import zarr; from zarr_cae.config import Settings; assert Settings(**zarr.config.get('cae')).threads == 1"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, env={**os.environ, "ZARR_CAE__THREADS": "1"}
    )


def test_every_damaged_byte_is_noticed(photograph, pipeline):
    array = create(photograph[:32, :32], codec=CAECodec(quality=1))
    ((key, frame),) = chunks_of(array.store).items()
    for place in range(0, len(frame), 7):
        broken = bytearray(frame)
        broken[place] ^= 0x10
        write(array.store, key, bytes(broken))
        with pytest.raises(CAEDataError):
            array[:]
    write(array.store, key, frame[:-1])
    with pytest.raises(CAEError):
        array[:]


def test_a_frame_of_another_shape_is_refused(photograph):
    small, large = create(photograph[:32, :32]), create(photograph[:48, :32])
    write(small.store, "c/0/0/0", read(large.store, "c/0/0/0"))
    with pytest.raises(CAEDataError, match="48"):
        small[:]


def _networks_of_a_worker():
    """Return (process, torch's threads, cores for networks, cores for coding, whether networks run on no more)."""
    from zarr_cae.threads import cores as cores_for_coding

    cores = zarr.config.get("cae.threads")
    running = [thread for thread in threading.enumerate() if thread.name.startswith("cae-cae-v1")]
    with ThreadPoolExecutor(1) as fresh:  # a thread whose number of torch threads is not set
        threads = fresh.submit(torch.get_num_threads).result()
    with mock.patch.object(os, "sched_getaffinity", return_value=range(64), create=True):  # as on a larger machine
        for_coding = cores_for_coding()
    return os.getpid(), threads, cores, for_coding, 0 < len(running) <= cores


@pytest.mark.slow
def test_dask_workers_in_processes(tmp_path, photograph):
    """Two workers of dask.distributed write regions of an array and read them."""
    dask = pytest.importorskip("dask")
    da = pytest.importorskip("dask.array")
    distributed = pytest.importorskip("distributed")
    pixels = np.array(photograph[:256, :512])
    array = zarr.create_array(
        tmp_path / "photo.zarr", shape=(512, 512, 3), chunks=(128, 128, 3), dtype="uint8",
        serializer=CAECodec(quality=4), compressors=None, fill_value=9,
    )  # fmt: skip
    options = {"dashboard_address": None, "worker_dashboard_address": None, "local_directory": str(tmp_path)}
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ.ZARR_CAE__THREADS": 2}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=2, processes=True, **options) as cluster,
        distributed.Client(cluster) as client,
    ):
        # dask's chunks are multiples of zarr's, and begin at multiples of zarr's: no two tasks write the same chunk.
        da.from_array(pixels, chunks=(256, 128, 3)).to_zarr(array, region=(slice(256, 512), slice(None), slice(None)))
        lazy = da.from_zarr(tmp_path / "photo.zarr", chunks=(256, 256, 3))
        found = lazy.compute()
        workers = list(client.run(_networks_of_a_worker).values())
    assert len({process for process, *_ in workers} - {os.getpid()}) == 2
    assert {tuple(rest) for _, *rest in workers} == {(1, 2, 2, True)}
    assert sorted(path.parent.name for path in (tmp_path / "photo.zarr/c").glob("[23]/*/0")) == sorted("0123" * 2)
    assert not list((tmp_path / "photo.zarr/c").glob("[01]/*/0"))
    assert (found[:256] == 9).all()
    assert psnr(found[256:], pixels) > 28
    assert np.abs(array[...].astype(int) - found).max() <= 1


def test_weights_are_named_when_a_codec_is_made_and_never_stored_by_name():
    assert CAECodec(quality=3, weights="photographs") == CAECodec(quality=3)
    with pytest.raises(WeightsNotFoundError, match="no weights named 'unheard-of'"):
        CAECodec(quality=3, weights="unheard-of")
    with pytest.raises(CAEConfigurationError, match="sha256"):
        CAECodec.from_dict({"name": "cae", "configuration": {"quality": 3, "weights": "photographs"}})
