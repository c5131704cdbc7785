"""`BottleneckStore` and `open_bottleneck`: the latents of an archive as arrays, read where they lie.

What appears as what stands in `rewriting`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from typing import Any, NoReturn, Self, cast

import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import StoreLike, StorePath, WrapperStore
from zarr.storage._common import make_store

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.latents import codec as latents
from zarr_cae.latents.metadata import holds, rewrite

_METADATA = "zarr.json"


class BottleneckStore(WrapperStore[Store]):
    """A read-only view of a store in which CAE arrays are their latents.

    Only `zarr.json` documents differ from those of the store beneath; chunks are served as they lie.

    Parameters
    ----------
    store
        Anything that zarr takes: a Store, a path, a URL, a dictionary.
    storage_options
        For the file system of a URL.

    Raises
    ------
    CAEConfigurationError
        From every method that would write. From `get` of the metadata of an array whose latents can't be served.
    """

    def __init__(self, store: StoreLike, *, storage_options: dict[str, Any] | None = None) -> None:
        if isinstance(store, StorePath) and store.path:
            raise CAEConfigurationError(
                f"cae: BottleneckStore wraps a whole store, not path {store.path!r} in it; use open_bottleneck, or "
                "give zarr the path"
            )
        if not isinstance(store, Store):
            store = sync(make_store(store, mode="r", storage_options=storage_options))
        super().__init__(store)

    def _with_store(self, store: Store) -> Self:
        return type(self)(store)

    def with_read_only(self, read_only: bool = False) -> Self:
        """The same view; it can't be made writable."""
        if not read_only:
            latents.refuse_writing()
        return self._with_store(self._store)

    def __str__(self) -> str:
        return f"bottleneck-{self._store}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._store!r})"

    @property
    def read_only(self) -> bool:
        """True."""
        return True

    @property
    def supports_writes(self) -> bool:
        """False."""
        return False

    @property
    def supports_deletes(self) -> bool:
        """False."""
        return False

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Bytes of a key: of the rewritten document, or of the store beneath."""
        if not _is_metadata(key):
            return await self._store.get(key, prototype, byte_range)
        stored = await self._store.get(key, prototype)
        return None if stored is None else await asyncio.to_thread(_rewritten, stored, prototype, byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """`get` without an event loop, if the store beneath can."""
        store = cast("Any", self._store)
        if not hasattr(store, "get_sync"):
            raise TypeError(f"Store {type(store).__name__} does not support synchronous get.")  # as WrapperStore does
        if not _is_metadata(key):
            return cast("Buffer | None", store.get_sync(key, prototype=prototype, byte_range=byte_range))
        prototype = prototype or default_buffer_prototype()
        stored = store.get_sync(key, prototype=prototype)
        return None if stored is None else _rewritten(stored, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """`get` for several keys and ranges."""
        requests = list(key_ranges)
        if not any(_is_metadata(key) for key, _ in requests):
            return await self._store.get_partial_values(prototype, requests)
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in requests)))

    async def get_ranges(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        *,
        prototype: BufferPrototype,
        **options: Any,
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """Several ranges of one key, where zarr has it."""
        # Of a document, zarr's own loop over self.get; of a chunk, whatever the store beneath does best.
        read = Store.get_ranges(self, key, byte_ranges, prototype=prototype) if _is_metadata(key) else None  # type: ignore[attr-defined,unused-ignore]
        if read is None:
            chosen = {name: value for name, value in options.items() if value is not None}
            read = cast("Any", self._store).get_ranges(key, byte_ranges, prototype=prototype, **chosen)
        async for group in read:
            yield group

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        listed = list(requests)
        found = await asyncio.gather(*(self.get(*request) for request in listed))
        for (key, *_), value in zip(listed, found, strict=True):
            yield key, value

    async def getsize(self, key: str) -> int:
        """Bytes of a value as the view serves it. Raises FileNotFoundError."""
        if not _is_metadata(key):
            return await self._store.getsize(key)
        value = await self.get(key, default_buffer_prototype())
        if value is None:
            raise FileNotFoundError(key)
        return len(value)

    async def getsize_prefix(self, prefix: str) -> int:
        """Bytes of all values under a prefix as the view serves them."""
        return await Store.getsize_prefix(self, prefix)

    def _check_writable(self) -> None:
        latents.refuse_writing()

    async def set(self, key: str, value: Buffer) -> NoReturn:  # noqa: ARG002
        """Refused."""
        latents.refuse_writing()

    async def set_if_not_exists(self, key: str, value: Buffer) -> NoReturn:  # noqa: ARG002
        """Refused."""
        latents.refuse_writing()

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> NoReturn:  # noqa: ARG002
        latents.refuse_writing()

    def set_sync(self, key: str, value: Buffer) -> NoReturn:  # noqa: ARG002
        """Refused."""
        latents.refuse_writing()

    async def delete(self, key: str) -> NoReturn:  # noqa: ARG002
        """Refused."""
        latents.refuse_writing()

    def delete_sync(self, key: str) -> NoReturn:  # noqa: ARG002
        """Refused."""
        latents.refuse_writing()

    async def delete_dir(self, prefix: str) -> NoReturn:  # noqa: ARG002
        """Refused."""
        latents.refuse_writing()

    async def clear(self) -> NoReturn:
        """Refused."""
        latents.refuse_writing()


def _is_metadata(key: str) -> bool:
    return key == _METADATA or key.endswith("/" + _METADATA)


def _rewritten(stored: Buffer, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer:
    """The bytes asked for of a rewritten document; of the stored one if there is nothing to rewrite."""
    content = stored.to_bytes()
    try:
        document = json.loads(content)
    except ValueError:
        document = None  # zarr says what is wrong with it
    if isinstance(document, dict) and (changed := rewrite(document)) != document:
        content = json.dumps(changed, indent=2).encode()
    return prototype.buffer.from_bytes(content[_window(byte_range, len(content))])


def _window(byte_range: ByteRequest | None, length: int) -> slice:
    match byte_range:
        case None:
            return slice(None)
        case RangeByteRequest(start=start, end=end):
            return slice(start, end)
        case OffsetByteRequest(offset=offset):
            return slice(offset, None)
        case SuffixByteRequest(suffix=suffix):
            return slice(max(0, length - suffix), None)
    raise CAEConfigurationError(f"cae: byte range must be a range, an offset, a suffix or None; got {byte_range!r}")


def open_bottleneck(
    store_or_path: StoreLike, *, path: str = "", **zarr_open_kwargs: Any
) -> zarr.Array[Any] | zarr.Group:
    """Open an array, or a group of arrays, of the codec `cae` as latents; nothing is decompressed to pixels.

    Parameters
    ----------
    store_or_path
        Anything that zarr takes: a path, a URL, a Store, a StorePath.
    path
        Of the node within it.
    zarr_open_kwargs
        For `zarr.open`, among them `storage_options` for a URL. The mode is "r", which None stands for too.

    Returns
    -------
    zarr.Array, or zarr.Group
        Read only. An array of pixels (H, W, 3) in chunks of a multiple of 16 is an array (ceil(H / 16), ceil(W / 16),
        M) of float32; `zarr_cae.latents.metadata` has all rules. In a group, arrays of other codecs stay what they are.

    Raises
    ------
    CAEConfigurationError
        If the node is an array of another codec, or one whose latents can't be served; WeightsNotFoundError if its
        weights are not on this machine.
    """
    if zarr_open_kwargs.pop("mode", None) not in (None, "r"):
        latents.refuse_writing()
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
    """Whether an array is one of latents, as `open_bottleneck` shows those of the codec `cae`."""
    return holds(array.metadata.to_dict().get("codecs"), latents.NAME)
