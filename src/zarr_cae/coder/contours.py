"""Code the rows of a binary image by the columns where they change, as differences from the row above.

The section "Mask section" of spec/cae.md defines the numbers. A smooth outline moves by a column or two from row to
row, so most numbers are small and compress well.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zarr_cae.coder.fields import MAX_VARINT_BYTES, VARINT_END, varints
from zarr_cae.errors import StreamError

__all__ = ["decode_contours", "encode_contours"]

_DAMAGED = "the stored chunk is damaged"


def encode_contours(rows: NDArray[np.bool_], most: int) -> bytes | None:
    """Return the contours of an image as varints.

    Parameters
    ----------
    rows
        bool (R, W).
    most
        The largest number of bytes.

    Returns
    -------
    bytes or None
        None if there would be more bytes.
    """
    changes = rows.copy()
    changes[:, 1:] ^= rows[:, :-1]
    counts = np.count_nonzero(changes, axis=1)
    if counts.sum() > most:
        return None
    columns = np.nonzero(changes)[1]
    starts = np.flatnonzero(np.concatenate([[True], counts[1:] != counts[:-1]]))
    numbers, at = [], 0
    for start, length in zip(starts, np.diff(starts, append=len(rows)), strict=True):
        count = counts[start]
        block = columns[at : at + length * count].reshape(length, count)
        at += block.size
        moves = np.diff(block, axis=0).reshape(-1)
        moves = np.where(moves < 0, -2 * moves - 1, 2 * moves)
        numbers += [np.array([length, count]), np.diff(block[0], prepend=0), moves]
    content = varints(np.concatenate(numbers))
    return content if len(content) <= most else None


def decode_contours(content: bytes, rows: int, width: int) -> NDArray[np.bool_]:
    """Return the image (rows, width) of contours.

    Raises
    ------
    StreamError
        If the numbers are malformed, or not those of an image of this size.
    """
    numbers = _numbers(content)
    places: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    top = at = 0
    while top < rows:
        length, count = numbers[at : at + 2].tolist() if at + 2 <= len(numbers) else (0, 0)
        at += 2
        if not (1 <= length <= rows - top and count <= width and at + length * count <= len(numbers)):
            raise StreamError(f"cae: mask section has {length} rows of {count} changes at row {top}; {_DAMAGED}")
        block = numbers[at : at + length * count].reshape(length, count)
        at += block.size
        if count:
            moves = np.where(block[1:] & 1, -(block[1:] >> 1) - 1, block[1:] >> 1)
            columns = np.cumsum(np.concatenate([np.cumsum(block[:1], axis=1), moves]), axis=0)
            if columns[:, 0].min() < 0 or columns[:, -1].max() >= width or (np.diff(columns, axis=1) < 1).any():
                raise StreamError(f"cae: mask section has changes outside {width} columns or out of order; {_DAMAGED}")
            places.append((np.arange(top, top + length)[:, None], columns))
        top += length
    if at != len(numbers):
        raise StreamError(f"cae: mask section has {len(numbers) - at} numbers after the last row; {_DAMAGED}")
    changes = np.zeros((rows, width), np.bool_)  # only now, when the numbers are those of so many rows
    for place in places:
        changes[place] = True
    return np.bitwise_xor.accumulate(changes, axis=1)


def _numbers(content: bytes) -> NDArray[np.int64]:
    """Return the numbers of varints. Raise StreamError if they are malformed."""
    octets = np.frombuffer(content, np.uint8).astype(np.int64)
    ends = np.flatnonzero(octets < 0x80)
    begins = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    sizes = ends - begins + 1
    whole = len(ends) > 0 and ends[-1] == len(octets) - 1
    if not whole or sizes.max() > MAX_VARINT_BYTES or (octets[ends[sizes > 1]] == 0).any():
        raise StreamError(f"cae: mask section has malformed numbers; {_DAMAGED}")
    shifts = 7 * (np.arange(len(octets)) - np.repeat(begins, sizes))
    numbers: NDArray[np.int64] = np.add.reduceat((octets & 0x7F) << shifts, begins)
    if numbers.max() >= VARINT_END:
        raise StreamError(f"cae: mask section has numbers of 2^32 and more; {_DAMAGED}")
    return numbers
