"""Exact pixels that wait to be written: those of one chunk or shard, in memory or in a temporary Zarr on disk.

Pixels are kept as the pieces in which they came, in their order, so that a plane of a deep chunk costs no more memory
than its own pixels. Later pieces cover earlier ones. Many small pieces are merged into one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr
from zarr.buffer import cpu
from zarr.codecs import BloscCodec

from zarr_cae.pixels.layout import Pixels

Bits: TypeAlias = npt.NDArray[np.bool_]
Bytes: TypeAlias = npt.NDArray[np.uint8]
ChunkIndex: TypeAlias = tuple[Any, ...]
"""Selects pixels of a chunk: a NumPy index of slices, or of arrays as `numpy.ix_` makes them."""
_OVERHEAD = 500
"""Bytes of Python objects that a piece needs besides its pixels, about."""
_FEW = 64
"""Pieces of a chunk that are not merged."""
_CHUNK = 1 << 18
"""Bytes of a chunk of a temporary Zarr: as many as are read for a small piece."""
_LARGEST_ARRAY = 1 << 26
"""Bytes of a temporary Zarr with more than one piece."""


class Spill:
    """A folder of temporary Zarrs on disk, losslessly compressed. It is made when it is first needed.

    Parameters
    ----------
    parent
        The folder to make it in; None for the system's folder for temporary files.
    typesize
        Bytes of a pixel value, for the compression.
    """

    def __init__(self, parent: str | os.PathLike[str] | None, typesize: int) -> None:
        self._parent = parent
        self._compressor = BloscCodec(typesize=min(typesize, 255), cname="zstd", clevel=1, shuffle="shuffle")
        self._folder: Path | None = None
        self._numbers = count()

    def save(self, waiting: Iterable[Pending]) -> None:
        """Move all pixels of some chunks to disk."""
        together: list[_Piece] = []
        size = 0
        for piece in (piece for pending in waiting for piece in pending.in_memory()):
            if together and size + piece.content.nbytes > _LARGEST_ARRAY:
                self._save(together)
                together, size = [], 0
            together.append(piece)
            size += piece.content.nbytes
        if together:
            self._save(together)

    def _save(self, pieces: Sequence[_Piece]) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="zarr-cae-buffered-", dir=self._parent))
            weakref.finalize(self, _remove, self._folder, os.getpid())
        content = np.concatenate([_as_bytes(piece.content) for piece in pieces])
        path = self._folder / str(next(self._numbers))
        array = zarr.create_array(
            str(path), shape=content.shape, chunks=(_CHUNK,), dtype="uint8", compressors=[self._compressor],
            zarr_format=3,
        )  # fmt: skip
        array.set_basic_selection(..., content, prototype=cpu.buffer_prototype)
        saved, at = _Saved(path, array, len(pieces)), 0
        for piece in pieces:
            size = piece.content.nbytes
            piece.content, piece.borrowed = _Place(saved, at, at + size), False
            at += size


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # the parent of a forked process still needs it
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Saved:
    """A temporary Zarr with the bytes of some pieces."""

    path: Path
    array: zarr.Array[Any]
    needed: int
    """The number of its pieces that are still needed."""


@dataclass
class _Place:
    """Where the bytes of a piece are on disk."""

    saved: _Saved
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def load(self) -> Bytes:
        part = slice(self.start, self.stop)
        return np.asarray(self.saved.array.get_basic_selection(part, prototype=cpu.buffer_prototype))

    def drop(self) -> None:
        """Remove the Zarr if no other piece needs it."""
        self.saved.needed -= 1
        if not self.saved.needed:
            shutil.rmtree(self.saved.path, ignore_errors=True)


@dataclass
class _Piece:
    """The pixels of one write, or a merged piece."""

    index: ChunkIndex | None
    """Where the pixels lie in the chunk; None if `content` begins with a bit for each pixel of the chunk."""
    content: Pixels | _Place
    """The pixels in the shape of the index, or the bytes of a merged piece, or the place of such bytes on disk."""
    count: int
    """The number of pixels."""
    borrowed: bool = False
    """Whether the pixels are memory of the caller, which changes after the call."""

    @property
    def held(self) -> int:
        """Bytes of memory."""
        return _OVERHEAD + (0 if self.borrowed or isinstance(self.content, _Place) else self.content.nbytes)

    def put(self, pixels: Pixels | None, mask: Bits) -> None:
        """Put the pixels into an array of the whole chunk, if there is one, and set their bits in the mask."""
        if self.index is not None:
            mask[self.index] = True
            if pixels is not None:
                own = self.content
                if isinstance(own, _Place):
                    own = own.load().view(pixels.dtype).reshape(pixels[self.index].shape)
                pixels[self.index] = own
            return
        content = self.content.load() if isinstance(self.content, _Place) else self.content
        size = -(-mask.size // 8)
        bits = np.unpackbits(content[:size], count=mask.size).view(bool).reshape(mask.shape)
        mask |= bits
        if pixels is not None:
            pixels[bits] = content[size:].view(pixels.dtype)

    def drop(self) -> None:
        if isinstance(self.content, _Place):
            self.content.drop()


def _as_bytes(pixels: Any) -> Bytes:
    return np.ascontiguousarray(pixels).reshape(-1).view(np.uint8)


@dataclass
class Pending:
    """Pixels of one chunk, or of one shard, that wait to be written."""

    shape: tuple[int, ...]
    """The shape of the chunk inside the array: shorter than other chunks at the array's end."""
    dtype: np.dtype[Any]
    _pieces: list[_Piece] = field(default_factory=list)
    _count: int = 0
    """The pixels of all pieces: those in several pieces count several times."""
    held: int = 0
    """Bytes of memory that are used now."""

    @property
    def size(self) -> int:
        """The number of pixels of the chunk."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that `assemble` allocates."""
        return self.size * (self.dtype.itemsize + 1)

    def add(self, index: ChunkIndex, values: Pixels, size: int) -> None:
        """Add pixels.

        Parameters
        ----------
        index
            Where they lie in the chunk.
        values
            The pixels, in the shape that the index selects. They are copied, unless they are the whole chunk: then
            call `own` if they are needed after this call.
        size
            The number of different pixels.
        """
        if size == self.size:
            self.drop()
        self._append(_Piece(index, values if size == self.size else values.copy(), size, size == self.size))
        crowded = len(self._pieces) > max(_FEW, self.nbytes // _OVERHEAD)
        if crowded or (len(self._pieces) > 1 and self._count >= self.size and not self.complete):
            self._merge()

    def extend(self, newer: Pending) -> None:
        """Add the pixels of another object for the same chunk. The other object must not be used afterwards."""
        for piece in newer._pieces:
            if piece.count == self.size:
                self.drop()
            self._append(piece)

    def _append(self, piece: _Piece) -> None:
        self._pieces.append(piece)
        self._count += piece.count
        self.held += piece.held

    @property
    def complete(self) -> bool:
        """Whether no pixel of the chunk is missing."""
        if self._count < self.size:
            return False
        if any(piece.count == self.size for piece in self._pieces):
            return True
        mask = np.zeros(self.shape, bool)
        for piece in self._pieces:
            piece.put(None, mask)
        return bool(mask.all())

    def assemble(self) -> tuple[Pixels, Bits]:
        """Return the pixels of the whole chunk, and the mask that is true where they were written."""
        if len(self._pieces) == 1 and self._pieces[0].count == self.size:
            only = self._pieces[0]
            in_order = only.index is not None and all(isinstance(one, slice) for one in only.index)
            if in_order and not isinstance(only.content, _Place):
                return only.content.reshape(self.shape), np.broadcast_to(np.True_, self.shape)
        pixels, mask = np.empty(self.shape, self.dtype), np.zeros(self.shape, bool)
        for piece in self._pieces:
            piece.put(pixels, mask)
        return pixels, mask

    def own(self) -> None:
        """Copy the pixels that are memory of the caller."""
        for piece in self._pieces:
            if piece.borrowed and not isinstance(piece.content, _Place):
                piece.content, piece.borrowed = piece.content.copy(), False
        self.weigh()

    def in_memory(self) -> list[_Piece]:
        """Return the pieces that are not on disk."""
        return [piece for piece in self._pieces if not isinstance(piece.content, _Place)]

    def weigh(self) -> None:
        """Compute `held` again, after pieces were moved to disk."""
        self.held = sum(piece.held for piece in self._pieces)

    def drop(self) -> None:
        """Forget all pixels."""
        for piece in self._pieces:
            piece.drop()
        self._pieces, self._count, self.held = [], 0, 0

    def _merge(self) -> None:
        """Make one piece of all: a bit for each pixel of the chunk, and then the pixels whose bits are set."""
        pixels, mask = self.assemble()
        content = np.concatenate([np.packbits(mask), _as_bytes(pixels[mask])])
        self.drop()
        self._append(_Piece(None, content, int(mask.sum())))
