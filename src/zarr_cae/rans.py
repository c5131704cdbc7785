"""Interleaved rANS between symbols and bytes.

Range asymmetric numeral systems with several interleaved states (Duda, arXiv:1311.2540; Giesen, arXiv:1402.3392):
32-bit states held in [2^16, 2^32), renormalised by 16-bit words. Everything is integer arithmetic, so the same bytes
give the same symbols on every machine.

The stream of one tile
----------------------
Given by the frame: M channels, `positions` symbols in each, and the `tables`. With T = 2^PRECISION, little endian:

    1 byte            log2 of the number of lanes L: 0 to 5
    4 L bytes         the start state of lane 0, 1, ... for the decoder, each in [2^16, 2^32)
    2 bytes each      the words, in the order in which the decoder reads them
    1 to 3 bytes each the escapes: symbols outside their channel's alphabet, in the order of their occurrence

There is no count of words or escapes: the decoder knows where each section ends when it gets there, and the last
escape (or the last word, without escapes) must end with the stream.

The coded symbols are numbered i = 0, 1, ...; number i belongs to lane i mod L. First come the flags of the channels
that have one, then the symbols of the channels without a flag or with a flag that says so, channel by channel. To
decode number i from state x of its lane:

    slot = x mod T                          find the entry with  start <= slot < start + frequency
    x    = frequency * floor(x / T) + slot - start
    if x < 2^16:  x = x * 2^16 + next word

* A flag has two entries. All zero: start 0, frequency z. Coded: start z, frequency T - z. Here z / T is the probability
  that `positions` symbols in a row are zero, in fixed point with 32 fractional bits, f0 being the table's frequency of
  symbol 0 (or 0 if the alphabet lacks it). A channel has a flag if 16 z >= 15 T: a flag that says "coded" is redundant,
  at -log2(1 - z / T) bits, so channels that are often not zero go without.

      power = 2^32;  base = f0 * 2^(32 - PRECISION);  n = positions
      while n > 0:
          if n is odd:  power = floor(power * base / 2^32)
          base = floor(base * base / 2^32);  n = floor(n / 2)
      z = min(floor(power / 2^(32 - PRECISION)), T - 1)

* Entry k of a channel's row is the symbol minimum + k; the last entry is the escape. A start is the sum of the
  frequencies before it in the row. Rows sum to T.
* An escaped symbol v is written as a little-endian base-128 varint (7 bits a byte, high bit set on all but the last
  byte, no superfluous last byte) of 2 v if v >= 0, of -2 v - 1 if v < 0. It is an int16 outside the alphabet.

After the last coded symbol each state must be back at 2^16, where the encoder began. The encoder runs the same steps
backwards. It takes L from the payload (`_LANE_BYTES`); a decoder accepts any L. A group of L symbols reads at most L
words, in the order of the lanes, so a warp decodes it in lockstep with a ballot and a prefix count.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from zarr_cae.errors import CAEConfigurationError, StreamError
from zarr_cae.tables import PRECISION, Tables, escape_bytes

__all__ = ["decode", "encode"]

_START_STATE = 1 << 16
_MAX_LOG2_LANES = 5
_LANE_BYTES = 750  # payload per lane: a lane costs 3 bytes (4, less what its state still holds), 0.4 % of this
_DAMAGED = "the stored chunk is damaged, or of other weights"

# The kernels' constants are uint64: numba makes float64 of int64 with uint64, and guards signed indices.
_U = np.uint64
_ZERO, _ONE, _SIXTEEN, _WIDE = _U(0), _U(1), _U(16), _U(256)
_BYTE, _WORD, _STATE_MIN = _U(0xFF), _U(0xFFFF), _U(_START_STATE)
_SLOTS, _SLOT_MASK, _SLOT_BITS = _U(1 << PRECISION), _U((1 << PRECISION) - 1), _U(PRECISION)
_LIMIT_SHIFT, _RECIPROCAL_SHIFT = _U(32 - PRECISION), _U(32 + PRECISION)

Symbols = NDArray[np.int16]
_log = logging.getLogger(__name__)


def encode(symbols: Symbols, tables: Tables) -> bytes:
    """One tile's symbols as a stream (the layout stands in the module's docstring).

    Parameters
    ----------
    symbols
        int16 (M, positions), positions >= 1. Any values: those outside a channel's alphabet take the escape.
    tables
        Tables of the same M channels.

    Raises
    ------
    CAEConfigurationError
        If `symbols` has another dtype or shape.
    """
    if symbols.dtype != np.int16 or symbols.ndim != 2 or symbols.shape[0] != tables.channels or symbols.shape[1] < 1:
        raise CAEConfigurationError(
            f"cae: symbols must be int16 of shape ({tables.channels}, positions) with at least one position; "
            f"got {symbols.dtype} of shape {symbols.shape}"
        )
    symbols = np.require(symbols, np.int16, ["C", "A"])
    positions = symbols.shape[1]
    zero_flag = tables.zero_flag(positions)
    coded: NDArray[np.bool_] = np.any(symbols, axis=1) | (zero_flag == 0)
    words = np.empty(np.count_nonzero(zero_flag) + np.count_nonzero(coded) * positions, np.uint16)
    escapes = np.empty(words.size, np.int16)  # the system gives pages only to what is used
    lanes, better = 0, _lanes(float(tables.entropy @ coded) * positions / 8)
    while lanes != better:  # guessed from the tables, and done again where the payload says otherwise
        lanes, retry = better, not lanes
        state = np.full(lanes, _START_STATE, np.uint32)
        free, count = _kernels().encode(
            symbols.reshape(-1),
            tables.minimum,
            tables.length,
            tables.offset,
            tables.interval,
            tables.reciprocal,
            zero_flag,
            coded,
            state,
            words,
            escapes,
        )
        better = _lanes(2 * (words.size - free)) if retry else lanes
    head = bytes([lanes.bit_length() - 1]) + state.astype("<u4").tobytes()
    return head + words[free:].astype("<u2").tobytes() + _varints(escapes[:count][::-1])


def _lanes(payload: float) -> int:
    return 1 << min(max(int(payload) // _LANE_BYTES, 1).bit_length() - 1, _MAX_LOG2_LANES)


def decode(stream: bytes | memoryview, positions: int, tables: Tables) -> Symbols:
    """The symbols of one tile's stream.

    Parameters
    ----------
    stream
        All bytes of the stream, and nothing else; contiguous.
    positions
        Symbols per channel, >= 1, from the frame.
    tables
        The tables that it was encoded with.

    Returns
    -------
    int16 (M, positions)

    Raises
    ------
    StreamError
        If the stream is malformed, truncated, or was written with other tables.
    CAEConfigurationError
        If `positions` is not positive.
    """
    if positions < 1:
        raise CAEConfigurationError(f"cae: positions must be at least 1; got {positions}")
    if len(stream) < 1:
        raise StreamError(f"cae: stream is empty; a tile has at least 5 bytes; {_DAMAGED}")
    log2_lanes = stream[0]
    if log2_lanes > _MAX_LOG2_LANES:
        raise StreamError(f"cae: stream's lane byte must be 0 to {_MAX_LOG2_LANES}; got {log2_lanes}; {_DAMAGED}")
    head = 1 + (4 << log2_lanes)
    if len(stream) < head:
        raise StreamError(
            f"cae: stream needs {head} bytes for its {1 << log2_lanes} lane states; got {len(stream)}; {_DAMAGED}"
        )
    state = np.frombuffer(stream, "<u4", 1 << log2_lanes, 1).astype(np.uint32)
    if int(state.min()) < _START_STATE:
        raise StreamError(f"cae: stream's lane states must be at least 2^16; got {int(state.min())}; {_DAMAGED}")
    word_count = (len(stream) - head) // 2
    words = np.zeros(word_count + max(positions, tables.channels), np.uint16)  # room to read on to a channel's end
    words[:word_count] = np.frombuffer(stream, "<u2", word_count, head)
    escapes = np.empty(len(stream), np.int64)  # each takes a byte at least
    symbols = np.zeros((tables.channels, positions), np.int16)
    read, count = _kernels().decode(
        words,
        word_count,
        tables.minimum,
        tables.length,
        tables.offset,
        tables.interval,
        tables.lookup,
        tables.zero_flag(positions),
        np.empty(tables.channels, np.bool_),
        state,
        symbols.reshape(-1),
        escapes,
    )
    if read > word_count:
        raise StreamError(f"cae: stream ends before its last word; {_DAMAGED}")
    if (state != _START_STATE).any():
        raise StreamError(f"cae: stream's lanes must end in state 2^16; got {hex(state.max())}; {_DAMAGED}")
    section = np.frombuffer(memoryview(stream)[head + 2 * read :], np.uint8)
    if count > section.size:
        raise StreamError(f"cae: stream needs {count} escapes; got {section.size} bytes; {_DAMAGED}")
    _put_escapes(section, escapes[:count], tables, symbols)
    return symbols


def _put_escapes(section: NDArray[np.uint8], place: NDArray[np.int64], tables: Tables, symbols: Symbols) -> None:
    """Put the values of the escape section at these places, counted over all of `symbols`."""
    end = np.flatnonzero(section < 128) + 1
    if end.size < place.size:
        raise StreamError(f"cae: stream needs {place.size} escapes; got {end.size}; {_DAMAGED}")
    if end.size > place.size or section.size > (end[-1] if end.size else 0):
        raise StreamError(f"cae: stream goes on after its last symbol; {_DAMAGED}")
    if place.size == 0:
        return
    row = place // symbols.shape[1]
    size = np.diff(end, prepend=0)
    if int(size.max()) > 3 or ((size > 1) & (section[end - 1] == 0)).any():
        raise StreamError(f"cae: stream's escapes must be varints of 1 to 3 bytes, none superfluous; {_DAMAGED}")
    digits = section.astype(np.int64) & 0x7F
    zigzag = sum(np.where(size > n, digits[end - np.maximum(size - n, 1)] << 7 * n, 0) for n in range(3))
    value = (zigzag >> 1) ^ -(zigzag & 1)
    if ((zigzag > 0xFFFF) | ((value >= tables.minimum[row]) & (value <= tables.largest[row]))).any():
        raise StreamError(f"cae: stream's escapes must be of int16 and outside their channel's alphabet; {_DAMAGED}")
    symbols.reshape(-1)[place] = value


def _varints(values: Symbols) -> bytes:
    wide = values.astype(np.int64)[:, None]
    zigzag, size = (wide << 1) ^ (wide >> 63), escape_bytes(wide)
    more, used = np.arange(1, 4) < size, np.arange(3) < size
    return bytes((zigzag >> [0, 7, 14] & 0x7F | more << 7)[used].astype(np.uint8))


# The kernels are plain functions, compiled at the first use, one signature each, without inner calls, slices or
# allocation: that keeps numba out of `import zarr_cae` and their compilation short. Arrays are flat.


def _encode(
    symbols: Symbols,
    minimum: NDArray[np.int32],
    length: NDArray[np.int32],
    offset: NDArray[np.uint32],
    interval: NDArray[np.uint32],
    reciprocal: NDArray[np.uint64],
    zero_flag: NDArray[np.uint32],
    coded: NDArray[np.bool_],
    state: NDArray[np.uint32],
    words: NDArray[np.uint16],
    escapes: Symbols,
) -> tuple[int, int]:
    """Fill `words` from its end, `escapes` backwards, and leave the lanes in `state`.

    Returns the number of words left free and the number of escapes.
    """
    channels = minimum.size
    positions = symbols.size // channels
    mask = _U(state.size - 1)
    pointer = _U(words.size)
    at = _U(symbols.size)
    count = _ZERO
    lane = pointer  # there is room for one word a symbol
    for c in range(channels - 1, -1, -1):
        if not coded[c]:
            at -= _U(positions)
            continue
        low, escape, base = np.int64(minimum[c]), _U(length[c] - 1), _U(offset[c])
        for _ in range(positions):
            at -= _ONE
            entry = _U(np.int64(symbols[at]) - low)  # below the minimum it wraps to far above the escape
            if entry >= escape:
                entry = escape
                escapes[count] = symbols[at]
                count += _ONE
            entry += base
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


def _decode(  # noqa: C901 - one kernel: inner calls cost compile time
    words: NDArray[np.uint16],
    word_count: int,
    minimum: NDArray[np.int32],
    length: NDArray[np.int32],
    offset: NDArray[np.uint32],
    interval: NDArray[np.uint32],
    lookup: NDArray[np.uint8],
    zero_flag: NDArray[np.uint32],
    coded: NDArray[np.bool_],
    state: NDArray[np.uint32],
    symbols: Symbols,
    escapes: NDArray[np.int64],
) -> tuple[int, int]:
    """Fill the coded channels of `symbols`, and `escapes` with the places that take one.

    Returns the number of words read and of escapes. Both may exceed what there is: `words` has padding for the symbols
    of one channel, and surplus escapes are only counted.
    """
    channels = minimum.size
    positions = symbols.size // channels
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
        low, base, first_slot = np.int64(minimum[c]), _U(offset[c]), _U(c) << _SLOT_BITS
        escape, largest = _U(length[c] - 1), _ZERO
        wide = escape - _BYTE if escape > _BYTE else _ZERO
        begin = c * positions
        ahead = lane - _U(begin)
        lane += _U(positions)
        for at in range(begin, begin + positions):
            here = (_U(at) + ahead) & mask
            x = _U(state[here])
            slot = x & _SLOT_MASK
            entry = _U(lookup[first_slot + slot])
            while entry < wide and _U(interval[base + entry + _WIDE]) & _WORD <= slot:
                entry += _WIDE
            packed = _U(interval[base + entry])
            x = (packed >> _SIXTEEN) * (x >> _SLOT_BITS) + slot - (packed & _WORD)
            word = _U(words[pointer])  # read always: a branch here would be mispredicted at high rates
            short = x < _STATE_MIN
            x = (x << _SIXTEEN) | word if short else x
            pointer = pointer + _ONE if short else pointer
            state[here] = x
            symbols[_U(at)] = np.int64(entry) + low
            largest = max(largest, entry)
        if largest == escape:
            for at in range(begin, begin + positions):
                if symbols[_U(at)] == low + np.int64(escape):
                    if count < most:
                        escapes[count] = at
                    count += _ONE
    return np.int64(pointer), np.int64(count)  # type: ignore[return-value]


class _Kernels(NamedTuple):
    encode: Callable[..., tuple[int, int]]
    decode: Callable[..., tuple[int, int]]


_compiled: _Kernels | None = None
_compiling = threading.Lock()


def _kernels() -> _Kernels:
    """Compile the kernels, or load them from numba's cache, once in a process."""
    global _compiled  # noqa: PLW0603
    if _compiled is None:
        with _compiling:
            if _compiled is None:
                _compiled = _compile()
    return _compiled


