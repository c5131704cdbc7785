"""The correction section of a tile: round trips, and one error for each malformation."""

from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_cae.coder.correction import SCALES, Correction, decode_correction, encode_correction
from zarr_cae.errors import CAEConfigurationError, StreamError

SHAPE = (3, 5)
NUMBERS = {1: 12, 3: 14}


def numbers_of(components: int, value: int = 0) -> np.ndarray:
    return np.full((components, NUMBERS[components]), value, np.int64)


@st.composite
def corrections(draw):
    components = draw(st.sampled_from([1, 3]))
    size = components * NUMBERS[components]
    numbers = draw(st.lists(st.integers(-32767, 32767) | st.integers(-3, 3), min_size=size, max_size=size))
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    where = None
    if draw(st.booleans()):
        bits = draw(st.integers(1, 2 ** (shape[0] * shape[1]) - 1))
        where = np.array([bits >> n & 1 for n in range(shape[0] * shape[1])], bool).reshape(shape)
    numbers = np.array(numbers).reshape(components, -1)
    return Correction(draw(st.sampled_from(SCALES)), draw(st.integers(1, 255)), numbers, where), shape


@settings(max_examples=150, deadline=None)
@given(given=corrections())
def test_round_trip(given):
    correction, shape = given
    section = encode_correction(correction)
    for content in (section, memoryview(section)):
        found = decode_correction(content, correction.components, shape)
        assert (found.scale, found.limit) == (correction.scale, correction.limit)
        np.testing.assert_array_equal(found.numbers, correction.numbers)
        if correction.where is None:
            assert found.where is None
        else:
            np.testing.assert_array_equal(found.where, correction.where)


def test_bytes_are_those_of_the_document():
    numbers = np.arange(12)[None] * [[1, -1] * 6]
    numbers[0, 3] = -32767
    where = np.zeros(SHAPE, bool)
    where[0, 1] = where[2, 4] = True
    section = encode_correction(Correction("root", 200, numbers, where))
    assert section == bytes([3, 200, 0, 1, 4, 0xFD, 0xFF, 3, 8, 9, 12, 13, 16, 17, 20, 21, 2, 0x40])


def test_the_smallest_sections():
    for components, size in NUMBERS.items():
        section = encode_correction(Correction("uniform", 1, numbers_of(components)))
        assert section == bytes([0, 1]) + bytes(components * size)


PLAIN = bytes([0, 7]) + bytes(12)
PARTIAL = bytes([2, 7]) + bytes(12) + b"\x01\x40"
MALFORMED = {
    "no bytes": (b"", "form of 0 to 3"),
    "one byte": (b"\x00", "form of 0 to 3"),
    "unknown form": (b"\x04" + PLAIN[1:], "form of 0 to 3"),
    "high bit of the form": (b"\x80" + PLAIN[1:], "form of 0 to 3"),
    "no limit": (b"\x00\x00" + PLAIN[2:], "limit above 0"),
    "no numbers": (PLAIN[:2], "must have 12 numbers; got 0"),
    "a number too few": (PLAIN[:-1], "must have 12 numbers; got 11"),
    "a number that does not end": (PLAIN[:-1] + b"\x80", "must have 12 numbers; got 11"),
    "a number too many": (PLAIN + b"\x00", "1 bytes after its last number"),
    "numbers of colours": (bytes([0, 7]) + bytes(42), "at most 38 bytes; got 44"),
    "a number too large": (PLAIN[:-1] + b"\xff\xff\x03", "-32767 to 32767; got 65535"),
    "a number much too large": (PLAIN[:-1] + b"\xff\xff\x7f", "-32767 to 32767; got 2097151"),
    "a varint of four bytes": (PLAIN[:-1] + b"\x80\x80\x80\x01", "malformed varint"),
    "a superfluous last byte": (PLAIN[:-1] + b"\x81\x00", "malformed varint"),
    "an overlong zero": (PLAIN[:-1] + b"\x80\x00", "malformed varint"),
    "no bits": (PARTIAL[:-2], "bits for 15 positions"),
    "bits that are cut off": (PARTIAL[:-1], "bits for 15 positions"),
    "bits that are too long": (PARTIAL + b"\x00", "bits for 15 positions"),
    "no position": (PARTIAL[:-2] + b"\x00\x00", "at least one of them set"),
    "a position that does not exist": (PARTIAL[:-1] + b"\x80", "bits for 15 positions"),
    "bits without their flag": (b"\x00" + PARTIAL[1:], "2 bytes after its last number"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_sections(name):
    section, message = MALFORMED[name]
    assert decode_correction(PLAIN, 1, SHAPE).where is None
    assert decode_correction(PARTIAL, 1, SHAPE).where.sum() == 2
    for content in (section, memoryview(section)):
        with pytest.raises(StreamError, match=rf"^cae: correction.*{message}.*damaged"):
            decode_correction(content, 1, SHAPE)


def test_a_section_of_another_tile():
    section = encode_correction(Correction("uniform", 9, numbers_of(1, 300), np.ones(SHAPE, bool)))
    for components, shape in ((3, SHAPE), (1, (5, 5)), (1, (1, 5))):
        with pytest.raises(StreamError, match=r"^cae: correction"):
            decode_correction(section, components, shape)


def test_each_truncation_and_tail():
    for form in (None, np.eye(*SHAPE, dtype=bool)):
        section = encode_correction(Correction("root", 9, numbers_of(3, -4000), form))
        for size in range(len(section)):
            with pytest.raises(StreamError, match=r"^cae: correction"):
                decode_correction(section[:size], 3, SHAPE)
        with pytest.raises(StreamError, match=r"^cae: correction"):
            decode_correction(section + b"\0", 3, SHAPE)


@settings(max_examples=400, deadline=None)
@given(tail=st.binary(max_size=70), keep=st.integers(0, 14), components=st.sampled_from([1, 3]))
def test_arbitrary_bytes(tail, keep, components):
    """What is accepted is written again as it was: no two sections mean the same."""
    section = (PARTIAL if tail[:1] > b"\x80" else PLAIN)[:keep] + tail
    with contextlib.suppress(StreamError):
        assert encode_correction(decode_correction(section, components, SHAPE)) == section


@pytest.mark.parametrize("form", [0, 2])
def test_long_sections_take_no_memory(form):
    section = bytes([form, 1]) + bytes(1 << 22)
    decode_correction(PLAIN, 1, SHAPE)
    tracemalloc.start()
    try:
        with pytest.raises(StreamError, match="at most"):
            decode_correction(section, 1, SHAPE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 16


@pytest.mark.parametrize(
    "correction",
    [
        Correction("uniform", 0, numbers_of(1)), Correction("uniform", 256, numbers_of(1)),
        Correction("uniform", 1, numbers_of(1, 32768)), Correction("uniform", 1, numbers_of(3, -32768)),
        Correction("uniform", 1, np.zeros((1, 14), np.int64)),
        Correction("uniform", 1, numbers_of(1), np.zeros(SHAPE, bool)),
    ],
)  # fmt: skip
def test_impossible_corrections(correction):
    with pytest.raises(CAEConfigurationError, match="correction has"):
        encode_correction(correction)
