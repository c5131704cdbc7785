"""`BottleneckStore` and `open_bottleneck`: every way to read, every layout, nothing served wrong."""

import argparse
import asyncio
import copy
import inspect
import json
import pickle
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.codecs import Crc32cCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import FsspecStore, LocalStore, MemoryStore, StorePath, WrapperStore, ZipStore

from zarr_cae import (
    BottleneckStore,
    CAEBottleneckCodec,
    CAECodec,
    CAEConfigurationError,
    CAEDataError,
    WeightsNotFoundError,
    as_torch_dataset,
    open_bottleneck,
)
from zarr_cae.codec.cae import loaded
from zarr_cae.latents.metadata import rewrite

PROTOTYPE = default_buffer_prototype()
M = loaded(CAECodec(quality=2)).latent_channels


def create(data, chunks, store=None, **keywords):
    options = {"compressors": None, "serializer": CAECodec(quality=2), **keywords}
    store = MemoryStore() if store is None else store
    array = zarr.create_array(store, shape=data.shape, chunks=chunks, dtype=data.dtype, **options)
    array[...] = data
    return array


def latents_of(data, chunks, **keywords):
    return open_bottleneck(create(data, chunks, **keywords).store)[...]


def document(array):
    return json.loads(json.dumps(array.metadata.to_dict(), default=str))


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    """Where the same pixels are written as the same bytes in any batch; latents are read without a network."""
    with zarr.config.set({"cae.device": "cpu"}):
        yield


@pytest.fixture(scope="module")
def small(photograph):
    return photograph[150:214, 200:296]  # 64 x 96


# Layouts.


@pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed` codec")
@pytest.mark.parametrize("around", [
    {"compressors": [Crc32cCodec()]},
    {"compressors": [ZstdCodec(level=1), Crc32cCodec()]},
    {"shards": (64, 64, 3)},
    {"shards": (64, 64, 3), "compressors": [ZstdCodec()]},
    {"serializer": ShardingCodec(chunk_shape=(32, 32, 3), codecs=[CAECodec(quality=2)], index_location="start"),
     "chunks": (64, 64, 3), "compressors": [Crc32cCodec()]},
    {"serializer": ShardingCodec(chunk_shape=(32, 64, 3), codecs=[
        ShardingCodec(chunk_shape=(32, 32, 3), codecs=[CAECodec(quality=2)])]), "chunks": (64, 64, 3)},
])  # fmt: skip
def test_codecs_around_change_nothing(small, pipeline, around):
    expected = latents_of(small, (32, 32, 3))
    assert expected.shape == (4, 6, M)
    around = dict(around)
    view = open_bottleneck(create(small, around.pop("chunks", (32, 32, 3)), **around).store)
    assert view[...].tobytes() == expected.tobytes()
    assert view[1:3, 1:5, 2:7].tobytes() == expected[1:3, 1:5, 2:7].tobytes()
    assert view[3, 5].tobytes() == expected[3, 5].tobytes()


@pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed` codec")
@pytest.mark.parametrize("around", [
    lambda cae, order: {"serializer": cae, "filters": [TransposeCodec(order=order)]},
    lambda cae, order: {"serializer": cae, "filters": [TransposeCodec(order=order[::-1]),
                                                       TransposeCodec(order=range(len(order))[::-1])]},
    lambda cae, order: {"serializer": ShardingCodec(chunk_shape=[(32, 16, 3)[i] for i in order], codecs=[cae]),
                        "filters": [TransposeCodec(order=order)], "shards": True},
    lambda cae, order: {"serializer": ShardingCodec(chunk_shape=(32, 16, 3)[: len(order)],
                                                    codecs=[TransposeCodec(order=order), cae]), "shards": True},
], ids=["plain", "two", "outside shards", "inside shards"])  # fmt: skip
@pytest.mark.parametrize(("colour", "order"), [(True, (2, 1, 0)), (True, (1, 0, 2)), (False, (1, 0))])
def test_transposes_before_are_undone(small, pipeline, around, colour, order):
    data = small if colour else small[..., 0]
    chunk = (32, 16, 3)[: data.ndim]
    keywords = around(CAECodec(quality=2, channel_axis=order.index(2) if colour else None), order)
    chunks = (96, 96, 3)[: data.ndim] if keywords.pop("shards", False) else chunk
    if chunks != chunk and order == (2, 1, 0) and "filters" in keywords:
        pytest.skip("zarr holds the inner chunks against the axes before the transpose")
    found = open_bottleneck(create(data, chunks, **keywords).store)
    transposed = latents_of(data.transpose(order), tuple(chunk[i] for i in order))
    back = np.argsort(order) if colour else (*np.argsort(order), 2)
    assert found.shape == (4, 6, M)
    assert found[...].tobytes() == np.ascontiguousarray(transposed.transpose(back)).tobytes()
    assert found.attrs["cae_bottleneck"]["axes"] == ["rows", "columns", "latents"]


