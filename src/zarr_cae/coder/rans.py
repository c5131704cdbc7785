"""Interleaved rANS between symbols and bytes.

Range asymmetric numeral systems with several interleaved states (Duda, arXiv:1311.2540; Giesen, arXiv:1402.3392):
32-bit states held in [2^16, 2^32), renormalised by 16-bit words. Everything is integer arithmetic, so the same bytes
give the same symbols on every machine.

The section "Streams" of spec/cae.md defines the bytes. A group of L symbols, one for each of L lanes, reads at most L
words in the order of the lanes. So a GPU's warp could decode it in lockstep, with a ballot and a prefix count.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zarr_cae.coder.compile import decoders, encoders
from zarr_cae.coder.contexts import Contexts, to_differences
from zarr_cae.coder.fields import varints
from zarr_cae.coder.frame import Symbols
from zarr_cae.coder.kernels import START_STATE
from zarr_cae.coder.tables import Tables
from zarr_cae.errors import CAEConfigurationError, StreamError

__all__ = ["decode", "encode"]

_MAX_LOG2_LANES = 5
_LANE_BYTES = 750  # payload per lane; a lane costs about 3 bytes, 0.4 % of this
_SPARSE_WORDS = 1 / 32  # per symbol, half a bit: below this, trying the likely symbol first is faster
_DAMAGED = "the stored chunk is damaged, or of other weights"


def encode(symbols: Symbols, tables: Tables, version: int) -> bytes:
    """Return the stream of one tile.

    Parameters
    ----------
    symbols
        int16 (M, h, w), h and w >= 1. Values outside a table's alphabet are coded by the escape.
    tables
        Tables of the same M channels.
    version
        Version of the frame that the stream is for; it decides which channels have a zero flag.

    Raises
    ------
    CAEConfigurationError
        If `symbols` has another dtype or shape.
    """
    if symbols.dtype != np.int16 or symbols.ndim != 3 or len(symbols) != tables.channels or not symbols.size:
        raise CAEConfigurationError(
            f"cae: symbols must be int16 of shape ({tables.channels}, rows, columns) with at least one position; "
            f"got {symbols.dtype} of shape {symbols.shape}"
        )
    if tables.contexts is not None:
        symbols = to_differences(symbols, tables.contexts.predicted)
    width = symbols.shape[2]
    flat = np.require(symbols, np.int16, ["C", "A"]).reshape(tables.channels, -1)
    positions = flat.shape[1]
    zero_flag = tables.zero_flag(positions, version)
    coded: NDArray[np.bool_] = np.any(flat, axis=1) | (zero_flag == 0)
    classes = np.zeros(flat.size, np.uint8)
    if tables.contexts is None:
        bits = float(tables.entropy @ coded) * positions
    else:
        scratch = _Scratch.of(flat.size, positions, width)
        bits = encoders().assign(
            flat.reshape(-1),
            width,
            tables.minimum,
            tables.length,
            coded,
            *_sources(tables.contexts),
            *scratch,
            classes,
            tables.entropy,
        )
    words = np.empty(np.count_nonzero(zero_flag) + np.count_nonzero(coded) * positions, np.uint16)
    escapes = np.empty(words.size, np.int16)  # untouched pages cost no memory
    lanes, better = 0, _lanes(bits / 8)
    while lanes != better:  # the tables give a first guess; encode again if the payload calls for another number
        lanes, retry = better, not lanes
        state = np.full(lanes, START_STATE, np.uint32)
        free, count = encoders().encode(
            flat.reshape(-1),
            tables.minimum,
            tables.length,
            tables.offset,
            tables.interval,
            tables.reciprocal,
            zero_flag,
            coded,
            classes,
            state,
            words,
            escapes,
        )
        better = _lanes(2 * (words.size - free)) if retry else lanes
    head = bytes([lanes.bit_length() - 1]) + state.astype("<u4").tobytes()
    values = escapes[:count][::-1].astype(np.int64)
    zigzag = (values << 1) ^ (values >> 63)
    return head + words[free:].astype("<u2").tobytes() + varints(zigzag)


class _Scratch(NamedTuple):
    """Buffers of the kernels: scores of a channel, its activities with a border of zeros, `around` of all channels."""

    score: NDArray[np.uint16]
    activity: NDArray[np.uint8]
    around: NDArray[np.uint8]

    @classmethod
    def of(cls, size: int, positions: int, width: int) -> _Scratch:
        border = (positions // width + 2) * (width + 2)
        return cls(np.empty(positions, np.uint16), np.zeros(border, np.uint8), np.empty(size, np.uint8))


@lru_cache(maxsize=64)
def _sources(contexts: Contexts | None) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.uint16]]:
    """Return source, weight and threshold as flat arrays for the kernels; empty without contexts."""
    if contexts is None:
        return np.empty(0, np.int16), np.empty(0, np.uint8), np.empty(0, np.uint16)
    return contexts.source.reshape(-1), contexts.weight.reshape(-1), contexts.threshold.reshape(-1)


def _lanes(payload: float) -> int:
    return 1 << min(max(int(payload) // _LANE_BYTES, 1).bit_length() - 1, _MAX_LOG2_LANES)


def decode(stream: bytes | memoryview, shape: tuple[int, int], tables: Tables, version: int) -> Symbols:
    """Return the symbols of one tile.

    Parameters
    ----------
    stream
        All bytes of the stream, and nothing else; contiguous.
    shape
        Rows and columns of the tile, >= 1, from the frame.
    tables
        The tables that it was encoded with.
    version
        Version of the frame that holds the stream.

    Returns
    -------
    int16 (M, *shape)

    Raises
    ------
    StreamError
        If the stream is malformed, truncated, or was written with other tables.
    CAEConfigurationError
        If `shape` is not positive.
    """
    if min(shape) < 1:
        raise CAEConfigurationError(f"cae: a tile's shape must be at least 1 x 1; got {shape}")
    positions, width = shape[0] * shape[1], shape[1]
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
    if int(state.min()) < START_STATE:
        raise StreamError(f"cae: stream's lane states must be at least 2^16; got {int(state.min())}; {_DAMAGED}")
    word_count = (len(stream) - head) // 2
    words = np.zeros(
        word_count + max(positions, tables.channels), np.uint16
    )  # padded: the kernel reads on to the end of a channel
    words[:word_count] = np.frombuffer(stream, "<u2", word_count, head)
    escapes = np.empty(len(stream), np.int64)  # each escape takes at least one byte
    symbols = np.zeros((tables.channels, positions), np.int16)
    classes = np.zeros(symbols.size, np.uint8)
    read, count = decoders().decode(
        words,
        word_count,
        width,
        tables.minimum,
        tables.length,
        tables.offset,
        tables.interval,
        tables.lookup,
        *tables.likely,
        word_count < symbols.size * _SPARSE_WORDS,
        tables.zero_flag(positions, version),
        np.empty(tables.channels, np.bool_),
        *_sources(tables.contexts),
        *_Scratch.of(symbols.size if tables.contexts else 0, positions, width),
        classes,
        state,
        symbols.reshape(-1),
        escapes,
    )
    if read > word_count:
        raise StreamError(f"cae: stream ends before its last word; {_DAMAGED}")
    if (state != START_STATE).any():
        raise StreamError(f"cae: stream's lanes must end in state 2^16; got {hex(state.max())}; {_DAMAGED}")
    section = np.frombuffer(memoryview(stream)[head + 2 * read :], np.uint8)
    if count > section.size:
        raise StreamError(f"cae: stream needs {count} escapes; got {section.size} bytes; {_DAMAGED}")
    _put_escapes(section, escapes[:count], tables, classes, symbols.reshape(-1))
    if tables.contexts is not None:
        decoders().restore(symbols.reshape(-1), width, tables.contexts.predicted)
    return symbols.reshape(-1, *shape)


def _put_escapes(
    section: NDArray[np.uint8], place: NDArray[np.int64], tables: Tables, classes: NDArray[np.uint8], symbols: Symbols
) -> None:
    """Write the values of the section of escapes to these indices of the flat symbols."""
    end = np.flatnonzero(section < 128) + 1
    if end.size < place.size:
        raise StreamError(f"cae: stream needs {place.size} escapes; got {end.size}; {_DAMAGED}")
    if end.size > place.size or section.size > (end[-1] if end.size else 0):
        raise StreamError(f"cae: stream goes on after its last symbol; {_DAMAGED}")
    if place.size == 0:
        return
    row = place // (symbols.size // tables.channels) * tables.classes + classes[place]
    size = np.diff(end, prepend=0)
    if int(size.max()) > 3 or ((size > 1) & (section[end - 1] == 0)).any():
        raise StreamError(f"cae: stream's escapes must be varints of 1 to 3 bytes, none superfluous; {_DAMAGED}")
    digits = section.astype(np.int64) & 0x7F
    zigzag = sum(np.where(size > n, digits[end - np.maximum(size - n, 1)] << 7 * n, 0) for n in range(3))
    value = (zigzag >> 1) ^ -(zigzag & 1)
    if ((zigzag > 0xFFFF) | ((value >= tables.minimum[row]) & (value <= tables.largest[row]))).any():
        raise StreamError(f"cae: stream's escapes must be of int16 and outside their channel's alphabet; {_DAMAGED}")
    symbols[place] = value
