"""`CAEBottleneckCodec`: shapes, exact latents, refusals."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from archives import PROTOTYPE, chunks_of, create, read, run, write
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.array_spec import ArrayConfig, ArraySpec
from zarr.dtype import Float32
from zarr.storage import MemoryStore

from zarr_cae import (
    CAEBottleneckCodec,
    CAECodec,
    CAEConfigurationError,
    CAEDataError,
    CAEError,
    open_bottleneck,
)
from zarr_cae.codec.cae import loaded
from zarr_cae.coder import rans, tiles
from zarr_cae.coder.frame import FrameHeader, pack, unpack
from zarr_cae.latents.codec import WithoutLatentAxis, latent_shape
from zarr_cae.pixels.layout import Layout

FIXTURES = Path(__file__).parents[1] / "fixtures" / "latents"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


@pytest.fixture
def synthetic(monkeypatch):
    """The weights of the golden archive, which are not the package's own."""
    monkeypatch.setenv("ZARR_CAE_WEIGHTS", str(FIXTURES))


def test_golden_latents_bit_for_bit(synthetic, pipeline):
    found = open_bottleneck(FIXTURES / "golden.zarr")[:]
    expected = np.load(FIXTURES / "golden.npy")
    assert (found.dtype, found.shape) == (np.dtype(np.float32), (38, 7, 6))
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_golden_latents_at_any_thread_count(synthetic, pipeline, monkeypatch, threads):
    with ThreadPoolExecutor(threads) as pool, zarr.config.set({"async.concurrency": threads}):
        monkeypatch.setattr("zarr_cae.threads.pool", lambda: pool)
        found = open_bottleneck(FIXTURES / "golden.zarr")[:]
    assert found.tobytes() == np.load(FIXTURES / "golden.npy").tobytes()


@pytest.mark.parametrize("chunks", [(1024, 512, 3), (512, 512, 3)], ids=["tiles of a chunk", "chunks"])
def test_decoding_is_parallel(photograph, pipeline, monkeypatch, chunks):
    """Two streams wait for each other inside the decoder, so the test passes only if two threads decode at once."""
    array = create(np.concatenate([photograph, photograph[::-1]]), chunks)
    view = open_bottleneck(array.store)
    expected = view[...]
    meeting, decode = threading.Barrier(2, timeout=60), rans.decode

    def met(*arguments):
        meeting.wait()
        return decode(*arguments)

    with ThreadPoolExecutor(2) as pool, zarr.config.set({"threading.max_workers": 2}):
        monkeypatch.setattr("zarr_cae.threads.pool", lambda: pool)
        monkeypatch.setattr(rans, "decode", met)
        assert view[...].tobytes() == expected.tobytes()


READ = """
import sys
import numpy as np
import zarr_cae
array = zarr_cae.open_bottleneck(sys.argv[1])
patch, label = zarr_cae.as_torch_dataset(array, 7, labels=range(5))[2]
assert label == 2
assert np.array_equal(patch, np.load(sys.argv[2])[14:21].transpose(2, 0, 1))
loaded = {"torch", "compressai", "torchvision"} & set(sys.modules)
assert not loaded, loaded
"""


def test_reading_latents_imports_neither_torch_nor_compressai():
    environment = {**os.environ, "ZARR_CAE_WEIGHTS": str(FIXTURES)}
    command = [sys.executable, "-W", "error", "-c", READ, FIXTURES / "golden.zarr", FIXTURES / "golden.npy"]
    subprocess.run(command, check=True, env=environment)


