"""`DecodedStore`: the same pixels with standard codecs, by every way to read, under every layout."""

import asyncio
import json
import pickle

import numpy as np
import pytest
import torch
import zarr
from archives import (
    PROTOTYPE,
    chunks_of,
    contents,
    create,
    document,
    fill,
    latents_of,
    ranges_of,
    read,
    run,
    store_of,
    write,
)
from zarr.abc.store import RangeByteRequest
from zarr.codecs import Crc32cCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore, StorePath, WrapperStore

from zarr_cae import BottleneckStore, CAECodec, CAEConfigurationError, CAEDataError, DecodedStore, WeightsNotFoundError

STANDARD = {"bytes", "zstd", "blosc", "gzip"}


def names_of(node):
    return {codec["name"] for codec in node["codecs"]}


def assert_same(found, expected):
    """Check that pixels agree within one grey level: batches of other sizes may sum in another order."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert np.abs(found.astype(np.float64) - expected).max(initial=0) <= 1


def decoded(array, *arguments, **keywords):
    return zarr.open_array(DecodedStore(array.store, *arguments, **keywords), mode="r")


LAYOUTS = {
    "plain": {},
    "checksum after": {"compressors": [ZstdCodec(level=1), Crc32cCodec()]},
    "shards": {"shards": (64, 96, 3)},
    "shards with an index at the start": {
        "chunks": (64, 64, 3),
        "serializer": ShardingCodec(chunk_shape=(32, 32, 3), codecs=[CAECodec(quality=2)], index_location="start"),
    },
    "shards in shards": {
        "chunks": (64, 64, 3),
        "serializer": ShardingCodec(chunk_shape=(32, 64, 3), codecs=[
            ShardingCodec(chunk_shape=(32, 32, 3), codecs=[CAECodec(quality=2)])]),
    },
    "transpose": {"filters": [TransposeCodec(order=(1, 2, 0))], "serializer": CAECodec(quality=2, channel_axis=1)},
    "transpose in shards": {
        "chunks": (64, 64, 3),
        "serializer": ShardingCodec(chunk_shape=(32, 16, 3), codecs=[
            TransposeCodec(order=(2, 0, 1)), CAECodec(quality=2, channel_axis=0)]),
    },
    "keys of v2": {"chunk_key_encoding": {"name": "v2", "separator": "."}},
    "keys of v2 with slashes": {"chunk_key_encoding": {"name": "v2", "separator": "/"}, "shards": (64, 64, 3)},
    "keys with dots": {"chunk_key_encoding": {"name": "default", "separator": "."}, "shards": (64, 64, 3)},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(small, pipeline, layout):
    layout = dict(layout)
    array = create(small, layout.pop("chunks", (32, 32, 3)), **layout)
    view = decoded(array)
    assert names_of(document(view)) <= STANDARD
    assert (view.shape, view.dtype) == (array.shape, array.dtype)
    assert_same(view[...], array[...])
    assert_same(view[30:70, 31:33], array[30:70, 31:33])


@pytest.mark.parametrize("codecs", ["zstd", "blosc", "gzip"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_compressors_and_dtypes(small, pipeline, codecs, dtype):
    data = small[..., 0].astype(dtype)
    array = create(data, (32, 48), serializer=CAECodec(quality=2, value_range=(0, 255)))
    view = decoded(array, codecs)
    assert names_of(document(view)) == {"bytes", codecs}
    assert view.dtype == data.dtype
    assert_same(view[...], array[...])


@pytest.mark.parametrize("shards", [None, (64, 64, 3)])
def test_latents_with_standard_codecs(small, pipeline, shards):
    array = create(small, (32, 32, 3), shards=shards)
    view = zarr.open_array(DecodedStore(BottleneckStore(array.store)), mode="r")
    assert names_of(document(view)) <= STANDARD
    assert view[...].tobytes() == latents_of(small, (32, 32, 3)).tobytes()


@pytest.mark.parametrize("encoding", [{"name": "default", "separator": "/"}, {"name": "v2", "separator": "."}])
def test_latents_with_an_axis_of_their_own(small, pipeline, encoding):
    grey = small[..., 0]
    array = create(grey, (32, 32), chunk_key_encoding=encoding)
    view = zarr.open_array(DecodedStore(BottleneckStore(array.store)), mode="r")
    assert names_of(document(view)) <= STANDARD
    assert document(view)["chunk_key_encoding"]["name"] == encoding["name"]
    assert view[...].tobytes() == latents_of(grey, (32, 32)).tobytes()


@pytest.mark.parametrize("consolidated", [False, True])
def test_groups(small, pipeline, consolidated):
    store = MemoryStore()
    fill(store, small, consolidated=consolidated)
    stored, view = zarr.open_group(store, mode="r"), zarr.open_group(DecodedStore(store), mode="r")
    assert sorted(dict(view.members(max_depth=None))) == ["deep", "deep/photo", "mask", "photo"]
    for name in ("photo", "deep/photo", "mask"):
        assert names_of(document(view[name])) <= STANDARD
        assert_same(view[name][...], stored[name][...])
    root = json.loads(read(DecodedStore(store), "zarr.json"))
    assert ("cae" in json.dumps(root.get("consolidated_metadata"))) is False


def test_other_values_are_served_as_they_are_stored(small):
    store = MemoryStore()
    zarr.create_array(store, name="mask", data=small, attributes={"codec": "cae"})
    zarr.create_array(store, name="old", data=small, zarr_format=2)
    write(store, "notes/c/1.txt", b"text")
    assert contents(DecodedStore(store)) == contents(store)


@pytest.mark.parametrize("shards", [None, (64, 64, 3)])
def test_every_way_to_read(small, shards):
    array = create(small, (32, 32, 3), shards=shards)
    store = DecodedStore(array.store)
    for key in ("c/1/2/0", "zarr.json"):
        whole = read(store, key)
        size = len(whole)
        ranges = ranges_of(whole)
        for request, expected in ranges.items():
            assert run(store.get(key, PROTOTYPE, request)).to_bytes() == expected
        found = run(store.get_partial_values(PROTOTYPE, [(key, request) for request in ranges]))
        assert [value.to_bytes() for value in found] == list(ranges.values())
        assert run(store.getsize(key)) == size
        with pytest.raises(TypeError, match="synchronous"):
            store.get_sync(key)

        async def many(key=key):
            return [(k, v.to_bytes()) async for k, v in store._get_many([(key, PROTOTYPE, None)])]

        assert run(many()) == [(key, whole)]
        if hasattr(zarr.abc.store.Store, "get_ranges"):

            async def grouped(key=key, wanted=tuple(ranges)):
                groups = store.get_ranges(key, wanted, prototype=PROTOTYPE)
                return {i: value.to_bytes() async for group in groups for i, value in group}

            assert run(grouped()) == dict(enumerate(ranges.values()))
    stored = contents(store)
    assert run(store.getsize_prefix("")) == sum(map(len, stored.values()))
    with pytest.raises(FileNotFoundError):
        run(store.getsize("c/9/9/0"))


async def listed(iterator):
    return sorted([key async for key in iterator])


@pytest.mark.parametrize("layout", ["plain", "shards", "keys of v2", "keys of v2 with slashes", "keys with dots"])
def test_listing(small, layout):
    store = MemoryStore()
    zarr.create_group(store)
    for name in ("photo", "deep/0"):
        create(small, (32, 32, 3), StorePath(store, name), **LAYOUTS[layout])
    create(small[..., 0], (32, 32), StorePath(store, "grey"))
    for view in (DecodedStore(store), DecodedStore(BottleneckStore(store))):
        keys = run(listed(view.list()))
        for name in ("photo", "deep/0", "grey"):
            array = zarr.open_array(view, path=name, mode="r")
            chunks = np.ndindex(*(-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)))
            expected = [f"{name}/zarr.json", *(f"{name}/{array.metadata.encode_chunk_key(chunk)}" for chunk in chunks)]
            assert [key for key in keys if key.startswith(f"{name}/")] == sorted(expected)
        for key in keys:
            assert run(view.exists(key))
        for prefix in ("", "photo", "photo/", "photo/c/1", "deep/", "deep/0/c", "deep/0/c/", "grey/c/0/0/", "none/"):
            assert run(listed(view.list_prefix(prefix))) == [key for key in keys if key.startswith(prefix)]
            folder = prefix.rstrip("/")
            below = {key.removeprefix(folder + "/" if folder else "") for key in keys
                     if not folder or key.startswith(folder + "/")}  # fmt: skip
            assert run(listed(view.list_dir(folder))) == sorted({key.partition("/")[0] for key in below})
            assert run(view.is_empty(folder)) == (not below)


@pytest.mark.parametrize("shards", [None, (32, 64, 3)])
def test_chunks_that_were_never_written(small, shards):
    array = create(np.zeros_like(small), (32, 32, 3), shards=shards)
    array[:32, :32] = small[:32, :32]
    store = DecodedStore(array.store)
    for key in ("c/2/0/0", "c/0/3/0", "c/7/0/0", "c/0/0/1"):
        assert read(store, key) is None
        assert not run(store.exists(key))
    assert set(chunks_of(store)) == {"c/0/0/0"} | ({"c/0/1/0"} if shards else set())  # which the shard may hold
    assert_same(zarr.open_array(store, mode="r")[...], array[...])


def test_keys_that_are_no_chunks(small):
    array = create(small, (32, 32, 3))
    store = DecodedStore(array.store)
    for key in (
        "c/01/0/0",
        "c/-1/0/0",
        "c/0/0",
        "c/0/0/0/0",
        "c/٣/0/0",
        "0/0/0",
        "c.0.0.0",
        "c/" + "9" * 40 + "/0/0",
        "c",
    ):
        assert read(store, key) is None
        assert not run(store.exists(key))


def test_a_damaged_chunk_is_refused(small, pipeline):
    array = create(small, (32, 32, 3))
    content = bytearray(read(array.store, "c/1/0/0"))
    content[len(content) // 2] ^= 1
    write(array.store, "c/1/0/0", bytes(content))
    view = decoded(array)
    assert_same(view[:32], array[:32])
    for _ in range(2):
        with pytest.raises(CAEDataError, match="damaged"):
            view[32:64]


class Counting(WrapperStore):
    """A store that records the keys that were read."""

    def __init__(self, store):
        super().__init__(store)
        self.read = []

    async def get(self, key, prototype, byte_range=None):
        self.read.append(key)
        await asyncio.sleep(0)
        return await super().get(key, prototype, byte_range)


def test_requests_at_the_same_time_decode_a_chunk_once(small):
    store = Counting(create(small, (32, 32, 3)).store)
    view = DecodedStore(store, cache_bytes=0)

    async def together():
        ranges = [RangeByteRequest(i, i + 2) for i in range(20)]
        return [
            value.to_bytes() for value in await view.get_partial_values(PROTOTYPE, [("c/0/0/0", r) for r in ranges])
        ]

    found = run(together())
    assert store.read.count("c/0/0/0") == 1
    whole = read(view, "c/0/0/0")
    assert found == [whole[i : i + 2] for i in range(20)]
    assert store.read.count("c/0/0/0") == 2  # no value was cached


def test_chunks_are_kept_within_the_limit(small):
    store = Counting(create(small, (32, 32, 3)).store)
    size = len(read(DecodedStore(store), "c/0/0/0"))
    view = DecodedStore(store, cache_bytes=5 * size // 2)
    store.read.clear()
    for key in ("c/0/0/0", "c/0/0/0", "c/0/1/0", "c/0/0/0", "c/0/2/0", "c/1/0/0", "c/1/1/0", "c/0/0/0"):
        read(view, key)
    assert store.read.count("c/0/0/0") == 2


def test_requests_at_the_same_time_are_one_batch(photograph):
    array = create(photograph[:128, :256], (32, 32, 3))
    view = DecodedStore(array.store)
    expected = array[...]
    sizes = []

    def count(_, arguments):
        sizes.extend(len(value) for value in arguments if isinstance(value, torch.Tensor) and value.ndim == 4)

    async def together():
        keys = [f"c/{row}/{column}/0" for row in range(4) for column in range(8)]
        return await view.get_partial_values(PROTOTYPE, [(key, None) for key in keys])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        run(together())
    finally:
        hook.remove()
    assert max(sizes) > 1
    assert_same(zarr.open_array(view, mode="r")[...], expected)


def test_cancelled_requests_leave_the_others(small):
    view = DecodedStore(create(small, (32, 32, 3)).store, cache_bytes=0)

    async def together():
        requests = [asyncio.ensure_future(view.get("c/0/0/0", PROTOTYPE)) for _ in range(3)]
        await asyncio.sleep(0)
        requests[0].cancel()
        found = await asyncio.gather(*requests, return_exceptions=True)
        alone = asyncio.ensure_future(view.get("c/0/1/0", PROTOTYPE))
        await asyncio.sleep(0)
        alone.cancel()
        await asyncio.gather(alone, return_exceptions=True)
        return found, await view.get("c/0/1/0", PROTOTYPE)

    (first, *others), again = run(together())
    assert isinstance(first, asyncio.CancelledError)
    assert {other.to_bytes() for other in others} == {read(view, "c/0/0/0")}
    assert again.to_bytes() == read(view, "c/0/1/0")


def test_an_array_that_is_replaced_is_read_anew_when_it_is_opened(small):
    store = MemoryStore()
    create(small, (32, 32, 3), StorePath(store, "a"))
    view = DecodedStore(store)
    zarr.open_array(view, path="a", mode="r")[...]
    other = create(255 - small[..., 0], (32, 48), StorePath(store, "a"), overwrite=True)
    assert_same(zarr.open_array(view, path="a", mode="r")[...], other[...])


def test_store_is_a_value(small, tmp_path):
    fill(tmp_path / "g.zarr", small)
    store = DecodedStore(tmp_path / "g.zarr", "gzip", cache_bytes=7)
    again = pickle.loads(pickle.dumps(store))
    assert again == store
    assert (again.codecs, again.cache_bytes) == ("gzip", 7)
    assert store == DecodedStore(str(tmp_path / "g.zarr"), "gzip")
    assert store != DecodedStore(tmp_path / "g.zarr")
    assert store.with_read_only(True) == store
    assert "DecodedStore" in repr(store)
    assert str(store).startswith("decoded-")
    with store as entered:
        assert isinstance(entered, DecodedStore)
        assert entered.codecs == "gzip"
    array = zarr.open(store=store, mode="r")["photo"]
    assert_same(pickle.loads(pickle.dumps(array))[...], array[...])


def test_writing_is_refused(small):
    array = create(small, (32, 32, 3))
    before = contents(array.store)
    store = DecodedStore(array.store)
    value = PROTOTYPE.buffer.from_bytes(b"x")
    for write_something in (
        lambda: run(store.set("c/0/0/0", value)),
        lambda: run(store.delete("c/0/0/0")),
        lambda: run(store.delete_dir("c")),
        lambda: run(store.clear()),
        lambda: store.set_sync("zarr.json", value),
        lambda: store.with_read_only(False),
    ):
        with pytest.raises(CAEConfigurationError, match="read only"):
            write_something()
    assert store.read_only
    with pytest.raises(ValueError, match="read"):
        zarr.open_array(store, mode="r+")
    assert contents(array.store) == before


def test_arguments_that_do_not_fit(small):
    array = create(small, (32, 32, 3))
    for keywords in ({"codecs": "cae"}, {"codecs": None}, {"cache_bytes": -1}, {"cache_bytes": 1.5}):
        with pytest.raises(CAEConfigurationError):
            DecodedStore(array.store, **keywords)
    with pytest.raises(CAEConfigurationError, match="whole store"):
        DecodedStore(StorePath(array.store, "a"))


@pytest.mark.parametrize(("changes", "reason"), [
    ({"chunk_grid": {"name": "rectilinear", "configuration": {"kind": "inline"}}}, "rectilinear"),
    ({"chunk_grid": {"name": "regular"}}, "malformed"),
    ({"shape": None}, "malformed"),
    ({"shape": [64]}, "malformed"),
    ({"data_type": "r24"}, "data_type"),
    ({"chunk_key_encoding": {"name": "own"}}, "chunk key encoding"),
    ({"codecs": [{"name": "transpose", "configuration": 1}, "cae"]}, "malformed"),
    ({"codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [5, 5, 3], "codecs": ["cae"]}}]},
     "fill"),
])  # fmt: skip
def test_arrays_that_cannot_be_shown_are_refused_when_opened(small, changes, reason):
    with pytest.raises(CAEConfigurationError, match=reason):
        zarr.open_array(DecodedStore(store_of({**document(create(small, (32, 32, 3))), **changes})), mode="r")


def test_weights_that_are_elsewhere_are_missed_when_chunks_are_read(small):
    array = create(small, (32, 32, 3))
    node = document(array)
    node["codecs"][0]["configuration"]["weights"] = "sha256:" + "0" * 64
    write(array.store, "zarr.json", json.dumps(node).encode())
    view = zarr.open_array(DecodedStore(array.store), mode="r")
    with pytest.raises(WeightsNotFoundError, match="weights import"):
        view[...]
