"""Move an archive of zarr v2 to zarr v3. The symbols of caecodec's chunks get new frames; no pixel is decoded.

Arrays of the codec `cae` become arrays of `CAECodec` with the same weights, shape and chunks. Their weights file says
that latents continue by reflection at the edges of a chunk, as in caecodec. So pixels stay the same, except at the
seams between the patches of chunks larger than `patch_size`. Groups and attributes are copied. Arrays of other codecs
keep their chunks byte by byte, and their metadata are written in the form of zarr v3. xarray keeps the names of axes in
the attribute `_ARRAY_DIMENSIONS` of zarr v2; it becomes `dimension_names`.

A migration that was interrupted goes on where it ended: what is there is checked, and what is good is kept.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import zarr
from zarr.abc.store import Store
from zarr.buffer import default_buffer_prototype
from zarr.metadata.migrate_v3 import migrate_to_v3
from zarr.storage import MemoryStore, StoreLike, StorePath

from zarr_cae._zarr import sync
from zarr_cae.codec.cae import CAECodec
from zarr_cae.coder import tiles
from zarr_cae.coder.frame import FrameHeader, unpack
from zarr_cae.errors import CAEConfigurationError, CAEDataError
from zarr_cae.latents.metadata_v2 import DIMENSIONS_ATTRIBUTE
from zarr_cae.legacy.codec import ConvolutionalAutoencoder
from zarr_cae.legacy.weights import with_margin
from zarr_cae.pixels.layout import RGB
from zarr_cae.tasks import for_each
from zarr_cae.threads import lazy_property
from zarr_cae.weights.file import ZOO_MODEL, Weights

__all__ = ["Migrated", "migrate"]

_METADATA = "zarr.json"

AdvanceChunks = Callable[[int], object]


@dataclass(frozen=True)
class Migrated:
    """The result of a migration."""

    arrays: int
    chunks: int
    bytes_before: int
    """Of all chunks, without metadata."""
    bytes_after: int


@dataclass(frozen=True, eq=False)
class _Array:
    """An array whose chunks are copied."""

    path: str
    array: zarr.Array[Any]
    keys: tuple[str, ...]
    """Its chunks in the old store, relative to `path`."""
    document: dict[str, Any]
    """Its new `zarr.json`."""

    def new_key(self, key: str) -> str:
        """Return the key of a chunk in the new store, relative to `path`."""
        return key

    def moved(self, chunk: bytes) -> bytes:
        """Return the bytes of a chunk for the new store."""
        return chunk

    def is_good(self, old: bytes, new: bytes, *, deep: bool) -> bool:  # noqa: ARG002
        """Return whether the new chunk has the content of the old one."""
        return old == new


class _CAEArray(_Array):
    """An array of the codec `cae`."""

    @lazy_property
    def codec(self) -> ConvolutionalAutoencoder:
        return cast("Any", self.array.metadata).compressor  # type: ignore[no-any-return]

    @lazy_property
    def weights(self) -> Weights:
        return self.codec.loaded()

    @lazy_property
    def header(self) -> FrameHeader:
        height, width, _ = self.array.chunks
        return FrameHeader(1, height, width, grey=False, version=self._tables.frame_version)

    @property
    def _tables(self) -> Any:
        return self.weights.tables[self.weights.row(self.codec.quality)]

    def new_key(self, key: str) -> str:
        """Return the key of a chunk in the new store, relative to `path`."""
        return "c/" + key.replace(".", "/")

    def _symbols(self, chunk: bytes) -> Any:
        shape, symbols = self.codec.symbols(memoryview(chunk), self.weights)
        if shape != self.array.chunks[:2]:
            raise CAEDataError(
                f"cae: chunk of array {self.path!r} has {shape} pixels, expected {self.array.chunks[:2]}"
            )
        return symbols[None]

    def moved(self, chunk: bytes) -> bytes:
        """Return the symbols of a chunk in a frame."""
        return tiles.encode(self._symbols(chunk), self.header, self._tables)

    def is_good(self, old: bytes, new: bytes, *, deep: bool) -> bool:
        """Return whether the frame is complete; with `deep`, whether it holds the symbols of the old chunk."""
        try:
            if not deep:
                unpack(new, self.header)
                return True
            found = tiles.decode(new, self.header, self._tables)
        except CAEDataError:
            return False
        return bool((found == self._symbols(old)).all())


def migrate(
    old: StoreLike, new: StoreLike, *, verify: bool = False, start: Callable[[int], AdvanceChunks] | None = None
) -> Migrated:
    """Move an archive of zarr v2 to zarr v3.

    Parameters
    ----------
    old
        A path or a Store with the archive: an array or a group. It is not modified.
    new
        A path or a Store, empty or left by an interrupted migration of the same archive.
    verify
        Whether to read every symbol of both archives and every byte of other arrays again at the end. Without it,
        frames are checked by their checksums.
    start
        A function for progress bars. It is called once, with the number of steps, and returns a function that is
        called with the number of steps done since the last call.

    Returns
    -------
    Migrated
        Counts and sizes.

    Raises
    ------
    CAEConfigurationError
        If `old` is not an archive of zarr v2 or has arrays that zarr v3 can't hold, or if `new` holds something else;
        WeightsNotFoundError if weights are not on this machine. Nothing is written then.
    CAEDataError
        If a chunk of `old` is damaged, or one of `new` is wrong at the end. It names the key.
    """
    try:
        root = zarr.open(store=old, mode="r", zarr_format=2)
    except FileNotFoundError as error:
        raise CAEConfigurationError(f"cae: {old} holds no array or group of zarr v2") from error
    source, prefix = root.store_path.store, root.store_path.path
    nodes = [("", root)] if isinstance(root, zarr.Array) else [("", root), *root.members(max_depth=None)]
    listed = _chunk_keys(sync(_listed(source, prefix)))
    plans: list[_Array] = []
    groups: dict[str, dict[str, Any]] = {}
    for path, node in nodes:
        if isinstance(node, zarr.Array):
            plans.append(_planned(path, node, listed))
        else:
            groups[path] = {"zarr_format": 3, "node_type": "group", "attributes": node.attrs.asdict()}
    target_root = sync(_target(new))
    move = _Move(source, prefix, target_root.store, target_root.path, verify)
    steps = sum(len(plan.keys) for plan in plans)
    advance: AdvanceChunks = (lambda _: None) if start is None else start(2 * steps)
    documents = {**groups, **{plan.path: plan.document for plan in plans}}
    sync(move.write_metadata(documents))
    sync(move.each(plans, move.one, advance))
    bad = [key for key in sync(move.each(plans, move.check, advance)) if key is not None]
    if bad:
        some = ", ".join(bad[:4])
        raise CAEDataError(f"cae: {len(bad)} chunks of {new} are wrong after the migration: {some}; run it again")
    return Migrated(len(plans), steps, move.bytes_before, move.bytes_after)


async def _target(new: StoreLike) -> StorePath:
    from zarr.storage._common import make_store_path

    return await make_store_path(new, mode="a")


async def _listed(store: Store, prefix: str) -> list[str]:
    start = f"{prefix}/" if prefix else ""
    return [key.removeprefix(start) async for key in store.list_prefix(start)]


def _chunk_keys(keys: Iterable[str]) -> dict[str, list[str]]:
    """Group the keys that may be chunks by all the folders that may be their arrays."""
    found: dict[str, list[str]] = {}
    for key in keys:
        parts = key.split("/")
        last = len(parts) - 1
        if not re.fullmatch(r"\d+(\.\d+)*", parts[last]):
            continue
        while last >= 0 and re.fullmatch(r"\d+(\.\d+)*", parts[last]):
            found.setdefault("/".join(parts[:last]), []).append("/".join(parts[last:]))
            last -= 1
    return found


def _planned(path: str, array: zarr.Array[Any], listed: dict[str, list[str]]) -> _Array:
    metadata = cast("Any", array.metadata)
    separator = metadata.dimension_separator
    grid = array.cdata_shape or (1,)

    def is_chunk(key: str) -> bool:
        numbers = key.split(separator)
        fits = len(numbers) == len(grid) and all(number.isdecimal() for number in numbers)
        return fits and all(int(number) < length for number, length in zip(numbers, grid, strict=True))

    keys = tuple(sorted(filter(is_chunk, listed.get(path, ()))))
    name = path or str(array.store_path)
    if isinstance(metadata.compressor, ConvolutionalAutoencoder):
        return _planned_cae(path, name, array, keys)
    scratch = MemoryStore()
    try:
        migrate_to_v3(array, StorePath(scratch))
        stored = sync(scratch.get(_METADATA, default_buffer_prototype()))
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise CAEConfigurationError(
            f"cae: array {name!r} can't be moved to zarr v3, which lacks its codecs or dtype: {error}; move the other "
            "arrays by their paths, and copy this one by its values"
        ) from error
    assert stored is not None
    return _Array(path, array, keys, _named(json.loads(stored.to_bytes())))


def _planned_cae(path: str, name: str, array: zarr.Array[Any], keys: tuple[str, ...]) -> _Array:
    metadata = cast("Any", array.metadata)
    if array.ndim != 3 or array.shape[2] != RGB or array.chunks[2] != RGB or array.dtype != "uint8" or metadata.filters:
        raise CAEConfigurationError(
            f"cae: array {name!r} of the codec 'cae' must be uint8 of shape (rows, columns, 3), in chunks of all three "
            f"colours, without filters; got {array.dtype} {array.shape} in chunks {array.chunks}"
        )
    codec: ConvolutionalAutoencoder = metadata.compressor
    weights = with_margin(codec.loaded())
    scratch = MemoryStore()
    zarr.create_array(
        scratch, shape=array.shape, chunks=array.chunks, dtype=array.dtype, compressors=None, filters=None,
        fill_value=0 if array.fill_value is None else array.fill_value, attributes=array.attrs.asdict(),
        serializer=CAECodec(
            quality=codec.quality, metric=weights.info.metric, model=ZOO_MODEL, weights=weights.info.digest,
            channel_axis=-1,
        ),
    )  # fmt: skip
    stored = sync(scratch.get(_METADATA, default_buffer_prototype()))
    assert stored is not None
    return _CAEArray(path, array, keys, _named(json.loads(stored.to_bytes())))


def _named(document: dict[str, Any]) -> dict[str, Any]:
    """Turn xarray's attribute with the names of axes into those of zarr v3."""
    attributes = dict(document.get("attributes") or {})
    names = attributes.get(DIMENSIONS_ATTRIBUTE)
    if isinstance(names, list) and len(names) == len(document["shape"]):
        del attributes[DIMENSIONS_ATTRIBUTE]
        return {**document, "attributes": attributes, "dimension_names": names}
    return document


