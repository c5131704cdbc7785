"""`DecodedStore`: show CAE arrays with standard codecs, so that any Zarr reader sees their pixels."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Self, cast, get_args
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.buffer import cpu, default_buffer_prototype
from zarr.storage import StoreLike, StorePath

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.latents.view import METADATA, StoreView, is_metadata, rewrite_arrays, rewritten
from zarr_cae.serve.cache import ByteCache, ByteLimit, SharedWork
from zarr_cae.serve.metadata import Compressor, DecodedGrid, compressor, decoded_grid, is_cae, rewrite_array

_ARRAYS = 1024
"""Arrays whose metadata are kept."""
_MOST_AXES = 32
_BYTES_AT_WORK = 1 << 29
"""Bytes of decoded chunks that one event loop works on at one time."""


@dataclass(frozen=True)
class _DecodedArray:
    """A CAE array of the store beneath, and how its chunks appear."""

    path: str
    document: bytes
    stored: zarr.AsyncArray[Any]
    grid: DecodedGrid

    @property
    def prefix(self) -> str:
        """The beginning of the keys of its chunks."""
        return f"{self.path}/" if self.path else ""


class DecodedStore(StoreView):
    """A read-only view of a store in which CAE arrays appear as pixels with standard codecs.

    Any Zarr v3 reader opens the arrays of this view, also without this package. A chunk is decoded and compressed again
    when it is read. Chunks that are read at the same time go through the networks in batches. Shards are undone: each
    of their inner chunks is a chunk of its own. Arrays of latents in a `BottleneckStore` appear as float32 arrays in
    the same way, so `DecodedStore(BottleneckStore(...))` shows latents to any reader. All other keys are served as
    they are stored; so are arrays of zarr format 2, which `zarr-cae migrate` brings to format 3.

    The archive must not change while it is read through the view: chunks and metadata that were read may be kept.

    Parameters
    ----------
    store
        A Store, or anything that zarr can make a Store from: a path, a URL, a dictionary.
    codecs
        The compressor of the chunks: "zstd", "blosc" or "gzip".
    cache_bytes
        Bytes of compressed chunks to keep at most. Without a cache (0), ranges of one chunk decode it each time.
    storage_options
        Options for the file system of a URL.

    Raises
    ------
    CAEConfigurationError
        For an unknown compressor; if `store` is a StorePath with a path; from every method that writes; and when the
        metadata are read of a CAE array whose chunk grid is not regular. Chunks raise what decoding them raises:
        CAEDataError if they are damaged, WeightsNotFoundError if the weights are not on this machine.

    Examples
    --------
    >>> pixels = zarr.open(store=zarr_cae.DecodedStore("archive.zarr"), mode="r")  # doctest: +SKIP
    """

    def __init__(
        self,
        store: StoreLike,
        codecs: Compressor = "zstd",
        *,
        cache_bytes: int = 1 << 28,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(store, storage_options=storage_options)
        if codecs not in get_args(Compressor):
            raise CAEConfigurationError(f"cae: codecs must be one of {', '.join(get_args(Compressor))}; got {codecs!r}")
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise CAEConfigurationError(f"cae: cache_bytes must be an integer of at least 0; got {cache_bytes!r}")
        self.codecs, self.cache_bytes = codecs, cache_bytes
        self._chunks = ByteCache(cache_bytes)
        self._arrays: dict[str, _DecodedArray | None] = {}
        self._work = SharedWork()
        self._limits: WeakKeyDictionary[asyncio.AbstractEventLoop, ByteLimit] = WeakKeyDictionary()

    def _with_store(self, store: Store) -> Self:
        return type(self)(store, self.codecs, cache_bytes=self.cache_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), cache_bytes=self.cache_bytes), (self._store, self.codecs)

    def __eq__(self, value: object) -> bool:
        return super().__eq__(value) and self.codecs == cast("DecodedStore", value).codecs

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"decoded-{self._store}"

    @property
    def _supports_sync_io(self) -> bool:
        return False

    def get_sync(self, key: str, **options: Any) -> NoReturn:  # noqa: ARG002
        """Raise TypeError: chunks are decoded on an event loop only."""
        raise TypeError(f"Store {type(self).__name__} does not support synchronous get.")

    def _refuse_writing(self) -> NoReturn:
        raise CAEConfigurationError("cae: DecodedStore is read only; write pixels to the array itself")

    async def makes(self, key: str) -> bool:
        """Return whether the key names metadata or a chunk of an array that is decoded."""
        return is_metadata(key) or await self._find(key) is not None

    async def _value(self, key: str) -> bytes | None:
        if is_metadata(key):
            return await self._document(key)
        found = await self._find(key)
        return None if found is None else await self._chunk(key, *found)

    async def _document(self, key: str) -> bytes | None:
        """Return the rewritten document; if it changed, read the array anew for the chunks that follow."""
        stored = await self._store.get(key, default_buffer_prototype())
        path = key.removesuffix(METADATA).removesuffix("/")
        if stored is None:
            self._arrays.pop(path, None)
            return None
        content = stored.to_bytes()
        known = self._arrays.get(path)
        if known is None or known.document != content:
            self._arrays.pop(path, None)
        if known is not None and known.document != content:
            self._chunks.forget(known.prefix)
        return await asyncio.to_thread(rewritten, content, partial(rewrite_arrays, rewrite=self._rewrite))

    def _rewrite(self, array: Any) -> Any:
        return rewrite_array(array, self.codecs)

    async def _array(self, path: str) -> _DecodedArray | None:
        """Return the CAE array at a path; None for any other node."""
        if path in self._arrays:
            return self._arrays.get(path)
        stored = await self._store.get(f"{path}/{METADATA}" if path else METADATA, default_buffer_prototype())
        found = None if stored is None else await asyncio.to_thread(self._opened, path, stored.to_bytes())
        if stored is not None:
            if len(self._arrays) >= _ARRAYS:
                self._arrays.clear()
            self._arrays[path] = found
        return found

    def _opened(self, path: str, content: bytes) -> _DecodedArray | None:
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            return None
        if not isinstance(document, dict) or document.get("node_type") != "array" or not is_cae(document):
            return None
        grid = decoded_grid(document)
        return _DecodedArray(path, content, zarr.AsyncArray.from_dict(StorePath(self._store, path), document), grid)

    async def _find(self, key: str) -> tuple[_DecodedArray, tuple[int, ...]] | None:
        """Return the CAE array that a key belongs to, and the chunk; None for keys that are served as they are."""
        for path, rest in _splits(key):
            array = await self._array(path)
            if array is not None:
                chunk = array.grid.keys.chunk(rest)
                return None if chunk is None else (array, chunk)
        return None

    async def _chunk(self, key: str, array: _DecodedArray, chunk: tuple[int, ...]) -> bytes | None:
        kept = self._chunks.get(key)
        if kept is not None:
            return kept
        return await self._work.result(key, partial(self._transcoded, key, array, chunk))

    async def _transcoded(self, key: str, array: _DecodedArray, chunk: tuple[int, ...]) -> bytes | None:
        window = array.grid.window(chunk)
        if window is None:
            return None
        dtype = np.dtype(array.stored.dtype)
        size = int(np.prod(array.grid.chunk_shape, dtype=object)) * dtype.itemsize
        async with self._limits.setdefault(asyncio.get_running_loop(), ByteLimit(_BYTES_AT_WORK)).holding(size):
            values = np.asarray(await array.stored.getitem(window, prototype=cpu.buffer_prototype))
            fill = array.stored.metadata.fill_value
            if _is_all(values, fill) and not await self._store.exists(array.prefix + array.grid.stored_key(chunk)):
                return None
            content = await asyncio.to_thread(self._compressed, values, array.grid.chunk_shape, fill)
        self._chunks.put(key, content)
        return content

    def _compressed(self, values: npt.NDArray[Any], shape: tuple[int, ...], fill: Any) -> bytes:
        """Return the bytes of a chunk; one at the edge of the array is filled up to its whole shape, as zarr does."""
        dtype = values.dtype.newbyteorder("<")
        if values.shape != shape:
            whole = np.full(shape, fill, dtype)
            whole[tuple(map(slice, values.shape))] = values
            values = whole
        values = np.ascontiguousarray(values, dtype)
        return bytes(compressor(self.codecs, dtype.itemsize).encode(values))

    async def exists(self, key: str) -> bool:
        """Return whether there is a value for a key."""
        found = None if is_metadata(key) else await self._find(key)
        if found is None:
            return await self._store.exists(key)
        array, chunk = found
        if array.grid.window(chunk) is None:
            return False
        return await self._store.exists(array.prefix + array.grid.stored_key(chunk))

    async def is_empty(self, prefix: str) -> bool:
        """Return whether there is no key under a prefix."""
        return await Store.is_empty(self, prefix)

    async def list(self) -> AsyncIterator[str]:
        """Yield all keys."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield all keys that begin with a prefix."""
        array = await self._around(prefix)
        async for stored in self._store.list_prefix(prefix if array is None else array.prefix):
            async for key in self._appearing(stored):
                if key.startswith(prefix):
                    yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly below a prefix."""
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        if await self._around(folder) is None:
            async for name in self._store.list_dir(prefix):
                yield name
            return
        names: set[str] = set()
        async for key in self.list_prefix(folder):
            name = key.removeprefix(folder).partition("/")[0]
            if name not in names:
                names.add(name)
                yield name

    async def _around(self, prefix: str) -> _DecodedArray | None:
        """Return the array whose chunks a prefix reaches into, if they appear under other keys than stored."""
        parts = prefix.split("/")
        for end in range(len(parts) - 1, -1, -1):
            path = "/".join(parts[:end])
            array = await self._array(path)
            if array is not None:
                return None if array.grid.keeps_keys else array
            if path in self._arrays:
                return None  # another array or a group, in which no array has its chunks
        return None

    async def _appearing(self, stored: str) -> AsyncIterator[str]:
        """Yield the keys under which the value of a stored key appears."""
        if not is_metadata(stored):
            for path, rest in _splits(stored):
                array = await self._array(path)
                if array is not None and not array.grid.keeps_keys:
                    for chunk in array.grid.chunks_in(rest):
                        yield array.prefix + array.grid.keys.key(chunk)
                    return
        yield stored


def _is_all(values: npt.NDArray[Any], fill: Any) -> bool:
    return bool((np.isnan(values) if np.isnan(fill) else values == fill).all())


def _splits(key: str) -> list[tuple[str, str]]:
    """Return the ways to split a key into the path of an array and the key of a chunk, the likely ones first."""
    parts = key.split("/")
    numbers = 0
    while numbers < min(len(parts), _MOST_AXES) and parts[-1 - numbers].isdecimal():
        numbers += 1
    if not numbers:  # the last part is like c.0.1.2, 0.1.2, or no chunk's
        last = parts[-1].removeprefix("c.").split(".")
        return [("/".join(parts[:-1]), parts[-1])] if all(part.isdecimal() for part in last) else []
    ends = [len(parts) - numbers - 1] if len(parts) > numbers and parts[-1 - numbers] == "c" else []
    ends += range(len(parts) - numbers, len(parts))
    return [("/".join(parts[:end]), "/".join(parts[end:])) for end in ends]
