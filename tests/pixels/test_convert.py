"""Chunks to planes and back: value range, dtype, padding, crop, rounding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_cae.errors import CAEConfigurationError, CAEDataError
from zarr_cae.pixels.convert import from_root, resolve_value_range, to_chunk, to_planes, to_root
from zarr_cae.pixels.layout import Layout

BYTE = (0, 255)


@settings(deadline=None)
@given(st.data())
def test_planes_give_the_chunk_back(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 20), min_size=3, max_size=5)))
    axis = data.draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    layout = Layout(shape, axis)
    chunk = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    planes = to_planes(chunk, layout, BYTE)
    assert planes.dtype == np.float32
    assert planes.shape[0] == layout.planes
    assert planes.shape[2] % 16 == 0
    assert planes.shape[3] % 16 == 0
    assert planes.min() >= 0
    assert planes.max() <= 1
    np.testing.assert_array_equal(to_chunk(planes, layout, chunk.dtype, BYTE), chunk)


def test_channels_of_a_plane_are_those_of_the_pixel():
    chunk = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    planes = to_planes(chunk, Layout(chunk.shape, 3), BYTE)
    assert np.rint(planes[1, :, 2, 3] * 255).tolist() == chunk[1, 2, 3].tolist()


def test_padding_repeats_the_edge_and_input_stays_as_it_is():
    chunk = np.random.default_rng(0).integers(0, 256, (17, 3), np.uint8)
    chunk.setflags(write=False)
    planes = to_planes(chunk, Layout(chunk.shape, None), BYTE)
    assert planes.shape == (1, 1, 32, 16)
    np.testing.assert_array_equal(planes[0, 0, :17, 3:], np.repeat(planes[0, 0, :17, 2:3], 13, 1))
    np.testing.assert_array_equal(planes[0, 0, 17:], np.repeat(planes[0, 0, 16:17], 15, 0))


@pytest.mark.parametrize(
    ("dtype", "value_range"),
    [("uint16", (0, 4095)), ("int16", (-1000, 1000)), ("float32", (0.1, 0.3)), ("float64", (-0.1, 0.3)),
     ("float16", (0, 1)), ("uint8", (10, 20)), ("uint32", (0, 2**32 - 1)), ("int64", (-5, 2**40)),
     (">u2", (0, 65535))],
)  # fmt: skip
def test_value_ranges(dtype, value_range):
    low, high = value_range
    values = np.linspace(low, high, 64).astype(dtype).clip(low, high).reshape(8, 8)
    layout = Layout(values.shape, None)
    back = to_chunk(to_planes(values, layout, value_range), layout, np.dtype(dtype), value_range)
    assert back.dtype == np.dtype(dtype)
    assert np.abs(back.astype(float) - values.astype(float)).max() <= max(1e-3, 1e-6) * (high - low)
    to_planes(back, layout, value_range)  # decoded values can be encoded again: the ends are not rounded outwards


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("int8", -128, 127), ("int16", -32768, 32767), ("uint16", 100, 65535), ("int32", -(2**31), 2**31 - 1),
     ("int32", 10**9, 10**9 + 255), ("uint32", 2**31, 2**32 - 1), ("int64", -(2**63), 2**63 - 1),
     ("int64", 10**18, 10**18 + 255), ("uint64", 0, 2**64 - 1), ("uint64", 2**63, 2**63 + 255)],
)  # fmt: skip
def test_integers_do_not_overflow_and_small_ranges_far_from_0_are_exact(dtype, low, high):
    """Samples are exact at the ends of ranges, and between, even if float32 can't hold them."""
    values = np.array([low + (high - low) * n // 255 for n in range(256)], dtype).reshape(16, 16)
    layout = Layout(values.shape, None)
    value_range = resolve_value_range(np.dtype(dtype), (low, high))
    planes = to_planes(values, layout, value_range)
    np.testing.assert_allclose(planes.ravel(), np.linspace(0, 1, 256), atol=0.005)
    back = to_chunk(planes, layout, np.dtype(dtype), value_range)
    assert back.dtype == np.dtype(dtype)
    errors = [abs(int(a) - int(b)) for a, b in zip(values.ravel(), back.ravel(), strict=True)]
    assert max(errors) <= (high - low) * 2.0**-24
    to_planes(back, layout, value_range)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("float64", 1e9, 1e9 + 1), ("float64", -8e307, 8e307), ("float64", 0, 1e-300), ("float32", -3e38, 3e38),
     ("float32", 1e6, 1e6 + 4), ("float16", -65504, 65504)],
)  # fmt: skip
def test_float_ranges_that_float32_cannot_hold(dtype, low, high):
    values = np.linspace(low, high, 64).astype(dtype).clip(low, high).reshape(8, 8)
    layout = Layout(values.shape, None)
    value_range = resolve_value_range(np.dtype(dtype), (low, high))
    planes = to_planes(values, layout, value_range)
    back = to_chunk(planes, layout, np.dtype(dtype), value_range)
    assert np.abs(back.astype(np.longdouble) - values).max() <= 1e-3 * (np.longdouble(high) - low)
    to_planes(back, layout, value_range)


