"""`StoreView`, tested with `BottleneckStore`: methods that read are routed, methods that write are refused."""

import inspect
import json
import pickle

import pytest
import zarr
from archives import PROTOTYPE, M, contents, fill, ranges_of, read, run
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.storage import MemoryStore, StorePath, WrapperStore

from zarr_cae import BottleneckStore, CAEConfigurationError, DecodedStore, open_bottleneck
from zarr_cae.latents.view import StoreView


def test_every_way_to_read_is_rewritten(small):
    beneath = MemoryStore()
    fill(beneath, small)
    store = BottleneckStore(beneath)
    key, chunk = "photo/zarr.json", "photo/c/0/0/0"
    whole = run(store.get(key, PROTOTYPE)).to_bytes()
    assert json.loads(whole)["data_type"] == "float32"
    raw = read(beneath, chunk)
    ranges = ranges_of(whole)
    for request, expected in ranges.items():
        assert run(store.get(key, PROTOTYPE, request)).to_bytes() == expected
        assert store.get_sync(key, prototype=PROTOTYPE, byte_range=request).to_bytes() == expected
        found = run(store.get_partial_values(PROTOTYPE, [(key, request), (chunk, RangeByteRequest(1, 3))]))
        assert [value.to_bytes() for value in found] == [expected, raw[1:3]]
    assert run(store.get_partial_values(PROTOTYPE, [(chunk, None)]))[0].to_bytes() == raw
    assert store.get_sync(key).to_bytes() == whole
    assert store.get_sync(chunk).to_bytes() == raw
    assert store.get_sync("none/zarr.json") is None
    assert run(store.get("none/zarr.json", PROTOTYPE)) is None

    async def many():
        return {k: v async for k, v in store._get_many([(key, PROTOTYPE, None), (chunk, PROTOTYPE, None)])}

    assert {k: v.to_bytes() for k, v in run(many()).items()} == {key: whole, chunk: raw}
    assert run(store.getsize(key)) == len(whole)
    assert run(store.getsize(chunk)) == len(raw)
    with pytest.raises(FileNotFoundError):
        run(store.getsize("none/zarr.json"))
    difference = len(whole) - len(read(beneath, key))
    assert run(store.getsize_prefix("photo")) == run(beneath.getsize_prefix("photo")) + difference
    assert run(store.exists(key))
    assert not run(store.exists("photo/c/9"))
    assert not run(store.is_empty("photo"))

    async def listed(iterator):
        return sorted([name async for name in iterator])

    for name, arguments in (("list", ()), ("list_prefix", ("photo",)), ("list_dir", ("photo",))):
        assert run(listed(getattr(store, name)(*arguments))) == run(listed(getattr(beneath, name)(*arguments)))
    if hasattr(zarr.abc.store.Store, "_get_json"):
        assert run(store._get_json(key, prototype=PROTOTYPE))["data_type"] == "float32"
    if hasattr(zarr.abc.store.Store, "get_ranges"):
        requests = [None, RangeByteRequest(5, 20), SuffixByteRequest(9)]

        async def grouped(name):
            groups = store.get_ranges(name, requests, prototype=PROTOTYPE, max_gap_bytes=4)
            return {i: value.to_bytes() async for group in groups for i, value in group}

        for name, content in ((key, whole), (chunk, raw)):
            expected = {0: content, 1: content[5:20], 2: content[-9:]}
            assert run(grouped(name)) == expected
            found = store.get_ranges_sync(name, requests, prototype=PROTOTYPE)
            assert {i: value.to_bytes() for i, value in found} == expected
        with pytest.raises(ExceptionGroup):
            run(grouped("none/zarr.json"))


MADE = {"get", "get_partial_values", "get_ranges", "_get_many", "getsize", "getsize_prefix"}
"""Methods that return values, or depend on them: `StoreView` makes these itself."""
BUILT_ON_GET = {"_get_bytes", "_get_bytes_sync", "_get_json", "_get_json_sync", "get_ranges_sync"}
"""Methods that zarr's Store builds on `get`, `get_sync` and `get_ranges` of the view."""
REFUSED = {
    "_check_writable", "set", "set_if_not_exists", "_set_many", "set_sync", "delete", "delete_sync", "delete_dir",
    "clear", "with_read_only",
}  # fmt: skip
CONSTANT = {"read_only", "supports_writes", "supports_deletes", "supports_partial_writes"}
OF_EACH_VIEW = {
    "get_sync", "exists", "list", "list_prefix", "list_dir", "_supports_sync_io", "is_empty", "__str__",
}  # fmt: skip
"""Methods that depend on whether the keys of the view are those of the store beneath."""
HARMLESS = {
    "__init__", "_with_store", "open", "__enter__", "__exit__", "_open", "_ensure_open", "_is_open", "close", "__eq__",
    "__repr__", "supports_listing", "supports_consolidated_metadata",
}  # fmt: skip
"""Methods that neither read, nor write, nor list values."""


