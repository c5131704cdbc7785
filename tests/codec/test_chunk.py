"""Whole chunks and latents on a device, with the CPU as the device: arrays stay there."""

import argparse

import numpy as np
import pytest
import torch
import zarr
from zarr.core.buffer import gpu
from zarr.registry import register_ndbuffer

from zarr_cae import CAECodec, as_torch_dataset, open_bottleneck
from zarr_cae.cli import archive, bottleneck
from zarr_cae.errors import CAEDataError
from zarr_cae.networks.engine import Engine
from zarr_cae.pixels.device import supported

ON_HOST = []
"""The shapes of device arrays that were copied to the host."""


class DeviceArray:
    """Stands in for a cupy array, with the operations that zarr and this package use, and DLPack."""

    def __init__(self, array):
        self._array = array

    dtype = property(lambda self: self._array.dtype)
    shape = property(lambda self: self._array.shape)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)

    def __len__(self):
        return len(self._array)

    def __getitem__(self, key):
        return DeviceArray(self._array[key])

    def __setitem__(self, key, value):
        self._array[key] = value._array if isinstance(value, DeviceArray) else value

    def __eq__(self, other):
        return self._array == other

    __hash__ = None

    def reshape(self, *shape, **keywords):
        return DeviceArray(self._array.reshape(*shape, **keywords))

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")  # as cupy does

    def __dlpack__(self, **keywords):
        return self._array.__dlpack__()

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def to_host(self):
        ON_HOST.append(self.shape)
        return self._array


class DeviceBuffer(gpu.NDBuffer):
    """Stands in for the buffer that `zarr.config.enable_gpu()` makes zarr use."""

    def __init__(self, array):
        if isinstance(array, torch.Tensor | np.ndarray):
            array = DeviceArray(np.asarray(array))
        self._data = array

    @classmethod
    def create(cls, *, shape, dtype, order="C", fill_value=None):
        result = cls(np.empty(shape, dtype, order))
        if fill_value is not None:
            result._data[...] = fill_value
        return result

    @classmethod
    def empty(cls, shape, dtype, order="C"):
        return cls(np.empty(shape, dtype, order))

    @classmethod
    def from_numpy_array(cls, array_like):
        return cls(np.asarray(array_like))

    def as_numpy_array(self):
        return self._data.to_host()

    def __getitem__(self, key):
        return DeviceBuffer(self._data[key])

    def __setitem__(self, key, value):
        self._data[key] = value._data if isinstance(value, DeviceBuffer) else value.as_numpy_array()


register_ndbuffer(DeviceBuffer, qualname="test_chunk.DeviceBuffer")


@pytest.fixture
def whole(monkeypatch):
    """Let the CPU's engine take whole chunks, as on a GPU. Yield the list of its methods that did so."""
    taken = []

    def recorded(direction):
        usual = getattr(Engine, direction)

        def call(self, source, form, *settings):
            if self._runs_whole(form):
                taken.append(direction)
            return usual(self, source, form, *settings)

        return call

    for direction in ("analyse_chunk", "synthesise_chunk"):
        monkeypatch.setattr(Engine, direction, recorded(direction))
    monkeypatch.setattr(Engine, "_runs_whole", lambda self, form: supported(form.dtype))
    with zarr.config.set({"cae.device": "cpu"}):
        yield taken


@pytest.fixture
def on_device():
    """Put zarr's arrays on the device, as `zarr.config.enable_gpu()` does; the networks run on the CPU."""
    with zarr.config.set({"ndbuffer": "test_chunk.DeviceBuffer", "cae.device": "cpu"}):
        yield


def written(pixels, chunks, **keywords):
    array = zarr.create_array(
        {}, shape=pixels.shape, chunks=chunks, dtype=pixels.dtype, serializer=CAECodec(quality=4, **keywords),
        compressors=None, fill_value=keywords.get("value_range", (0,))[0],
    )  # fmt: skip
    array[...] = pixels
    return array


