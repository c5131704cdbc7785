"""`BottleneckStore` and `open_bottleneck` over every kind of store, and read by other libraries."""

import json
import threading
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import zarr
from archives import PROTOTYPE, M, consolidate, create, fill, latents_of, read, write
from zarr.storage import FsspecStore, LocalStore, MemoryStore, StorePath, ZipStore

from zarr_cae import BottleneckStore, CAECodec, CAEConfigurationError, WeightsNotFoundError, open_bottleneck


@pytest.mark.parametrize("mode", ["r", None])
def test_modes_that_read(small, mode):
    array = create(small, (32, 32, 3))
    assert open_bottleneck(array.store, mode=mode).shape == (4, 6, M)


def test_every_selection_of_zarr(small, pipeline):
    view = open_bottleneck(create(small, (32, 32, 3)).store)
    whole = view[...]
    assert np.array_equal(view.oindex[[1, 3], :, [5, 9]], whole[np.ix_([1, 3], range(6), [5, 9])])
    assert np.array_equal(view.vindex[[1, 2], [3, 4], [5, 6]], whole[[1, 2], [3, 4], [5, 6]])
    assert np.array_equal(view.blocks[1, 2], whole[2:4, 4:6])
    assert np.array_equal(view[::3, -1], whole[::3, -1])


def test_an_array_of_another_codec(small, tmp_path):
    zarr.create_array(tmp_path / "a.zarr", data=small)
    with pytest.raises(CAEConfigurationError, match=r"array 'file://.*a\.zarr' is not stored with the codec 'cae'"):
        open_bottleneck(tmp_path / "a.zarr")
    zarr.create_array(tmp_path / "b.zarr", data=small, zarr_format=2)
    with pytest.raises(CAEConfigurationError, match="not stored with the codec 'cae'"):
        open_bottleneck(tmp_path / "b.zarr")
    with pytest.raises(FileNotFoundError):
        open_bottleneck(tmp_path / "c.zarr")


@pytest.mark.parametrize("consolidated", [False, True])
def test_groups(small, pipeline, consolidated):
    store = MemoryStore()
    expected = fill(store, small, consolidated=consolidated)
    group = open_bottleneck(store)
    assert (group.metadata.consolidated_metadata is not None) == consolidated
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
    node = json.loads(read(store, "deep/photo/zarr.json"))
    node["codecs"][0]["configuration"]["weights"] = "sha256:" + "0" * 64
    write(store, "deep/photo/zarr.json", json.dumps(node).encode())
    consolidate(store)
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


def local(folder, _):
    return LocalStore(folder)


def path(folder, _):
    return str(folder)


def file_url(folder, _):
    return folder.as_uri()


def memory(folder, _):
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return MemoryStore({key: PROTOTYPE.buffer.from_bytes(value) for key, value in files.items()})


def zipped(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "g.zip", "w") as target:
        for file in folder.rglob("*"):
            target.write(file, file.relative_to(folder))
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
    """Serves the files of a folder, with byte ranges, and records every GET."""

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
            consolidate(tmp_path / "x.zarr")
        with xarray.open_zarr(BottleneckStore(tmp_path / "x.zarr"), consolidated=consolidated, chunks=None) as data:
            assert dict(data.sizes) == {"y_latent": 4, "x_latent": 6, "c_latent": M}
            assert data.photo.attrs["units"] == "1"
            assert data.photo.values.tobytes() == archive[1].tobytes()


def test_xarray_and_dask_with_grey_arrays(archive, tmp_path, small):
    """xarray reads lazily, chunk by chunk. The latents of an array without channels have an additional axis."""
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
        assert dict(data.sizes) == {"y_latent": 4, "x_latent": 6, "c_latent": M, "latent": M}
        assert data.photo.chunks == ((2, 2), (2, 2, 2), (M,))
        assert data.grey.chunks == ((2, 2), (2, 2, 2), (M,))
        assert data.photo.values.tobytes() == colour.tobytes()
        assert data.grey.values.tobytes() == grey.tobytes()
        assert data.grey.isel(y_latent=3, x_latent=slice(1, 4)).values.tobytes() == grey[3, 1:4].tobytes()
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


def coordinates(data):
    return data.assign_coords(y=np.arange(64.0), x=np.arange(96.0))


def mask(data):
    return data.assign(mask=(("y", "x"), data.photo.values[..., 0]))


def lengths_along_channels(data):
    return data.assign_coords(c=["red", "green", "blue"])


@pytest.mark.parametrize("beside", [coordinates, mask, lengths_along_channels])
def test_xarray_with_arrays_along_the_axes_of_pixels(small, tmp_path, beside):
    xarray = pytest.importorskip("xarray")
    pixels = beside(xarray.Dataset({"photo": (("y", "x", "c"), small)}))
    encoding = {"photo": {"serializer": CAECodec(quality=2), "compressors": None, "chunks": (32, 32, 3)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels.to_zarr(tmp_path / "x.zarr", zarr_format=3, encoding=encoding)
    with xarray.open_zarr(BottleneckStore(tmp_path / "x.zarr"), chunks=None) as data:
        assert data.photo.dims == ("y_latent", "x_latent", "c_latent")
        assert data.photo.values.tobytes() == latents_of(small, (32, 32, 3)).tobytes()
        for name in set(pixels.variables) - {"photo"}:
            assert data[name].equals(pixels[name])


def test_xarray_does_not_unpack_latents(small, tmp_path):
    """Packed pixels have a scale, an offset and a fill value, which xarray applies to all that it reads."""
    xarray = pytest.importorskip("xarray")
    packed = {"dtype": "uint16", "scale_factor": 0.01, "add_offset": 5.0, "_FillValue": 65535}
    codec = CAECodec(quality=2, value_range=(0, 65535))
    pixels = xarray.Dataset({"photo": (("y", "x", "c"), small.astype(np.float32) + 10)})
    encoding = {"photo": {**packed, "serializer": codec, "compressors": None, "chunks": (32, 32, 3)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels.to_zarr(tmp_path / "x.zarr", zarr_format=3, encoding=encoding)
    expected = open_bottleneck(tmp_path / "x.zarr", path="photo")
    with xarray.open_zarr(BottleneckStore(tmp_path / "x.zarr"), chunks=None) as data:
        assert data.photo.values.tobytes() == expected[...].tobytes()
        assert data.photo.attrs["cae_bottleneck"]["pixel_attributes"]["scale_factor"] == 0.01
