"""Chunks as tensors: the same numbers as in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_cae.errors import CAEDataError
from zarr_cae.pixels import convert
from zarr_cae.pixels import device as on_device
from zarr_cae.pixels.layout import Layout

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]
RANGES = {
    "uint8": (0, 255), "int8": (-100, 50), "uint16": (100, 60000), "int16": (-32768, 32767), "float16": (-2.0, 3.5),
    "float32": (1e-3, 7.0), "float64": (1e6, 1e6 + 1e-3),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RANGES)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_there_and_back_as_on_the_host(device, name, data):
    dtype, value_range = np.dtype(name), RANGES[name]
    shape = tuple(data.draw(st.lists(st.integers(1, 20), min_size=3, max_size=5)))
    axis = data.draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    colours = 0 if axis is None or shape[axis] < 3 else shape[axis]
    layout = Layout(shape, axis, data.draw(st.permutations(range(colours)).map(lambda order: tuple(order[:3]) or None)))
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    chunk = (value_range[0] + random.random(shape) * (value_range[1] - value_range[0])).astype(dtype)
    chunk = chunk.clip(*value_range)
    assert on_device.supported(dtype)
    there = on_device.to_tensor(chunk, torch.device(device))
    planes = on_device.to_planes(there, layout, value_range)
    expected = convert.to_planes(chunk, layout, value_range)
    assert planes.dtype == torch.float32
    np.testing.assert_allclose(planes.cpu().numpy(), expected, rtol=0, atol=2e-7)
    wild = torch.from_numpy(expected + random.normal(0, 0.3, expected.shape).astype(np.float32)).to(device)
    back = on_device.to_chunk(wild, layout, dtype, value_range)
    host = convert.to_chunk(wild.cpu().numpy(), layout, dtype, value_range)
    assert back.is_contiguous()
    found = back.cpu().numpy()
    assert found.dtype == dtype
    assert found.shape == shape
    np.testing.assert_allclose(
        found.astype(float), host.astype(float), rtol=1e-3 if name == "float16" else 1e-12, atol=0
    )  # float16 may be rounded twice


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
def test_wide_integers_are_left_to_the_host(dtype):
    assert not on_device.supported(np.dtype(dtype))


@pytest.mark.parametrize(("name", "bad"), [("int16", 200), ("uint16", 65535), ("float32", np.nan), ("float32", 1.5)])
def test_values_outside_the_range_are_refused_in_the_same_words(name, bad):
    chunk, layout = np.zeros((4, 5), name), Layout((4, 5), None)
    chunk[1, 2] = bad
    value_range = (0, 1) if name == "float32" else (0, 100)
    messages = []
    for make in (lambda: convert.to_planes(chunk, layout, value_range),
                 lambda: on_device.to_planes(torch.from_numpy(chunk), layout, value_range)):  # fmt: skip
        with pytest.raises(CAEDataError) as caught:
            make()
        messages.append(str(caught.value).split("not fit")[1])
    assert messages[0] == messages[1]


class OnDevice:
    """An array whose values can only be read through DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_arrays_of_any_order_and_of_the_device():
    chunk = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)[:, ::2, ::-1]
    chunk.setflags(write=False)
    cpu = torch.device("cpu")
    np.testing.assert_array_equal(on_device.to_tensor(chunk, cpu).numpy(), chunk)
    np.testing.assert_array_equal(on_device.to_tensor(OnDevice(torch.arange(5)), cpu).numpy(), np.arange(5))


@pytest.mark.parametrize("value_range", [(0, 65535), (0.0, 1.0)])
def test_the_square_root_is_that_of_the_host(value_range):
    planes = np.random.default_rng(0).random((2, 3, 16, 32)).astype(np.float32)
    rooted = convert.to_root(planes, value_range)
    np.testing.assert_allclose(on_device.to_root(torch.from_numpy(planes), value_range), rooted, atol=1e-7)
    back = on_device.from_root(torch.from_numpy(rooted), value_range)
    np.testing.assert_allclose(back, convert.from_root(rooted, value_range), atol=1e-7)
