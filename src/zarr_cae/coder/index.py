"""Where the parts of a frame lie, and how a stored tile splits into its parts; `frame` reads the index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from zarr_cae.coder.fields import CHECKSUM_BYTES, Reader, TooShortError, check_checksum
from zarr_cae.coder.header import FrameHeader
from zarr_cae.errors import FrameError


class TileParts(NamedTuple):
    """The parts of a stored tile; views of its bytes."""

    stream: memoryview
    pixels: memoryview | None = None
    """The pixel section for `lossless.decode_pixels`; None if the tile is not exact."""
    correction: memoryview | None = None
    """The correction section for `correction.decode_correction`; None if the tile has none."""


@dataclass(frozen=True)
class FrameIndex:
    """The header of a frame, and where its parts lie.

    Attributes
    ----------
    header
        The header.
    offsets
        Tile i is stored as `frame[offsets[i] : offsets[i + 1]]`, with its checksum.
    mask
        First byte and end of the stored mask section, with its checksum; None if the frame has no mask.
    exact
        For each exact tile, by number, the bytes of its pixel section.
    psnr
        The PSNR that the writer measured, in hundredths of dB; 65535 if no sample differed; None if it did not measure.
    corrected
        Whether tiles may have corrections.
    """

    header: FrameHeader
    offsets: tuple[int, ...]
    mask: tuple[int, int] | None = None
    exact: Mapping[int, int] = field(default_factory=dict)
    psnr: int | None = None
    corrected: bool = False

    @property
    def frame_bytes(self) -> int:
        """Number of bytes of the whole frame."""
        return self.offsets[-1] + (CHECKSUM_BYTES if self.header.version == 1 else 0)

    def parts(self, tile: int, stored: memoryview) -> TileParts:
        """Return the parts of a tile from its stored bytes.

        Raises
        ------
        FrameError
            If the checksum of the tile does not match (frames of version 1 have none for each tile), or its bytes end
            within its correction.
        """
        if self.header.version == 1:
            return TileParts(stored)
        content = stored[:-CHECKSUM_BYTES]
        check_checksum(f"tile {tile}'s", content, stored[-CHECKSUM_BYTES:])
        end = len(content) - self.exact.get(tile, 0)
        pixels = content[end:] if tile in self.exact else None
        if not self.corrected:
            return TileParts(content[:end], pixels)
        reader = Reader(content[:end])
        try:
            correction = reader.take(reader.varint(f"length of the correction of tile {tile}", 0), 0)
        except TooShortError as error:
            raise FrameError(
                f"cae: frame's tile {tile} ends {error.missing} bytes before the end of its correction: the stored "
                "chunk is damaged"
            ) from error
        return TileParts(content[reader.at : end], pixels, correction if len(correction) else None)

    def mask_section(self, stored: memoryview) -> memoryview:
        """Return the mask section from its stored bytes. Raises FrameError if its checksum does not match."""
        check_checksum("mask's", stored[:-CHECKSUM_BYTES], stored[-CHECKSUM_BYTES:])
        return stored[:-CHECKSUM_BYTES]
