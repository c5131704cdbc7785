"""Masks and exact pixels: round trips, and one error for each malformation."""

from __future__ import annotations

import contextlib
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zarr_cae.coder.contours import decode_contours, encode_contours
from zarr_cae.coder.lossless import decode_mask, decode_pixels, encode_mask, encode_pixels
from zarr_cae.errors import CAEConfigurationError, StreamError

DTYPES = [np.dtype(name) for name in ("u1", "i1", "<u2", ">i2", "<i4", "<f2", "<f4", ">f4", "<u8", "<f8")]
shapes = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.bool_, st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(1, 30), st.integers(1, 30)))
)
def test_masks_come_back(mask):
    mask[-1, -1, -1, -1] = True
    np.testing.assert_array_equal(decode_mask(encode_mask(mask), mask.shape), mask)


@pytest.mark.parametrize("kind", ["disc", "border", "all", "stripes"])
def test_usual_masks_cost_next_to_nothing(kind):
    y, x = np.mgrid[:512, :512]
    mask = {
        "disc": (y - 256) ** 2 + (x - 256) ** 2 > 200**2,
        "border": (y < 20) | (x > 400),
        "all": y >= 0,
        "stripes": y % 7 == 0,
    }[kind]
    section = encode_mask(np.broadcast_to(mask, (1, 3, 512, 512)))
    assert 8 * len(section) < 0.02 * 512 * 512  # bits per pixel


OUTLINES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.floats(0.02, 0.98)).map(
    lambda drawn: np.random.default_rng(drawn[2]).random(drawn[:2]) < drawn[3]
)


@settings(max_examples=100, deadline=None)
@given(OUTLINES)
def test_contours_come_back(rows):
    content = encode_contours(rows, 10**6)
    np.testing.assert_array_equal(decode_contours(content, *rows.shape), rows)
    assert encode_contours(rows, len(content)) == content
    assert encode_contours(rows, len(content) - 1) is None


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (b"", "malformed"), (b"\x80", "malformed"), (b"\x04\x80\x00", "malformed"),
        (b"\xff" * 5 + b"\x01", "malformed"),
        (b"\x04", "0 rows"), (b"\x00\x00", "0 rows"), (b"\x05\x00", "5 rows"), (b"\x04\x0a", "4 rows of 10"),
        (b"\x04\x02\x01\x01", "4 rows of 2"), (b"\x04\x00\x00", "1 numbers after"), (b"\x03\x00", "0 rows"),
        (b"\x04\x01\x09\x00\x00\x00", "outside"), (b"\x04\x01\x00\x01\x00\x00", "outside"),
        (b"\x04\x02\x01\x00" + bytes(6), "out of order"), (b"\xff\xff\xff\xff\x0f\x02\x01\x01", "4294967295 rows"),
        (b"\xff\xff\xff\xff\x1f\x02\x01\x01", "2\\^32"),
    ],
)  # fmt: skip
def test_malformed_contours_are_refused(numbers, message):
    with pytest.raises(StreamError, match=message):
        decode_contours(numbers, 4, 9)


def test_the_older_form_of_masks_stays_readable():
    mask = np.random.default_rng(0).random((2, 3, 20, 13)) < 0.3
    changed = mask.copy()
    changed[:, 1:] ^= mask[:, :-1]
    packed = np.packbits(changed, axis=-1, bitorder="little")
    packed[..., 1:, :] ^= packed[..., :-1, :].copy()
    np.testing.assert_array_equal(decode_mask(zlib.compress(packed.tobytes()), mask.shape), mask)


def test_noise_costs_a_bit_a_sample():
    mask = np.random.default_rng(0).random((1, 1, 256, 256)) < 0.5
    assert 8 * len(encode_mask(mask)) < 1.01 * mask.size


@pytest.mark.parametrize("mask", [np.zeros((1, 1, 4, 4), bool), np.ones((4, 4), bool), np.ones((1, 1, 4, 4), np.uint8)])
def test_invalid_masks_are_refused(mask):
    with pytest.raises(CAEConfigurationError, match=r"^cae: mask must be bool"):
        encode_mask(mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), shape=shapes)
