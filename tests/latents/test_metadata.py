"""How arrays of pixels appear as latents: shapes, names, attributes, and the arrays that are refused."""

import copy
import json
import pickle
import tracemalloc

import numpy as np
import pytest
import zarr
from archives import M, create, document, latents_of, read, store_of, write
from zarr.codecs import Crc32cCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore

from zarr_cae import BottleneckStore, CAECodec, CAEConfigurationError, WeightsNotFoundError, open_bottleneck
from zarr_cae.latents.metadata import rewrite


def test_attributes_and_names_come_along(small):
    array = create(small, (32, 40, 3), dimension_names=["y", "x", "c"], attributes={"scanner": "A", "n": [1, 2]})
    view = open_bottleneck(array.store)
    assert view.metadata.dimension_names == ("y_latent", "x_latent_40", "c_latent")
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
def test_arrays_without_servable_latents_are_refused_when_opened(small, changes, reason):
    store = store_of(refused(small, **changes))
    with pytest.raises(CAEConfigurationError, match=reason):
        open_bottleneck(store)
    with pytest.raises(CAEConfigurationError, match=reason):
        zarr.open_array(BottleneckStore(store), mode="r")


def test_arrays_of_other_codecs_do_not_change(small):
    array = document(create(small, (32, 32, 3)))
    assert rewrite({**array, "attributes": None})["shape"] == [4, 6, M]
    shard = {**array, "codecs": [{"name": "sharding_indexed", "configuration": ["cae"]}]}
    group = {"consolidated_metadata": {"metadata": {"a": [1], "b": None, "c": shard}}}
    for other in (shard, group, {**array, "codecs": None}, {**array, "codecs": {"cae": 1}}):
        assert rewrite(other) == other


@pytest.mark.skipif("array.rectilinear_chunks" not in zarr.config, reason="this zarr has no rectilinear grids")
def test_a_rectilinear_array_is_coded_but_its_latents_are_refused(small, pipeline):
    with zarr.config.set({"array.rectilinear_chunks": True}):
        array = create(small, [[24, 40], [96], [3]])  # zarr 3.3 writes [40, 24] as a regular grid
        alone = create(small[:24], (24, 96, 3))
        assert np.abs(array[:24].astype(int) - alone[...]).max() <= 1
        with pytest.raises(CAEConfigurationError, match="rectilinear"):
            open_bottleneck(array.store)


def test_weights_that_are_elsewhere_are_refused_when_opened(small):
    array = document(create(small, (32, 32, 3)))
    array["codecs"][0]["configuration"]["weights"] = "sha256:" + "0" * 64
    with pytest.raises(WeightsNotFoundError, match="weights import"):
        open_bottleneck(store_of(array))


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
    own = CAECodec(quality=2, channel_axis=order.index(2) if colour else None)
    transposed = latents_of(data.transpose(order), tuple(chunk[i] for i in order), serializer=own)
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
    found = latents_of(small, (32, 32, 1), serializer=CAECodec(quality=2, channel_axis=2))
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
        assert view.metadata.dimension_names == ("t", "latent_latent", None, "latent_")
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


@pytest.mark.parametrize(("names", "expected"), [
    (["y", "x", "c"], ("y_latent", "x_latent", "c_latent")),
    (["y", None, "y_latent"], ("y_latent_", None, "y_latent_latent")),
    ([None, None, None], (None, None, None)),
])  # fmt: skip
def test_names_differ_from_all_names_of_pixels(small, names, expected):
    view = open_bottleneck(create(small, (32, 32, 3), dimension_names=names).store)
    assert view.metadata.dimension_names == expected


def test_names_of_batch_axes_stay(small):
    codec = CAECodec(quality=2, channel_axis=1)
    data = np.stack([small.transpose(2, 0, 1)] * 2)
    array = create(data, (1, 3, 32, 32), serializer=codec, dimension_names=["t", "c", "y", "x"])
    assert open_bottleneck(array.store).metadata.dimension_names == ("t", "c_latent", "y_latent", "x_latent")


def test_attributes_of_pixel_values_are_set_aside(small):
    packing = {"scale_factor": 0.5, "add_offset": 3, "_FillValue": 0, "valid_range": [0, 10]}
    view = open_bottleneck(create(small, (32, 32, 3), attributes={**packing, "units": "m"}).store)
    assert view.attrs["units"] == "m"
    assert not packing.keys() & view.attrs.keys()
    assert view.attrs["cae_bottleneck"]["pixel_attributes"] == packing


@pytest.mark.parametrize("depth", [10, 300, 480, 700])
def test_attributes_as_deep_as_zarr_reads_them(small, depth):
    """The array is refused alone, and as a member of consolidated metadata, where the others must still open."""
    plain = json.dumps(document(create(small, (32, 32, 3))))
    deep = json.dumps({**json.loads(plain), "attributes": "@"}).replace('"@"', '{"a":' * depth + "1" + "}" * depth)
    group = (
        '{"zarr_format": 3, "node_type": "group", "attributes": {}, "consolidated_metadata": {"kind": "inline", '
        f'"must_understand": false, "metadata": {{"deep": {deep}, "plain": {plain}}}}}}}'
    )
    store = MemoryStore({})
    for key, content in (("zarr.json", group), ("deep/zarr.json", deep), ("plain/zarr.json", plain)):
        write(store, key, content.encode())
    zarr.open_group(store, mode="r")
    view = open_bottleneck(store)
    assert view["plain"].shape == (4, 6, M)
    attributes = view["deep"].attrs.asdict()
    for _ in range(depth):
        attributes = attributes["a"]
    assert attributes == 1


def test_metadata_too_deep_for_zarr_are_left_to_zarr():
    content = b"[" * 200_000 + b"]" * 200_000
    store = MemoryStore({})
    write(store, "zarr.json", content)
    assert read(BottleneckStore(store), "zarr.json") == content


def test_a_huge_channel_axis_in_metadata_allocates_nothing():
    codec = CAECodec(2, channel_axis=-1, colour=(0, 1, 2))
    stored = document(
        zarr.create_array({}, shape=(32, 32, 4), chunks=(32, 32, 4), dtype="u1", compressors=None, serializer=codec)
    )
    stored["shape"][2] = stored["chunk_grid"]["configuration"]["chunk_shape"][2] = 1 << 26
    tracemalloc.start()
    try:
        assert rewrite(stored)["shape"][2] == ((1 << 26) - 2) * M
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
