"""Check the stored chunks of an array: checksums, structure and weights; with `deep` also their pixels."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import numpy as np
import zarr
from zarr.abc.buffer import Buffer, NDBuffer
from zarr.abc.store import ByteGetter
from zarr.buffer import default_buffer_prototype
from zarr.codecs import ShardingCodec

from zarr_cae._zarr import ArraySpec, sync
from zarr_cae.codec.cae import CAECodec, _coder, loaded
from zarr_cae.codec.chunk import decode_chunk
from zarr_cae.codec.plan import contiguous, run, run_async
from zarr_cae.codec.selection import Grid, Region
from zarr_cae.coder import tiles
from zarr_cae.tasks import for_each

__all__ = ["BadChunk", "Verified", "stored_chunks", "verify"]


@dataclass(frozen=True)
class BadChunk:
    """A chunk that can't be read."""

    key: str
    """Its key in the store; for an inner chunk of a shard, with its number there."""
    reason: str


@dataclass
class Verified:
    """The result for one array."""

    chunks: int = 0
    """How many chunks or shards are stored."""
    absent: int = 0
    """How many are not stored. Their pixels are read as the fill value."""
    bad: list[BadChunk] = field(default_factory=list)
    lowest: float | None = None
    """Of all decoded pixels; None if no pixels were decoded."""
    highest: float | None = None

    def add(self, pixels: Any) -> None:
        """Extend the range by these pixels. NaN does not count."""
        if isinstance(pixels, np.ndarray) and pixels.dtype.kind == "f":
            pixels = pixels[~np.isnan(pixels)]
            if not pixels.size:
                return
        low, high = pixels.min(), pixels.max()
        self.lowest = low if self.lowest is None else min(self.lowest, low)
        self.highest = high if self.highest is None else max(self.highest, high)


def verify(
    array: zarr.Array[Any], *, deep: bool = False, advance: Callable[[int], object] = lambda _: None
) -> Verified:
    """Check every stored chunk of an array.

    Parameters
    ----------
    array
        An array of the codec `cae`, also in shards or behind a transpose. Arrays of other codecs are read, which checks
        what their codecs check.
    deep
        Whether to decode all chunks to pixels. Otherwise headers, lengths and checksums of frames are checked.
    advance
        Called with the number of newly checked chunks or shards; for progress bars.

    Returns
    -------
    Verified
        Counts, the range of the pixels, and the bad chunks in the order of their keys.

    Raises
    ------
    WeightsNotFoundError, CAEConfigurationError
        If the weights are not on this machine, are damaged, or are of another model, metric or quality.
    """
    result = Verified()
    metadata = cast("Any", array.metadata)
    codecs = getattr(metadata, "codecs", None)
    if codecs is not None:
        metadata = replace(metadata, codecs=_checking(codecs, deep, result))
    checked = zarr.AsyncArray(metadata, array.store_path)
    keep = result.add if codecs is None or not _has_cae(codecs) else lambda _: None
    sync(_verify(checked, array, result, advance, keep))
    result.absent = Grid.of(array).count - result.chunks
    result.bad.sort(key=lambda one: one.key)
    return result


@dataclass(frozen=True, repr=False)
class _CheckingCodec(CAECodec):
    """The codec of an array, with a decoder that checks whole chunks."""

    deep: bool = field(default=False, kw_only=True, compare=False)
    result: Any = field(default=None, kw_only=True, compare=False)

    def _check_sync(self, chunk_bytes: Buffer, spec: ArraySpec) -> Any:
        coder = _coder(self, spec)
        if not self.deep:
            header, _ = tiles.unpack(contiguous(chunk_bytes), coder.header)
            coder.of_frame(header)  # refuses a row that the weights do not have
            return np.zeros(spec.shape, spec.dtype.to_native_dtype())
        return self._kept(run(decode_chunk(coder, contiguous(chunk_bytes))))

    async def _check(self, chunk_bytes: Buffer, spec: ArraySpec) -> Any:
        if not self.deep:
            return await asyncio.to_thread(self._check_sync, chunk_bytes, spec)
        return self._kept(await run_async(decode_chunk(_coder(self, spec), contiguous(chunk_bytes))))

    def _kept(self, pixels: Any) -> Any:
        self.result.add(pixels)
        return pixels

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return _buffer(self._check_sync(chunk_bytes, chunk_spec), chunk_spec)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return _buffer(await self._check(chunk_bytes, chunk_spec), chunk_spec)

    def _decode_partial_sync(self, byte_getter: Any, selection: Any, chunk_spec: ArraySpec) -> NDBuffer | None:
        chunk_bytes = byte_getter.get_sync(prototype=default_buffer_prototype())
        return (
            None if chunk_bytes is None else _buffer(self._check_sync(chunk_bytes, chunk_spec)[selection], chunk_spec)
        )

    async def _decode_partial_single(
        self, byte_getter: ByteGetter, selection: Any, chunk_spec: ArraySpec
    ) -> NDBuffer | None:
        chunk_bytes = await byte_getter.get(default_buffer_prototype())
        return (
            None
            if chunk_bytes is None
            else _buffer((await self._check(chunk_bytes, chunk_spec))[selection], chunk_spec)
        )


