"""The entropy coder: round trips, a second decoder written from the docs, golden streams, malformed streams, rates."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from densities import laplace
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_cae.coder import rans
from zarr_cae.coder.frequencies import frequencies, trimmed_frequencies
from zarr_cae.coder.tables import PRECISION, Tables, ideal_bits
from zarr_cae.errors import CAEConfigurationError, StreamError

TOTAL = 1 << PRECISION
GOLDEN = Path(__file__).parents[1] / "fixtures" / "streams"


def encode(symbols, tables):
    """Encode symbols (M, positions): without contexts the shape of a tile does not matter."""
    return rans.encode(symbols[:, None], tables, 3)


def decode(stream, positions, tables):
    return rans.decode(stream, (1, positions), tables, 3)[:, 0]


def tables_of(rows):
    """Return tables from pairs (minimum, row)."""
    return Tables(
        np.array([minimum for minimum, _ in rows], np.int32),
        np.array([len(row) for _, row in rows], np.int32),
        np.concatenate([row for _, row in rows]).astype(np.uint32),
    )


def random_tables(rng, channels, longest=40):
    rows = []
    for _ in range(channels):
        length = int(rng.integers(2, longest + 1))
        row = 1 + rng.multinomial(TOTAL - length, rng.dirichlet(np.full(length, 0.3)))
        rows.append((int(rng.integers(-length, 3)), row))
    return tables_of(rows)


def random_symbols(rng, tables, positions, escapes=0.01):
    """Return symbols drawn from the tables; some are any int16, and a third of the channels is zero."""
    symbols = np.empty((tables.channels, positions), np.int16)
    for c, begin in enumerate(tables.offset):
        row = tables.frequency[begin : begin + tables.length[c]] / TOTAL
        symbols[c] = tables.minimum[c] + rng.choice(row.size, positions, p=row)
    wild = rng.integers(-(1 << 15), 1 << 15, symbols.shape)
    symbols = np.where(rng.random(symbols.shape) < escapes, wild, symbols).astype(np.int16)
    symbols[rng.random(tables.channels) < 0.3] = 0
    return symbols


def plain_decode(stream, positions, tables):  # noqa: C901 - it follows the docs line by line
    """Decode by the section "Streams" of spec/cae.md, word by word."""
    lanes = 1 << stream[0]
    states = [int.from_bytes(stream[1 + 4 * n : 5 + 4 * n], "little") for n in range(lanes)]
    pointer, number = 1 + 4 * lanes, 0

    def take(row):
        nonlocal pointer, number
        x = states[number % lanes]
        slot, start, entry = x % TOTAL, 0, 0
        while slot >= start + row[entry]:
            start, entry = start + row[entry], entry + 1
        x = row[entry] * (x // TOTAL) + slot - start
        if x < 1 << 16:
            x, pointer = (x << 16) + int.from_bytes(stream[pointer : pointer + 2], "little"), pointer + 2
        states[number % lanes] = x
        number += 1
        return entry

    rows = [
        [int(f) for f in tables.frequency[begin : begin + length]]
        for begin, length in zip(tables.offset, tables.length, strict=True)
    ]
    coded = []
    for minimum, row in zip(tables.minimum, rows, strict=True):
        f0 = row[-minimum] if 0 <= -minimum < len(row) - 1 else 0
        power, base, n = 1 << 32, f0 << (32 - PRECISION), positions
        while n:
            if n & 1:
                power = power * base >> 32
            base, n = base * base >> 32, n >> 1
        z = min(power >> (32 - PRECISION), TOTAL - 1)
        coded.append(take([z, TOTAL - z]) if 16 * z >= 15 * TOTAL else 1)
    symbols = np.zeros((len(rows), positions), np.int16)
    escaped = []
    for c, row in enumerate(rows):
        for j in range(positions if coded[c] else 0):
            entry = take(row)
            if entry == len(row) - 1:
                escaped.append((c, j))
            else:
                symbols[c, j] = tables.minimum[c] + entry
    assert states == [1 << 16] * lanes
    for c, j in escaped:
        zigzag, shift = 0, 0
        while True:
            byte, pointer = stream[pointer], pointer + 1
            zigzag, shift = zigzag | (byte & 127) << shift, shift + 7
            if byte < 128:
                break
        symbols[c, j] = -(zigzag + 1) // 2 if zigzag & 1 else zigzag // 2
    assert pointer == len(stream)
    return symbols


@pytest.mark.parametrize("positions", [1, 2, 15, 16, 64, 1024])
@pytest.mark.parametrize("channels", [1, 3, 192])
def test_round_trip(channels, positions):
    rng = np.random.default_rng(channels * positions)
    tables = random_tables(rng, channels)
    symbols = random_symbols(rng, tables, positions)
    stream = encode(symbols, tables)
    assert np.array_equal(decode(stream, positions, tables), symbols)
    assert np.array_equal(decode(memoryview(bytearray(stream)), positions, tables), symbols)
    assert encode(symbols.copy(), tables) == stream
    if symbols.size < 20_000:
        assert np.array_equal(plain_decode(stream, positions, tables), symbols)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    channels=st.integers(1, 20),
    positions=st.integers(1, 70),
    longest=st.sampled_from([2, 3, 20, 700, TOTAL]),
    escapes=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_round_trip_of_any_tables(seed, channels, positions, longest, escapes):
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, channels, longest)
    symbols = random_symbols(rng, tables, positions, escapes)
    stream = encode(symbols, tables)
    assert np.array_equal(decode(stream, positions, tables), symbols)


@pytest.mark.parametrize("longest", [20, 256, 257, 258, 512, 513, TOTAL])
def test_long_alphabets_use_every_entry(longest):
    tables = tables_of([(-(longest // 2), frequencies(np.ones(longest)))])
    symbols = np.arange(-(longest // 2) - 1, longest - longest // 2 + 1, dtype=np.int16)[None]
    assert np.array_equal(decode(encode(symbols, tables), symbols.shape[1], tables), symbols)


def test_every_lane_count_and_the_second_decoder():
    rng = np.random.default_rng(5)
    tables = tables_of([(-40, frequencies(np.ones(82)))] * 8)
    seen = set()
    for positions in (1, 60, 200, 400, 800, 1500, 3000, 6000):
        symbols = rng.integers(-41, 42, (8, positions)).astype(np.int16)
        stream = encode(symbols, tables)
        seen.add(stream[0])
        assert 4 << stream[0] <= max(4, 0.007 * len(stream))
        assert np.array_equal(decode(stream, positions, tables), symbols)
        if positions <= 3000:
            assert np.array_equal(plain_decode(stream, positions, tables), symbols)
    assert seen == set(range(6))


@pytest.mark.parametrize("symbol", [-(1 << 15), -8193, -8192, -65, -64, 63, 64, 8191, 8192, (1 << 15) - 1])
def test_escapes_at_the_bounds(symbol):
    tables = tables_of([(0, frequencies(np.array([0.9, 0.1]))), (-2, frequencies(np.ones(5)))])
    symbols = np.array([[0, symbol, 0], [symbol, 1, symbol]], np.int16)
    stream = encode(symbols, tables)
    assert np.array_equal(decode(stream, 3, tables), symbols)
    assert np.array_equal(plain_decode(stream, 3, tables), symbols)


def test_alphabets_at_the_bounds_of_int16():
    top, bottom = (1 << 15) - 10, -(1 << 15)
    tables = tables_of([(top, frequencies(np.ones(10))), (bottom, frequencies(np.ones(10)))])
    symbols = np.array([[top, 32766, 32767, -32768], [bottom, bottom + 8, bottom + 9, 32767]], np.int16)
    assert np.array_equal(decode(encode(symbols, tables), 4, tables), symbols)


def test_zero_need_not_be_in_the_alphabet():
    # The mark of an escape is 0 in the first channel, which must not touch flagged channels.
    tables = tables_of([(-3, frequencies(np.ones(4))), (1, frequencies(np.ones(4)))])
    for rows in ([[0, 0], [0, 0]], [[0, -1], [0, 1]], [[0, 0], [0, 3]]):
        symbols = np.array(rows, np.int16)
        assert np.array_equal(decode(encode(symbols, tables), 2, tables), symbols)


def test_all_zero_costs_next_to_nothing():
    tables = tables_of([(0, frequencies(np.array([1.0, 0.0])))] * 300)
    symbols = np.zeros((300, 256), np.int16)
    stream = encode(symbols, tables)
    assert len(stream) <= 5 + 2 + ideal_bits(symbols[:, None], tables) / 8
    assert np.array_equal(decode(stream, 256, tables), symbols)


def test_input_need_not_be_contiguous_or_writable():
    rng = np.random.default_rng(0)
    tables = random_tables(rng, 6)
    symbols = random_symbols(rng, tables, 30)
    wanted = encode(symbols, tables)
    fortran = np.asfortranarray(symbols)
    fortran.setflags(write=False)
    unaligned = np.frombuffer(b"\0" + symbols.tobytes(), np.int16, offset=1).reshape(symbols.shape)
    assert encode(fortran, tables) == encode(unaligned, tables) == wanted


# Golden streams: integer inputs only, so that no rounding of floats changes the bytes.


def golden_cases():
    wave = (np.arange(6 * 40).reshape(6, 40) * 7919 % 31 % 9 - 4).astype(np.int16)
    wave[2] = 0
    wave[4, 5], wave[4, 6], wave[5, 39] = -32768, 300, 32767
    narrow = np.array([1, 15, 90, 500, TOTAL // 2, 500, 90, 15], np.int64)
    narrow = np.append(narrow, TOTAL - narrow.sum())
    even = np.full(512, TOTAL // 512)
    wide = (np.arange(2 * 900).reshape(2, 900) * 6151 % 520 - 260).astype(np.int16)
    return {
        "one_lane_escapes": (wave, tables_of([(-4, narrow)] * 6)),
        "wide_alphabet": (wide, tables_of([(-255, even)] * 2)),
        "one_position": (np.array([[0], [1], [-1]], np.int16), tables_of([(-4, narrow)] * 3)),
        "all_zero": (np.zeros((20, 64), np.int16), tables_of([(-4, narrow)] * 20)),
    }


def make_golden_streams():
    """Run once by hand: python -c 'import test_rans as t; t.make_golden_streams()'. Never replaces a file."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, (symbols, tables) in golden_cases().items():
        with (GOLDEN / f"{name}.p{PRECISION}.bin").open("xb") as file:
            file.write(encode(symbols, tables))


