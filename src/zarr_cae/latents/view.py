"""`StoreView`: the base of read-only stores that show the arrays of another store in another form.

`BottleneckStore` shows latents, `zarr_cae.serve.store.DecodedStore` shows pixels with standard codecs. Each says which
values it makes itself; this module routes every method of zarr's `Store` to these values or to the store beneath, and
refuses every method that writes. `tests/latents/test_view.py` lists the methods of the installed zarr's `Store`, so
that a new one can't be forgotten.
"""

from __future__ import annotations

import asyncio
import json
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Self, cast

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.storage import StoreLike, StorePath, WrapperStore
from zarr.storage._common import make_store

from zarr_cae._zarr import sync
from zarr_cae.errors import CAEConfigurationError

METADATA = "zarr.json"


class StoreView(WrapperStore[Store]):
    """A read-only store that makes some of its values from those of another store.

    Parameters
    ----------
    store
        A Store, or anything that zarr can make a Store from: a path, a URL, a dictionary.
    storage_options
        Options for the file system of a URL.

    Raises
    ------
    CAEConfigurationError
        If `store` is a StorePath with a path, and from every method that writes.
    """

    def __init__(self, store: StoreLike, *, storage_options: dict[str, Any] | None = None) -> None:
        if isinstance(store, StorePath) and store.path:
            raise CAEConfigurationError(
                f"cae: {type(self).__name__} wraps a whole store, not path {store.path!r} in it; use open_bottleneck "
                "for latents, or give the path to zarr.open"
            )
        if not isinstance(store, Store):
            store = sync(make_store(store, mode="r", storage_options=storage_options))
        super().__init__(store)

    @abstractmethod
    async def makes(self, key: str) -> bool:
        """Return whether the view makes the value of this key; otherwise the store beneath serves it."""

    @abstractmethod
    async def _value(self, key: str) -> bytes | None:
        """Make the whole value of a key for which `makes` is true; None if the key does not exist."""

    @abstractmethod
    def _refuse_writing(self) -> NoReturn:
        """Raise CAEConfigurationError: the view is read only."""

    def _with_store(self, store: Store) -> Self:
        return type(self)(store)

    def with_read_only(self, read_only: bool = False) -> Self:
        """Return the same view; raise CAEConfigurationError if `read_only` is False."""
        if not read_only:
            self._refuse_writing()
        return self._with_store(self._store)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._store!r})"

    @property
    def read_only(self) -> bool:
        """Whether the store is read only: always True."""
        return True

    @property
    def supports_writes(self) -> bool:
        """Whether the store can write: always False."""
        return False

    @property
    def supports_deletes(self) -> bool:
        """Whether the store can delete: always False."""
        return False

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return the bytes of a key, or a range of them; None if the key does not exist."""
        if not await self.makes(key):
            return await self._store.get(key, prototype, byte_range)
        value = await self._value(key)
        return None if value is None else buffer_of(value, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return the bytes of several keys and ranges, in their order."""
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    async def get_ranges(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], *, prototype: BufferPrototype, **options: Any
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """Yield several ranges of one key. zarr 3.1.6 does not have this method yet."""
        if await self.makes(key):
            groups = Store.get_ranges(self, key, byte_ranges, prototype=prototype)  # type: ignore[attr-defined,unused-ignore]
        else:
            chosen = {name: value for name, value in options.items() if value is not None}
            groups = cast("Any", self._store).get_ranges(key, byte_ranges, prototype=prototype, **chosen)
        async for group in groups:
            yield group

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        listed = list(requests)
        found = await asyncio.gather(*(self.get(*request) for request in listed))
        for (key, *_), value in zip(listed, found, strict=True):
            yield key, value

    async def getsize(self, key: str) -> int:
        """Return the number of bytes of a value as the view serves it. Raise FileNotFoundError if there is none."""
        if not await self.makes(key):
            return await self._store.getsize(key)
        value = await self._value(key)
        if value is None:
            raise FileNotFoundError(key)
        return len(value)

    async def getsize_prefix(self, prefix: str) -> int:
        """Return the number of bytes of all values under a prefix as the view serves them."""
        return await Store.getsize_prefix(self, prefix)

    def _check_writable(self) -> None:
        self._refuse_writing()

    async def set(self, key: str, value: Buffer) -> NoReturn:  # noqa: ARG002
        """Raise CAEConfigurationError: the view is read only."""
        self._refuse_writing()

    async def set_if_not_exists(self, key: str, value: Buffer) -> NoReturn:  # noqa: ARG002
        """Raise CAEConfigurationError: the view is read only."""
        self._refuse_writing()

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> NoReturn:  # noqa: ARG002
        self._refuse_writing()

    def set_sync(self, key: str, value: Buffer) -> NoReturn:  # noqa: ARG002
        """Raise CAEConfigurationError: the view is read only."""
        self._refuse_writing()

    async def delete(self, key: str) -> NoReturn:  # noqa: ARG002
        """Raise CAEConfigurationError: the view is read only."""
        self._refuse_writing()

    def delete_sync(self, key: str) -> NoReturn:  # noqa: ARG002
        """Raise CAEConfigurationError: the view is read only."""
        self._refuse_writing()

    async def delete_dir(self, prefix: str) -> NoReturn:  # noqa: ARG002
        """Raise CAEConfigurationError: the view is read only."""
        self._refuse_writing()

    async def clear(self) -> NoReturn:
        """Raise CAEConfigurationError: the view is read only."""
        self._refuse_writing()