LAYOUTS = {
    "rgb last": ((40, 72, 3), 2),
    "rgb first": ((3, 40, 72), 0),
    "rgb between": ((40, 3, 72), 1),
    "rgb batch": ((2, 40, 72, 3), 3),
    "rgb first, batch": ((2, 3, 40, 72), 1),
    "grey": ((40, 72), None),
    "grey batch": ((2, 40, 72), None),
    "grey channels": ((40, 72, 2), 2),
    "grey channels first": ((2, 4, 40, 72), 1),
    "one grey channel": ((40, 72, 1), 2),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_latents_are_the_input_of_the_synthesis_network(shape, axis, device, photograph):
    """The latents equal the input of the synthesis transform bit for bit, on every device."""
    from zarr_cae.config import Settings
    from zarr_cae.networks.engine import engine_for

    size = int(np.prod(shape))
    data = photograph.ravel()[:size].reshape(shape)
    codec = CAECodec(quality=4, channel_axis=axis)
    array = create(data, shape, serializer=codec)
    found = open_bottleneck(array.store)[...]
    weights = loaded(codec)
    engine, layout, row = engine_for(weights, Settings(device=device)), Layout(shape, axis), weights.row(4)
    received = []
    hook = engine._synthesis.register_forward_pre_hook(lambda _, given: received.append(given[0].cpu().numpy().copy()))
    with zarr.config.set({"cae.device": device}):
        array[...]
    hook.remove()
    received = np.concatenate(received)  # (N, M, h, w), in the order in which the network took the planes
    header = FrameHeader(
        layout.planes, layout.height, layout.width, layout.grey, version=weights.tables[row].frame_version
    )
    (frame,) = chunks_of(array.store).values()
    symbols = tiles.decode(frame, header, weights.tables[row])  # not analysed again: that is inexact
    step, offset = (weights.tensors[name][row][:, None, None] for name in ("step", "offset"))
    given = symbols.astype(np.float32) * step + offset
    assert sorted(plane.tobytes() for plane in received) == sorted(plane.tobytes() for plane in given)

    batch = [n for i, n in enumerate(shape) if i != axis][:-2]
    if axis is None:
        expected = np.moveaxis(given.reshape(*batch, -1, 3, 5), -3, -1)
    else:
        expected = np.moveaxis(given.reshape(*batch, -1, 3, 5), -3, axis)
    assert found.shape == expected.shape
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


@given(
    length=st.integers(0, 300), chunk=st.integers(1, 70), channels=st.integers(1, 9), colours=st.integers(1, 4),
    per_chunk=st.integers(1, 4),
)  # fmt: skip
def test_chunks_of_latents_are_chunks_of_pixels(length, chunk, channels, colours, per_chunk):
    layout = Layout((chunk, 20, per_chunk), 2)
    shape = latent_shape((length, 20, colours), layout, channels)
    chunks = latent_shape(layout.shape, layout, channels)
    for whole, part, pixels, edge in zip(shape, chunks, (length, 20, colours), layout.shape, strict=True):
        assert -(-whole // part) == -(-pixels // edge)
    if chunk % 16 == 0:
        assert shape[0] == -(-length // 16)


def test_shapes_by_hand():
    def shape(pixels, chunk, axis):
        return latent_shape(pixels, Layout(chunk, axis), 192)

    assert shape((4096, 1000, 3), (256, 256, 3), 2) == (256, 63, 192)
    assert shape((3, 100, 100), (3, 50, 30), 0) == (192, 8, 7)
    assert shape((5, 64, 64), (1, 64, 64), None) == (5, 4, 4, 192)
    assert shape((64, 64, 5), (64, 64, 2), 2) == (4, 4, 960)
    assert shape((64, 64, 3), (64, 64, 1), 2) == (4, 4, 576)
    assert shape((64, 64, 7), (64, 64, 3), 2) == (4, 4, 576)


def test_codec_is_a_value():
    codec = CAEBottleneckCodec(CAECodec(quality=3, channel_axis=2), (64, 48, 3))
    same = CAEBottleneckCodec.from_dict(codec.to_dict())
    assert same == codec
    assert hash(same) == hash(codec)
    assert codec.to_dict()["configuration"]["chunk_shape"] == [64, 48, 3]
    assert zarr.registry.get_codec_class("cae_bottleneck") is CAEBottleneckCodec


@pytest.mark.parametrize("shape", [None, "64", [64, "48", 3], [64, True, 3], [64, 0, 3], [64], []])
def test_wrong_chunk_shapes_are_refused(shape):
    document = CAECodec(channel_axis=2).to_dict()
    configuration = {**document["configuration"], "chunk_shape": shape}
    with pytest.raises(CAEConfigurationError, match="cae: "):
        CAEBottleneckCodec.from_dict({"name": "cae_bottleneck", "configuration": configuration})


def test_unresolved_axis_is_refused():
    with pytest.raises(CAEConfigurationError, match="auto"):
        CAEBottleneckCodec(CAECodec(), (64, 48, 3))


def test_writing_is_refused(pipeline):
    codec = CAEBottleneckCodec(CAECodec(quality=1, channel_axis=2), (32, 32, 3))
    channels = loaded(codec.cae).latent_channels
    array = zarr.create_array(
        MemoryStore(), shape=(2, 2, channels), chunks=(2, 2, channels), dtype="float32", serializer=codec,
        compressors=None,
    )  # fmt: skip
    with pytest.raises(CAEConfigurationError, match="read only"):
        array[...] = 1


def test_an_array_of_another_shape_is_refused(photograph, pipeline):
    array = create(photograph[:32, :32], (32, 32, 3))
    codec = CAEBottleneckCodec(array.metadata.codecs[0], (32, 32, 3))
    store, channels = MemoryStore(), loaded(codec.cae).latent_channels
    wrong = zarr.create_array(
        store, shape=(2, 3, channels), chunks=(2, 3, channels), dtype="float32", serializer=codec, compressors=None
    )
    write(store, "c/0/0/0", read(array.store, "c/0/0/0"))
    with pytest.raises(CAEConfigurationError, match=rf"\(2, 2, {channels}\).*\(2, 3, {channels}\)"):
        wrong[...]


def test_damaged_chunks_are_refused(photograph, pipeline):
    array = create(photograph[:64, :64], (32, 32, 3))
    store = array.store
    content = bytearray(read(store, "c/1/0/0"))
    content[len(content) // 2] ^= 1
    write(store, "c/1/0/0", bytes(content))
    view = open_bottleneck(store)
    assert np.isfinite(view[:2]).all()
    with pytest.raises(CAEDataError, match="damaged"):
        view[2:]


@pytest.fixture(scope="module")
def coded(photograph):
    """Return a codec of latents, its tables and header, a frame with one stream, and its latents."""
    array = create(photograph[:96, :80], (96, 80, 3), serializer=CAECodec(quality=8))
    view = open_bottleneck(array.store)
    (frame,) = chunks_of(array.store).values()
    return view.metadata.codecs[0], frame, view[...]


def decoded(codec, frame, shape):
    spec = ArraySpec(shape, Float32(), np.float32(0), ArrayConfig.from_dict({}), PROTOTYPE)
    (found,) = run(codec.decode([(PROTOTYPE.buffer.from_bytes(frame), spec)]))
    return found.as_numpy_array()


def header_and_tables(codec):
    weights, layout = loaded(codec.cae), codec.layout
    tables = weights.tables[weights.row(codec.cae.quality)]
    version = tables.frame_version
    return FrameHeader(layout.planes, layout.height, layout.width, layout.grey, version=version), tables


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_streams_with_sound_checksums_are_refused(coded, data):
    codec, frame, expected = coded
    expected_header, tables = header_and_tables(codec)
    header, (stream,) = unpack(frame, expected_header)
    changed = bytearray(stream)
    at = data.draw(st.integers(0, len(changed) - 1), label="at")
    match data.draw(st.sampled_from(["cut", "flip", "insert", "remove", "tail"]), label="kind"):
        case "cut":
            del changed[at:]
        case "flip":
            changed[at] ^= data.draw(st.integers(1, 255))
        case "insert":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=5))
        case "remove":
            del changed[at : at + data.draw(st.integers(1, 5))]
        case "tail":
            changed += data.draw(st.binary(min_size=1, max_size=5))
    damaged = pack(header, [bytes(changed)])
    try:
        found = decoded(codec, damaged, expected.shape)
    except CAEDataError:
        return
    (symbols,) = tiles.decode(damaged, header, tables)
    # The encoder writes every accepted stream for the same symbols.
    assert rans.encode(symbols, tables, 2) == bytes(changed)
    assert np.array_equal(found, expected) == (changed == stream)


@pytest.mark.parametrize("shape", [(1 << 40, 96, 80, 3), (1 << 31, 1 << 31, 3), (96, 80, (1 << 31) - 1)])
def test_a_chunk_shape_that_no_frame_has_allocates_nothing(coded, shape):
    codec, frame, _ = coded
    huge = CAEBottleneckCodec(codec.cae if len(shape) == 3 else CAECodec(quality=8, channel_axis=3), shape)
    with pytest.raises(CAEError):
        decoded(huge, frame, latent_shape(shape, huge.layout, loaded(huge.cae).latent_channels))


@pytest.mark.parametrize("size", [1, 3])
def test_batches_of_any_size_hold_missing_chunks(photograph, size):
    array = create(photograph[:96, :64], (32, 32, 3))
    expected = open_bottleneck(array.store)[...]
    run(array.store.delete("c/1/1/0"))
    expected[2:4, 2:] = np.nan
    with zarr.config.set({"codec_pipeline.batch_size": size}):
        found = open_bottleneck(array.store)[...]
    assert found.tobytes() == expected.tobytes()


def test_key_encoding_leaves_out_the_last_axis():
    encoding = WithoutLatentAxis.from_dict(
        {
            "name": "cae_bottleneck",
            "configuration": {"encoding": {"name": "v2", "configuration": {"separator": "/"}}},
        }
    )
    assert encoding.encode_chunk_key((4, 5, 0)) == "4/5"
    assert encoding.decode_chunk_key("4/5") == (4, 5, 0)
    assert WithoutLatentAxis.from_dict(encoding.to_dict()) == encoding
    assert hash(encoding)
