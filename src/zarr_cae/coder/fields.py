"""The fields of a frame: varints and checksums, written and read with their bounds checked.

The section "Frames" of spec/cae.md defines them.
"""

from __future__ import annotations

from collections.abc import Sequence

import crc32c
import numpy as np
from numpy.typing import NDArray

from zarr_cae.errors import FrameError

CHECKSUM_BYTES = 4
VARINT_END = 1 << 32
"""Varints are below this."""
MAX_VARINT_BYTES = 5


def sealed(content: bytes | bytearray | memoryview) -> bytes:
    """Return the bytes followed by their CRC32C."""
    return bytes(content) + crc32c.crc32c(content).to_bytes(CHECKSUM_BYTES, "little")


def check_checksum(part: str, content: memoryview, checksum: memoryview, hint: str = "") -> None:
    """Raise FrameError if the CRC32C of the content is not the stored one."""
    computed, stored = crc32c.crc32c(content), int.from_bytes(checksum, "little")
    if computed != stored:
        raise FrameError(
            f"cae: frame's {part} checksum must be {stored:#010x}; its bytes have {computed:#010x}: "
            f"the stored chunk is damaged{hint}"
        )


class TooShortError(Exception):
    """Raised when the beginning of a frame ends too early; at least `missing` bytes follow."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


class Reader:
    """Reads the beginning of a frame, byte by byte, and raises TooShortError at its end."""

    def __init__(self, view: memoryview) -> None:
        self.view, self.at = view, 0

    def need(self, count: int, after: int = 0) -> None:
        """Raise TooShortError if fewer than `count` bytes are left; `after` more bytes must follow them."""
        if self.at + count > len(self.view):
            raise TooShortError(self.at + count + after - len(self.view))

    def take(self, count: int, after: int) -> memoryview:
        """Return the next `count` bytes."""
        self.need(count, after)
        self.at += count
        return self.view[self.at - count : self.at]

    def varint(self, name: str, after: int) -> int:
        """Return the next varint. Raises FrameError, which names it, if it is malformed."""
        value, end = _read_varint(self.view, self.at, name)
        if end > len(self.view):
            raise TooShortError(end + after - len(self.view))
        self.at = end
        return value


def varints(values: Sequence[int] | NDArray[np.int64]) -> bytes:
    """Return numbers from 0 to 2^32 - 1 as varints: base 128, low bits first."""
    groups = np.asarray(values, np.int64)[:, None] >> 7 * np.arange(MAX_VARINT_BYTES)
    used = groups > 0
    used[:, 0] = True
    groups &= 0x7F
    groups[:, :-1] |= np.where(used[:, 1:], 0x80, 0)
    return groups[used].astype(np.uint8).tobytes()


def _read_varint(view: memoryview, start: int, name: str) -> tuple[int, int]:
    """Return the value and the end of the varint at `start`; an end beyond the view if the view ends within it."""
    value = 0
    for n, byte in enumerate(view[start : start + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * n
        if byte < 0x80:
            if n and byte == 0:
                raise FrameError(f"cae: frame's {name} has a superfluous last byte: the stored chunk is damaged")
            if value >= VARINT_END:
                raise FrameError(f"cae: frame's {name} must be below 2^32; got {value}: the stored chunk is damaged")
            return value, start + n + 1
    if len(view) - start >= MAX_VARINT_BYTES:
        raise FrameError(f"cae: frame's {name} must have at most 5 bytes: the stored chunk is damaged")
    return 0, len(view) + 1
