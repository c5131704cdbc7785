"""Decode CompressAI's rANS stream: the entropy-coded latents inside caecodec's chunks.

The stream (`compressai.ans`, after Giesen's rans64, arXiv:1402.3392)
---------------------------------------------------------------------
One 64-bit state, renormalised by 32-bit words, little endian. The first two words are the state, low word first; it
lies in [2^31, 2^63). The symbols follow channel after channel, row after row. With T = 2^16, and c_0 = 0 < c_1 < ... <
c_n = T the cumulative frequencies of the symbol's channel:

    slot = x mod T                          entry k has  c_k <= slot < c_k+1
    x    = (c_k+1 - c_k) * floor(x / T) + slot - c_k
    if x < 2^31:  x = x * 2^32 + next word

Entry k < n - 1 is the symbol offset + k. The last entry, n - 1, is the escape: digits of 4 bits follow, each
taken from the state by

    digit = x mod 16;  x = floor(x / 16)
    if x < 2^31:  x = x * 2^32 + next word

First comes the number of digits d, in one digit (15 would mean that another digit is to be added; no 32-bit value
needs so many). The d digits are those of a value r, lowest first. An odd r is the symbol offset - (r + 1) / 2, an even
r the symbol offset + n - 1 + r / 2.

After the last symbol the state is 2^31, where the encoder began, and no word is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarr_cae.coder.compile import _compiled, _once
from zarr_cae.coder.frame import Symbols
from zarr_cae.errors import CAEConfigurationError, StreamError
from zarr_cae.threads import lazy_property

__all__ = ["CumulativeTables", "decode"]

_SLOTS = 1 << 16
_START_STATE = 1 << 31
_END_STATE = 1 << 63
_ROUNDING_BITS = 1e-4  # one step may use this much less than -log2(frequency / T) bits, as states are rounded down
_DAMAGED = "the stored chunk is damaged, or of other weights"

# uint64 constants: numba makes float64 of int64 with uint64.
_U = np.uint64
_ONE, _FOUR, _SIXTEEN, _THIRTY_TWO = _U(1), _U(4), _U(16), _U(32)
_SLOT_MASK, _DIGIT_MASK, _LEAST = _U(_SLOTS - 1), _U(15), _U(_START_STATE)
_MOST_DIGITS = 8
_GOOD, _SHORT, _LONG, _WRONG_END, _WRONG_ESCAPE = range(5)
_FAULTS = {
    _SHORT: "it ends before its last symbol",
    _LONG: "it goes on after its last symbol",
    _WRONG_END: f"its state must end at {_START_STATE:#x}",
    _WRONG_ESCAPE: f"its escapes must have at most {_MOST_DIGITS} digits, none superfluous, and be of int16",
}


@dataclass(frozen=True, eq=False)
class CumulativeTables:
    """The integer tables with which CompressAI codes latents of M channels.

    Parameters
    ----------
    cumulative
        Integers (M, L), `_quantized_cdf` of the checkpoint: cumulative frequencies of each channel, from 0 to 65536;
        entries after the channel's length are ignored.
    length
        Integers (M,), `_cdf_length`: how many entries of each row are used, 3 to L.
    offset
        Integers (M,), `_offset`: the symbol of each channel's first entry.

    Raises
    ------
    CAEConfigurationError
        If an array has another shape or kind, or a row does not ascend strictly from 0 to 65536.
    """

    cumulative: NDArray[np.uint32]
    length: NDArray[np.int32]
    offset: NDArray[np.int32]

    def __post_init__(self) -> None:
        given = {name: np.asarray(getattr(self, name)) for name in ("cumulative", "length", "offset")}
        cumulative, length, offset = given.values()
        if any(array.dtype.kind not in "iu" for array in given.values()) or cumulative.ndim != 2 or not cumulative.size:
            _refuse("integers, the cumulative frequencies in two dimensions", cumulative)
        if length.shape != (len(cumulative),) or offset.shape != (len(cumulative),):
            _refuse(f"one length and one offset for each of {len(cumulative)} channels", length)
        if length.min() < 3 or length.max() > cumulative.shape[1]:
            _refuse(f"lengths in [3, {cumulative.shape[1]}]", length)
        if offset.min() < -(1 << 15) or offset.max() >= 1 << 15:
            _refuse("offsets of int16", offset)
        used = np.arange(cumulative.shape[1]) < length[:, None]
        ascending = np.where(used[:, 1:], np.diff(cumulative.astype(np.int64), axis=1) > 0, True)
        last = np.take_along_axis(cumulative, length[:, None].astype(np.int64) - 1, axis=1)
        if not ascending.all() or cumulative[:, 0].any() or (last != _SLOTS).any():
            _refuse(f"rows that ascend strictly from 0 to {_SLOTS}", cumulative)
        for name, kind in (("cumulative", np.uint32), ("length", np.int32), ("offset", np.int32)):
            array = np.where(used, cumulative, 0).astype(kind) if name == "cumulative" else given[name].astype(kind)
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def channels(self) -> int:
        """M, the number of channels."""
        return len(self.length)

    @lazy_property
    def least_bits(self) -> float:
        """Return the fewest bits that one position can take, with one symbol of each channel."""
        frequency = np.diff(self.cumulative.astype(np.int64), axis=1).max(axis=1)
        return float(np.maximum(np.log2(_SLOTS / frequency) - _ROUNDING_BITS, 0).sum())


def _refuse(expected: str, came: NDArray[Any]) -> None:
    raise CAEConfigurationError(
        f"cae: CompressAI's tables need {expected}; got {came.dtype} {came.shape} from {came.min(initial=0)} to "
        f"{came.max(initial=0)}; import the checkpoint again"
    )


def decode(stream: bytes | memoryview, shape: tuple[int, int], tables: CumulativeTables) -> Symbols:
    """Decode the symbols of a stream.

    Parameters
    ----------
    stream
        All bytes of the stream, and nothing else; contiguous.
    shape
        Rows and columns of latent positions, at least 1.
    tables
        The tables with which the stream was encoded.

    Returns
    -------
    int16 (M, *shape)

    Raises
    ------
    StreamError
        If the stream is malformed or truncated, was encoded with other tables, or is too short for so many symbols;
        the last is found before anything of their size is allocated.
    CAEConfigurationError
        If `shape` is not positive.
    """
    if min(shape) < 1:
        raise CAEConfigurationError(f"cae: the shape of latents must be at least 1 x 1; got {shape}")
    if len(stream) < 8 or len(stream) % 4:
        raise StreamError(
            f"cae: CompressAI's stream needs 8 bytes or more, in words of 4; got {len(stream)}; {_DAMAGED}"
        )
    positions = shape[0] * shape[1]
    if positions * tables.least_bits > 8 * len(stream):
        raise StreamError(
            f"cae: CompressAI's stream of {len(stream)} bytes can't hold {shape[0]} x {shape[1]} latents; {_DAMAGED}"
        )
    words = np.frombuffer(stream, "<u4").astype(np.uint32)  # a copy, as the stream may lie at an odd address
    state = int(words[0]) | int(words[1]) << 32
    if not _START_STATE <= state < _END_STATE:
        raise StreamError(
            f"cae: CompressAI's stream must begin with a state in [2^31, 2^63); got {state:#x}; {_DAMAGED}"
        )
    symbols = np.empty((tables.channels, positions), np.int16)
    cumulative = tables.cumulative.reshape(-1)
    fault = _once(_compile)(words, cumulative, tables.length, tables.offset, positions, symbols.reshape(-1))
    if fault:
        raise StreamError(f"cae: CompressAI's stream is malformed: {_FAULTS[fault]}; {_DAMAGED}")
    return symbols.reshape(tables.channels, *shape)


def _loop(  # noqa: C901, PLR0911, PLR0912 - one loop: inner calls cost compile time
    words: NDArray[np.uint32],
    cumulative: NDArray[np.uint32],
    length: NDArray[np.int32],
    offset: NDArray[np.int32],
    positions: int,
    symbols: NDArray[np.int16],
) -> int:
    """Fill `symbols` and return `_GOOD`, or return the fault. Every read of a word is checked first."""
    end = len(words)
    width = len(cumulative) // len(length)
    x = _U(words[0]) | _U(words[1]) << _THIRTY_TWO
    at = 2
    for c in range(len(length)):
        base, escape = c * width, length[c] - 2
        for p in range(positions):
            slot = x & _SLOT_MASK
            low, high = 0, escape + 1
            while high - low > 1:
                middle = (low + high) >> 1
                if _U(cumulative[base + middle]) <= slot:
                    low = middle
                else:
                    high = middle
            start = _U(cumulative[base + low])
            x = (_U(cumulative[base + high]) - start) * (x >> _SIXTEEN) + slot - start
            if x < _LEAST:
                if at >= end:
                    return _SHORT
                x = x << _THIRTY_TWO | _U(words[at])
                at += 1
            value: Any = np.int64(low)
            if low == escape:
                digits, count, raw = -1, 0, np.int64(0)
                while count != digits:
                    digit: Any = np.int64(x & _DIGIT_MASK)
                    x >>= _FOUR
                    if x < _LEAST:
                        if at >= end:
                            return _SHORT
                        x = x << _THIRTY_TWO | _U(words[at])
                        at += 1
                    if digits < 0:
                        digits = digit
                        if digits > _MOST_DIGITS:
                            return _WRONG_ESCAPE
                    else:
                        raw |= digit << (4 * count)
                        count += 1
                        if count == digits and digit == 0:
                            return _WRONG_ESCAPE
                value = -((raw + 1) >> 1) if raw & 1 else escape + (raw >> 1)
            value += offset[c]
            if value < -32768 or value > 32767:
                return _WRONG_ESCAPE
            symbols[c * positions + p] = np.int16(value)
    if at < end:
        return _LONG
    return _GOOD if x == _LEAST else _WRONG_END


def _compile() -> Callable[..., int]:
    from numba import types as t

    def read(kind: Any) -> Any:
        return t.Array(kind, 1, "C", readonly=True)

    arguments = (read(t.uint32), read(t.uint32), read(t.int32), read(t.int32), t.int64, t.int16[::1])
    compiled: Callable[..., int] = _compiled(_loop, t.int64, *arguments)
    return compiled
