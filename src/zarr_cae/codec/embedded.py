"""Store weights files inside an archive, so that copies of it open on every machine.

A file is stored once, under `.cae/weights/<digest>.safetensors` in the folder of the first array that needs it. Other
readers ignore it there; in the folder of a group zarr would warn of an unknown object. Files from an archive
are untrusted like all weights files, and must have the digest in their name.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.api import asynchronous
from zarr.buffer import cpu
from zarr.codecs import ShardingCodec
from zarr.storage import LocalStore, StoreLike, StorePath

from zarr_cae._zarr import sync
from zarr_cae.codec.cae import CAECodec
from zarr_cae.errors import CAEConfigurationError, WeightsNotFoundError
from zarr_cae.weights import registry
from zarr_cae.weights.file import WeightsInfo

FOLDER = ".cae/weights"
_LARGEST_FILE = 1 << 28
"""Bytes of a weights file in an archive. The bundled ones have at most 12 MB."""


def open(  # noqa: A001 - named like `zarr.open`
    store: StoreLike, *, path: str = "", **zarr_open_kwargs: Any
) -> zarr.Array[Any] | zarr.Group:
    """Open an array or a group like `zarr.open`, with the weights that the archive holds.

    Weights that are not on this machine are taken from the archive, for this process and for those on this machine that
    get an array from it, such as the workers of a DataLoader. `import_weights` keeps them.

    Parameters
    ----------
    store
        A path, a URL, a Store or a StorePath.
    path
        The path of the node in the store.
    zarr_open_kwargs
        Further arguments for `zarr.open`. The mode is "r" if none is given.

    Returns
    -------
    zarr.Array or zarr.Group

    Raises
    ------
    CAEConfigurationError
        If a weights file in the archive is damaged.

    Examples
    --------
    >>> pixels = zarr_cae.open("archive.zarr")[:256, :256]  # doctest: +SKIP
    """
    node = zarr.open(store=store, path=path, **{"mode": "r", **zarr_open_kwargs})
    places = [array.store_path for array in _arrays(node)]
    for digest in digests(node):
        sync(_take(node.store_path, places, digest))
    return node


async def take_weights(store: Store, path: str, digest: str, *, group: bool, above: bool = True) -> None:
    """Take weights from the archive for this process, if it holds them and they are not on this machine.

    Parameters
    ----------
    store, path
        The place of an array or a group.
    digest
        That of the weights.
    group
        Whether a group is there, in whose arrays the weights may lie.
    above
        Whether to look in the groups above it too.

    Raises
    ------
    CAEConfigurationError
        If a weights file in the archive is damaged.
    """
    place = StorePath(store, path)
    await _take(place if above else None, await _arrays_at(store, path) if group else [place], digest)


async def _take(node: StorePath | None, arrays: Sequence[StorePath], digest: str) -> None:
    if registry.find_digest(digest) is None and (content := await _find(node, arrays, digest)) is not None:
        await asyncio.to_thread(registry.store, content, _process_folder())
        registry.add_folder(_process_folder())


def embed_weights(store: StoreLike, *, path: str = "", **zarr_open_kwargs: Any) -> list[str]:
    """Store the weights of all arrays of an archive in the archive itself.

    Parameters
    ----------
    store, path, zarr_open_kwargs
        As for `zarr.open`. The store must be writable.

    Returns
    -------
    list of str
        The digests of all weights that the archive needs.

    Raises
    ------
    WeightsNotFoundError
        If weights of an array are neither on this machine nor in the archive. Nothing is written then.
    """
    node = zarr.open(store=store, path=path, **{**zarr_open_kwargs, "mode": "r+"})
    missing: dict[str, bytes] = {}
    found: set[str] = set()
    for array in _arrays(node):
        for digest in digests(array):
            if digest not in found and _read(node, digest) is None:
                missing[_key(array.store_path, digest)] = _content(digest)
            found.add(digest)
    for key, content in missing.items():
        sync(node.store_path.store.set(key, cpu.Buffer.from_bytes(content)))
    return sorted(found)


def _content(digest: str) -> bytes:
    info = registry.find_digest(digest)
    if info is None:
        raise WeightsNotFoundError(f"cae: weights {digest} are not on this machine, so they cannot be embedded")
    registry.load(info.path)  # checks the digest
    return info.path.read_bytes()


def import_weights(store: StoreLike, *, path: str = "", **zarr_open_kwargs: Any) -> list[WeightsInfo]:
    """Copy the weights that an archive holds to the cache folder of this machine.

    Parameters
    ----------
    store, path, zarr_open_kwargs
        As for `zarr.open`.

    Returns
    -------
    list of WeightsInfo
        The files, in the cache folder.

    Raises
    ------
    CAEConfigurationError
        If a weights file in the archive is damaged, or there is none.
    """
    node = zarr.open(store=store, path=path, **{**zarr_open_kwargs, "mode": "r"})
    contents = [content for digest in digests(node) if (content := _read(node, digest)) is not None]
    if not contents:
        raise CAEConfigurationError(
            f"cae: {node.store_path} holds no weights; `zarr-cae weights embed` puts them there"
        )
    return [registry.store(content) for content in contents]


def is_from_archive(info: WeightsInfo) -> bool:
    """Return whether weights were taken from an archive for this process, and are not on this machine otherwise."""
    return info.path.parent == _process_folder()


def digests(node: zarr.Array[Any] | zarr.Group) -> list[str]:
    """Return the digests of the weights of an array, or of all arrays of a group."""
    return sorted({codec.weights for array in _arrays(node) for codec in codecs_of(array)})


def _arrays(node: zarr.Array[Any] | zarr.Group) -> list[zarr.Array[Any]]:
    """Return an array, or all arrays of a group, sorted by name."""
    if isinstance(node, zarr.Array):
        return [node]
    members = sorted(node.members(max_depth=None), key=lambda member: member[0])
    return [member for _, member in members if isinstance(member, zarr.Array)]


def codecs_of(array: zarr.Array[Any]) -> Iterator[CAECodec]:
    """Yield the `cae` codecs of an array, also those inside shards."""
    left = list(getattr(array.metadata, "codecs", ()))
    while left:
        codec = left.pop()
        if isinstance(codec, ShardingCodec):
            left += codec.codecs
        elif isinstance(codec, CAECodec):
            yield codec


def _key(place: StorePath, digest: str) -> str:
    return "/".join(filter(None, (place.path, FOLDER, f"{digest.removeprefix('sha256:')}.safetensors")))


def _read(node: zarr.Array[Any] | zarr.Group, digest: str) -> bytes | None:
    """Return a weights file from an array of the archive, or None."""
    return sync(_find(node.store_path, [array.store_path for array in _arrays(node)], digest))


async def _find(node: StorePath | None, arrays: Sequence[StorePath], digest: str) -> bytes | None:
    """Return a weights file from some arrays or, if none holds it, from those of the groups above a node; or None."""
    async for place in _places(node, arrays):
        store, key = place.store, _key(place, digest)
        if not await store.exists(key):
            continue
        size = await store.getsize(key)
        if size > _LARGEST_FILE:
            raise CAEConfigurationError(f"cae: weights file {key} has {size:,} bytes, more than {_LARGEST_FILE:,}")
        buffer = await store.get(key, cpu.buffer_prototype)
        content = b"" if buffer is None else buffer.to_bytes()
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
            raise CAEConfigurationError(f"cae: weights file {key} of {store} is damaged: its SHA-256 is not its name")
        return content
    return None


async def _places(node: StorePath | None, arrays: Sequence[StorePath]) -> AsyncIterator[StorePath]:
    """Yield some arrays, then those of the groups above a node, also above the root of a local store."""
    for array in arrays:
        yield array
    if node is None:
        return
    store, path = node.store, node.path
    while path:
        path = path.rpartition("/")[0]
        for array in await _arrays_at(store, path):
            yield array
    if isinstance(store, LocalStore):
        folder = store.root.absolute().parent
        while (folder / "zarr.json").is_file():
            for array in await _arrays_at(folder):
                yield array
            folder = folder.parent


async def _arrays_at(store: Store | Path, path: str = "") -> list[StorePath]:
    """Return the places of all arrays in a group, by name. There are none if it can't be opened or listed."""
    try:
        group = await asynchronous.open_group(store, path=path, mode="r")
        members = [member async for _, member in group.members(max_depth=None)]
    except (OSError, NotImplementedError, KeyError, TypeError, ValueError):  # the last three: damaged metadata
        return []
    places = [member.store_path for member in members if isinstance(member, zarr.AsyncArray)]
    return sorted(places, key=lambda place: place.path)


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="zarr-cae-weights-")


def _process_folder() -> Path:
    """Return a folder that exists as long as this process."""
    return Path(_scratch().name)
