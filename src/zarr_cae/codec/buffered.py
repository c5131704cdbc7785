"""`buffered`: write an array in pieces, and encode each of its chunks once.

A lossy chunk that is written row by row, or colour by colour, is decoded and encoded again for each piece, and loses
quality each time. A `BufferedArray` keeps the exact pixels of incomplete chunks instead. It writes a chunk when it is
complete. In a sharded array it does so with whole shards.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr
from zarr.buffer import cpu

from zarr_cae._zarr import sync
from zarr_cae.codec.pending import Bits, Pending, Spill
from zarr_cae.codec.selection import Grid, Part, Region, Selection, boxes
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.pixels.layout import Pixels

Key: TypeAlias = tuple[int, ...]
_UNITS = {"": 1, "k": 10**3, "ki": 2**10, "m": 10**6, "mi": 2**20, "g": 10**9, "gi": 2**30, "t": 10**12, "ti": 2**40}
_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


@contextmanager
def buffered(
    array: zarr.Array[Any], memory: int | str = "1 GiB", *, folder: str | os.PathLike[str] | None = None
) -> Iterator[BufferedArray]:
    """Collect the pieces that are written to an array, and encode each chunk once.

    Use it where pieces are smaller than chunks: rows of a scanner, planes of a deep chunk, one colour after the other.
    A chunk is written as soon as it is complete. Incomplete chunks are written at the end of the block, even if the
    block ends with an exception, and by `BufferedArray.flush`. In a sharded array all this holds for whole shards.

    A chunk of which only a part was written is decoded once at the end: its other pixels lose the quality of one more
    encoding, and those far from the written ones lose nothing. Pixels that were never written have the fill value.
    A further write to a complete chunk, or to a flushed one, encodes it once more.

    Flushed pixels are in the store and survive the process. Pixels in the buffer are lost with it.

    Parameters
    ----------
    array
        The array to write to, with any codecs and in any store.
    memory
        How many bytes of pixels may wait in memory, as a number or like "512 MiB". Beyond it they wait in a temporary
        Zarr on disk, losslessly compressed.
    folder
        The folder for this Zarr. By default the system's folder for temporary files; see `tempfile.gettempdir`.

    Yields
    ------
    BufferedArray
        It is written and read like the array, from any number of threads.

    Raises
    ------
    CAEConfigurationError
        If the array can't be written, or `memory` is not a number of bytes.
    CAEDataError
        At the end of the block, or from a write that completes a chunk, if pixels lie outside the value range. Other
        chunks are written before. Chunks that could not be written stay in the buffer: `BufferedArray.flush` tries
        them again. If the block itself ends with an exception, that one is raised, with a note about this one.

    Examples
    --------
    >>> with zarr_cae.buffered(array) as target:  # doctest: +SKIP
    ...     for number, row in enumerate(scanner):
    ...         target[number] = row
    """
    target = BufferedArray(array, memory, folder=folder)
    try:
        yield target
    except BaseException as error:
        try:
            target.close()
        except Exception as second:  # noqa: BLE001 - the first error is the one that is raised
            error.add_note(f"zarr_cae.buffered could not write all that was left: {type(second).__name__}: {second}")
        raise
    target.close()


class BufferedArray:
    """An array behind a buffer. Make it with `buffered`.

    It is written and read with integers, slices of positive step and the ellipsis, like the array, and through
    `set_orthogonal_selection` and `get_orthogonal_selection` with lists, arrays of integers and masks of an axis too.
    Reads return the exact pixels in the buffer, and elsewhere the decoded pixels of the array.

    Parameters
    ----------
    array, memory, folder
        As for `buffered`.

    Raises
    ------
    CAEConfigurationError
        If the array can't be written or holds objects, or `memory` is no number of bytes.
    """

    def __init__(
        self, array: zarr.Array[Any], memory: int | str = "1 GiB", *, folder: str | os.PathLike[str] | None = None
    ) -> None:
        if not isinstance(array, zarr.Array):
            raise CAEConfigurationError(f"cae: buffered takes a zarr.Array, got {type(array).__name__}")
        if array.read_only:
            raise CAEConfigurationError('cae: buffered needs an array that can be written; open it with mode="r+"')
        if np.dtype(array.dtype).kind in "OT":
            raise CAEConfigurationError(f"cae: buffered needs values of fixed size; the array has dtype {array.dtype}")
        self.array = array
        """The array beneath."""
        self._limit = _bytes(memory)
        self._grid = Grid.of(array)
        self._spill = Spill(folder, self.dtype.itemsize)
        self._process = os.getpid()
        self._closed = False
        self._changed = threading.Condition()
        """Guards the attributes below. No chunk is encoded and nothing is read from the array while it is held."""
        self._waiting: dict[Key, Pending] = {}
        self._being_written: dict[Key, Pending] = {}
        self._held = 0

    def __repr__(self) -> str:
        return f"<BufferedArray of {self.array!r}>"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self._grid.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the array."""
        return np.dtype(self.array.dtype)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("cae: an array without axes has no length")
        return self.shape[0]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Pixels:
        if copy is False:
            raise ValueError("cae: a buffered array can't become a NumPy array without a copy")
        return np.asarray(self[...], dtype)

    def __setitem__(self, selection: Any, value: npt.ArrayLike) -> None:
        self._set(Selection.basic(selection, self.shape), value)

    def set_orthogonal_selection(self, selection: Any, value: npt.ArrayLike) -> None:
        """Write to a selection that is made for each axis by itself, like `zarr.Array.set_orthogonal_selection`.

        Parameters
        ----------
        selection
            For each axis an integer, a slice of positive step, a list or an array of integers, or a mask of its length.
        value
            The pixels, of the shape of the selection or one that broadcasts to it.

        Raises
        ------
        IndexError
            If the selection does not fit the array.
        ValueError
            If the value does not fit the selection, or the buffer is closed.
        CAEDataError
            If the write completes a chunk whose pixels lie outside the value range.
        """
        self._set(Selection.orthogonal(selection, self.shape), value)

    def __getitem__(self, selection: Any) -> Any:
        return self._get(Selection.basic(selection, self.shape))

    def get_orthogonal_selection(self, selection: Any) -> Any:
        """Read a selection that is made for each axis by itself, like `zarr.Array.get_orthogonal_selection`.

        Parameters
        ----------
        selection
            For each axis an integer, a slice of positive step, a list or an array of integers, or a mask of its length.

        Returns
        -------
        ndarray or scalar
            The pixels, without the axes of which the selection has an integer.

        Raises
        ------
        IndexError
            If the selection does not fit the array.
        ValueError
            If the buffer is closed.
        """
        return self._get(Selection.orthogonal(selection, self.shape))

    def flush(self) -> None:
        """Write all pixels in the buffer, also those of incomplete chunks, and wait until the store has them.

        Raises
        ------
        Exception
            The first error of a chunk that could not be written. It stays in the buffer, and all others are written.
        """
        with self._changed:
            keys = self._waiting.keys() | self._being_written.keys()
        self._write(keys)

    def close(self) -> None:
        """Flush, and refuse writes and reads from now on. In a forked process this does nothing."""
        if os.getpid() == self._process:
            self.flush()
            self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise ValueError("cae: this buffer is closed; write inside of its `with` block")
        if os.getpid() != self._process:
            raise CAEConfigurationError("cae: a buffer can't be used in a forked process; make one there")
        if self.array.shape != self.shape:
            raise CAEConfigurationError(
                f"cae: the array was resized from {self.shape} to {self.array.shape} while it was buffered; resize it "
                "before that"
            )

    def _set(self, selection: Selection, value: npt.ArrayLike) -> None:
        values = selection.expand(_cast(value, self.dtype))
        complete = []
        with self._changed:
            self._check()
            for part in self._grid.parts(selection):
                pending = self._waiting.get(part.key)
                if pending is None:
                    pending = self._waiting[part.key] = Pending(part.shape, self.dtype)
                self._held -= pending.held
                pending.add(part.inside, values[part.outside], part.size)
                self._held += pending.held
                if pending.complete:
                    complete.append(part.key)
            self._make_space(complete)
        if complete:
            self._write(complete)

    def _make_space(self, keep: Collection[Key]) -> None:
        """Move pixels to disk if too many are in memory, the chunks with most of them first."""
        if self._held <= self._limit:
            return
        chosen: list[Pending] = []
        left = self._held
        for key in sorted(self._waiting.keys() - keep, key=lambda key: -self._waiting[key].held):
            if left > self._limit // 2:
                chosen.append(self._waiting[key])
                left -= self._waiting[key].held
        self._spill.save(chosen)
        for pending in chosen:
            self._held -= pending.held
            pending.weigh()
            self._held += pending.held

    def _get(self, selection: Selection) -> Any:
        found: list[tuple[Part, Pixels, Bits]] = []
        with self._changed:
            self._check()
            for part in self._grid.parts(selection):
                for pending in (self._being_written.get(part.key), self._waiting.get(part.key)):  # the older first
                    if pending is not None:
                        pixels, mask = pending.assemble()
                        found.append((part, pixels[part.inside].copy(), mask[part.inside].copy()))
        known = np.zeros(selection.lengths, bool)
        for part, _, mask in found:
            known[part.outside] |= mask
        result = np.empty(selection.lengths, self.dtype) if known.all() else self._read(selection)
        for part, pixels, mask in found:
            result[part.outside] = np.where(mask, pixels, result[part.outside])
        return selection.squeeze(result)

    def _read(self, selection: Selection) -> Pixels:
        """Return a copy of pixels of the array, with all its axes."""
        index: Any = selection.index
        slices = all(isinstance(one, slice) for one in index)
        read = self.array.get_basic_selection if slices else self.array.get_orthogonal_selection
        return np.array(read(index, prototype=cpu.buffer_prototype))

    def _write(self, keys: Collection[Key]) -> None:
        """Write chunks, and raise the first error after all were tried."""
        left, errors = set(keys), dict[Key, BaseException]()
        while left:
            with self._changed:
                self._changed.wait_for(lambda: not left <= self._being_written.keys())
                batch = self._claim(left)
            failed: Mapping[Key, object] = dict.fromkeys(batch)  # all of them, if an interrupt ends this thread's work
            try:
                failed = failures = self._store(batch)
            finally:
                with self._changed:
                    self._release(batch, failed)
            errors.update(failures)
        if errors:
            (key, error), *others = errors.items()
            more = f", and {len(others)} others could not either" if others else ""
            place = _text(self._grid.region(key))
            error.add_note(f"zarr_cae.buffered could not write {place}{more}; this is still in the buffer")
            raise error

    def _claim(self, left: set[Key]) -> dict[Key, Pending]:
        """Take chunks out of `left` that no other thread writes now, as many as may be in memory together."""
        batch: dict[Key, Pending] = {}
        size = 0
        for key in sorted(left - self._being_written.keys()):
            pending = self._waiting.get(key)
            if pending is not None:
                if batch and size + pending.nbytes > self._limit // 2:
                    break
                size += pending.nbytes
                batch[key] = self._being_written[key] = self._waiting.pop(key)
            left.remove(key)
        return batch

    def _release(self, batch: Mapping[Key, Pending], failed: Mapping[Key, object]) -> None:
        """Forget the chunks that were written, and put back those that could not be written."""
        for key, pending in batch.items():
            del self._being_written[key]
            self._held -= pending.held
            if key not in failed:
                pending.drop()
                continue
            pending.own()
            newer = self._waiting.pop(key, None)
            if newer is not None:
                self._held -= newer.held
                pending.extend(newer)
            self._waiting[key] = pending
            self._held += pending.held
        self._changed.notify_all()

    def _store(self, batch: Mapping[Key, Pending]) -> dict[Key, BaseException]:
        """Write chunks to the array, and return the errors of those that could not be written."""
        together = asyncio.Semaphore(zarr.config.get("async.concurrency") or len(batch))

        async def write(key: Key, pixels: Pixels, mask: Bits) -> None:
            corner = [side.start for side in self._grid.region(key)]
            for box in boxes(mask, self._grid.inner):  # one by one: zarr writes the whole shard each time
                place = tuple(slice(at + one.start, at + one.stop) for at, one in zip(corner, box, strict=True))
                own = pixels[box]
                async with together:
                    if not mask[box].all():
                        stored = await self.array.async_array.getitem(place, prototype=cpu.buffer_prototype)
                        own = np.where(mask[box], own, np.asarray(stored).reshape(own.shape))
                    await self.array.async_array.setitem(place, own, prototype=cpu.buffer_prototype)

        async def write_all(chunks: Mapping[Key, tuple[Pixels, Bits]]) -> list[BaseException | None]:
            return await asyncio.gather(*(write(key, *one) for key, one in chunks.items()), return_exceptions=True)

        answers = sync(write_all({key: pending.assemble() for key, pending in batch.items()}))
        return {key: error for key, error in zip(batch, answers, strict=True) if error is not None}


def _cast(value: Any, dtype: np.dtype[Any]) -> Pixels:
    """Return values in the dtype of the array, converted as zarr does it."""
    return value.astype(dtype, copy=False) if isinstance(value, np.ndarray) else np.asarray(value, dtype)


def _bytes(memory: int | str) -> int:
    """Return a number of bytes that may be written with a unit."""
    if isinstance(memory, Integral) and not isinstance(memory, bool) and memory > 0:
        return int(memory)
    match = _MEMORY.fullmatch(memory) if isinstance(memory, str) else None
    found = int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if found < 1:
        raise CAEConfigurationError(
            f'cae: memory must be a positive number of bytes, or one with a unit like "512 MiB"; got {memory!r}'
        )
    return found


def _text(region: Region) -> str:
    return f"array[{', '.join(f'{side.start}:{side.stop}' for side in region)}]"
