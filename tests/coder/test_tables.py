"""Integer frequency tables: making them from densities, ideal lengths, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from densities import laplace

from zarr_cae.coder.frequencies import frequencies, trimmed_frequencies
from zarr_cae.coder.tables import PRECISION, Tables, escape_bytes, ideal_bits
from zarr_cae.errors import CAEConfigurationError

TOTAL = 1 << PRECISION


def test_frequencies_are_optimal_on_small_rows():
    rng = np.random.default_rng(2)
    for n in (2, 3, 5, 40, 400):
        p = rng.dirichlet(np.full(n, 0.2))
        f = frequencies(p).astype(np.int64)
        assert f.sum() == TOTAL
        assert f.min() >= 1
        cost = -(p * np.log2(f)).sum()
        for _ in range(300):  # no exchange of units between two entries is better
            a, b = rng.integers(0, n, 2)
            if a != b and f[a] > 1:
                g = f.copy()
                g[a] -= 1
                g[b] += 1
                assert -(p * np.log2(g)).sum() >= cost - 1e-12


@pytest.mark.parametrize("p", [[1.0, 0.0], [0.0, 1.0], [1e-300, 1e-300], [1e6, 1.0], [0.0] * 2000 + [1.0]])
def test_frequencies_of_extremes(p):
    f = frequencies(np.array(p))
    assert f.sum() == TOTAL
    assert f.min() >= 1


@pytest.mark.parametrize("p", [[], [1.0], [0.0, 0.0], [-1.0, 2.0], [np.nan, 1.0], [np.inf, 1.0], [1.0] * (TOTAL + 1)])
def test_frequencies_refuses(p):
    with pytest.raises(CAEConfigurationError, match=r"^cae: probability must be"):
        frequencies(np.array(p))


@pytest.mark.parametrize(("scale", "mean"), [(0.06, 0.0), (0.3, 0.2), (2.0, -7.4), (60.0, 90.0), (400.0, 0.0)])
def test_trimmed_alphabets_are_near_the_best_range(scale, mean):
    p = laplace(scale, 1000, mean)
    escape_bytes = 1 + (np.abs(np.arange(-1000, 1001) + 0.25) > 64)

    def expected_bits(low, row):
        inside = slice(low + 1000, low + 1000 + row.size - 1)
        outside = np.ones(p.size, bool)
        outside[inside] = False
        escape = (p[outside] * (PRECISION - np.log2(row[-1]) + 8 * escape_bytes[outside])).sum()
        return (p[inside] * (PRECISION - np.log2(row[:-1]))).sum() + escape

    minimum, row = trimmed_frequencies(p, -1000)
    found = expected_bits(minimum, row)
    entropy = -(p * np.log2(p)).sum()
    assert found - entropy < max(0.01 * entropy, 2e-3)
    high = minimum + row.size - 2
    for low, top in ((minimum - 1, high), (minimum, high + 1), (minimum - 3, high + 3), (minimum + 1, high), (-90, 90)):
        if -1000 <= low <= top <= 1000 and top - low < TOTAL - 2:
            kept = p[low + 1000 : top + 1001]
            other = frequencies(np.append(kept, 1 - kept.sum()))
            assert found <= expected_bits(low, other) + max(1e-3 * entropy, 2e-4)


def test_trimmed_alphabets_beyond_int16():
    with pytest.raises(CAEConfigurationError, match=r"must lie in \[-32768, 32766\]"):
        trimmed_frequencies(np.ones(10) / 10, 32760)


@pytest.mark.parametrize(
    ("value", "size"),
    [(0, 1), (-64, 1), (63, 1), (-65, 2), (64, 2), (-8192, 2), (8191, 2), (-8193, 3), (8192, 3), (-(1 << 15), 3)],
)
def test_escape_bytes(value, size):
    assert escape_bytes(np.array([value], np.int16)).tolist() == [size]


def test_ideal_bits_of_a_known_row():
    row = np.array([TOTAL // 4, TOTAL // 2, TOTAL // 8, TOTAL // 8])  # -1, 0, 1, escape
    tables = Tables(np.array([-1]), np.array([4]), row)
    symbols = np.array([[[0, -1, 1, 0], [2, -2, 64, 32767]]], np.int16)
    assert ideal_bits(symbols, tables) == 1 + 2 + 3 + 1 + 4 * 3 + 8 * (1 + 1 + 2 + 3)


@pytest.mark.parametrize(
    ("minimum", "length", "frequency", "message"),
    [
        ([0], [2], [TOTAL - 1, 2], "frequencies that sum to"),
        ([0], [2], [TOTAL, 0], "frequencies in"),
        ([0], [2], [TOTAL + 1, -1], "frequencies in"),
        ([0], [1], [TOTAL], "a length in"),
        ([0], [TOTAL + 1], [1] * (TOTAL + 1), "a length in"),
        ([0], [3], [TOTAL - 1, 1], "3 frequencies; got 2"),
        ([0, 0], [2], [TOTAL - 1, 1], "one length per channel; got 2 and 1"),
        ([], [], [], "one-dimensional integers|one length per channel"),
        ([-32769], [2], [TOTAL - 1, 1], "a minimum of at least"),
        ([32767], [2], [TOTAL - 1, 1], "a largest symbol of at most"),
        ([0.0], [2], [TOTAL - 1, 1], "one-dimensional integers"),
        ([0], [2], [[TOTAL - 1, 1]], "one-dimensional integers"),
    ],
)
def test_impossible_tables(minimum, length, frequency, message):
    with pytest.raises(CAEConfigurationError, match=f"^cae: .*({message})"):
        Tables(np.array(minimum), np.array(length), np.array(frequency))


def test_tables_are_read_only_copies():
    frequency = np.array([TOTAL - 1, 1], np.uint16 if TOTAL < 1 << 16 else np.uint32)
    tables = Tables(np.zeros(1, np.int32), np.full(1, 2, np.int32), frequency)
    frequency[0] = 0
    assert tables.frequency[0] == TOTAL - 1
    with pytest.raises(ValueError, match="read-only"):
        tables.frequency[0] = 1
