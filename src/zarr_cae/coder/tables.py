"""Integer frequency tables of the entropy coder.

All arithmetic that coding depends on is integer arithmetic, so encoder and decoder agree to the last bit on every
machine. `frequencies` makes tables from probabilities. The section "Streams" of spec/cae.md says how they become bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from zarr_cae.coder.contexts import LARGEST_ACTIVITY, Contexts, around, to_differences
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.threads import lazy_property

__all__ = ["BUCKETS", "PRECISION", "TOTAL", "Tables", "escape_bytes", "ideal_bits", "rows_of"]

PRECISION = 12  # frequencies of a row sum to 2^PRECISION; anything from 8 to 16 works
BUCKETS = 8  # log2 of the number of buckets of a row in `lookup`

TOTAL = 1 << PRECISION
_LEAST_ZERO_FLAG = TOTAL // 16 * 15

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Tables:
    """Integer frequency tables of M channels with K rows each, R = M K.

    It holds read-only copies of the arrays.

    Parameters
    ----------
    minimum
        int32 (R,): the smallest symbol of each row's alphabet.
    length
        int32 (R,): entries of each row, the escape (the last one) included; at least 2.
    frequency
        uint32 (sum(length),): the rows, one after the other. Entries are at least 1, rows sum to 2^PRECISION.
    contexts
        The contexts that choose among the K rows of a channel; None if K is 1.

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
    _flags: dict[tuple[int, bool], NDArray[np.uint32]] = field(default_factory=dict, init=False, repr=False)

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
        _check_channels((length < 2) | (length > TOTAL), length, f"a length in [2, {TOTAL}]")
        if int(length.sum()) != frequency.size:
            raise CAEConfigurationError(
                f"cae: tables need sum(length) = {int(length.sum())} frequencies; got {frequency.size}"
            )
        _check_channels(minimum < -(1 << 15), minimum, "a minimum of at least -32768")
        _check_channels(minimum + length > 1 << 15, minimum + length - 2, "a largest symbol of at most 32766")
        starts = np.cumsum(length) - length
        # Bounded entries come first: the sums below can't overflow.
        outside = (frequency < 1) | (frequency > TOTAL)
        extreme = np.maximum.reduceat(np.where(outside, np.abs(frequency - 1) + 1, 0), starts)
        _check_channels(np.logical_or.reduceat(outside, starts), extreme, f"frequencies in [1, {TOTAL}]")
        total = np.add.reduceat(frequency, starts)
        _check_channels(total != TOTAL, total, f"frequencies that sum to {TOTAL}")
        for name, kind in (("minimum", np.int32), ("length", np.int32), ("frequency", np.uint32)):
            object.__setattr__(self, name, _frozen(wide[name].astype(kind)))

    @property
    def channels(self) -> int:
        """Number of channels, M."""
        return self.minimum.size // self.classes

    @property
    def classes(self) -> int:
        """Number of rows of a channel, K."""
        return 1 if self.contexts is None else self.contexts.classes

    @property
    def frame_version(self) -> int:
        """Version of the frames that releases before frame version 3 wrote with these tables: 1 or 2."""
        return 1 if self.contexts is None else 2

    @lazy_property
    def offset(self) -> NDArray[np.uint32]:
        """uint32 (R,): where each row begins in `frequency`."""
        return _frozen((np.cumsum(self.length) - self.length).astype(np.uint32))

    @lazy_property
    def interval(self) -> NDArray[np.uint32]:
        """uint32 (sum(length),): each entry's frequency << 16 | start."""
        before = np.cumsum(self.frequency, dtype=np.uint64) - self.frequency
        return _frozen((self.frequency << np.uint32(16)) | (before % TOTAL).astype(np.uint32))

    @lazy_property
    def reciprocal(self) -> NDArray[np.uint64]:
        """uint64 (sum(length),): ceil(2^(32 + PRECISION) / frequency).

        For every x < frequency << (32 - PRECISION), which a state is before it takes a symbol, the product with x
        fits 64 bits and x * reciprocal >> (32 + PRECISION) is floor(x / frequency) exactly (Granlund and Montgomery,
        1994): the excess x * (frequency - 1) stays below 2^(32 + PRECISION).
        """
        divisor = self.frequency.astype(np.uint64)
        return _frozen(((1 << 32 + PRECISION) + divisor - 1) // divisor)

    @lazy_property
    def lookup(self) -> NDArray[np.uint8]:
        """uint8 (R * 2^BUCKETS,): the entry that owns the first slot of each bucket of each row, at most 255.

        The decoder searches from there, entry by entry. A bucket has 16 slots. With a byte for each slot the tables of
        all channels did not fit into the cache, and decoding took three times as long.
        """
        rows = np.arange(len(self.length))[:, None]
        slots = (rows << PRECISION) + np.arange(0, TOTAL, 1 << PRECISION - BUCKETS)
        firsts = np.searchsorted(np.cumsum(self.frequency, dtype=np.int64), slots, side="right") - self.offset[:, None]
        return _frozen(np.minimum(firsts, 255).astype(np.uint8).reshape(-1))

    @lazy_property
    def likely(self) -> tuple[NDArray[np.uint32], NDArray[np.int16]]:
        """uint32 (R,) and int16 (R,): interval and symbol of the entry that has at least half of its row.

        The interval is 0 if no entry has, or if it is the escape.
        """
        owner = np.repeat(np.arange(len(self.length)), self.length)
        entry = np.arange(self.frequency.size) - self.offset[owner]
        found = np.flatnonzero((self.frequency >= TOTAL // 2) & (entry < self.length[owner] - 1))
        interval, symbol = np.zeros(len(self.length), np.uint32), np.zeros(len(self.length), np.int16)
        interval[owner[found]], symbol[owner[found]] = self.interval[found], self.minimum[owner[found]] + entry[found]
        return _frozen(interval), _frozen(symbol)

    @lazy_property
    def entropy(self) -> NDArray[np.float32]:
        """float32 (R,): expected bits per symbol. Only the first guess of the number of lanes uses it."""
        bits = self.frequency * (PRECISION - np.log2(self.frequency)) / TOTAL
        return _frozen(np.add.reduceat(bits, self.offset.astype(np.intp)).astype(np.float32))

    @lazy_property
    def largest(self) -> NDArray[np.int32]:
        """int32 (R,): the largest symbol of each row's alphabet."""
        return _frozen(self.minimum + self.length - 2)

    def zero_flag(self, positions: int, version: int) -> NDArray[np.uint32]:
        """Return the frequency of the flag "all symbols of the channel are zero", by the section "Streams" of the spec.

        Parameters
        ----------
        positions
            Number of latent positions of the tile.
        version
            Version of the frame. In versions 1 and 2 a channel that is always zero has no flag.

        Returns
        -------
        uint32 (M,)
            0 where a channel has no flag.
        """
        key = positions, version >= 3
        known = self._flags.get(key)
        if known is not None:
            return known
        if self.contexts is None:
            entry = -self.minimum.astype(np.int64)
            has_zero = (entry >= 0) & (entry < self.length - 1)
            f0 = np.where(has_zero, self.frequency[np.where(has_zero, self.offset + entry, 0)], 0)
        else:
            f0 = np.minimum(self.contexts.zero, TOTAL)
        to_fixed, half = np.uint64(32 - PRECISION), np.uint64(32)
        always = f0 == TOTAL  # 2^32 squared would overflow
        base = np.where(always, 0, f0).astype(np.uint64) << to_fixed
        power, n = np.full(self.channels, 1 << 32, np.uint64), positions
        while n:
            if n & 1:
                power = power * base >> half
            base, n = base * base >> half, n >> 1
        flag = np.minimum(power >> to_fixed, TOTAL - 1).astype(np.uint32)
        if version >= 3:
            flag = np.where(always, TOTAL - 1, flag)
        flag = _frozen(np.where(flag >= _LEAST_ZERO_FLAG, flag, 0).astype(np.uint32))
        if len(self._flags) >= 64:  # enough: a chunk's tiles have at most four sizes
            self._flags.clear()
        self._flags[key] = flag
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
    """Return the bits of a tile's symbols (M, h, w) under the integer tables, escapes included, zero flags ignored."""
    coded = symbols if tables.contexts is None else to_differences(symbols, tables.contexts.predicted)
    row = rows_of(coded, tables)
    entry = coded.astype(np.int64) - tables.minimum[row]
    escape = tables.length[row] - 1
    escaped = (entry < 0) | (entry >= escape)
    chosen = tables.frequency[tables.offset[row] + np.where(escaped, escape, entry)]
    return float((PRECISION - np.log2(chosen)).sum()) + 8.0 * float(escape_bytes(coded[escaped]).sum())


def rows_of(coded: NDArray[np.int16], tables: Tables) -> NDArray[np.intp]:
    """Return the row of each coded symbol of a tile (M, h, w), by the section "Contexts" of spec/cae.md."""
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


def escape_bytes(values: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return how many bytes each value takes as an escape: 1 to 3."""
    wide = values.astype(np.int64)
    folded = wide ^ (wide >> 63)  # v, or -v - 1 below zero
    return 1 + (folded >= 1 << 6).astype(np.int64) + (folded >= 1 << 13)
