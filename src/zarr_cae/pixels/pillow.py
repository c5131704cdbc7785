"""What reading image files with Pillow takes wherever it is done: no limit of size, and what damaged files raise."""

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
"""What Pillow's plugins raise, besides OSError, for images that make no sense."""


@contextmanager
def no_size_limit() -> Iterator[None]:
    """Without Pillow's limit against bombs: the user named the file, and it may be large."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