@pytest.mark.parametrize("name", ["one_lane_escapes", "wide_alphabet", "one_position", "all_zero"])
def test_golden_streams(name):
    symbols, tables = golden_cases()[name]
    golden = (GOLDEN / f"{name}.p{PRECISION}.bin").read_bytes()
    assert encode(symbols, tables) == golden
    assert np.array_equal(decode(golden, symbols.shape[1], tables), symbols)
    assert np.array_equal(plain_decode(golden, symbols.shape[1], tables), symbols)


# Rates


def realistic(rng, channels, positions, tiles, busiest):
    """Return Laplacian channels with scales like a transform's, and the ideal code length of their densities."""
    scales = np.maximum(busiest * np.exp(-np.arange(channels) / 25), 0.03 + 0.05 * rng.random(channels))
    densities = [laplace(scale, 1000) for scale in scales]
    tables = tables_of([trimmed_frequencies(density, -1000) for density in densities])
    symbols = np.rint(rng.laplace(size=(tiles, channels, positions)) * scales[:, None]).astype(np.int16)
    ideal = sum(-np.log2(density[symbols[:, c].ravel() + 1000]).sum() for c, density in enumerate(densities))
    return tables, symbols, float(ideal)


@pytest.mark.parametrize(("busiest", "low", "high"), [(0.5, 0.09, 0.13), (3.0, 0.4, 0.8), (60.0, 1.2, 4.0)])
@pytest.mark.parametrize("positions", [256, 1024])
def test_within_one_percent_of_the_float_density(busiest, low, high, positions):
    tables, symbols, ideal = realistic(np.random.default_rng(1), 192, positions, 4, busiest)
    streams = [encode(tile, tables) for tile in symbols]
    bits = 8 * sum(map(len, streams))
    assert low < bits / (len(symbols) * positions * 256) < high, "bits per pixel of the synthetic latents"
    assert bits <= 1.01 * ideal
    for tile, stream in zip(symbols, streams, strict=True):
        assert np.array_equal(decode(stream, positions, tables), tile)


