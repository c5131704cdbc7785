"""`BottleneckStore` and `open_bottleneck`: read the latents of an archive as arrays.

`zarr_cae.latents.metadata` says how arrays of pixels appear.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

import zarr
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.storage import StoreLike, StorePath

from zarr_cae._zarr import sync
from zarr_cae.codec.embedded import take_weights
from zarr_cae.errors import CAEConfigurationError, WeightsNotFoundError
from zarr_cae.latents import metadata_v2
from zarr_cae.latents.codec import NAME, refuse_writing
from zarr_cae.latents.metadata import has_codec, rewrite, weights_of
from zarr_cae.latents.multiscales import level_keys, rewrite_multiscales
from zarr_cae.latents.view import METADATA, StoreView, buffer_of, is_metadata, read_sync, rewritten
from zarr_cae.weights.registry import find_digest


class BottleneckStore(StoreView):
    """A read-only view of a store in which CAE arrays appear as their latents.

    Only metadata differ from those of the store beneath, in zarr v3 and in zarr v2 (`metadata_v2`); chunks are served
    as they are stored. Weights that are not on this machine are taken from the archive (`zarr_cae.open`), for this
    process only.

    Parameters
    ----------
    store
        A Store, or anything that zarr can make a Store from: a path, a URL, a dictionary.
    storage_options
        Options for the file system of a URL.

    Raises
    ------
    CAEConfigurationError
        If `store` is a StorePath with a path; from every method that writes; and from reading the metadata of an array
        whose latents can't be served; WeightsNotFoundError if its weights are neither on this machine nor in the
        archive.

    Examples
    --------
    >>> import xarray, zarr_cae  # doctest: +SKIP
    >>> xarray.open_zarr(zarr_cae.BottleneckStore("archive.zarr"))  # doctest: +SKIP
    """

    def __init__(self, store: StoreLike, *, storage_options: dict[str, Any] | None = None) -> None:
        super().__init__(store, storage_options=storage_options)
        self._being_read: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Future[Buffer | None]] = {}
        self._being_taken: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Future[None]] = {}
        self._not_found: set[str] = set()  # digests of weights that no group above an array of theirs holds

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_being_read": {}, "_being_taken": {}}

    def __str__(self) -> str:
        return f"bottleneck-{self._store}"

    async def makes(self, key: str) -> bool:
        """Return whether the key names metadata: `zarr.json`, or a document of Zarr version 2."""
        return is_metadata(key) or metadata_v2.is_v2_metadata(key)

    async def _value(self, key: str) -> bytes | None:
        if metadata_v2.is_v2_metadata(key):
            contents = await asyncio.gather(*(self._read_once(name) for name in metadata_v2.sources(key)))
            return await asyncio.to_thread(metadata_v2.make, key, contents)
        stored = await self._store.get(key, default_buffer_prototype())
        if stored is None:
            return None
        content = stored.to_bytes()
        names = level_keys(key, content)
        found = await asyncio.gather(*(self._store.get(name, default_buffer_prototype()) for name in names.values()))
        levels = {path: one.to_bytes() for path, one in zip(names, found, strict=True) if one is not None}
        await self._take_all_weights(key, content, levels)
        return await asyncio.to_thread(_rewritten, content, levels)

    async def _take_all_weights(self, key: str, content: bytes, levels: Mapping[str, bytes]) -> None:
        """Take the weights of a `zarr.json` document and of an image's levels; see `_take_weights`."""
        await self._take_weights(key, content)
        names = level_keys(key, content) if levels else {}
        for path, level in levels.items():
            with suppress(CAEConfigurationError):  # such a level raises it when it is opened itself
                await self._take_weights(names[path], level)

    async def _take_weights(self, key: str, content: bytes) -> None:
        """Take the weights that a `zarr.json` document names from the archive, if they are not on this machine.

        Raises
        ------
        CAEConfigurationError
            If it is the document of an array, and its weights file in the archive is damaged; WeightsNotFoundError if
            there is none.
        """
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            return  # zarr names the fault
        if not isinstance(document, dict):
            return
        group = document.get("node_type") != "array"
        folder = key.removesuffix(METADATA).rstrip("/")
        for digest in sorted(weights_of(document)):
            if find_digest(digest) is not None:
                continue
            try:
                await self._take_once(folder, digest, group=group)
            except CAEConfigurationError:
                if not group:  # the members of a group raise it themselves
                    raise
            if not group and find_digest(digest) is None:
                raise WeightsNotFoundError(
                    f"cae: weights {digest} are neither on this machine nor in the archive {self._store}; get their "
                    "file from the author of the array and run `zarr-cae weights import FILE`"
                )

    async def _take_once(self, path: str, digest: str, *, group: bool) -> None:
        """Take weights from the archive. Concurrent calls for the same ones wait for each other."""
        place = (asyncio.get_running_loop(), digest)
        while (taking := self._being_taken.get(place)) is not None:
            await asyncio.wait([taking])
        if find_digest(digest) is not None:
            return
        above = digest not in self._not_found  # search a whole hierarchy once, not for each of its arrays
        taking = asyncio.ensure_future(take_weights(self._store, path, digest, group=group, above=above))
        self._being_taken[place] = taking
        taking.add_done_callback(lambda _: self._being_taken.pop(place, None))
        await asyncio.shield(taking)
        if find_digest(digest) is None:
            self._not_found.add(digest)

    async def _read_once(self, key: str) -> bytes | None:
        """Read a key of the store beneath; concurrent reads of the same key share one request."""
        place = (asyncio.get_running_loop(), key)
        reading = self._being_read.get(place)
        if reading is None:
            reading = asyncio.ensure_future(self._store.get(key, default_buffer_prototype()))
            self._being_read[place] = reading
            reading.add_done_callback(lambda _: self._being_read.pop(place, None))
        value = await asyncio.shield(reading)
        return None if value is None else value.to_bytes()

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the same as `get`, without an event loop. Raise TypeError if the store beneath can't do so."""
        if metadata_v2.is_v2_metadata(key):
            values = [read_sync(self._store, name, prototype) for name in metadata_v2.sources(key)]
            made = metadata_v2.make(key, [None if value is None else value.to_bytes() for value in values])
            return None if made is None else buffer_of(made, prototype or default_buffer_prototype(), byte_range)
        if not is_metadata(key):
            return read_sync(self._store, key, prototype, byte_range)
        stored = read_sync(self._store, key, prototype)
        if stored is None:
            return None
        content = stored.to_bytes()
        stored_levels = {path: read_sync(self._store, one, prototype) for path, one in level_keys(key, content).items()}
        levels = {path: one.to_bytes() for path, one in stored_levels.items() if one is not None}
        sync(self._take_all_weights(key, content, levels))
        content = _rewritten(content, levels)
        return buffer_of(content, prototype or default_buffer_prototype(), byte_range)

    def _refuse_writing(self) -> NoReturn:
        refuse_writing()


