"""Contexts: the compiled coder against the plain arithmetic of the spec, golden streams, refusals."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_cae.coder import rans
from zarr_cae.coder.contexts import Contexts, around, scores, to_differences
from zarr_cae.coder.tables import PRECISION, Tables, ideal_bits, rows_of
from zarr_cae.errors import CAEConfigurationError, StreamError

TOTAL = 1 << PRECISION
GOLDEN = Path(__file__).parents[1] / "fixtures" / "streams"


def random_contexts(rng, channels, sources, classes) -> Contexts:
    source = np.array([rng.integers(-1, max(c, 1), sources) if c else [-1] * sources for c in range(channels)])
    weight = rng.integers(0, 273 // sources + 1, (channels, sources)).clip(max=255)
    threshold = np.sort(rng.integers(1, 4000, (channels, classes - 1)), axis=1)
    zero = rng.choice([0, 3000, TOTAL], channels)
    return Contexts(
        source.astype(np.int16), weight.astype(np.uint8), threshold.astype(np.uint16),
        rng.random(channels) < 0.4, zero.astype(np.uint16),
    )  # fmt: skip


def random_tables(rng, channels=7, sources=3, classes=4, longest=30) -> Tables:
    rows = []
    for _ in range(channels * classes):
        length = int(rng.integers(2, longest + 1))
        row = 1 + rng.multinomial(TOTAL - length, rng.dirichlet(np.full(length, 0.3)))
        rows.append((int(rng.integers(-length, 3)), row))
    return Tables(
        np.array([minimum for minimum, _ in rows]),
        np.array([len(row) for _, row in rows]),
        np.concatenate([row for _, row in rows]),
        random_contexts(rng, channels, sources, classes),
    )


def plain_rows(coded, tables):
    """Return the row of each coded symbol, position by position, by the section "Contexts" of spec/cae.md."""
    channels, height, width = coded.shape
    contexts = tables.contexts
    assert contexts is not None
    row = np.empty(coded.shape, int)
    active = np.zeros((channels, height + 2, width + 2), int)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                score = 0
                for other, weight in zip(contexts.source[c].tolist(), contexts.weight[c].tolist(), strict=True):
                    if other >= 0:
                        block = active[other, y : y + 3, x : x + 3]
                        score += weight * int((block * [[1, 2, 1], [2, 4, 2], [1, 2, 1]]).sum())
                row[c, y, x] = c * tables.classes + sum(score >= t for t in contexts.threshold[c].tolist())
        for y in range(height):
            for x in range(width):
                own, value = row[c, y, x], int(coded[c, y, x])
                largest = int(tables.minimum[own] + tables.length[own]) - 2
                if not tables.minimum[own] <= value <= largest:
                    value = largest + 1
                active[c, y + 1, x + 1] = min(abs(value), 15)
    return row


def plain_differences(symbols, predicted):
    coded = symbols.astype(int)
    for c in np.flatnonzero(predicted):
        for y in range(symbols.shape[1]):
            for x in range(symbols.shape[2]):
                left, upper = int(symbols[c, y, x - 1]), int(symbols[c, y - 1, x])
                guess = (left + upper + 1) >> 1 if x and y else left if x else upper if y else 0
                coded[c, y, x] = (int(symbols[c, y, x]) - guess + (1 << 15)) % (1 << 16) - (1 << 15)
    return coded


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    channels=st.integers(1, 12),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    sources=st.integers(1, 9),
    classes=st.integers(1, 9),
    busy=st.sampled_from([0.3, 3.0, 50.0, 20000.0]),
)
def test_there_and_back_by_the_rows_of_the_docs(seed, channels, shape, sources, classes, busy):
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, channels, sources, classes)
    assert tables.contexts is not None
    symbols = np.rint(rng.laplace(size=(channels, *shape)) * busy).clip(-(1 << 15), (1 << 15) - 1).astype(np.int16)
    symbols[rng.random(channels) < 0.3] = 0
    coded = to_differences(symbols, tables.contexts.predicted)
    np.testing.assert_array_equal(coded, plain_differences(symbols, tables.contexts.predicted))
    row = rows_of(coded, tables)
    np.testing.assert_array_equal(row, plain_rows(coded, tables))
    stream = rans.encode(symbols, tables, 2)
    np.testing.assert_array_equal(rans.decode(stream, shape, tables, 2), symbols)
    # Only the rows matter: a coder without contexts, with one table per symbol, gives the same words.
    flagged = tables.zero_flag(shape[0] * shape[1], 2) > 0
    if not flagged.any():
        single = Tables(
            tables.minimum[row.ravel()],
            tables.length[row.ravel()],
            np.concatenate([tables.frequency[tables.offset[r] :][: tables.length[r]] for r in row.ravel()]),
        )
        if not (single.zero_flag(1, 2) > 0).any():
            assert rans.encode(coded.reshape(-1, 1, 1), single, 2) == stream


def test_symbols_are_not_changed():
    rng = np.random.default_rng(2)
    tables = random_tables(rng)
    symbols = rng.integers(-3, 4, (7, 4, 5)).astype(np.int16)
    before = symbols.copy()
    symbols.setflags(write=False)
    rans.encode(symbols, tables, 2)
    np.testing.assert_array_equal(symbols, before)


def golden_case():
    """Make streams from integers only, so that no rounding of floats changes the bytes."""
    n = np.arange(6 * 8 * 11)
    symbols = (n * 7919 % 31 % 9 - 4).reshape(6, 8, 11).astype(np.int16)
    symbols[3] = 0
    symbols[1] = symbols[1].cumsum(1)
    symbols[4, 2, 3], symbols[5, 7, 10], symbols[1, 4, 4] = -32768, 300, 32767
    row = np.array([1, 15, 90, 500, TOTAL // 2, 500, 90, 15], np.int64)
    row = np.append(row, TOTAL - row.sum())
    flat = np.array([3, 40, 300, 500, 1000, 500, 300, 40, 3], np.int64)
    flat[4] += TOTAL - flat.sum()
    contexts = Contexts(
        np.array([[-1, -1], [0, -1], [0, 1], [2, 1], [2, 3], [4, 2]], np.int16),
        np.array([[0, 0], [200, 0], [100, 173], [9, 255], [30, 1], [136, 137]], np.uint8),
        np.array([[65535]] + [[8000]] * 5, np.uint16),
        np.array([False, True, False, False, True, False]),
        np.array([2000, 2000, 2000, TOTAL, 2000, 2000], np.uint16),
    )
    return symbols, Tables(np.full(12, -4), np.full(12, 9), np.tile(np.concatenate([row, flat]), 6), contexts)


def test_golden_stream():
    symbols, tables = golden_case()
    assert len(np.unique(rows_of(to_differences(symbols, tables.contexts.predicted), tables))) > 8
    golden = (GOLDEN / f"contexts.p{PRECISION}.bin").read_bytes()
    assert rans.encode(symbols, tables, 2) == golden
    np.testing.assert_array_equal(rans.decode(golden, symbols.shape[1:], tables, 2), symbols)


def test_golden_stream_of_version_3():
    symbols, tables = golden_case()
    golden = (GOLDEN / f"contexts_3.p{PRECISION}.bin").read_bytes()
    assert rans.encode(symbols, tables, 3) == golden
    np.testing.assert_array_equal(rans.decode(golden, symbols.shape[1:], tables, 3), symbols)


@pytest.mark.parametrize("positions", [1, 2, 3, 1024])
def test_a_channel_that_is_always_zero_has_a_flag_from_version_3_on(positions):
    _, tables = golden_case()
    assert tables.contexts.zero[3] == TOTAL
    assert tables.zero_flag(positions, 2)[3] == 0
    assert tables.zero_flag(positions, 3)[3] == TOTAL - 1
    others = np.arange(6) != 3
    np.testing.assert_array_equal(tables.zero_flag(positions, 2)[others], tables.zero_flag(positions, 3)[others])


@pytest.mark.parametrize("value", [0, 1, -300])
def test_versions_differ_only_for_channels_that_are_always_zero(value):
    symbols, tables = golden_case()
    symbols[3, 5, 5] = value  # a channel whose flag says otherwise
    for version in (2, 3):
        stream = rans.encode(symbols, tables, version)
        np.testing.assert_array_equal(rans.decode(stream, symbols.shape[1:], tables, version), symbols)
        with pytest.raises(StreamError):
            rans.decode(stream, symbols.shape[1:], tables, 5 - version)


def test_damaged_streams_are_noticed():
    symbols, tables = golden_case()
    stream = rans.encode(symbols, tables, 2)
    for size in range(len(stream)):
        with pytest.raises(StreamError):
            rans.decode(stream[:size], symbols.shape[1:], tables, 2)
    assert tables.contexts is not None
    other = replace(tables, contexts=replace(tables.contexts, threshold=np.full((6, 1), 3000, np.uint16)))
    with pytest.raises(StreamError):
        rans.decode(stream, symbols.shape[1:], other, 2)
    with pytest.raises(StreamError):
        rans.decode(stream, (symbols.shape[2], symbols.shape[1]), tables, 2)


@settings(max_examples=60, deadline=None)
@given(
    tail=st.binary(min_size=5, max_size=300), lanes=st.integers(0, 5), shape=st.tuples(st.integers(1, 6), st.just(5))
)
def test_arbitrary_bytes(tail, lanes, shape):
    _, tables = golden_case()
    stream = bytes([lanes]) + b"\1\2\3\4" * (1 << lanes) + tail
    with contextlib.suppress(StreamError):
        assert rans.decode(stream, shape, tables, 2).shape == (6, *shape)


def test_payload_is_within_one_percent_of_the_tables():
    rng = np.random.default_rng(1)
    tables = random_tables(rng, channels=40, sources=8, classes=8)
    symbols = np.rint(rng.laplace(size=(40, 32, 32)) * 2).astype(np.int16)
    assert 8 * len(rans.encode(symbols, tables, 2)) <= 1.01 * ideal_bits(symbols, tables)


def test_scores_reach_and_never_pass_their_16_bits():
    full = around(np.full((2, 3, 3), 15, np.uint8))
    assert full.max() == 240
    score = scores(full, np.array([0, 1], np.int16), np.array([255, 18], np.uint8))
    assert score.max() == 273 * 240 == 65520


def test_refusals():
    _, tables = golden_case()
    good = tables.contexts
    assert good is not None
    for change, message in (
        ({"source": np.zeros((6, 2), np.int16)}, "channel 0 need earlier channels"),
        ({"source": np.full((6, 2), -2, np.int16)}, "channel 0 need earlier channels"),
        ({"weight": np.full((6, 2), 137, np.uint8)}, "sum to at most 273"),
        ({"weight": np.zeros((6, 3), np.uint8)}, "one weight a source"),
        ({"threshold": np.zeros((5, 1), np.uint16)}, "contexts.threshold must have 2 axes and 6 rows"),
        ({"zero": np.zeros(6)}, "contexts.zero"),
    ):
        with pytest.raises(CAEConfigurationError, match=message):
            replace(good, **change)
    with pytest.raises(CAEConfigurationError, match="6 channels in 3 classes"):
        replace(tables, contexts=replace(good, threshold=np.zeros((6, 2), np.uint16)))