# Refusals


@pytest.mark.parametrize(("shape", "dtype"), [((2, 4), np.int32), ((3, 4), np.int16), ((2, 0), np.int16)])
def test_encode_refuses(shape, dtype):
    with pytest.raises(CAEConfigurationError, match=r"^cae: symbols must be int16 of shape \(2, rows, columns\)"):
        encode(np.zeros(shape, dtype), tables_of([(0, frequencies(np.ones(2)))] * 2))


SMALL_TABLES = tables_of([(-2, frequencies(np.array([1.0, 3, 9, 3, 1, 0.5])))] * 3)
SMALL = np.array([[0, 1, 0, -2, 400, 2], [0] * 6, [1, 0, 0, -9999, 0, -1]], np.int16)


def test_truncation_at_each_byte_and_a_tail():
    stream = encode(SMALL, SMALL_TABLES)
    for size in range(len(stream)):
        with pytest.raises(StreamError, match=r"^cae: stream"):
            decode(stream[:size], 6, SMALL_TABLES)
    for tail in (b"\0", b"\0\0", b"\xff", b"tail"):
        with pytest.raises(StreamError, match="after its last symbol"):
            decode(stream + tail, 6, SMALL_TABLES)


def test_flipped_bits_before_the_escapes():
    stream = encode(SMALL, SMALL_TABLES)
    for bit in range(8 * (len(stream) - 5)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StreamError, match=r"^cae: stream"):
            decode(bytes(damaged), 6, SMALL_TABLES)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (b"\xa0\x06\x8d\x9c", "needs 2 escapes; got 1"),
        (b"\xa0\x06\x9d\x9c\x01\x00", "after its last symbol"),
        (b"\xa0\x06\x9d\x9c\x81\x00", "1 to 3 bytes"),
        (b"\xa0\x86\x00\x9d\x9c\x01", "none superfluous"),
        (b"\xa0\x06\xff\xff\x7f", "of int16"),
        (b"\x02\x9d\x9c\x01", "outside their channel's alphabet"),
    ],
)
def test_malformed_escapes(section, message):
    stream = encode(SMALL, SMALL_TABLES)
    assert stream.endswith(b"\xa0\x06\x9d\x9c\x01")
    with pytest.raises(StreamError, match=message):
        decode(stream[:-5] + section, 6, SMALL_TABLES)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"", "is empty"),
        (b"\x06" + bytes(300), "lane byte must be 0 to 5; got 6"),
        (b"\x05" + bytes(100), "needs 129 bytes for its 32 lane states; got 101"),
        (b"\x00\xff\xff\x00\x00", "lane states must be at least 2\\^16"),
        (b"\x00\xff\xff\xff\xff", "ends before its last word|must end in state"),
    ],
)
def test_malformed_heads(stream, message):
    with pytest.raises(StreamError, match=message):
        decode(stream, 6, SMALL_TABLES)


