"""Masks and pixels without loss: the mask section and the pixel sections of frames of version 3.

The sections "Mask section" and "Pixel section" of spec/cae.md define the bytes. Both are zlib streams: zlib can be told
how many bytes may come out, so a damaged or hostile section never allocates more than the chunk's shape allows.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarr_cae.coder.contours import decode_contours, encode_contours
from zarr_cae.errors import CAEConfigurationError, StreamError

__all__ = ["decode_mask", "decode_pixels", "encode_mask", "encode_pixels"]

_LEVEL, _BEST = 6, 9
_CONTOURS = 1
"""First byte of a mask section that holds contours. Other sections are zlib streams, which never begin with it."""
_PREDICTORS = (0, 1, 2)
_DAMAGED = "the stored chunk is damaged"


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """Return the mask section of a frame.

    Parameters
    ----------
    mask
        bool (N, C, H, W), True for masked samples; at least one is True. A frame without masked samples has no mask.

    Raises
    ------
    CAEConfigurationError
        If the mask has another dtype or shape, or no sample is masked.
    """
    if mask.dtype != np.bool_ or mask.ndim != 4 or not mask.any():
        raise CAEConfigurationError(
            f"cae: mask must be bool (planes, components, height, width) with at least one masked sample; got "
            f"{mask.dtype} {mask.shape} with {np.count_nonzero(mask)}"
        )
    # Mostly empty: components of a pixel are usually masked together.
    changed = mask.copy()
    changed[:, 1:] ^= mask[:, :-1]
    rows = np.packbits(changed, axis=-1, bitorder="little")
    contours = encode_contours(changed.reshape(-1, mask.shape[-1]), rows.size)
    rows[..., 1:, :] ^= rows[..., :-1, :].copy()
    sections = [zlib.compress(rows.tobytes(), _LEVEL)]
    if contours is not None:
        sections.append(bytes([_CONTOURS]) + zlib.compress(contours, _BEST))
    return min(sections, key=len)


def decode_mask(section: bytes | memoryview, shape: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """Return the mask of a mask section.

    Parameters
    ----------
    section
        The section, without its checksum.
    shape
        (N, C, H, W) of the chunk.

    Raises
    ------
    StreamError
        If the section is malformed, or does not have this shape.
    """
    *outer, width = shape
    packed = (*outer, -(-width // 8))
    view = memoryview(section)
    if view and view[0] == _CONTOURS:
        changed = decode_contours(_inflated(view[1:], math.prod(packed), "mask section"), math.prod(outer), width)
        mask = np.bitwise_xor.accumulate(changed.reshape(shape), axis=1)
        if not mask.any():
            raise StreamError(f"cae: mask section must mask at least one sample; {_DAMAGED}")
        return mask
    rows = _inflate(section, packed, "mask section")
    np.bitwise_xor.accumulate(rows, axis=1, out=rows)
    np.bitwise_xor.accumulate(rows, axis=2, out=rows)
    if width % 8 and (rows[..., -1] >> width % 8).any():
        raise StreamError(f"cae: mask section has bits after the last column; {_DAMAGED}")
    mask = np.unpackbits(rows, axis=-1, count=width, bitorder="little").view(np.bool_)
    if not mask.any():
        raise StreamError(f"cae: mask section must mask at least one sample; {_DAMAGED}")
    return mask


def encode_pixels(pixels: NDArray[Any]) -> bytes:
    """Return the pixel section of an exact tile.

    Parameters
    ----------
    pixels
        (C, rows, columns) of any integer or float dtype. All bits are kept, also those of NaN.
    """
    values = _as_unsigned(pixels)
    sections = []
    for predictor in _PREDICTORS:
        residuals = values
        if predictor >= 1:
            residuals = np.diff(residuals, axis=2, prepend=residuals.dtype.type(0))
        if predictor == 2:
            residuals = np.diff(residuals, axis=1, prepend=residuals.dtype.type(0))
        # From (C, rows, columns, bytes) to (C, bytes, rows, columns): equal bytes come together.
        planes = np.moveaxis(_bytes_of(residuals), -1, 1)
        sections.append(bytes([predictor]) + zlib.compress(planes.tobytes(), _LEVEL))
    return min(sections, key=len)


def decode_pixels(section: bytes | memoryview, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the pixels of a pixel section.

    Parameters
    ----------
    section
        The section, without the checksum of its tile.
    shape
        (C, rows, columns) of the tile in pixels, those beyond the edges of the plane not counted.
    dtype
        The dtype of the array.

    Returns
    -------
    ndarray (C, rows, columns) of `dtype`

    Raises
    ------
    StreamError
        If the section is malformed, or does not have this shape and dtype.
    """
    view = memoryview(section)
    if not view or view[0] not in _PREDICTORS:
        got = f"predictor {view[0]}" if view else "no bytes"
        raise StreamError(f"cae: pixel section must begin with a predictor of 0 to 2; got {got}; {_DAMAGED}")
    predictor, (components, rows, columns) = view[0], shape
    planes = _inflate(view[1:], (components, dtype.itemsize, rows, columns), "pixel section")
    values = np.ascontiguousarray(np.moveaxis(planes, 1, -1)).view(f"<u{dtype.itemsize}")[..., 0]
    if predictor == 2:
        values = np.cumsum(values, axis=1, dtype=values.dtype)
    if predictor >= 1:
        values = np.cumsum(values, axis=2, dtype=values.dtype)
    return np.ascontiguousarray(values).view(dtype.newbyteorder("<")).astype(dtype, copy=False)


def _as_unsigned(pixels: NDArray[Any]) -> NDArray[Any]:
    little = pixels.astype(pixels.dtype.newbyteorder("<"), order="C", copy=False)
    return np.ascontiguousarray(little).view(f"<u{pixels.dtype.itemsize}")


def _bytes_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the bytes of unsigned integers as a further axis, the lowest first."""
    return np.ascontiguousarray(values)[..., None].view(np.uint8)


def _inflate(section: bytes | memoryview, shape: tuple[int, ...], name: str) -> NDArray[np.uint8]:
    """Return the content of a zlib stream, which must be exactly that of a uint8 array of `shape`; writable."""
    size = math.prod(shape)
    # Deflate codes 258 bytes with no fewer than two bits, so a short section can't fill a large array.
    if size > 1032 * len(section):
        raise StreamError(f"cae: {name} of {len(section)} bytes can't hold {size} bytes; {_DAMAGED}")
    content = _inflated(section, size, name)
    if len(content) != size:
        raise StreamError(f"cae: {name} must be a zlib stream of {size} bytes; got {len(content)}; {_DAMAGED}")
    return np.frombuffer(content, np.uint8).reshape(shape).copy()


def _inflated(section: bytes | memoryview, most: int, name: str) -> bytes:
    """Return the content of a zlib stream, which must be at most `most` bytes, with nothing after it."""
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(section, most + 1)
    except zlib.error as error:
        raise StreamError(f"cae: {name} is not a zlib stream: {error}; {_DAMAGED}") from error
    if len(content) > most or not inflater.eof or inflater.unused_data:
        raise StreamError(
            f"cae: {name} must be a zlib stream of {most} bytes and nothing more; got {len(content)} bytes, "
            f"{'a' if inflater.eof else 'no'} proper end, {len(inflater.unused_data)} bytes after it; {_DAMAGED}"
        )
    return content
