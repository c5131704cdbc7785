"""The header of a frame: which planes a chunk holds, and how they are cut into tiles.

The section "Frames" of spec/cae.md defines its bytes; `frame` reads and writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zarr_cae.coder.fields import VARINT_END
from zarr_cae.errors import CAEConfigurationError, FrameError

STRIDE = 16
"""Pixels per latent position, along each edge."""

Symbols = NDArray[np.int16]
"""Quantised latents: int16 (..., M, rows, columns) with M latent channels."""

LARGEST_SYMBOL = 32767
"""Analysis clips symbols to this, and to its negative."""

VERSIONS = (1, 2, 3)
MAX_LOG2_TILE = 10
MAX_ROW = 255


@dataclass(frozen=True)
class FrameHeader:
    """The shape of a chunk and the version of its frame.

    Parameters
    ----------
    planes
        Number of planes, N. An RGB image is one plane.
    height, width
        Size of a plane in pixels.
    grey
        Whether planes have one component; RGB planes have three.
    tile
        Edge of a tile in latent positions: a power of two in [1, 1024].
    version
        Version of the frame: 1, 2 or 3.
    row
        Number of the row of the weights file that coded the chunk, 0 to 255. Only frames of version 3 store it; it is
        None in the others.

    Raises
    ------
    CAEConfigurationError
        If a value is out of its range.
    """

    planes: int
    height: int
    width: int
    grey: bool
    tile: int = 32
    version: int = 1
    row: int | None = None

    def __post_init__(self) -> None:
        for name in ("planes", "height", "width"):
            value = getattr(self, name)
            if not 1 <= value < VARINT_END:
                raise CAEConfigurationError(f"cae: frame's {name} must be in [1, 2^32); got {value}")
        if self.version not in VERSIONS:
            raise CAEConfigurationError(f"cae: frame's version must be one of {VERSIONS}; got {self.version}")
        if self.tile not in {1 << n for n in range(MAX_LOG2_TILE + 1)}:
            raise CAEConfigurationError(
                f"cae: frame's tile must be a power of two in [1, {1 << MAX_LOG2_TILE}]; got {self.tile}"
            )
        if self.row is not None and (self.version < 3 or not 0 <= self.row <= MAX_ROW):
            raise CAEConfigurationError(
                f"cae: frame's row must be in [0, {MAX_ROW}] in version 3, and None in versions 1 and 2; got "
                f"{self.row} in version {self.version}"
            )

    def row_of(self, rows: int, default: int) -> int:
        """Return the row of the weights file that coded the chunk.

        Parameters
        ----------
        rows
            Number of rows (qualities) of the weights file.
        default
            The row of the array's quality, which holds for frames that do not store their row.

        Raises
        ------
        FrameError
            If the weights file has no such row.
        """
        if self.row is None:
            return default
        if self.row >= rows:
            raise FrameError(
                f"cae: frame's row must be below {rows}, the qualities of the array's weights file; got {self.row}: "
                "it was written with other weights"
            )
        return self.row

    @property
    def components(self) -> int:
        """Number of components of a plane, C."""
        return 1 if self.grey else 3

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Rows and columns of latent positions of a plane."""
        return -(-self.height // STRIDE), -(-self.width // STRIDE)

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Rows and columns of tiles of a plane."""
        rows, columns = self.latent_shape
        return -(-rows // self.tile), -(-columns // self.tile)

    @property
    def tile_count(self) -> int:
        """Number of tiles of all planes."""
        rows, columns = self.tile_grid
        return self.planes * rows * columns