@pytest.mark.parametrize(("chunks", "shards"), [((50, 33, 3), None), ((25, 11, 3), (50, 33, 3)), ((100, 100, 3), None)])
def test_chunks_that_16_does_not_divide(photograph, pipeline, chunks, shards):
    data = photograph[:64, :96]
    view = open_bottleneck(create(data, chunks, shards=shards).store)
    p = [-(-c // 16) for c in chunks[:2]]
    assert view.chunks == (*p, M)
    assert view.shape == (
        *(n // c * size + -(-(n % c) // 16) for n, c, size in zip(data.shape, chunks[:2], p, strict=False)), M,
    )  # fmt: skip
    for i in range(-(-64 // chunks[0])):
        for j in range(-(-96 // chunks[1])):
            pixels = data[i * chunks[0] : (i + 1) * chunks[0], j * chunks[1] : (j + 1) * chunks[1]]
            padded = np.zeros(chunks, np.uint8)
            padded[: pixels.shape[0], : pixels.shape[1]] = pixels
            alone = latents_of(padded, chunks)
            found = view[i * p[0] : (i + 1) * p[0], j * p[1] : (j + 1) * p[1]]
            assert found.tobytes() == np.ascontiguousarray(alone[: found.shape[0], : found.shape[1]]).tobytes()


@pytest.mark.parametrize("last", [True, False])
def test_grey_planes_are_plane_major(small, pipeline, last):
    data = np.concatenate([small, 255 - small[..., :2]], 2)  # five channels in chunks of two
    planes = np.stack([latents_of(data[..., c], (32, 32)) for c in range(5)])
    assert planes.shape == (5, 4, 6, M)
    if last:
        found = latents_of(data, (32, 32, 2), serializer=CAECodec(quality=2, channel_axis=2))
        assert np.array_equal(found, planes.transpose(1, 2, 0, 3).reshape(4, 6, 5 * M))
    else:
        data = np.ascontiguousarray(data.transpose(2, 0, 1))
        found = latents_of(data, (2, 32, 32), serializer=CAECodec(quality=2, channel_axis=0))
        assert np.array_equal(found, planes.transpose(0, 3, 1, 2).reshape(5 * M, 4, 6))


def test_rgb_axis_in_chunks_of_one_is_grey(small, pipeline):
    found = latents_of(small, (32, 32, 1))
    assert np.array_equal(found[..., M : 2 * M], latents_of(small[..., 1], (32, 32)))


@pytest.mark.parametrize("shards", [None, (2, 64, 64)])
def test_added_axis_reads_the_same_keys(small, pipeline, shards):
    data = np.stack([small[..., 0], small[..., 1], small[..., 2], small[..., 0], small[..., 1]])
    for encoding in ({"name": "default", "separator": "/"}, {"name": "v2", "separator": "."}):
        codec = CAECodec(quality=2, channel_axis=None)
        array = create(
            data, (1, 32, 32), serializer=codec, shards=shards, chunk_key_encoding=encoding,
            dimension_names=["t", "latent", None],
        )  # fmt: skip
        view = open_bottleneck(array.store)
        assert view.shape == (5, 4, 6, M)
        assert np.array_equal(view[3], latents_of(data[3], (32, 32)))
        assert view.metadata.dimension_names == ("t", "latent", None, "latent_")
        assert pickle.loads(pickle.dumps(view.metadata)).to_dict() == view.metadata.to_dict()


def test_float_data(small, pipeline):
    data = (small / np.float32(255)).astype(np.float32)
    view = open_bottleneck(create(data, (32, 32, 3), serializer=CAECodec(quality=2, value_range=(0, 1))).store)
    assert view.attrs["cae_bottleneck"]["pixel_data_type"] == "float32"
    assert np.abs(view[...] - latents_of(small, (32, 32, 3))).max() < 3  # a symbol may round the other way


def test_latents_that_were_never_written_are_nan(small, pipeline):
    for shards in (None, (32, 64, 3)):
        array = create(small, (32, 32, 3), shards=shards)
        array[32:, 32:64] = 0
        found = open_bottleneck(array.store)[...]
        assert np.isnan(found[2:, 2:4]).all()
        found[2:, 2:4] = 0
        assert np.isfinite(found).all()


# Metadata.


def test_attributes_and_names_come_along(small):
    array = create(small, (32, 40, 3), dimension_names=["y", "x", "c"], attributes={"scanner": "A", "n": [1, 2]})
    view = open_bottleneck(array.store)
    assert view.metadata.dimension_names == ("y", "x", "c")
    assert view.attrs["scanner"] == "A"
    assert view.attrs["n"] == [1, 2]
    described = dict(view.attrs["cae_bottleneck"])
    assert described.pop("weights") == array.metadata.codecs[0].weights
    assert "stride pixels" in described.pop("position")
    assert described == {
        "stride": 16, "axes": ["rows", "columns", "latents"], "latent_channels": M, "planes": "rgb",
        "pixel_shape": [64, 96, 3], "pixel_chunk_shape": [32, 40, 3], "pixel_data_type": "uint8",
        "model": "cae-v1", "quality": 2, "metric": "mse",
    }  # fmt: skip


def test_an_attribute_of_the_same_name_stays_in_the_archive(small):
    array = create(small, (32, 32, 3), attributes={"cae_bottleneck": "mine"})
    assert open_bottleneck(array.store).attrs["cae_bottleneck"]["stride"] == 16
    assert zarr.open_array(array.store).attrs["cae_bottleneck"] == "mine"


@pytest.mark.parametrize("mode", ["r", None])
def test_modes_that_read(small, mode):
    array = create(small, (32, 32, 3))
    assert open_bottleneck(array.store, mode=mode).shape == (4, 6, M)


def test_rewriting_changes_nothing_in_place(small):
    for array in (create(small, (32, 32, 3), shards=(64, 64, 3)), create(small[..., 0], (32, 32))):
        before = document(array)
        kept = copy.deepcopy(before)
        after = rewrite(before)
        assert before == kept
        assert after != before
        assert rewrite(after) == after
        group = {"zarr_format": 3, "node_type": "group", "consolidated_metadata": {"metadata": {"a": before}}}
        assert rewrite(group)["consolidated_metadata"]["metadata"]["a"] == after
        assert before == kept


def test_bare_codec_names_and_auto_axis(small):
    array = document(create(small, (32, 32, 3), compressors=[Crc32cCodec()]))
    del array["codecs"][0]["configuration"]["channel_axis"]
    array["codecs"][1] = "crc32c"
    assert rewrite(array)["shape"] == [4, 6, M]
    other = {"zarr_format": 3, "node_type": "array", "codecs": ["bytes"], "shape": [3]}
    assert rewrite(other) == other


def refused(small, **changes):
    array = document(create(small, (32, 32, 3)))
    array["codecs"] = changes.pop("filters", []) + array["codecs"]
    return {**array, **changes}


REFUSED = {
    "rectilinear": ({"chunk_grid": {"name": "rectilinear", "configuration": {"kind": "inline"}}}, "rectilinear"),
    "filter": ({"filters": [{"name": "numcodecs.delta", "configuration": {"dtype": "u1"}}]}, "numcodecs.delta"),
    "order": ({"filters": [{"name": "transpose", "configuration": {"order": "F"}}]}, "'F'"),
    "malformed": ({"chunk_grid": {"name": "regular"}}, "malformed"),
    "dimensions": ({"shape": [64]}, "shape"),
    "shape": ({"shape": None}, "malformed"),
    "attributes": ({"attributes": [1]}, "malformed"),
    "configuration": ({"codecs": [{"name": "cae", "configuration": [1]}]}, "malformed"),
    "no configuration": ({"codecs": [{"name": "cae", "configuration": None}]}, "malformed"),
    "transpose": ({"codecs": [{"name": "transpose", "configuration": 1}, "cae"]}, "malformed"),
    "axis": ({"codecs": [{"name": "cae", "configuration": {"channel_axis": 7}}]}, "channel_axis 7"),
    "chunk": ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 32, 3]}}}, ">= 1"),
    "shards": ({"codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [8, 8, 3], "codecs": []}},
                           "cae"]}, "malformed"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_served_is_refused_when_opened(small, changes, reason):
    content = json.dumps(refused(small, **changes)).encode()
    store = MemoryStore({"zarr.json": PROTOTYPE.buffer.from_bytes(content)})
    with pytest.raises(CAEConfigurationError, match=reason):
        open_bottleneck(store)
    with pytest.raises(CAEConfigurationError, match=reason):
        zarr.open_array(BottleneckStore(store), mode="r")


def test_what_is_no_cae_array_is_left_to_zarr(small):
    array = document(create(small, (32, 32, 3)))
    assert rewrite({**array, "attributes": None})["shape"] == [4, 6, M]
    shard = {**array, "codecs": [{"name": "sharding_indexed", "configuration": ["cae"]}]}
    group = {"consolidated_metadata": {"metadata": {"a": [1], "b": None, "c": shard}}}
    for other in (shard, group, {**array, "codecs": None}, {**array, "codecs": {"cae": 1}}):
        assert rewrite(other) == other


@pytest.mark.skipif("array.rectilinear_chunks" not in zarr.config, reason="this zarr has no rectilinear grids")
def test_a_rectilinear_array_is_coded_but_its_latents_are_refused(small, pipeline):
    with zarr.config.set({"array.rectilinear_chunks": True}):
        array = create(small, [[40, 24], [96], [3]])
        alone = create(small[:40], (40, 96, 3))
        assert np.abs(array[:40].astype(int) - alone[...]).max() <= 1
        with pytest.raises(CAEConfigurationError, match="rectilinear"):
            open_bottleneck(array.store)


def test_every_selection_of_zarr(small, pipeline):
    view = open_bottleneck(create(small, (32, 32, 3)).store)
    whole = view[...]
    assert np.array_equal(view.oindex[[1, 3], :, [5, 9]], whole[np.ix_([1, 3], range(6), [5, 9])])
    assert np.array_equal(view.vindex[[1, 2], [3, 4], [5, 6]], whole[[1, 2], [3, 4], [5, 6]])
    assert np.array_equal(view.blocks[1, 2], whole[2:4, 4:6])
    assert np.array_equal(view[::3, -1], whole[::3, -1])


def test_weights_that_are_elsewhere_are_refused_when_opened(small):
    array = document(create(small, (32, 32, 3)))
    array["codecs"][0]["configuration"]["weights"] = "sha256:" + "0" * 64
    store = MemoryStore({"zarr.json": PROTOTYPE.buffer.from_bytes(json.dumps(array).encode())})
    with pytest.raises(WeightsNotFoundError, match="weights import"):
        open_bottleneck(store)


def test_an_array_of_another_codec(small, tmp_path):
    zarr.create_array(tmp_path / "a.zarr", data=small)
    with pytest.raises(CAEConfigurationError, match=r"array 'file://.*a\.zarr' is not stored with the codec 'cae'"):
        open_bottleneck(tmp_path / "a.zarr")
    zarr.create_array(tmp_path / "b.zarr", data=small, zarr_format=2)
    with pytest.raises(CAEConfigurationError, match="not stored with the codec 'cae'"):
        open_bottleneck(tmp_path / "b.zarr")
    with pytest.raises(FileNotFoundError):
        open_bottleneck(tmp_path / "c.zarr")


def fill(store, small, *, consolidate=False):
    """A group with a CAE array, a nested one, a plain one and a v2 group; returns the latents of the first."""
    root = zarr.create_group(store, attributes={"site": "x"})
    for path in ("photo", "deep/photo"):
        array = root.create_array(
            path, shape=small.shape, chunks=(32, 32, 3), dtype="uint8", serializer=CAECodec(quality=2), compressors=None
        )
        array[...] = small
    root.create_array("mask", data=small[..., 0])
    if consolidate:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(store)
    return latents_of(small, (32, 32, 3))


@pytest.mark.parametrize("consolidate", [False, True])
def test_groups(small, pipeline, consolidate):
    store = MemoryStore()
    expected = fill(store, small, consolidate=consolidate)
    group = open_bottleneck(store)
    assert (group.metadata.consolidated_metadata is not None) == consolidate
    assert sorted(name for name, _ in group.members(max_depth=None)) == ["deep", "deep/photo", "mask", "photo"]
    assert group.attrs["site"] == "x"
    assert group["photo"][...].tobytes() == expected.tobytes()
    assert group["deep/photo"].shape == expected.shape
    assert np.array_equal(group["mask"][...], small[..., 0])
    assert open_bottleneck(store, path="deep")["photo"].shape == expected.shape
    assert open_bottleneck(store, path="deep/photo").shape == expected.shape
    assert open_bottleneck(StorePath(store, "deep"), path="photo").shape == expected.shape


def test_a_refused_member_leaves_the_others(small):
    store = MemoryStore()
    fill(store, small)
    node = json.loads(store._store_dict["deep/photo/zarr.json"].to_bytes())
    node["codecs"][0]["configuration"]["weights"] = "sha256:" + "0" * 64
    store._store_dict["deep/photo/zarr.json"] = PROTOTYPE.buffer.from_bytes(json.dumps(node).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store)
    group = open_bottleneck(store)
    assert group["photo"].shape == (4, 6, M)
    with pytest.raises(WeightsNotFoundError):
        group["deep/photo"]


def test_zarr_format_2_passes_unchanged(small):
    store = MemoryStore()
    group = zarr.create_group(store, zarr_format=2, attributes={"a": 1})
    group.create_array("old", data=small)
    view = open_bottleneck(store)
    assert view.attrs["a"] == 1
    assert np.array_equal(view["old"][...], small)


# The store.


def run(coroutine):
    return asyncio.run(coroutine)


def test_every_way_to_read_is_rewritten(small):
    beneath = MemoryStore()
    fill(beneath, small)
    store = BottleneckStore(beneath)
    key, chunk = "photo/zarr.json", "photo/c/0/0/0"
    whole = run(store.get(key, PROTOTYPE)).to_bytes()
    assert json.loads(whole)["data_type"] == "float32"
    raw = beneath._store_dict[chunk].to_bytes()
    size = len(whole)
    ranges = {
        None: whole, RangeByteRequest(5, 20): whole[5:20], RangeByteRequest(size - 3, size + 9): whole[-3:],
        OffsetByteRequest(7): whole[7:], SuffixByteRequest(9): whole[-9:], SuffixByteRequest(size + 9): whole,
    }  # fmt: skip
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
    assert run(store.getsize(key)) == size
    assert run(store.getsize(chunk)) == len(raw)
    with pytest.raises(FileNotFoundError):
        run(store.getsize("none/zarr.json"))
    difference = size - len(beneath._store_dict[key].to_bytes())
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


HARMLESS = {  # what a wrapper may hand on: it neither reads values nor writes
    "_with_store", "open", "__enter__", "__exit__", "_open", "_ensure_open", "is_empty", "_is_open", "__eq__", "exists",
    "supports_listing", "_supports_sync_io", "list", "list_prefix", "list_dir", "close", "__init__",
}  # fmt: skip


def test_no_method_of_this_zarr_slips_past():
    delegated = {name for name, value in vars(WrapperStore).items() if callable(value) or isinstance(value, property)}
    delegated |= {name for name in ("open",) if name in vars(WrapperStore)}
    named = {name for name in delegated if inspect.isroutine(getattr(WrapperStore, name)) or not name.startswith("__")}
    missed = named - set(vars(BottleneckStore)) - HARMLESS
    assert not missed, f"WrapperStore delegates {missed}; decide in BottleneckStore what they do"


def test_every_write_is_refused(small):
    beneath = MemoryStore()
    fill(beneath, small)
    before = {key: value.to_bytes() for key, value in beneath._store_dict.items()}
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
    assert {key: value.to_bytes() for key, value in beneath._store_dict.items()} == before


def test_store_is_a_value(small, tmp_path):
    fill(tmp_path / "g.zarr", small)
    store = BottleneckStore(tmp_path / "g.zarr")
    assert store == BottleneckStore(str(tmp_path / "g.zarr"))
    assert store != BottleneckStore(tmp_path)
    assert store != store._store
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


# Kinds of stores.


@pytest.fixture(scope="module")
def archive(tmp_path_factory, small):
    """(folder of a group of CAE arrays, the latents of its arrays)."""
    folder = tmp_path_factory.mktemp("archive") / "g.zarr"
    expected = fill(folder, small, consolidate=True)
    root = zarr.open_group(folder, mode="r+", use_consolidated=False)
    sharded = root.create_array(
        "sharded", shape=small.shape, chunks=(32, 32, 3), shards=(64, 96, 3), dtype="uint8",
        serializer=CAECodec(quality=2), compressors=None,
    )  # fmt: skip
    sharded[...] = small
    return folder, expected


def local(folder, _):
    return LocalStore(folder)


def path(folder, _):
    return str(folder)


def file_url(folder, _):
    return folder.as_uri()


def memory(folder, _):
    buffers = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    return MemoryStore({key: PROTOTYPE.buffer.from_bytes(value) for key, value in buffers.items()})


def zipped(folder, tmp_path):
    with ZipStore(tmp_path / "g.zip", mode="w") as store:
        for key, value in memory(folder, None)._store_dict.items():
            store._set(key, value)
    return ZipStore(tmp_path / "g.zip", mode="r")


def fsspec_local(folder, _):
    pytest.importorskip("fsspec")
    return FsspecStore.from_url(folder.as_uri(), storage_options={"auto_mkdir": False})


def fsspec_memory(folder, _):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").put(str(folder), "/g.zarr", recursive=True)
    return "memory://g.zarr"


def obstore(folder, _):
    pytest.importorskip("obstore")
    from obstore.store import LocalStore as Local
    from zarr.storage import ObjectStore

    return ObjectStore(Local(str(folder)), read_only=True)


@pytest.mark.parametrize("kind", [local, path, file_url, memory, zipped, fsspec_local, fsspec_memory, obstore])
def test_kinds_of_stores(archive, tmp_path, pipeline, kind):
    folder, expected = archive
    store = kind(folder, tmp_path)
    group = open_bottleneck(store)
    assert group["photo"][...].tobytes() == expected.tobytes()
    assert open_bottleneck(store, path="sharded")[1:3].tobytes() == expected[1:3].tobytes()
    assert group["mask"].dtype == np.uint8


class Handler(BaseHTTPRequestHandler):
    """Files of a folder, with byte ranges; every GET is remembered."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        self.answer()

    def do_HEAD(self):
        self.server.requests.append((self.path, "HEAD"))
        self.answer(body=False)

    def answer(self, body=True):
        file = self.server.folder / self.path.strip("/")
        content, status = (file.read_bytes(), 200) if file.is_file() else (b"", 404)
        total, headers = len(content), {"Accept-Ranges": "bytes"}
        if status == 200 and (wanted := self.headers.get("Range")):
            first, last = wanted.removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, total - int(last))
            end = min(total, int(last) + 1) if first and last else total
            content, status = content[start:end], 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(archive):
    pytest.importorskip("aiohttp")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.folder, web.requests = archive[0].parent, []
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield web
        web.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["photo", "sharded"])
def test_a_latent_chunk_costs_no_more_requests_than_a_pixel_chunk(archive, server, pipeline, name):
    url = f"http://127.0.0.1:{server.server_port}/g.zarr"
    # An archive on the web lists no folders, so a group without consolidated metadata is opened by path.
    pixels = zarr.open_array(f"{url}/{name}", mode="r")
    to_open_pixels = len(server.requests)
    server.requests.clear()
    view = open_bottleneck(url, path=name)
    assert len(server.requests) <= to_open_pixels
    counts = {}
    for array, window in ((pixels, np.s_[32:64, 64:96]), (view, np.s_[2:4, 4:6])):
        server.requests.clear()
        found = array[window]
        counts[array.dtype.name] = len(server.requests)
    assert found.tobytes() == np.ascontiguousarray(archive[1][2:4, 4:6]).tobytes()
    assert 1 <= counts["float32"] <= counts["uint8"] <= 3


def test_consolidated_group_on_the_web(archive, server):
    group = open_bottleneck(f"http://127.0.0.1:{server.server_port}/g.zarr", storage_options={"block_size": 1 << 20})
    before = len(server.requests)
    assert group["photo"].shape == archive[1].shape
    assert group["deep/photo"].dtype == np.float32
    assert len(server.requests) == before
    assert group["photo"][...].tobytes() == archive[1].tobytes()


# What reads through it.


def test_xarray(archive, tmp_path, small):
    xarray = pytest.importorskip("xarray")
    root = zarr.create_group(tmp_path / "x.zarr")
    array = root.create_array(
        "photo", shape=small.shape, chunks=(32, 32, 3), dtype="uint8", serializer=CAECodec(quality=2),
        compressors=None, dimension_names=["y", "x", "c"], attributes={"units": "1"},
    )  # fmt: skip
    array[...] = small
    for consolidated in (False, True):
        if consolidated:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                zarr.consolidate_metadata(tmp_path / "x.zarr")
        with xarray.open_zarr(BottleneckStore(tmp_path / "x.zarr"), consolidated=consolidated, chunks=None) as data:
            assert dict(data.sizes) == {"y": 4, "x": 6, "c": M}
            assert data.photo.attrs["units"] == "1"
            assert data.photo.values.tobytes() == archive[1].tobytes()


def test_xarray_and_dask_with_grey_arrays(archive, tmp_path, small):
    """Lazily, chunk by chunk; the latents of an array without channels have an axis more."""
    xarray, dask = pytest.importorskip("xarray"), pytest.importorskip("dask.array")
    colour, grey = archive[1], latents_of(small[..., 0], (32, 32))
    root = zarr.create_group(tmp_path / "x.zarr")
    for name, data, names in (("photo", small, ["y", "x", "c"]), ("grey", small[..., 0], ["y", "x"])):
        array = root.create_array(
            name, shape=data.shape, chunks=(32, 32, 3)[: data.ndim], dtype="uint8", serializer=CAECodec(quality=2),
            compressors=None, dimension_names=names,
        )  # fmt: skip
        array[...] = data
    store = BottleneckStore(tmp_path / "x.zarr")
    with xarray.open_zarr(store, consolidated=False, chunks={}) as data:
        assert dict(data.sizes) == {"y": 4, "x": 6, "c": M, "latent": M}
        assert data.photo.chunks == ((2, 2), (2, 2, 2), (M,))
        assert data.grey.chunks == ((2, 2), (2, 2, 2), (M,))
        assert data.photo.values.tobytes() == colour.tobytes()
        assert data.grey.values.tobytes() == grey.tobytes()
        assert data.grey.isel(y=3, x=slice(1, 4)).values.tobytes() == grey[3, 1:4].tobytes()
    for name, expected in (("photo", colour), ("grey", grey)):
        lazy = dask.from_zarr(store, component=name)
        assert lazy.chunksize == (2, 2, M)
        assert lazy.compute(scheduler="threads").tobytes() == expected.tobytes()


def test_dask(archive):
    dask = pytest.importorskip("dask.array")
    folder, expected = archive
    lazy = dask.from_zarr(open_bottleneck(folder, path="photo"))
    assert lazy.chunksize == (2, 2, M)
    assert np.array_equal(lazy.compute(scheduler="threads"), expected)
    assert np.array_equal(lazy[1:3].compute(scheduler="synchronous"), expected[1:3])


# Patches.


def test_patches(small, photograph, pipeline):
    view = open_bottleneck(create(small, (32, 32, 3)).store)
    whole = view[...].transpose(2, 0, 1)
    data = as_torch_dataset(view, 2, labels="abcdef")
    assert len(data) == 6
    for i, (item, label) in enumerate(data):
        row, column = 2 * (i // 3), 2 * (i % 3)
        assert np.array_equal(item, whole[:, row : row + 2, column : column + 2])
        assert item.flags.c_contiguous
        assert label == "abcdef"[i]
    assert np.array_equal(data[-1][0], data[5][0])
    overlapping = as_torch_dataset(view, (np.int64(3), 2), step=np.array([1, 2]))
    assert len(overlapping) == 2 * 3
    assert np.array_equal(overlapping[4], whole[:, 1:4, 2:4])
    with pytest.raises(IndexError):
        data[6]


def test_patches_of_batches(small, pipeline):
    data = np.stack([small, small[::-1]]).transpose(3, 0, 1, 2)  # (3, t, y, x)
    codec = CAECodec(quality=2, channel_axis=0)
    view = open_bottleneck(create(data, (3, 1, 32, 32), serializer=codec).store)
    assert view.attrs["cae_bottleneck"]["axes"] == ["latents", "batch", "rows", "columns"]
    patches = as_torch_dataset(view, (4, 2))
    assert len(patches) == 2 * 3
    assert np.array_equal(patches[4], view[:, 1, :, 2:4])


def test_missing_patches(small):
    array = create(small, (32, 32, 3))
    array[:32, :32] = 0
    view = open_bottleneck(array.store)
    data = as_torch_dataset(view, 2)
    with pytest.raises(CAEDataError, match=r"patch 0 .*never written.*missing=0"):
        data[0]
    assert np.isfinite(data[1]).all()
    assert np.isnan(as_torch_dataset(view, 2, missing=np.nan)[0]).all()
    assert (as_torch_dataset(view, 2, missing=0)[0] == 0).all()


def test_blank_chunks_have_latents_if_they_are_written(small):
    data = np.zeros_like(small)
    array = create(data, (32, 32, 3), config={"write_empty_chunks": True})
    assert np.isfinite(open_bottleneck(array.store)[...]).all()


def test_patches_that_do_not_fit(small):
    array = create(small, (32, 32, 3))
    view = open_bottleneck(array.store)
    for keywords in (
        {"patch": 5}, {"patch": 0}, {"patch": 2, "step": 0}, {"patch": 2, "labels": [1]}, {"patch": (2, 2, 2)},
        {"patch": 1.5}, {"patch": "ab"},
    ):  # fmt: skip
        with pytest.raises(CAEConfigurationError):
            as_torch_dataset(view, **keywords)
    with pytest.raises(CAEConfigurationError, match="open_bottleneck"):
        as_torch_dataset(array)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there is but one core
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(archive, start):
    from torch.utils.data import DataLoader

    folder, expected = archive
    data = as_torch_dataset(open_bottleneck(folder, path="photo"), 2, labels=range(6))
    data[0]  # whatever reading starts must survive the fork
    loader = DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=start, timeout=120)
    batches = list(loader)
    assert [batch.tolist() for _, batch in batches] == [[0, 1, 2], [3, 4, 5]]
    assert np.array_equal(batches[1][0][2].numpy(), expected[2:4, 4:6].transpose(2, 0, 1))


def test_exported_names():
    assert {"open_bottleneck", "BottleneckStore", "CAEBottleneckCodec"} <= set(__import__("zarr_cae").__all__)
    assert CAEBottleneckCodec.__doc__


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_copying_latents_out(archive, tmp_path, small, suffix, capsys):
    from zarr_cae.cli import bottleneck

    folder, expected = archive
    out = tmp_path / f"latents{suffix}"
    arguments = argparse.Namespace(array=folder / "photo", latents=out, overwrite=False)
    bottleneck.bottleneck(arguments)
    assert "4 x 6" in capsys.readouterr().out
    if suffix == ".npy":
        assert np.load(out).tobytes() == expected.tobytes()
        return
    copied = zarr.open_array(out, mode="r")
    assert copied[...].tobytes() == expected.tobytes()
    assert np.array_equal(as_torch_dataset(copied, 2)[5], expected[2:4, 4:6].transpose(2, 0, 1))
    for array, message in ((folder, "name one"), (folder / "mask", "not stored with"), (folder / "none", "exist")):
        with pytest.raises(CAEConfigurationError, match=message):
            bottleneck.bottleneck(argparse.Namespace(array=array, latents=out, overwrite=True))
    with pytest.raises(CAEConfigurationError, match="overwrite"):
        bottleneck.bottleneck(arguments)
