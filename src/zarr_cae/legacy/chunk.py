"""Read the chunks of caecodec: their header, their symbols, and their pixels.

A chunk of caecodec (its newest form, 2023) has, all numbers big endian,

    8 bytes each    height and width of the chunk in pixels, then the rows and the columns of its padding
    ...             CompressAI's stream of the latents of the padded chunk (`stream`)

The chunk is padded by reflection to multiples of `patch_size`. Its latents have a position for 16 x 16 pixels of the
padded chunk. caecodec decodes one patch at a time. It gives the synthesis transform one more latent position on each
side of the patch (at the edge of the chunk, the reflected latents), and drops the pixels of these positions.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from zarr_cae.coder.frame import STRIDE, Symbols
from zarr_cae.config import Settings
from zarr_cae.errors import CAEConfigurationError, FrameError
from zarr_cae.legacy.stream import CumulativeTables, decode
from zarr_cae.pixels.convert import to_chunk
from zarr_cae.pixels.layout import RGB, Layout
from zarr_cae.weights.file import Weights

__all__ = ["Header", "parse", "symbols", "synthesise"]

_HEADER = struct.Struct(">4Q")
_LARGEST_CHUNK = (1 << 31) - 1
"""Bytes of a chunk in zarr v2: numcodecs takes no larger ones."""
_DAMAGED = "the stored chunk is damaged, or not one of caecodec"


class Header(NamedTuple):
    """The header of a chunk, in pixels."""

    height: int
    width: int
    added_rows: int
    added_columns: int

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Return the rows and columns of latent positions of the padded chunk."""
        return (self.height + self.added_rows) // STRIDE, (self.width + self.added_columns) // STRIDE


def parse(chunk: memoryview) -> Header:
    """Read the header of a chunk.

    Raises
    ------
    FrameError
        If the header is truncated, or no chunk of zarr v2 can have the size that it gives.
    """
    if len(chunk) < _HEADER.size:
        raise FrameError(f"cae: caecodec's chunk needs at least {_HEADER.size} bytes; got {len(chunk)}; {_DAMAGED}")
    header = Header(*_HEADER.unpack_from(chunk))
    rows, columns = header.height + header.added_rows, header.width + header.added_columns
    if (
        not (header.height and header.width)
        or rows % STRIDE
        or columns % STRIDE
        or rows * columns * RGB > _LARGEST_CHUNK
    ):
        raise FrameError(
            f"cae: caecodec's chunk must have edges of 1 pixel or more, padded to multiples of {STRIDE}, and at most "
            f"{_LARGEST_CHUNK} bytes of pixels; its header has {tuple(header)}; {_DAMAGED}"
        )
    return header


def symbols(chunk: memoryview, tables: CumulativeTables) -> tuple[Header, Symbols]:
    """Decode a chunk to its header and its symbols, int16 (M, rows, columns) of the padded chunk.

    Raises
    ------
    FrameError
        If the header gives an impossible size.
    StreamError
        If the stream is malformed, or was encoded with other weights.
    """
    header = parse(chunk)
    return header, decode(chunk[_HEADER.size :], header.latent_shape, tables)


def synthesise(
    header: Header, symbols: Symbols, weights: Weights, quality: int, patch_size: int, settings: Settings
) -> npt.NDArray[np.uint8]:
    """Return the pixels of a chunk, (height, width, 3). They are caecodec's, but rounded where caecodec truncates.

    Parameters
    ----------
    header, symbols
        From `symbols`.
    weights, quality
        The weights, and the quality that the chunk was written with.
    patch_size
        Edge of the patches in pixels, from the codec's metadata.
    settings
        The settings of this machine.

    Raises
    ------
    CAEConfigurationError
        If `patch_size` is not a positive multiple of 16.
    """
    from zarr_cae.networks.engine import engine_for

    if patch_size < STRIDE or patch_size % STRIDE:
        raise CAEConfigurationError(f"cae: patch_size must be a positive multiple of {STRIDE}; got {patch_size}")
    edge = patch_size // STRIDE
    _, rows, columns = symbols.shape
    below, right = -rows % edge, -columns % edge
    padded = np.pad(symbols, ((0, 0), (1, 1 + below), (1, 1 + right)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (edge + 2, edge + 2), axis=(1, 2))[:, ::edge, ::edge]
    down, across = windows.shape[1:3]
    batch = np.ascontiguousarray(windows.transpose(1, 2, 0, 3, 4)).reshape(
        down * across, len(symbols), edge + 2, edge + 2
    )
    planes = engine_for(weights, settings).synthesise(batch, quality, RGB, settings).result()
    inner = planes[:, :, STRIDE:-STRIDE, STRIDE:-STRIDE].reshape(down, across, RGB, edge * STRIDE, edge * STRIDE)
    plane = inner.transpose(2, 0, 3, 1, 4).reshape(1, RGB, down * edge * STRIDE, across * edge * STRIDE)
    layout = Layout((header.height, header.width, RGB), 2)
    return to_chunk(plane, layout, np.dtype(np.uint8), (0, 255))
