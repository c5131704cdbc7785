"""The correction of a tile: a few numbers that bring its synthesised pixels nearer to the original ones.

The section "Correction" of spec/cae.md defines the bytes, and what a decoder does with the numbers; `pixels.corrected`
does it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zarr_cae.coder.fields import varints
from zarr_cae.errors import CAEConfigurationError, StreamError

__all__ = [
    "CURVE_UNIT", "KNOTS", "LARGEST_LIMIT", "SCALES", "SHARE_UNIT", "SOFT_LIMIT", "Correction", "Scale",
    "decode_correction", "encode_correction", "numbers_of",
]  # fmt: skip

KNOTS = 9
"""Knots of a curve."""
CURVE_UNIT = 8
"""Values of a curve are in units of 1/8 grey level, which is 1/255 of the value range."""
SHARE_UNIT = 64
"""Other numbers are in units of 1/64."""
_AROUND = 3
"""Numbers for the surroundings of a pixel: the means of 3 x 3 and 7 x 7, and the four neighbours."""
SOFT_LIMIT = 3
"""Largest difference from one of the four neighbours, in grey levels."""
LARGEST_LIMIT = 255
_LARGEST = 32767
_MAX_VARINT_BYTES = 3
_PARTIAL = 2
"""Bit of the first byte that is set if only some positions are corrected."""
_DAMAGED = "the stored chunk is damaged"

Scale = Literal["uniform", "root"]
"""Where the knots lie: equally spaced in the values, or in their square roots, which is finer in the dark."""
SCALES: tuple[Scale, ...] = ("uniform", "root")
"""In the order of their numbers in a section."""


@dataclass(frozen=True, eq=False)
class Correction:
    """The numbers of a tile.

    Attributes
    ----------
    scale
        Where the knots lie.
    limit
        The largest change of a value, in grey levels: 1 to 255.
    numbers
        int (C, 9 + C - 1 + 3): for each of C components the curve at the knots; the shares of the differences from
        the other components, in ascending order; the shares of the differences from the means of 3 x 3 and 7 x 7
        pixels; and the share of the limited differences from the four neighbours.
    where
        bool (rows, columns), the latent positions whose pixels are corrected, at least one; None for all.
    """

    scale: Scale
    limit: int
    numbers: NDArray[np.int64]
    where: NDArray[np.bool_] | None = None

    @property
    def components(self) -> int:
        """Number of components, C."""
        return len(self.numbers)


def encode_correction(correction: Correction) -> bytes:
    """Return the correction section of a tile.

    Raises
    ------
    CAEConfigurationError
        If a number is out of its range, or no position is corrected.
    """
    numbers, where = correction.numbers, correction.where
    components = len(numbers)
    fits = numbers.shape == (components, numbers_of(components)) and np.abs(numbers).max(initial=0) <= _LARGEST
    some = where is None or bool(where.any())
    if not (fits and some and 1 <= correction.limit <= LARGEST_LIMIT):
        raise CAEConfigurationError(
            f"cae: a correction has {numbers_of(components)} numbers from {-_LARGEST} to {_LARGEST} a component, "
            f"a limit from 1 to {LARGEST_LIMIT}, and at least one position; got {numbers.shape} numbers up to "
            f"{np.abs(numbers).max(initial=0)}, a limit of {correction.limit}, and {'some' if some else 'no'} positions"
        )
    signed = numbers.reshape(-1).astype(np.int64)
    folded = np.where(signed >= 0, 2 * signed, -2 * signed - 1)
    form = SCALES.index(correction.scale) | (0 if where is None else _PARTIAL)
    bits = b"" if where is None else np.packbits(where, bitorder="little").tobytes()
    return bytes([form, correction.limit]) + varints(folded) + bits


def decode_correction(section: bytes | memoryview, components: int, shape: tuple[int, int]) -> Correction:
    """Return the correction of a section.

    Parameters
    ----------
    section
        The section, without its length.
    components
        Number of components of the tile, 1 or 3.
    shape
        Rows and columns of latent positions of the tile.

    Raises
    ------
    StreamError
        If the section is malformed, or is one of another number of components or another shape.
    """
    view = memoryview(section)
    if len(view) < 2 or view[0] >= 2 * _PARTIAL or view[1] == 0:
        raise StreamError(
            f"cae: correction must begin with a form of 0 to 3 and a limit above 0; got {bytes(view[:2])!r}; {_DAMAGED}"
        )
    count = components * numbers_of(components)
    positions = math.prod(shape) if view[0] & _PARTIAL else 0
    most = 2 + _MAX_VARINT_BYTES * count + -(-positions // 8)
    if len(view) > most:
        raise StreamError(f"cae: correction must have at most {most} bytes; got {len(view)}; {_DAMAGED}")
    stored = np.frombuffer(view[2:], np.uint8)
    ends = np.flatnonzero(stored < 0x80)[:count]
    if len(ends) < count:
        raise StreamError(f"cae: correction must have {count} numbers; got {len(ends)}; {_DAMAGED}")
    numbers = _unfolded(stored[: ends[-1] + 1], ends).reshape(components, -1)
    bits = stored[ends[-1] + 1 :]
    where = None
    if positions:
        every = np.unpackbits(bits, bitorder="little")
        if len(bits) != -(-positions // 8) or every[positions:].any() or not every.any():
            raise StreamError(
                f"cae: correction must have bits for {positions} positions, at least one of them set; got {len(bits)} "
                f"bytes; {_DAMAGED}"
            )
        where = every[:positions].view(np.bool_).reshape(shape)
    elif len(bits):
        raise StreamError(f"cae: correction has {len(bits)} bytes after its last number; {_DAMAGED}")
    return Correction(SCALES[view[0] & 1], view[1], numbers, where)


def numbers_of(components: int) -> int:
    """Return how many numbers each component has."""
    return KNOTS + components - 1 + _AROUND


def _unfolded(stored: NDArray[np.uint8], ends: NDArray[np.intp]) -> NDArray[np.int64]:
    """Return the numbers of varints that end at these bytes. Raise StreamError if they are malformed or too large."""
    lengths = np.diff(ends, prepend=-1)
    if (lengths > _MAX_VARINT_BYTES).any() or (stored[ends[lengths > 1]] == 0).any():
        raise StreamError(f"cae: correction has a malformed varint; {_DAMAGED}")
    place = np.arange(len(stored)) - np.repeat(ends - lengths + 1, lengths)
    parts = (stored & 0x7F).astype(np.int64) << 7 * place
    folded = np.add.reduceat(parts, ends - lengths + 1)
    if (folded > 2 * _LARGEST).any():
        raise StreamError(
            f"cae: correction's numbers must be from {-_LARGEST} to {_LARGEST}; got {folded.max()}; {_DAMAGED}"
        )
    signed: NDArray[np.int64] = np.where(folded % 2, -(folded + 1) // 2, folded // 2)
    return signed
