"""Read image files with Pillow: lift its size limit, and list the errors that damaged files raise."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["IMAGE_DAMAGE", "no_size_limit"]

IMAGE_DAMAGE = (
    EOFError, IndexError, KeyError, MemoryError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error,
    zlib.error,
)  # fmt: skip
"""The errors, besides OSError, that Pillow's plugins raise for malformed images."""


@contextmanager
def no_size_limit() -> Iterator[None]:
    """Lift Pillow's limit against decompression bombs: the user named the file, and it may be large."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