@pytest.mark.parametrize("wild", [-0.5, 1.5, 9.0])
def test_decoded_values_stay_in_range(wild):
    layout = Layout((16, 16), None)
    back = to_chunk(np.full((1, 1, 16, 16), wild, np.float32), layout, np.dtype("uint8"), BYTE)
    assert (back == (0 if wild < 0 else 255)).all()


@pytest.mark.parametrize("bad", [-1.0, 2.0, np.nan, np.inf])
def test_values_outside_the_range_are_refused(bad):
    chunk = np.full((4, 4), 0.5, np.float32)
    chunk[1, 1] = bad
    with pytest.raises(CAEDataError, match="value_range"):
        to_planes(chunk, Layout(chunk.shape, None), (0, 1))


@pytest.mark.parametrize(
    ("dtype", "value_range", "message"),
    [
        ("uint16", None, "needs value_range"), ("float32", None, "needs value_range"), ("complex64", (0, 1), "dtype"),
        ("bool", (0, 1), "dtype"), ("uint8", (0, 256), "ascending pair"), ("uint16", (5, 5), "ascending pair"),
        ("float32", (1, 0), "ascending pair"), ("M8[s]", None, "dtype"), ("int16", (0.5, 7), "ascending pair"),
        ("float64", (-1e308, 1e308), "ascending pair"), ("float16", (0, 70000), "ascending pair"),
    ],
)  # fmt: skip
def test_value_range_refused(dtype, value_range, message):
    with pytest.raises(CAEConfigurationError, match=message):
        resolve_value_range(np.dtype(dtype), value_range)


@pytest.mark.parametrize("value_range", [(0, 65535), (100, 4195), (0, 255), (0.0, 1.0), (-5.0, 3.5)])
def test_the_square_root_is_monotone_and_comes_back(value_range):
    x = np.linspace(0, 1, 65536, dtype=np.float32).reshape(1, 1, 256, 256)
    y = to_root(x, value_range)
    assert y.dtype == np.float32
    assert (y.min(), y.max()) == (0, 1)
    assert (np.diff(y.ravel()) >= 0).all()
    np.testing.assert_allclose(from_root(y, value_range), x, rtol=0, atol=2e-7)


def test_every_uint16_comes_back_from_its_square_root():
    chunk = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    layout, value_range = Layout(chunk.shape, None), (0, 65535)
    back = from_root(to_root(to_planes(chunk, layout, value_range), value_range), value_range)
    np.testing.assert_array_equal(to_chunk(back, layout, chunk.dtype, value_range), chunk)


def test_the_square_root_makes_photon_noise_even():
    random = np.random.default_rng(0)
    spread = [to_root((random.poisson(mean, 9999) / 4095).astype(np.float32), (0, 4095)).std() for mean in (9, 99, 999)]
    assert max(spread) < 1.1 * min(spread)


def test_nan_is_named():
    with pytest.raises(CAEDataError, match=r"pixels have NaN.*nan_to_num"):
        to_planes(np.full((4, 4), np.nan, np.float32), Layout((4, 4), None), (0, 1))
