"""The inner loops of coding one tile, and of dequantising it; `compile` compiles them.

They are plain functions of one signature each, without slices or allocation, so that they compile fast. Arrays are
flat. The sections "Streams" and "Contexts" of spec/cae.md define the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from zarr_cae.coder.contexts import LARGEST_ACTIVITY
from zarr_cae.coder.tables import BUCKETS, PRECISION

__all__ = ["START_STATE", "assign", "classify", "decode", "dequantise", "encode", "restore", "spread"]

START_STATE = 1 << 16
_LARGEST_ACTIVITY = np.int32(LARGEST_ACTIVITY)

# The kernels' constants are uint64: numba makes float64 of int64 with uint64, and guards signed indices.
_U = np.uint64
_ZERO, _ONE, _TWO, _FOUR, _SIXTEEN = _U(0), _U(1), _U(2), _U(4), _U(16)
_WORD, _STATE_MIN = _U(0xFFFF), _U(START_STATE)
_BUCKETS, _BUCKET_BITS = _U(BUCKETS), _U(PRECISION - BUCKETS)
_SLOTS, _SLOT_MASK, _SLOT_BITS = _U(1 << PRECISION), _U((1 << PRECISION) - 1), _U(PRECISION)
_LIMIT_SHIFT, _RECIPROCAL_SHIFT = _U(32 - PRECISION), _U(32 + PRECISION)


def classify(  # noqa: C901 - inner calls cost compile time
    channel: int,
    positions: int,
    source: NDArray[np.int16],
    weight: NDArray[np.uint8],
    threshold: NDArray[np.uint16],
    coded: NDArray[np.bool_],
    around: NDArray[np.uint8],
    score: NDArray[np.uint16],
    classes: NDArray[np.uint8],
) -> None:
    """Write the class of each position of a channel. `around` holds the values of the coded channels before it."""
    sources, thresholds = weight.size // coded.size, threshold.size // coded.size
    out = _U(channel) * _U(positions)
    for p in range(positions):
        score[_U(p)] = 0
        classes[out + _U(p)] = 0
    for s in range(channel * sources, (channel + 1) * sources):
        other = np.int64(source[_U(s)])
        if other < 0 or not coded[_U(other)]:
            continue
        factor, begin = _U(weight[_U(s)]), _U(other) * _U(positions)
        for p in range(positions):
            score[_U(p)] = np.uint16(_U(score[_U(p)]) + factor * _U(around[begin + _U(p)]))
    largest = np.uint16(0)
    for p in range(positions):
        largest = max(largest, score[_U(p)])
    k, end = channel * thresholds, (channel + 1) * thresholds
    while k + 3 < end:  # four thresholds at a time, up to the largest score: a pass costs little more than its loop
        a, b, c, d = threshold[_U(k)], threshold[_U(k + 1)], threshold[_U(k + 2)], threshold[_U(k + 3)]
        k += 4
        if largest < a and largest < b and largest < c and largest < d:
            continue
        for p in range(positions):
            value = score[_U(p)]
            reached = np.uint8(value >= a) + np.uint8(value >= b) + np.uint8(value >= c) + np.uint8(value >= d)
            classes[out + _U(p)] = np.uint8(_U(classes[out + _U(p)]) + _U(reached))
    while k < end:
        least = threshold[_U(k)]
        k += 1
        if largest >= least:
            for p in range(positions):
                classes[out + _U(p)] = np.uint8(_U(classes[out + _U(p)]) + _U(score[_U(p)] >= least))


def spread(width: int, begin: int, positions: int, activity: NDArray[np.uint8], around: NDArray[np.uint8]) -> None:
    """Write one channel of `around` from activities with a border of zeros, (h + 2, w + 2)."""
    stride, out = _U(width + 2), _U(begin)
    up, at, down = _ZERO, stride, stride + stride
    for _ in range(positions // width):
        for column in range(width):
            x = _U(column)
            corners = activity[up + x] + activity[up + x + _TWO] + activity[down + x] + activity[down + x + _TWO]
            edges = activity[up + x + _ONE] + activity[at + x] + activity[at + x + _TWO] + activity[down + x + _ONE]
            around[out + x] = np.uint8(_U(corners) + _TWO * _U(edges) + _FOUR * _U(activity[at + x + _ONE]))
        up, at, down, out = at, down, down + stride, out + _U(width)


def assign(
    symbols: NDArray[np.int16],
    width: int,
    minimum: NDArray[np.int32],
    length: NDArray[np.int32],
    coded: NDArray[np.bool_],
    source: NDArray[np.int16],
    weight: NDArray[np.uint8],
    threshold: NDArray[np.uint16],
    score: NDArray[np.uint16],
    activity: NDArray[np.uint8],
    around: NDArray[np.uint8],
    classes: NDArray[np.uint8],
    entropy: NDArray[np.float32],
) -> float:
    """Write the classes of all coded channels, for the encoder. Return the expected bits, from `entropy`."""
    bits = 0.0
    channels = coded.size
    positions = symbols.size // channels
    rows = minimum.size // channels
    for c in range(channels):
        if not coded[c]:
            continue
        run_classify(c, positions, source, weight, threshold, coded, around, score, classes)
        at, first, inner = _U(c * positions), _U(c * rows), _U(width + 3)
        for _ in range(positions // width):
            for column in range(width):
                x = _U(column)
                row = first + _U(classes[at + x])
                bits += entropy[row]
                value, least = np.int32(symbols[at + x]), minimum[row]
                outside = least + length[row] - np.int32(1)
                value = outside if value < least or value > outside else value
                activity[inner + x] = min(abs(value), _LARGEST_ACTIVITY)
            at, inner = at + _U(width), inner + _U(width + 2)
        run_spread(width, c * positions, positions, activity, around)
    return bits


def encode(
    symbols: NDArray[np.int16],
    minimum: NDArray[np.int32],
    length: NDArray[np.int32],
    offset: NDArray[np.uint32],
    interval: NDArray[np.uint32],
    reciprocal: NDArray[np.uint64],
    zero_flag: NDArray[np.uint32],
    coded: NDArray[np.bool_],
    classes: NDArray[np.uint8],
    state: NDArray[np.uint32],
    words: NDArray[np.uint16],
    escapes: NDArray[np.int16],
) -> tuple[int, int]:
    """Encode a tile: fill `words` from its end and `escapes` in reverse order, and leave the lanes in `state`.

    Return the number of unused words and the number of escapes.
    """
    channels = coded.size
    positions = symbols.size // channels
    rows = minimum.size // channels
    mask = _U(state.size - 1)
    pointer = _U(words.size)
    at = _U(symbols.size)
    count = _ZERO
    lane = pointer  # `words` has one word for each symbol
    for c in range(channels - 1, -1, -1):
        if not coded[c]:
            at -= _U(positions)
            continue
        first = _U(c * rows)
        for _ in range(positions):
            at -= _ONE
            row = first + _U(classes[at])
            escape = _U(length[row] - 1)
            entry = _U(np.int64(symbols[at]) - np.int64(minimum[row]))  # below it wraps to far above the escape
            if entry >= escape:
                entry = escape
                escapes[count] = symbols[at]
                count += _ONE
            entry += _U(offset[row])
            packed = _U(interval[entry])
            frequency = packed >> _SIXTEEN
            lane -= _ONE
            x = _U(state[lane & mask])
            # Written always, kept only if needed: a branch here would be mispredicted at high rates.
            words[pointer - _ONE] = x
            full = x >= frequency << _LIMIT_SHIFT
            pointer = pointer - _ONE if full else pointer
            x = x >> _SIXTEEN if full else x
            quotient = (x * reciprocal[entry]) >> _RECIPROCAL_SHIFT
            state[lane & mask] = x + (packed & _WORD) + quotient * (_SLOTS - frequency)
    for c in range(channels - 1, -1, -1):
        if zero_flag[c] == 0:
            continue
        start = _U(zero_flag[c]) if coded[c] else _ZERO
        frequency = _SLOTS - start if coded[c] else _U(zero_flag[c])
        lane -= _ONE
        x = _U(state[lane & mask])
        if x >= frequency << _LIMIT_SHIFT:
            pointer -= _ONE
            words[pointer] = x
            x >>= _SIXTEEN
        state[lane & mask] = (x // frequency << _SLOT_BITS) + x % frequency + start
    return np.int64(pointer), np.int64(count)  # type: ignore[return-value]


def decode(  # noqa: C901, PLR0912, PLR0915 - one kernel: inner calls cost compile time
    words: NDArray[np.uint16],
    word_count: int,
    width: int,
    minimum: NDArray[np.int32],
    length: NDArray[np.int32],
    offset: NDArray[np.uint32],
    interval: NDArray[np.uint32],
    lookup: NDArray[np.uint8],
    likely: NDArray[np.uint32],
    likely_symbol: NDArray[np.int16],
    sparse: bool,
    zero_flag: NDArray[np.uint32],
    coded: NDArray[np.bool_],
    source: NDArray[np.int16],
    weight: NDArray[np.uint8],
    threshold: NDArray[np.uint16],
    score: NDArray[np.uint16],
    activity: NDArray[np.uint8],
    around: NDArray[np.uint8],
    classes: NDArray[np.uint8],
    state: NDArray[np.uint32],
    symbols: NDArray[np.int16],
    escapes: NDArray[np.int64],
) -> tuple[int, int]:
    """Decode a tile: fill the coded channels of `symbols`, and `escapes` with the indices of escaped symbols.

    `sparse` says that most symbols are the likely symbol of their row. Then the loop tries that symbol first, and the
    processor can predict the branch instead of waiting for the tables. The result is the same.

    Return the number of words read and the number of escapes. Both may exceed the stream: `words` is padded for the
    symbols of one channel, and surplus escapes are only counted.
    """
    channels = coded.size
    positions = symbols.size // channels
    rows = minimum.size // channels
    mask = _U(state.size - 1)
    most, end = _U(escapes.size), _U(word_count)
    pointer, lane, count = _ZERO, _ZERO, _ZERO
    for c in range(channels):
        coded[c] = True
        if zero_flag[c] == 0:
            continue
        x = _U(state[lane & mask])
        slot, zero = x & _SLOT_MASK, _U(zero_flag[c])
        coded[c] = slot >= zero
        start = zero if slot >= zero else _ZERO
        x = (_SLOTS - zero if slot >= zero else zero) * (x >> _SLOT_BITS) + slot - start
        if x < _STATE_MIN:
            x = (x << _SIXTEEN) | _U(words[pointer])
            pointer += _ONE
        state[lane & mask] = x
        lane += _ONE
    for c in range(channels):
        if not coded[c] or pointer > end:
            continue
        if rows > 1:
            run_classify(c, positions, source, weight, threshold, coded, around, score, classes)
        first, escaped = _U(c * rows), False
        begin = c * positions
        ahead = lane - _U(begin)
        lane += _U(positions)
        if sparse:
            for at in range(begin, begin + positions):
                here = (_U(at) + ahead) & mask
                x = _U(state[here])
                slot = x & _SLOT_MASK
                row = first + _U(classes[_U(at)])
                packed = _U(likely[row])
                if slot - (packed & _WORD) < packed >> _SIXTEEN:
                    symbols[_U(at)] = likely_symbol[row]
                else:
                    base, escape = _U(offset[row]), _U(length[row] - 1)
                    entry = _U(lookup[(row << _BUCKETS) + (slot >> _BUCKET_BITS)])
                    packed = _U(interval[base + entry])
                    while slot >= (packed >> _SIXTEEN) + (packed & _WORD):
                        entry += _ONE
                        packed = _U(interval[base + entry])
                    symbols[_U(at)] = np.int64(entry) + np.int64(minimum[row])
                    escaped |= entry == escape
                x = (packed >> _SIXTEEN) * (x >> _SLOT_BITS) + slot - (packed & _WORD)
                if x < _STATE_MIN:
                    x = (x << _SIXTEEN) | _U(words[pointer])
                    pointer += _ONE
                state[here] = x
        else:
            for at in range(begin, begin + positions):
                here = (_U(at) + ahead) & mask
                x = _U(state[here])
                slot = x & _SLOT_MASK
                row = first + _U(classes[_U(at)])
                base, escape = _U(offset[row]), _U(length[row] - 1)
                entry = _U(lookup[(row << _BUCKETS) + (slot >> _BUCKET_BITS)])
                packed = _U(interval[base + entry])
                while slot >= (packed >> _SIXTEEN) + (packed & _WORD):
                    entry += _ONE
                    packed = _U(interval[base + entry])
                x = (packed >> _SIXTEEN) * (x >> _SLOT_BITS) + slot - (packed & _WORD)
                word = _U(words[pointer])  # read always: a branch here would be mispredicted at high rates
                short = x < _STATE_MIN
                x = (x << _SIXTEEN) | word if short else x
                pointer = pointer + _ONE if short else pointer
                state[here] = x
                symbols[_U(at)] = np.int64(entry) + np.int64(minimum[row])
                escaped |= entry == escape
        if escaped:
            for at in range(begin, begin + positions):
                row = first + _U(classes[_U(at)])
                if symbols[_U(at)] == minimum[row] + length[row] - 1:
                    if count < most:
                        escapes[count] = at
                    count += _ONE
        if rows > 1:
            source_at, inner = _U(begin), _U(width + 3)
            for _ in range(positions // width):
                for column in range(width):
                    x = _U(column)
                    activity[inner + x] = min(abs(np.int32(symbols[source_at + x])), _LARGEST_ACTIVITY)
                source_at, inner = source_at + _U(width), inner + _U(width + 2)
            run_spread(width, begin, positions, activity, around)
    return np.int64(pointer), np.int64(count)  # type: ignore[return-value]


def restore(symbols: NDArray[np.int16], width: int, predicted: NDArray[np.bool_]) -> None:
    """Replace the differences of predicted channels by their symbols."""
    positions = symbols.size // predicted.size
    for c in range(predicted.size):
        if not predicted[c]:
            continue
        for p in range(positions):
            at = c * positions + p
            if p >= width:
                upper = np.int32(symbols[at - width])
                guess = upper if p % width == 0 else (np.int32(symbols[at - 1]) + upper + 1) >> 1
            else:
                guess = np.int32(symbols[at - 1]) if p else np.int32(0)
            symbols[at] = np.int16(symbols[at] + guess)


def dequantise(
    symbols: NDArray[np.int16],
    width: int,
    step: NDArray[np.float32],
    offset: NDArray[np.float32],
    values: NDArray[np.float32],
    begin: int,
    rows: int,
    columns: int,
    channels: int,
) -> None:
    """Write symbol * step + offset, rounded after each operation, of a tile (M, h, w) to `values`.

    The first element goes to index `begin`; `rows`, `columns` and `channels` are the strides in elements. The loop
    takes blocks of 16 columns and 16 channels: all channels of a tile at once would compete for the same cache sets.
    """
    positions = symbols.size // step.size
    for first in range(0, step.size, 16):
        for row in range(positions // width):
            for left in range(0, width, 16):
                for c in range(first, min(first + 16, step.size)):
                    at, out = (
                        _U(c * positions + row * width + left),
                        _U(begin + row * rows + left * columns + c * channels),
                    )
                    factor, addend = step[_U(c)], offset[_U(c)]
                    for _ in range(min(16, width - left)):
                        values[out] = np.float32(symbols[at]) * factor + addend
                        at, out = at + _ONE, out + _U(columns)


# `assign` and `decode` call these two names, which `compile` binds to the compiled functions.
run_classify: Callable[..., None] = classify
run_spread: Callable[..., None] = spread