def _compile() -> _Kernels:
    import numba

    t = numba.types

    def read(kind: Any) -> Any:
        return t.Array(kind, 1, "C", readonly=True)

    tables = (read(t.int32), read(t.int32), read(t.uint32), read(t.uint32))  # minimum, length, offset, interval
    flags_state = (t.boolean[::1], t.uint32[::1])
    encode_types = (read(t.int16), *tables, read(t.uint64), read(t.uint32), *flags_state, t.uint16[::1], t.int16[::1])
    given = (read(t.uint16), t.int64, *tables, read(t.uint8), read(t.uint32))
    decode_types = (*given, *flags_state, t.int16[::1], t.int64[::1])
    result = t.UniTuple(t.int64, 2)  # type: ignore[no-untyped-call]

    def compiled(kernel: Callable[..., tuple[int, int]], signature: Any) -> Callable[..., tuple[int, int]]:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
        try:
            function = numba.njit(signature, cache=True, **options)(kernel)
        except Exception as error:  # noqa: BLE001 - no writable place, a full disk, a damaged cache: many types
            _log.debug("cae: numba's cache can't be used, compiling for this process only: %s", error)
            function = numba.njit(signature, **options)(kernel)
        return cast("Callable[..., tuple[int, int]]", function)

    return _Kernels(
        compiled(_encode, result(*encode_types)),
        compiled(_decode, result(*decode_types)),
    )