class _Move:
    """A migration: the two stores, and the work on each chunk."""

    def __init__(self, source: Store, source_prefix: str, target: Store, target_prefix: str, deep: bool) -> None:
        self._source, self._source_prefix = source, source_prefix
        self._target, self._target_prefix, self._deep = target, target_prefix, deep
        self.bytes_before = self.bytes_after = 0

    async def write_metadata(self, documents: dict[str, dict[str, Any]]) -> None:
        """Write each `zarr.json` that is missing. Refuse a target that holds something else."""
        prototype = default_buffer_prototype()
        missing = {}
        for path, document in documents.items():
            key = _joined(self._target_prefix, path, _METADATA)
            stored = await self._target.get(key, prototype)
            if stored is None:
                missing[key] = document
            elif _parsed(stored.to_bytes()) != document:
                raise CAEConfigurationError(
                    f"cae: {key} in {self._target} is not of an interrupted migration of this archive; give another "
                    "place, or remove what is there"
                )
        if len(missing) == len(documents) and not await self._target.is_empty(self._target_prefix):
            raise CAEConfigurationError(f"cae: {self._target} is not empty; give another place")
        for key, document in missing.items():
            await self._target.set(key, prototype.buffer.from_bytes(json.dumps(document, indent=2).encode()))

    async def each(self, plans: list[_Array], work: Callable[[_Array, str], Any], advance: AdvanceChunks) -> list[Any]:
        """Do `work` for all chunks of all arrays, some at a time, and return its results."""
        results: list[Any] = []

        async def work_one(chunk: tuple[_Array, str]) -> None:
            results.append(await work(*chunk))
            advance(1)

        await for_each([(plan, key) for plan in plans for key in plan.keys], work_one)
        return results

    async def one(self, plan: _Array, key: str) -> None:
        """Move a chunk, unless it is there already."""
        old = await self._read(self._source, _joined(self._source_prefix, plan.path, key))
        place = _joined(self._target_prefix, plan.path, plan.new_key(key))
        new = await self._read(self._target, place)
        if old is None or (new is not None and await asyncio.to_thread(plan.is_good, old, new, deep=False)):
            return
        try:
            made = await asyncio.to_thread(plan.moved, old)
        except CAEDataError as error:
            raise CAEDataError(f"cae: chunk {_joined(plan.path, key)}: {str(error).removeprefix('cae: ')}") from error
        await self._target.set(place, default_buffer_prototype().buffer.from_bytes(made))

    async def check(self, plan: _Array, key: str) -> str | None:
        """Return the key of a chunk that is wrong or missing, or None, and count the bytes."""
        old = await self._read(self._source, _joined(self._source_prefix, plan.path, key))
        place = _joined(self._target_prefix, plan.path, plan.new_key(key))
        new = await self._read(self._target, place)
        if old is None or new is None:
            return place if old is not None else None
        self.bytes_before += len(old)
        self.bytes_after += len(new)
        return None if await asyncio.to_thread(plan.is_good, old, new, deep=self._deep) else place

    @staticmethod
    async def _read(store: Store, key: str) -> bytes | None:
        value = await store.get(key, default_buffer_prototype())
        return None if value is None else value.to_bytes()


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