def methods(cls):
    """Return the names of the methods and properties that a class defines itself, without those from Python."""
    return {
        name for name, value in vars(cls).items()
        if (inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod))
        and name not in {"__hash__", "__class_getitem__", "__init_subclass__"}
    }  # fmt: skip


def test_every_method_of_the_installed_zarr_is_decided_on():
    """A new method of zarr's Store fails this test until the view routes or refuses it."""
    known = MADE | BUILT_ON_GET | REFUSED | CONSTANT | OF_EACH_VIEW | HARMLESS
    sync = {name for name in dir(MemoryStore) if name.endswith("_sync")}
    new = (methods(Store) | methods(WrapperStore) | sync) - known
    assert not new, f"zarr's stores have {new}; decide in StoreView how they are served"
    assert MADE | REFUSED - {"_check_writable"} <= methods(StoreView)
    assert methods(WrapperStore) & (MADE | REFUSED | CONSTANT) <= methods(StoreView)
    for view in (BottleneckStore, DecodedStore):
        assert not (MADE | REFUSED | CONSTANT | BUILT_ON_GET) & methods(view), f"{view} goes around StoreView"


def test_a_view_with_keys_of_its_own_lists_them_itself():
    own = {"get_sync", "exists", "list", "list_prefix", "list_dir", "_supports_sync_io", "is_empty"}
    assert own <= methods(DecodedStore)


def test_every_write_is_refused(small):
    beneath = MemoryStore()
    fill(beneath, small)
    before = contents(beneath)
    store = BottleneckStore(beneath)
    value = PROTOTYPE.buffer.from_bytes(b"x")
    for key in ("photo/zarr.json", "photo/c/0/0/0", "new"):
        for write in (
            lambda key=key: run(store.set(key, value)),
            lambda key=key: run(store.set_if_not_exists(key, value)),
            lambda key=key: run(store._set_many([(key, value)])),
            lambda key=key: run(store.delete(key)),
            lambda key=key: run(store.delete_dir(key)),
            lambda key=key: store.set_sync(key, value),
            lambda key=key: store.delete_sync(key),
            lambda: run(store.clear()),
            lambda: store.with_read_only(False),
            store._check_writable,
        ):
            with pytest.raises(CAEConfigurationError, match="read only"):
                write()
    assert store.read_only
    assert not store.supports_writes
    assert not store.supports_deletes
    group = open_bottleneck(store)
    for change in (
        lambda: group["photo"].__setitem__(0, 1),
        lambda: group["photo"].attrs.update(a=1),
        lambda: group["photo"].resize((1, 1, M)),
        lambda: group.create_array("new", shape=1, dtype="u1"),
        lambda: group.__delitem__("photo"),
        lambda: zarr.open(store=store, mode="r+"),
        lambda: zarr.open_group(store, mode="w"),
        lambda: open_bottleneck(store, mode="a"),
    ):
        with pytest.raises(ValueError, match=r"read|writ"):
            change()
    assert contents(beneath) == before


def test_store_is_a_value(small, tmp_path):
    fill(tmp_path / "g.zarr", small)
    store = BottleneckStore(tmp_path / "g.zarr")
    assert store == BottleneckStore(str(tmp_path / "g.zarr"))
    assert store != BottleneckStore(tmp_path)
    assert pickle.loads(pickle.dumps(store)) == store
    assert store.with_read_only(True) == store
    assert "BottleneckStore" in repr(store)
    array = zarr.open(store=store)["photo"]
    again = pickle.loads(pickle.dumps(array))
    assert again[...].tobytes() == array[...].tobytes()
    with store as entered:
        assert isinstance(entered, BottleneckStore)
    with pytest.raises(CAEConfigurationError, match="open_bottleneck"):
        BottleneckStore(StorePath(MemoryStore(), "a"))
    assert zarr.open(store=BottleneckStore(BottleneckStore(tmp_path / "g.zarr")))["photo"].shape == array.shape