def test_positions_must_be_positive():
    with pytest.raises(CAEConfigurationError, match=r"at least 1 x 1; got \(1, 0\)"):
        decode(b"\0" * 5, 0, SMALL_TABLES)


def test_other_tables_or_positions_are_noticed():
    rng = np.random.default_rng(9)
    tables, other = random_tables(rng, 30), random_tables(rng, 30)
    stream = encode(random_symbols(rng, tables, 100), tables)
    for positions, wrong in ((100, other), (99, tables), (101, tables)):
        with pytest.raises(StreamError):
            decode(stream, positions, wrong)


FUZZ_TABLES = random_tables(np.random.default_rng(4), 5, 600)


@settings(max_examples=150, deadline=None)
@given(
    lanes=st.integers(0, 7),
    state_high=st.lists(st.integers(0, 255), min_size=32, max_size=32),
    tail=st.binary(max_size=400),
    positions=st.integers(1, 50),
)
def test_arbitrary_bytes(lanes, state_high, tail, positions):
    states = b"".join(tail[n : n + 2].ljust(2, b"\1") + bytes([1, high]) for n, high in enumerate(state_high))
    for stream in (tail, bytes([lanes]) + states[: 4 << lanes] + tail):
        with contextlib.suppress(StreamError):
            assert decode(stream, positions, FUZZ_TABLES).shape == (5, positions)