@pytest.mark.parametrize(
    ("select", "chunks", "keywords"),
    [
        (lambda p: p[:96, :80], (48, 80, 3), {}),
        (lambda p: p[:96, :80].transpose(2, 0, 1), (3, 50, 50), {"channel_axis": 0}),
        (lambda p: p[:40, :50, 0], (40, 50), {}),
        (lambda p: p[:64, :64].astype(np.uint16) * 100 + 7, (64, 64, 3), {"value_range": (7, 25507)}),
        (lambda p: p[:64, :64, :2] / np.float32(255), (64, 64, 2), {"value_range": (0.0, 1.0), "channel_axis": 2}),
        (lambda p: p[:32, :32].astype(np.int64), (32, 32, 3), {"value_range": (0, 255)}),
    ],
)
def test_chunks_given_whole_are_those_given_as_planes(
    photograph, pipeline, whole, monkeypatch, select, chunks, keywords
):
    pixels = select(photograph)
    there = written(pixels, chunks, **keywords)
    back = there[...]
    assert bool(whole) == supported(pixels.dtype)
    monkeypatch.undo()
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        level = (keywords["value_range"][1] - keywords["value_range"][0]) / 255 if "value_range" in keywords else 1
        np.testing.assert_allclose(there[...].astype(float), back.astype(float), atol=1.01 * level)
        expected = written(pixels, chunks, **keywords)[...]
    assert back.dtype == expected.dtype
    differ = np.abs(back.astype(float) - expected.astype(float)) > 1.01 * level
    assert differ.mean() < 1e-3  # a latent may be rounded to the other side


@pytest.mark.usefixtures("fastest")
def test_arrays_of_the_device_stay_there(photograph, pipeline, whole, on_device):
    pixels = np.array(photograph[:128, :96])
    array = zarr.create_array(
        {}, shape=pixels.shape, chunks=(64, 96, 3), dtype="uint8", serializer=CAECodec(quality=4), compressors=None
    )
    ON_HOST.clear()
    array[...] = DeviceArray(pixels)
    back = array[...]
    assert not ON_HOST
    assert isinstance(back, DeviceArray)
    assert sorted(set(whole)) == ["analyse_chunk", "synthesise_chunk"]
    # A part of a chunk is coded on the host, and returned to the device.
    part = array[10:30, 5:50]
    array[10:30, 5:50] = DeviceArray(pixels[10:30, 5:50].copy())
    assert np.abs(back._array.astype(int) - pixels).mean() < 6
    np.testing.assert_allclose(part._array.astype(int), back._array[10:30, 5:50], atol=1)


def test_arrays_of_the_device_are_coded_by_networks_elsewhere(photograph, pipeline, on_device):
    pixels = np.array(photograph[:64, :64])
    array = zarr.create_array(
        {}, shape=pixels.shape, chunks=pixels.shape, dtype="uint8", serializer=CAECodec(quality=4), compressors=None
    )
    array[...] = DeviceArray(pixels)
    back = array[...]
    assert np.abs(back._array.astype(int) - pixels).mean() < 6


def test_latents_come_onto_the_device_as_they_are(photograph, pipeline, on_device):
    with zarr.config.set({"ndbuffer": "zarr.buffer.cpu.NDBuffer"}):
        array = written(photograph[:64, :96], (32, 32, 3))
        expected = open_bottleneck(array.store)[...]
    found = open_bottleneck(array.store)[...]
    assert isinstance(found, DeviceArray)
    assert found._array.tobytes() == expected.tobytes()


def test_patches_and_copies_of_arrays_of_the_device_are_on_the_host(photograph, pipeline, on_device, tmp_path):
    path = tmp_path / "a.zarr"
    with zarr.config.set({"ndbuffer": "zarr.buffer.cpu.NDBuffer"}):
        zarr.create_array(
            path, data=photograph[:64, :96], chunks=(32, 32, 3), serializer=CAECodec(quality=4), compressors=None
        )
        latents, pixels = open_bottleneck(path)[...], zarr.open_array(path, mode="r")[...]
    patch = as_torch_dataset(open_bottleneck(path), 2)[5]
    assert type(patch) is np.ndarray
    assert patch.tobytes() == np.ascontiguousarray(latents[2:4, 4:6].transpose(2, 0, 1)).tobytes()
    for name in ("l.npy", "l.zarr"):
        bottleneck.bottleneck(argparse.Namespace(array=path, latents=tmp_path / name, overwrite=False))
    assert np.load(tmp_path / "l.npy").tobytes() == latents.tobytes()
    assert zarr.open_array(tmp_path / "l.zarr", mode="r")[...]._array.tobytes() == latents.tobytes()
    archive.decode(argparse.Namespace(array=path, image=tmp_path / "p.npy"))
    np.testing.assert_allclose(np.load(tmp_path / "p.npy").astype(int), pixels, atol=1)


def test_bad_values_are_refused(whole):
    store = {}
    array = zarr.create_array(
        store, shape=(32, 32), chunks=(32, 32), dtype="int16", serializer=CAECodec(quality=4, value_range=(0, 100)),
        compressors=None,
    )  # fmt: skip
    pixels = np.full((32, 32), 50, np.int16)
    pixels[10, 3] = 101
    with pytest.raises(CAEDataError, match="101"):
        array[...] = pixels
    assert whole == ["analyse_chunk"]
    assert list(store) == ["zarr.json"]
