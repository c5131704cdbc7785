"""Open image files with Pillow: without its size limit, and with one error for all kinds of damage."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from zarr_cae.errors import CAEConfigurationError, CAEError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGE_DAMAGE", "no_size_limit", "opened_picture"]

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


@contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
    """Open an image file.

    Raises
    ------
    CAEConfigurationError
        If Pillow does not know its format, or it is damaged: also by an error of Pillow within the `with` statement.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with no_size_limit(), Image.open(path) as image:
            yield image
    except UnidentifiedImageError as error:
        reason = "an image in a format that is known here" if path.stat().st_size else "an image: it is empty"
        raise CAEConfigurationError(f"cae: {path} is not {reason}") from error
    except CAEError:
        raise
    except (OSError, *IMAGE_DAMAGE) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file can't be opened
        raise CAEConfigurationError(
            f"cae: {path} can't be read; is it damaged? {type(error).__name__}: {error}"
        ) from error
