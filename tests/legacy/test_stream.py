"""CompressAI's streams: the same symbols as its own coder, and an error for everything malformed."""

import importlib.util
import sys
from pathlib import Path

import caecodec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_cae.errors import CAEConfigurationError, StreamError
from zarr_cae.legacy.stream import CumulativeTables, decode

FIXTURES = Path(__file__).parent.parent / "fixtures" / "legacy"


def made(seed, *, channels=None, shape=None, spread=None):
    random = np.random.default_rng(seed)
    channels = channels or int(random.integers(1, 6))
    shape = shape or tuple(int(n) for n in random.integers(1, 7, 2))
    table = caecodec.tables(random, channels)
    spread = spread or random.choice([3, 30, 3000, 32767])
    symbols = random.integers(-spread, spread + 1, (channels, *shape)).astype(np.int16)
    return symbols, table


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_symbols_survive(seed):
    symbols, table = made(seed)
    stream = caecodec.encode(symbols, *table)
    assert (decode(stream, symbols.shape[1:], CumulativeTables(*table)) == symbols).all()


@pytest.mark.parametrize("value", [-32768, 32767, 0, -1, 1])
def test_extreme_symbols_survive(value):
    _, table = made(1, channels=2)
    symbols = np.full((2, 3, 5), value, np.int16)
    assert (decode(caecodec.encode(symbols, *table), (3, 5), CumulativeTables(*table)) == symbols).all()


@pytest.fixture(scope="module")
def ans():
    """Import CompressAI's own coder without the rest of that package, which has many dependencies."""
    if (package := importlib.util.find_spec("compressai")) is None:
        pytest.skip("compressai is not installed")
    for place in package.submodule_search_locations:
        for path in Path(place).glob("ans.*"):
            spec = importlib.util.spec_from_file_location("compressai.ans", path)
            module = sys.modules.setdefault("compressai.ans", importlib.util.module_from_spec(spec))
            spec.loader.exec_module(module)
            return module
    pytest.skip("compressai has no compiled coder here")


@pytest.mark.parametrize("seed", range(30))
def test_against_the_coder_of_compressai(ans, seed):
    symbols, (cumulative, length, offset) = made(seed)
    index = np.repeat(np.arange(len(symbols)), symbols[0].size).tolist()
    rows = [row[:n].tolist() for row, n in zip(cumulative, length, strict=True)]
    stream = ans.RansEncoder().encode_with_indexes(
        symbols.reshape(-1).tolist(), index, rows, length.tolist(), offset.tolist()
    )
    assert stream == caecodec.encode(symbols, cumulative, length, offset)
    assert (decode(stream, symbols.shape[1:], CumulativeTables(cumulative, length, offset)) == symbols).all()


def test_golden_stream_of_compressai():
    golden = np.load(FIXTURES / "stream.npz")
    tables = CumulativeTables(golden["cumulative"], golden["length"], golden["offset"])
    symbols = golden["symbols"]
    assert (decode(golden["stream"].tobytes(), symbols.shape[1:], tables) == symbols).all()


@given(st.integers(0, 2**32), st.data())
@settings(max_examples=150, deadline=None)
def test_damage_raises_or_gives_other_symbols(seed, data):
    """A damaged stream raises StreamError, or decodes to other symbols; nothing else happens."""
    symbols, table = made(seed)
    stream = bytearray(caecodec.encode(symbols, *table))
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(bytes(stream), symbols.shape[1:], CumulativeTables(*table))
    except StreamError:
        return
    assert found.shape == symbols.shape


@pytest.mark.parametrize("seed", range(10))
def test_truncated_and_longer_streams_raise(seed):
    symbols, table = made(seed, shape=(4, 4), spread=300)
    stream, tables = caecodec.encode(symbols, *table), CumulativeTables(*table)
    for length in range(len(stream)):
        with pytest.raises(StreamError):
            decode(stream[:length], (4, 4), tables)
    for more in (1, 4, 8):
        with pytest.raises(StreamError):
            decode(stream + bytes(more), (4, 4), tables)
    with pytest.raises(StreamError):
        decode(stream, (4, 3), tables)
    with pytest.raises(StreamError):
        decode(stream, (4, 5), tables)


def test_random_bytes_raise():
    random = np.random.default_rng(0)
    _, table = made(0, channels=4)
    tables = CumulativeTables(*table)
    for size in [0, 1, 8, 64, 1000] * 20:
        with pytest.raises(StreamError):
            decode(random.bytes(size), (8, 8), tables)


def test_a_short_stream_allocates_nothing():
    cumulative = np.tile(np.array([0, 30000, 65000, 65536], np.int32), (192, 1))
    tables = CumulativeTables(cumulative, np.full(192, 4, np.int32), np.zeros(192, np.int32))
    with pytest.raises(StreamError, match="can't hold"):
        decode(bytes(7) + b"\x01" + bytes(1000), (1 << 30, 1 << 30), tables)


@pytest.mark.parametrize("digits", [9, 15])
def test_escapes_with_too_many_digits_raise(digits):
    """Return a state whose first entry is the escape, and whose first digit gives the number of further digits."""
    tables = CumulativeTables(np.array([[0, 1, 65536]]), np.array([3]), np.array([0]))
    after = digits + 16 * (1 << 40)
    frequency = 65535
    state = (after // frequency << 16) + after % frequency + 1
    stream = state.to_bytes(8, "little") + bytes(range(200))
    with pytest.raises(StreamError, match="digits"):
        decode(stream, (1, 1), tables)


@pytest.mark.parametrize(
    ("cumulative", "length", "offset"),
    [
        ([[0, 5, 65536]], [4], [0]),
        ([[0, 5, 65536]], [2], [0]),
        ([[0, 5, 5, 65536]], [4], [0]),
        ([[0, 9, 5, 65536]], [4], [0]),
        ([[1, 5, 65536]], [3], [0]),
        ([[0, 5, 65535]], [3], [0]),
        ([[0, 5, 65536]], [3, 3], [0]),
        ([[0, 5, 65536]], [3], [40000]),
        ([[0.0, 5, 65536]], [3], [0]),
        ([0, 5, 65536], [3], [0]),
        (np.empty((0, 3), int), [], []),
    ],
)
def test_tables_that_cannot_be(cumulative, length, offset):
    with pytest.raises(CAEConfigurationError, match="tables need"):
        CumulativeTables(np.array(cumulative), np.array(length), np.array(offset))
