"""Write the formats of caecodec and CompressAI in plain Python."""

import struct

import numpy as np

START = 1 << 31


def encode(symbols, cumulative, length, offset):
    """Return CompressAI's stream of symbols (M, ...)."""
    steps = []  # (start, frequency) of 16 bits, or (digit, None)
    for c, channel in enumerate(np.asarray(symbols)):
        escape = int(length[c]) - 2
        for symbol in channel.reshape(-1).tolist():
            value = symbol - int(offset[c])
            raw = None
            if value < 0:
                raw, value = -2 * value - 1, escape
            elif value >= escape:
                raw, value = 2 * (value - escape), escape
            steps.append((int(cumulative[c][value]), int(cumulative[c][value + 1]) - int(cumulative[c][value])))
            if raw is not None:
                digits = [raw >> shift & 15 for shift in range(0, raw.bit_length(), 4)]
                steps += [(digit, None) for digit in (len(digits), *digits)]
    state, words = START, []
    for start, given in reversed(steps):
        bits, frequency = (4, 1) if given is None else (16, given)
        if state >= (START >> bits << 32) * frequency:
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        state = (state // frequency << bits) + state % frequency + start
    words += [state >> 32, state & 0xFFFFFFFF]
    return struct.pack(f"<{len(words)}I", *reversed(words))


def tables(random, channels, *, longest=24):
    """Return synthetic tables: cumulative frequencies (M, L), lengths and offsets, also very skewed ones."""
    length = random.integers(3, longest + 1, channels)
    cumulative = np.zeros((channels, longest), np.int32)
    for c, n in enumerate(length):
        weight = random.random(n - 1) ** random.choice([0.5, 4, 40]) + 1e-9
        frequency = np.maximum(np.floor(weight / weight.sum() * (1 << 16)), 1).astype(int)
        frequency[frequency.argmax()] += (1 << 16) - frequency.sum()
        cumulative[c, 1:n] = np.cumsum(frequency)
    offset = random.integers(-20, 3, channels)
    return cumulative, length.astype(np.int32), offset.astype(np.int32)


def chunk(symbols, height, width, table):
    """Return a chunk of caecodec: the latents of a chunk padded to whole patches, (M, rows, columns)."""
    rows, columns = symbols.shape[1:]
    return struct.pack(">4Q", height, width, rows * 16 - height, columns * 16 - width) + encode(symbols, *table)