def _buffer(pixels: Any, spec: ArraySpec) -> NDBuffer:
    return spec.prototype.nd_buffer.from_ndarray_like(pixels)


def _checking(codecs: Sequence[Any], deep: bool, result: Verified) -> tuple[Any, ...]:
    """Return a chain of codecs in which those of this package check. Raise if their weights can't be loaded."""
    changed: list[Any] = []
    for codec in codecs:
        if isinstance(codec, CAECodec):
            loaded(codec)
            own = {one.name: getattr(codec, one.name) for one in fields(codec) if one.init}
            checking = _CheckingCodec(**own, deep=deep, result=result)
            object.__setattr__(checking, "_origin", "stored")
            changed.append(checking)
        elif isinstance(codec, ShardingCodec):
            changed.append(replace(codec, codecs=_checking(codec.codecs, deep, result)))
        else:
            changed.append(codec)
    return tuple(changed)


def _has_cae(codecs: Sequence[Any]) -> bool:
    return any(
        isinstance(codec, CAECodec) or (isinstance(codec, ShardingCodec) and _has_cae(codec.codecs)) for codec in codecs
    )


async def _verify(
    checked: Any,
    array: zarr.Array[Any],
    result: Verified,
    advance: Callable[[int], object],
    keep: Callable[[Any], None],
) -> None:
    inner = Grid.of(array).inner

    async def check(chunk: tuple[str, Region]) -> None:
        key, place = chunk
        result.chunks += 1
        if (reason := await _fault(checked, place, keep)) is not None:
            result.bad += await _inner_faults(checked, inner, key, place) or [BadChunk(key, reason)]
        advance(1)

    await for_each(stored_chunks(array), check)


async def stored_chunks(array: zarr.Array[Any]) -> AsyncIterator[tuple[str, Region]]:
    """Yield the key in the store of each stored chunk or shard of an array, and the window that it holds."""
    folder = array.store_path.path
    start = f"{folder}/" if folder else ""
    metadata = cast("Any", array.metadata)
    grid = Grid.of(array)
    async for key in array.store_path.store.list_prefix(start):
        own = key.removeprefix(start)
        if not re.fullmatch(r"c|(c[/.])?\d+([/.]\d+)*", own):
            continue
        place = tuple(int(number) for number in re.findall(r"\d+", own))
        if array.ndim == 0:
            place = ()  # zarr v2 calls this chunk "0"
        inside = len(place) == array.ndim and all(
            number < len(edges) - 1 for number, edges in zip(place, grid.edges, strict=True)
        )
        if inside and metadata.encode_chunk_key(place) == own:
            yield key, grid.region(place)


async def _fault(checked: Any, window: Region, keep: Callable[[Any], None]) -> str | None:
    """Return why a window can't be read; None if it can."""
    try:
        keep(await checked.getitem(window))
    except Exception as error:  # noqa: BLE001 - codecs and stores raise whatever they like for damaged bytes
        return f"{type(error).__name__}: {str(error).removeprefix('cae: ')}"
    return None


async def _inner_faults(checked: Any, inner: tuple[int, ...] | None, key: str, window: Region) -> list[BadChunk]:
    """Return the bad inner chunks of a shard; none for a chunk, or if the shard itself can't be read."""
    if inner is None:
        return []
    found = []
    corners = list(_corners(window, inner))
    for corner in corners:
        place = tuple(
            slice(start, min(start + length, whole.stop))
            for start, length, whole in zip(corner, inner, window, strict=True)
        )
        if (reason := await _fault(checked, place, lambda _: None)) is not None:
            number = ((start - whole.start) // n for start, whole, n in zip(corner, window, inner, strict=True))
            found.append(BadChunk(f"{key} inner chunk {', '.join(map(str, number))}", reason))
    return [] if len(found) == len(corners) > 1 else found


def _corners(window: Region, chunk: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(whole.start, whole.stop, n) for whole, n in zip(window, chunk, strict=True)))