def is_metadata(key: str) -> bool:
    """Return whether a key is that of a `zarr.json` document."""
    return key == METADATA or key.endswith("/" + METADATA)


def rewrite_arrays(
    document: Mapping[str, Any], rewrite: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Apply `rewrite` to the document of an array, or to each array in the consolidated metadata of a group.

    Parameters
    ----------
    document
        A `zarr.json` document. It is not modified.
    rewrite
        Return the new document of an array, or the same object if there is nothing to rewrite. If it raises
        CAEConfigurationError for a member of consolidated metadata, these are left out: zarr then reads the members
        one by one, and raises for this one only.

    Returns
    -------
    Mapping
        `document` itself if nothing changed. Otherwise a new document that shares the parts that did not change.
    """
    if document.get("node_type") == "array":
        return rewrite(document)
    consolidated = document.get("consolidated_metadata")
    if not isinstance(consolidated, dict) or not isinstance(consolidated.get("metadata"), dict):
        return document
    members = consolidated["metadata"]
    try:
        changed = {
            path: rewrite_arrays(node, rewrite) if isinstance(node, dict) else node for path, node in members.items()
        }
    except CAEConfigurationError:
        return {name: value for name, value in document.items() if name != "consolidated_metadata"}
    if all(changed[path] is members[path] for path in members):
        return document
    return {**document, "consolidated_metadata": {**consolidated, "metadata": changed}}


def rewritten(content: bytes, rewrite: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> bytes:
    """Apply `rewrite` to a JSON document; return `content` itself if it is not JSON or nothing changed.

    Raises
    ------
    CAEConfigurationError
        From `rewrite`, or if the rewritten document is nested too deeply to be written.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return content  # zarr names the fault
    if not isinstance(document, dict) or (changed := rewrite(document)) is document:
        return content
    try:
        return json.dumps(changed).encode()  # without indent, which needs several times the stack for nested values
    except RecursionError as error:
        raise CAEConfigurationError("cae: the metadata are nested too deeply to be rewritten") from error


def buffer_of(content: bytes, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer:
    """Return a range of `content` as a buffer of zarr."""
    length = len(content)
    match byte_range:
        case None:
            window = slice(None)
        case RangeByteRequest(start=start, end=end):
            window = slice(start, end)
        case OffsetByteRequest(offset=offset):
            window = slice(offset, None)
        case SuffixByteRequest(suffix=suffix):
            window = slice(max(0, length - suffix), None)
        case _:
            raise CAEConfigurationError(
                f"cae: byte range must be a range, an offset, a suffix or None; got {byte_range!r}"
            )
    return prototype.buffer.from_bytes(content[window])


def read_sync(
    store: Store, key: str, prototype: BufferPrototype | None, byte_range: ByteRequest | None = None
) -> Buffer | None:
    """Read from a store without an event loop. Raise TypeError, as zarr's WrapperStore does, if the store can't."""
    if not hasattr(store, "get_sync"):
        raise TypeError(f"Store {type(store).__name__} does not support synchronous get.")
    prototype = prototype or default_buffer_prototype()
    return cast("Buffer | None", store.get_sync(key, prototype=prototype, byte_range=byte_range))
