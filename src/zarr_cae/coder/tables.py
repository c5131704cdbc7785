"""Integer frequency tables: what the entropy coder knows of each channel's symbols, and how to make it from densities.

Integers only, so that encoder and decoder agree to the last bit on every machine; floats stand only where tables are
made or judged. How the tables become a stream stands in `rans`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from zarr_cae.coder.contexts import LARGEST_ACTIVITY, Contexts, around, to_differences
from zarr_cae.errors import CAEConfigurationError

__all__ = ["BUCKETS", "PRECISION", "Tables", "escape_bytes", "frequencies", "ideal_bits", "trimmed_frequencies"]

PRECISION = 12  # frequencies of a row sum to 2^PRECISION; anything from 8 to 16 works
BUCKETS = 8  # log2 of the decoder's places to begin in a row

_TOTAL = 1 << PRECISION
_LEAST_ZERO_FLAG = _TOTAL // 16 * 15

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Tables:
    """Integer frequency tables of M channels, R = M rows or K for each; read-only copies of the arrays given.

    Parameters
    ----------
    minimum
        int32 (R,): the smallest symbol of each row's alphabet.
    length
        int32 (R,): entries of each row, the escape (the last one) included; at least 2.
    frequency
        uint32 (sum(length),): the rows, one after the other. Entries are at least 1, rows sum to 2^PRECISION.
    contexts
        Which of its K rows a channel takes where; None if it has just one.

    Raises
    ------
    CAEConfigurationError
        If an array has another shape or kind, or a row breaks a rule above. The alphabet must fit int16, with one
        more value above it.
    """

    minimum: NDArray[np.int32]
    length: NDArray[np.int32]
    frequency: NDArray[np.uint32]
    contexts: Contexts | None = None
    _flags: dict[int, NDArray[np.uint32]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        wide = {name: _integers(name, getattr(self, name)) for name in ("minimum", "length", "frequency")}
        minimum, length, frequency = wide.values()
        if minimum.size == 0 or minimum.size != length.size:
            raise CAEConfigurationError(
                f"cae: tables need one minimum and one length per channel; got {minimum.size} and {length.size}"
            )
        if self.contexts is not None and minimum.size != self.contexts.predicted.size * self.contexts.classes:
            raise CAEConfigurationError(
                f"cae: tables of {self.contexts.predicted.size} channels in {self.contexts.classes} classes need as "
                f"many rows; got {minimum.size}"
            )
        _check_channels((length < 2) | (length > _TOTAL), length, f"a length in [2, {_TOTAL}]")
        if int(length.sum()) != frequency.size:
            raise CAEConfigurationError(
                f"cae: tables need sum(length) = {int(length.sum())} frequencies; got {frequency.size}"
            )
        _check_channels(minimum < -(1 << 15), minimum, "a minimum of at least -32768")
        _check_channels(minimum + length > 1 << 15, minimum + length - 2, "a largest symbol of at most 32766")
        starts = np.cumsum(length) - length
        # Bounded entries come first: the sums below can't overflow.
        outside = (frequency < 1) | (frequency > _TOTAL)
        extreme = np.maximum.reduceat(np.where(outside, np.abs(frequency - 1) + 1, 0), starts)
        _check_channels(np.logical_or.reduceat(outside, starts), extreme, f"frequencies in [1, {_TOTAL}]")
        total = np.add.reduceat(frequency, starts)
        _check_channels(total != _TOTAL, total, f"frequencies that sum to {_TOTAL}")
        for name, kind in (("minimum", np.int32), ("length", np.int32), ("frequency", np.uint32)):
            object.__setattr__(self, name, _frozen(wide[name].astype(kind)))

    @property
    def channels(self) -> int:
        """M, the number of channels."""
        return self.minimum.size // self.classes

    @property
    def classes(self) -> int:
        """K, the number of rows of a channel."""
        return 1 if self.contexts is None else self.contexts.classes

    @property
    def frame_version(self) -> int:
        """Of frames that are coded with these tables."""
        return 1 if self.contexts is None else 2

    @cached_property
    def offset(self) -> NDArray[np.uint32]:
        """uint32 (R,): where each row begins in `frequency`."""
        return _frozen((np.cumsum(self.length) - self.length).astype(np.uint32))

    @cached_property
    def interval(self) -> NDArray[np.uint32]:
        """uint32 (sum(length),): each entry's frequency << 16 | start."""
        before = np.cumsum(self.frequency, dtype=np.uint64) - self.frequency
        return _frozen((self.frequency << np.uint32(16)) | (before % _TOTAL).astype(np.uint32))

    @cached_property
    def reciprocal(self) -> NDArray[np.uint64]:
        """uint64 (sum(length),): ceil(2^(32 + PRECISION) / frequency).

        For every x < frequency << (32 - PRECISION), which a state is before it takes a symbol, the product with x
        fits 64 bits and x * reciprocal >> (32 + PRECISION) is floor(x / frequency) exactly (Granlund and Montgomery,
        1994): the excess x * (frequency - 1) stays below 2^(32 + PRECISION).
        """
        divisor = self.frequency.astype(np.uint64)
        return _frozen(((1 << 32 + PRECISION) + divisor - 1) // divisor)

    @cached_property
    def lookup(self) -> NDArray[np.uint8]:
        """uint8 (R * 2^BUCKETS,): the entry that owns the first slot of each bucket of each row, at most 255.

        The decoder goes on from there entry by entry. A bucket is 16 slots: with a byte for each slot the tables of a
        tile's channels did not fit the cache, and decoding took three times as long.
        """
        rows = np.arange(len(self.length))[:, None]
        slots = (rows << PRECISION) + np.arange(0, _TOTAL, 1 << PRECISION - BUCKETS)
        firsts = np.searchsorted(np.cumsum(self.frequency, dtype=np.int64), slots, side="right") - self.offset[:, None]
        return _frozen(np.minimum(firsts, 255).astype(np.uint8).reshape(-1))

    @cached_property
    def likely(self) -> tuple[NDArray[np.uint32], NDArray[np.int16]]:
        """The interval and the symbol, uint32 (R,) and int16 (R,), of the one that has half of a row or more.

        An interval of 0 where there is none, or where it is the escape.
        """
        owner = np.repeat(np.arange(len(self.length)), self.length)
        entry = np.arange(self.frequency.size) - self.offset[owner]
        found = np.flatnonzero((self.frequency >= _TOTAL // 2) & (entry < self.length[owner] - 1))
        interval, symbol = np.zeros(len(self.length), np.uint32), np.zeros(len(self.length), np.int16)
        interval[owner[found]], symbol[owner[found]] = self.interval[found], self.minimum[owner[found]] + entry[found]
        return _frozen(interval), _frozen(symbol)

    @cached_property
    def entropy(self) -> NDArray[np.float32]:
        """float32 (R,): expected bits a symbol; only the first guess of the lanes rests on it."""
        bits = self.frequency * (PRECISION - np.log2(self.frequency)) / _TOTAL
        return _frozen(np.add.reduceat(bits, self.offset.astype(np.intp)).astype(np.float32))

    @cached_property
    def largest(self) -> NDArray[np.int32]:
        """int32 (R,): the largest symbol of each row's alphabet."""
        return _frozen(self.minimum + self.length - 2)

    def zero_flag(self, positions: int) -> NDArray[np.uint32]:
        """uint32 (M,): the frequency of the flag "all `positions` symbols are zero"; 0 where a channel has no flag.

        The arithmetic, which is part of the format, stands in the docstring of `rans`.
        """
        known = self._flags.get(positions)
        if known is not None:
            return known
        if self.contexts is None:
            entry = -self.minimum.astype(np.int64)
            has_zero = (entry >= 0) & (entry < self.length - 1)
            f0 = np.where(has_zero, self.frequency[np.where(has_zero, self.offset + entry, 0)], 0)
        else:
            f0 = np.minimum(self.contexts.zero, _TOTAL)
        to_fixed, half = np.uint64(32 - PRECISION), np.uint64(32)
        base, power, n = f0.astype(np.uint64) << to_fixed, np.full(self.channels, 1 << 32, np.uint64), positions
        while n:
            if n & 1:
                power = power * base >> half
            base, n = base * base >> half, n >> 1
        flag = np.minimum(power >> to_fixed, _TOTAL - 1).astype(np.uint32)
        flag = _frozen(np.where(flag >= _LEAST_ZERO_FLAG, flag, 0).astype(np.uint32))
        if len(self._flags) >= 64:  # a chunk's tiles have at most four sizes
            self._flags.clear()
        self._flags[positions] = flag
        return flag


def _integers(name: str, given: object) -> NDArray[np.int64]:
    array = np.asarray(given)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise CAEConfigurationError(
            f"cae: tables.{name} must be one-dimensional integers; got {array.ndim} dimensions of {array.dtype}"
        )
    return array.astype(np.int64)


def _check_channels(wrong: NDArray[np.bool_], came: NDArray[np.int64], expected: str) -> None:
    if wrong.any():
        channel = int(wrong.argmax())
        raise CAEConfigurationError(f"cae: channel {channel} of the tables needs {expected}; got {int(came[channel])}")


def _frozen(array: NDArray[_Scalar]) -> NDArray[_Scalar]:
    array.setflags(write=False)
    return array


def ideal_bits(symbols: NDArray[np.int16], tables: Tables) -> float:
    """Code length of a tile's symbols (M, h, w) under the integer tables, zeros and escaped values included."""
    coded = symbols if tables.contexts is None else to_differences(symbols, tables.contexts.predicted)
    row = rows_of(coded, tables)
    entry = coded.astype(np.int64) - tables.minimum[row]
    escape = tables.length[row] - 1
    escaped = (entry < 0) | (entry >= escape)
    chosen = tables.frequency[tables.offset[row] + np.where(escaped, escape, entry)]
    return float((PRECISION - np.log2(chosen)).sum()) + 8.0 * float(escape_bytes(coded[escaped]).sum())


def rows_of(coded: NDArray[np.int16], tables: Tables) -> NDArray[np.intp]:
    """The row of each coded symbol of a tile (M, h, w), as the docstring of `contexts` has it."""
    row = np.repeat(np.arange(len(coded)) * tables.classes, coded[0].size).reshape(coded.shape)
    if tables.contexts is not None:
        surroundings = np.empty(coded.shape, np.uint8)
        for channel, values in enumerate(coded.astype(np.int32)):
            row[channel] += tables.contexts.class_of(channel, surroundings)
            outside = tables.largest[row[channel]] + 1
            escaped = (values < tables.minimum[row[channel]]) | (values > outside)
            activity = np.abs(np.where(escaped, outside, values)).clip(max=LARGEST_ACTIVITY)
            surroundings[channel] = around(activity)
    return row


def frequencies(probability: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Integer frequencies of the least expected code length.

    The expected length is a sum of convex functions of one frequency each, so exchanging single units until no
    exchange helps ends at the optimum (Fox, "Discrete optimization via marginal analysis", 1966).

    Parameters
    ----------
    probability
        float64 (n,), finite and not negative, 2 <= n <= 2^PRECISION; the last is the escape's. Need not sum to 1.

    Returns
    -------
    uint32 (n,), each at least 1, of sum 2^PRECISION

    Raises
    ------
    CAEConfigurationError
        If `probability` is not as described.
    """
    p = _probabilities(probability, 2, _TOTAL)
    frequency = np.maximum(np.rint(p * (_TOTAL / p.sum())), 1.0)
    while True:
        gain = p * np.log2((frequency + 1) / frequency)
        with np.errstate(divide="ignore", invalid="ignore"):
            loss = np.where(frequency > 1, p * np.log2(frequency / (frequency - 1)), np.inf)
        best, least = int(gain.argmax()), int(loss.argmin())
        missing = _TOTAL - int(frequency.sum())
        if missing == 0 and gain[best] <= loss[least]:
            return np.asarray(frequency, np.uint32)
        if missing >= 0:
            frequency[best] += 1
        if missing <= 0:
            frequency[least] -= 1


def trimmed_frequencies(probability: NDArray[np.float64], first: int) -> tuple[int, NDArray[np.uint32]]:
    """The alphabet of nearly least expected code length for one channel, and its row.

    Every symbol in the alphabet takes at least one slot from the others; every one outside costs the escape and 1 to
    3 bytes. The ranges compared grow from the most probable symbol, each time by the likelier neighbour.

    Parameters
    ----------
    probability
        float64 (n,): probabilities of the integers first, first + 1, ...; what they lack of 1 lies outside.
    first
        The smallest integer, within int16.

    Returns
    -------
    minimum, frequency
        The alphabet's smallest symbol, and its row: uint32, escape last.

    Raises
    ------
    CAEConfigurationError
        If `probability` is not as `frequencies` wants it, or its integers leave [-32768, 32766].
    """
    p = _probabilities(probability, 1, 1 << 16)
    if first < -(1 << 15) or first + p.size - 1 > (1 << 15) - 2:
        raise CAEConfigurationError(
            f"cae: symbols must lie in [-32768, 32766]; got {first} to {first + p.size - 1}: give fewer probabilities"
        )
    p = p / max(p.sum(), 1.0)
    low = high = int(p.argmax())
    order = [low]
    while len(order) < min(p.size, _TOTAL - 1):
        down = p[low - 1] if low > 0 else -1.0
        up = p[high + 1] if high + 1 < p.size else -1.0
        if up >= down:
            high += 1
            order.append(high)
        else:
            low -= 1
            order.append(low)
    grown = p[order]
    escape = np.maximum(1.0 - grown.cumsum(), 0.0)
    escape_bits = 8.0 * escape_bytes(np.arange(p.size) + first)
    outside = 24.0 * max(1.0 - p.sum(), 0.0) + (p * escape_bits).sum() - (grown * escape_bits[order]).cumsum()
    slots, escape_slots = np.maximum(grown * _TOTAL, 1.0), np.maximum(escape * _TOTAL, 1.0)
    inside = -(grown * np.log2(slots)).cumsum() - escape * np.log2(escape_slots)
    bits = inside + np.log2(slots.cumsum() + escape_slots) + outside
    size = int(bits.argmin()) + 1
    low = min(order[:size])
    return first + low, frequencies(np.append(p[low : low + size], escape[size - 1]))


def _probabilities(given: NDArray[np.float64], least: int, most: int) -> NDArray[np.float64]:
    p = np.asarray(given, np.float64)
    if p.ndim != 1 or not least <= p.size <= most or not np.isfinite(p).all() or (p < 0).any() or p.sum() <= 0:
        raise CAEConfigurationError(
            f"cae: probability must be {least} to {most} finite values >= 0, not all zero; got shape {p.shape}"
        )
    return p


def escape_bytes(values: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Bytes that each value takes in a stream's section of escapes: 1 to 3 (the varints of `rans`)."""
    wide = values.astype(np.int64)
    folded = wide ^ (wide >> 63)  # v, or -v - 1 below zero
    return 1 + (folded >= 1 << 6).astype(np.int64) + (folded >= 1 << 13)