def _rewritten(content: bytes, levels: Mapping[str, bytes]) -> bytes:
    """Return a `zarr.json` document for latents. `levels` holds those of an OME-Zarr image's levels, by path."""
    documents = {}
    for path, level in levels.items():
        with suppress(CAEConfigurationError, ValueError):  # such levels raise it when they are opened themselves
            documents[path] = json.loads(rewritten(level, rewrite))
    return rewritten(content, lambda document: rewrite_multiscales(rewrite(document), documents))


def open_bottleneck(
    store_or_path: StoreLike, *, path: str = "", **zarr_open_kwargs: Any
) -> zarr.Array[Any] | zarr.Group:
    """Open an array, or a group of arrays, of the codec `cae` as latents; pixels are not decoded.

    Weights that are not on this machine are taken from the archive, as `zarr_cae.open` does.

    Parameters
    ----------
    store_or_path
        A path, a URL, a Store or a StorePath.
    path
        The path of the node in the store.
    zarr_open_kwargs
        Further arguments for `zarr.open`, for example `storage_options` for a URL. The mode is always "r".

    Returns
    -------
    zarr.Array or zarr.Group
        Read only. An array of pixels (H, W, 3) in chunks whose edges are multiples of 16 appears as a float32 array
        (ceil(H / 16), ceil(W / 16), M). `zarr_cae.latents.metadata` has all rules. In a group, arrays of other codecs
        do not change.

    Raises
    ------
    CAEConfigurationError
        If the node is an array of another codec, its latents can't be served, or its weights file in the archive is
        damaged; WeightsNotFoundError if its weights are neither on this machine nor in the archive.

    Examples
    --------
    >>> latents = zarr_cae.open_bottleneck("photo.zarr")[:16, :16]  # doctest: +SKIP
    """
    if zarr_open_kwargs.pop("mode", None) not in (None, "r"):
        refuse_writing()
    options = zarr_open_kwargs.pop("storage_options", None)
    if isinstance(store_or_path, StorePath):
        inner = store_or_path / path
        store_or_path, path = inner.store, inner.path
    store = BottleneckStore(store_or_path, storage_options=options)
    node = zarr.open(store=store, mode="r", path=path, **zarr_open_kwargs)
    if isinstance(node, zarr.Array) and not has_latents(node):
        beneath = str(node.store_path).removeprefix("bottleneck-")
        raise CAEConfigurationError(
            f"cae: array {beneath!r} is not stored with the codec 'cae', so it has no latents; open it with zarr.open"
        )
    return node


def has_latents(array: zarr.Array[Any]) -> bool:
    """Return whether an array holds the latents of a CAE array, as `open_bottleneck` shows it."""
    metadata = array.metadata.to_dict()
    return has_codec(metadata.get("codecs"), NAME) or metadata_v2.has_compressor(metadata, NAME)