# Threads and compilation


def test_concurrent_threads():
    rng = np.random.default_rng(3)
    tables = random_tables(rng, 64)
    tiles = [random_symbols(rng, tables, 64) for _ in range(60)]
    with ThreadPoolExecutor(8) as pool:
        streams = list(pool.map(lambda tile: encode(tile, tables), tiles))
        decoded = list(pool.map(lambda stream: decode(stream, 64, tables), streams))
    assert all(np.array_equal(a, b) for a, b in zip(tiles, decoded, strict=True))


FIRST_USE = """
import sys, threading
from zarr_cae.coder import rans
from zarr_cae.coder.frequencies import frequencies
from zarr_cae.coder.tables import Tables
assert "numba" not in sys.modules, "numba must not load before the first use"
import numpy as np
tables = Tables(np.array([-1]), np.array([4]), frequencies(np.array([1.0, 5, 1, 0.1])))
symbols = np.array([[[0, 1, -1, 0, 77]]], np.int16)
done = []
def work():
    assert (rans.decode(rans.encode(symbols, tables, 3), (1, 5), tables, 3) == symbols).all()
    done.append(1)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(done) == 4
"""


NO_PLACE = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
for kind in (caching.CompileResultCacheImpl, caching.CodeLibraryCacheImpl):
    kind._locator_classes = []
"""


@pytest.mark.parametrize("no_place", ["", NO_PLACE], ids=["folder", "anywhere"])
def test_first_use_in_threads_where_no_cache_can_be_written(tmp_path, no_place):
    obstacle = tmp_path / "file"
    obstacle.touch()  # a folder below a file can't be made, not even by root
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(obstacle / "cache"), "PYTHONWARNINGS": "error"}
    script = FIRST_USE.replace("import numpy as np\n", "import numpy as np\n" + no_place)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


ONCE = """
import numpy as np
from zarr_cae.coder import rans
from zarr_cae.coder.tables import Tables

tables = Tables(np.full(2, -2), np.full(2, 6), np.tile([10, 200, 3500, 300, 80, 6], 2))
symbols = np.tile(np.arange(-3, 5, dtype=np.int16), (2, 1, 1))
assert (rans.decode(rans.encode(symbols, tables, 3), (1, 8), tables, 3) == symbols).all()
"""


def test_a_second_process_compiles_nothing(tmp_path):
    found = []
    for _ in range(2):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "error"}
        subprocess.run([sys.executable, "-c", ONCE], env=environment, check=True, timeout=240)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        found.append({path: (path.stat().st_mtime_ns, path.stat().st_ino, path.stat().st_size) for path in files})
    assert {path.suffix for path in found[0]} == {".nbc", ".nbi"}
    assert sum(path.suffix == ".nbc" for path in found[0]) == 6  # one for each of the loops but that of latents
    assert found[0] == found[1]