def test_pixels_come_back_bit_by_bit(dtype, data, shape):
    raw = data.draw(hnp.arrays(np.uint8, (*shape, dtype.itemsize)))
    pixels = raw.view(dtype)[..., 0]
    got = decode_pixels(encode_pixels(pixels), shape, dtype)
    assert got.dtype == dtype
    assert got.shape == shape
    assert got.tobytes() == pixels.tobytes()


def test_pixels_that_are_not_contiguous_come_back():
    pixels = np.arange(2 * 40 * 60, dtype=np.uint16).reshape(60, 40, 2).T[:, ::2, ::3]
    np.testing.assert_array_equal(decode_pixels(encode_pixels(pixels), pixels.shape, pixels.dtype), pixels)


def test_each_predictor_is_the_shortest_for_something():
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:64, :64]
    kinds = {
        0: rng.choice(np.array([3, 200], np.uint8), (1, 64, 64)),
        1: np.cumsum(rng.integers(0, 2, (1, 64, 64)), axis=2).astype(np.uint8)
        + rng.integers(0, 255, (1, 64, 1), np.uint8),
        2: (3 * y + 2 * x + rng.integers(0, 2, (64, 1)).cumsum(0))[None].astype(np.uint16),
    }
    assert {encode_pixels(pixels)[0] for pixels in kinds.values()} >= {0, 1, 2}


def test_a_pattern_costs_next_to_nothing():
    y, x = np.mgrid[:512, :512]
    assert len(encode_pixels(((y + x) % 2 * 255)[None].astype(np.uint8))) < 2000


MASK = encode_mask(np.ones((1, 1, 8, 12), bool))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (b"", "can't hold"),
        (b"garbage", "not a zlib stream"),
        (MASK[:-1], "no proper end"),
        (MASK + b"x", "1 bytes after it"),
        (zlib.compress(bytes(15)), "got 15"),
        (zlib.compress(bytes(17)), "got 17 bytes"),
        (zlib.compress(bytes(1 << 20)), "got 17 bytes"),
        (zlib.compress(bytes(16)), "at least one sample"),
        (zlib.compress(b"\0\xf0" + bytes(14)), "after the last column"),
        (b"\1", "no proper end"),
        (b"\1" + zlib.compress(b"\x08\x00"), "at least one sample"),
        (b"\1" + zlib.compress(b"\x08\x01" + bytes(15)), "of 16 bytes"),
        (b"\1" + zlib.compress(b"\x08\x01" + bytes(8)) + b"x", "1 bytes after it"),
    ],
)
def test_malformed_masks(section, message):
    with pytest.raises(StreamError, match=f"^cae: mask section.*{message}"):
        decode_mask(section, (1, 1, 8, 12))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (b"", "predictor of 0 to 2; got no bytes"),
        (b"\3" + zlib.compress(bytes(12)), "got predictor 3"),
        (b"\0", "can't hold"),
        (b"\0" + zlib.compress(bytes(11)), "got 11"),
        (b"\1" + zlib.compress(bytes(13)), "got 13 bytes"),
        (b"\2" + zlib.compress(bytes(12)) + b"x", "1 bytes after it"),
        (b"\2" + zlib.compress(bytes(12))[:-2], "no proper end"),
    ],
)
def test_malformed_pixels(section, message):
    with pytest.raises(StreamError, match=f"^cae: pixel section.*{message}"):
        decode_pixels(section, (1, 2, 3), np.dtype(np.uint16))


def test_a_short_section_of_a_huge_chunk_is_refused_before_anything_is_allocated():
    with pytest.raises(StreamError, match="can't hold"):
        decode_mask(MASK, (1 << 20, 3, 1 << 20, 1 << 20))
    with pytest.raises(StreamError, match="0 rows"):
        decode_mask(b"\1" + zlib.compress(b"\x08\x00"), (1 << 20, 3, 1 << 20, 1 << 20))
    with pytest.raises(StreamError, match="can't hold"):
        decode_pixels(b"\0" + zlib.compress(bytes(100)), (3, 1 << 20, 1 << 20), np.dtype(np.float64))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_arbitrary_bytes(junk):
    for decode, shape in ((decode_mask, (1, 1, 4, 9)), (lambda s, n: decode_pixels(s, n, np.dtype("u1")), (1, 4, 9))):
        with contextlib.suppress(StreamError):
            assert decode(junk, shape).shape == shape
