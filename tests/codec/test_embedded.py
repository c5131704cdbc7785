"""Weights inside archives."""

import functools
import http.server
import json
import multiprocessing
import operator
import pickle
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import zarr
from weights_files import contexts, networks, tiny
from zarr.storage import LocalStore, MemoryStore

import zarr_cae
from zarr_cae import BottleneckStore, CAECodec, CAEConfigurationError, WeightsNotFoundError, open_bottleneck
from zarr_cae.codec.embedded import FOLDER, embed_weights, import_weights
from zarr_cae.weights import registry


@pytest.fixture
def elsewhere(move_weights):
    """Act as another machine, without the weights that were stored before."""
    move_weights("first")
    return move_weights


def archive(store, shards=None, **provenance):
    """Return a group with one array inside a group, and its pixels."""
    digest = registry.store(tiny(**networks(), **contexts(), provenance=provenance)).digest
    root = zarr.create_group(store)
    array = root.create_array(
        "a/b", shape=(32, 32, 3), chunks=(32, 32, 3), shards=shards, dtype="uint8", compressors=None,
        serializer=CAECodec(quality=2, weights=digest),
    )  # fmt: skip
    array[...] = np.arange(32 * 32 * 3).reshape(32, 32, 3) % 251
    return digest, array[...]


@pytest.mark.parametrize("kind", [MemoryStore, LocalStore])
def test_an_archive_brings_its_weights(tmp_path, elsewhere, kind):
    store = MemoryStore() if kind is MemoryStore else LocalStore(tmp_path / "x.zarr")
    digest, pixels = archive(store)
    assert embed_weights(store) == [digest]
    assert embed_weights(store) == [digest]
    assert [name for name, _ in zarr.open_group(store, mode="r").members()] == ["a"]

    elsewhere("second")
    with pytest.raises(WeightsNotFoundError, match=r"zarr_cae.open.*weights import"):
        zarr.open(store, mode="r")["a/b"][...]
    np.testing.assert_array_equal(zarr_cae.open(store)["a/b"][...], pixels)
    np.testing.assert_array_equal(zarr_cae.open(store, path="a/b")[...], pixels)

    if kind is LocalStore:
        elsewhere("another")
        np.testing.assert_array_equal(zarr_cae.open(tmp_path / "x.zarr/a/b")[...], pixels)

    elsewhere("third")
    assert [info.digest for info in import_weights(store)] == [digest]
    np.testing.assert_array_equal(zarr.open(store, mode="r")["a/b"][...], pixels)


@pytest.mark.parametrize("shards", [None, (32, 32, 3)])
@pytest.mark.parametrize("open_archive", [zarr_cae.open, open_bottleneck])
def test_a_pickled_array_finds_the_weights_of_its_archive(tmp_path, elsewhere, shards, open_archive):
    store = LocalStore(tmp_path / "x.zarr")
    digest, _ = archive(store, shards)
    embed_weights(store)
    elsewhere("second")
    array = open_archive(store, path="a/b")
    content, values = pickle.dumps(array), array[...]
    elsewhere("another process")
    assert registry.find_digest(digest) is None
    again = pickle.loads(content)
    assert registry.find_digest(digest) is not None
    np.testing.assert_array_equal(again[...], values)
    (codec,), (same,) = again.metadata.codecs, array.metadata.codecs
    assert codec == same
    assert codec.to_dict() == same.to_dict()
    if shards is None:  # sharding codecs have no hash by their value
        assert hash(codec) == hash(same)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [None, (32, 32, 3)])
@pytest.mark.parametrize("open_archive", [zarr_cae.open, open_bottleneck])
def test_a_spawned_process_finds_the_weights_of_the_archive(tmp_path, elsewhere, shards, open_archive):
    store = LocalStore(tmp_path / "x.zarr")
    archive(store, shards)
    embed_weights(store)
    elsewhere("second")
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # begins before the archive is opened
        array = open_archive(tmp_path / "x.zarr", path="a/b")
        found = pool.apply(operator.getitem, (array, ...))
        np.testing.assert_array_equal(found, array[...])
    assert not (tmp_path / "second").exists()


def test_metadata_do_not_say_where_weights_were_found(tmp_path, elsewhere):
    store = LocalStore(tmp_path / "x.zarr")
    digest, _ = archive(store, (32, 32, 3))
    embed_weights(store)
    elsewhere("second")
    array = zarr_cae.open(store, path="a/b")
    folder = str(registry.find_digest(digest).path.parent)
    assert folder in str(pickle.dumps(array))
    (codec,) = array.metadata.codecs[-1].codecs
    for text in (json.dumps(array.metadata.to_dict(), default=str), json.dumps(codec.to_dict()), repr(codec)):
        assert folder not in text
        assert digest in text


def test_a_pickled_array_refuses_damaged_weights(tmp_path, elsewhere):
    store = LocalStore(tmp_path / "x.zarr")
    digest, _ = archive(store, damaged="in the folder of the process")
    embed_weights(store)
    elsewhere("second")
    content = pickle.dumps(zarr_cae.open(store, path="a/b"))
    file = registry.find_digest(digest).path
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    elsewhere("another process")
    array = pickle.loads(content)
    with pytest.raises(CAEConfigurationError, match="damaged"):
        array[...]
    file.unlink()
    elsewhere("a process on another machine")
    with pytest.raises(WeightsNotFoundError, match=r"zarr_cae.open.*weights import"):
        pickle.loads(content)[...]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def over_http(folder):
    """Serve the files of a folder; yield the address of its archive."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/x.zarr", {}
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def on_s3(folder):
    """Copy the files of a folder to a bucket of a server on this machine; yield the address of its archive."""
    pytest.importorskip("s3fs", reason="no client of S3 here")
    server_module = pytest.importorskip("moto.server", reason="no server of S3 here")
    import s3fs

    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"key": "a", "secret": "b", "endpoint_url": f"http://{host}:{port}"}
        files = s3fs.S3FileSystem(**options)
        files.mkdir("bucket")
        files.put(str(folder / "x.zarr"), "bucket/x.zarr", recursive=True)
        yield "s3://bucket/x.zarr", {"storage_options": options}
    finally:
        server.stop()


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("place", [over_http, on_s3])
def test_an_archive_brings_its_weights_from_afar(tmp_path, elsewhere, place):
    store = LocalStore(tmp_path / "x.zarr")
    digest, pixels = archive(store)
    embed_weights(store)
    zarr.consolidate_metadata(store)  # plain HTTP lists no folders
    with place(tmp_path) as (url, options):
        elsewhere("second")
        with pytest.raises(WeightsNotFoundError, match=r"zarr_cae.open.*weights import"):
            zarr.open(url, mode="r", path="a/b", **options)[...]
        np.testing.assert_array_equal(zarr_cae.open(url, path="a/b", **options)[...], pixels)
        elsewhere("third")
        np.testing.assert_array_equal(zarr_cae.open(url, **options)["a/b"][...], pixels)
        elsewhere("fourth")
        assert [info.digest for info in import_weights(url, **options)] == [digest]
        np.testing.assert_array_equal(zarr.open(url, mode="r", path="a/b", **options)[...], pixels)


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("kind", [MemoryStore, LocalStore])
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_latents_take_the_weights_of_the_archive(tmp_path, elsewhere, kind, consolidated):
    store = MemoryStore() if kind is MemoryStore else LocalStore(tmp_path / "x.zarr")
    digest, _ = archive(store)
    zarr.open_group(store).create_array(
        "c", shape=(32, 32, 3), chunks=(32, 32, 3), dtype="uint8", compressors=None,
        serializer=CAECodec(quality=2, weights=digest),
    )  # fmt: skip
    embed_weights(store)  # in a/b alone
    latents = open_bottleneck(store, path="a/b")[...]
    assert np.isfinite(latents).all()
    if consolidated:
        zarr.consolidate_metadata(store)

    elsewhere("second")
    np.testing.assert_array_equal(open_bottleneck(store, path="a/b")[...], latents)
    elsewhere("third")
    np.testing.assert_array_equal(open_bottleneck(store)["a/b"][...], latents)
    elsewhere("fourth")
    np.testing.assert_array_equal(zarr.open(BottleneckStore(store), mode="r")["a/b"][...], latents)
    elsewhere("fifth")
    assert open_bottleneck(store, path="c").shape == latents.shape  # from its sibling
    elsewhere("sixth")
    content = BottleneckStore(store).get_sync("a/b/zarr.json")
    assert b"cae_bottleneck" in content.to_bytes()
    if kind is LocalStore:
        elsewhere("seventh")
        np.testing.assert_array_equal(open_bottleneck(tmp_path / "x.zarr/a/b")[...], latents)
        elsewhere("eighth")
        assert open_bottleneck(tmp_path / "x.zarr/c").shape == latents.shape


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_latents_take_the_weights_of_an_archive_on_a_server(tmp_path, elsewhere):
    store = LocalStore(tmp_path / "x.zarr")
    archive(store)
    embed_weights(store)
    latents = open_bottleneck(store, path="a/b")[...]
    with over_http(tmp_path) as (url, _):
        elsewhere("second")
        np.testing.assert_array_equal(open_bottleneck(f"{url}/a/b")[...], latents)
        elsewhere("third")
        np.testing.assert_array_equal(open_bottleneck(url, path="a/b")[...], latents)
        zarr.consolidate_metadata(store)
        elsewhere("fourth")
        np.testing.assert_array_equal(open_bottleneck(url)["a/b"][...], latents)


def test_latents_of_many_arrays_are_opened_at_once(elsewhere):
    store = MemoryStore()
    digest, _ = archive(store)
    for number in range(40):
        zarr.open_group(store).create_array(
            f"n{number}", shape=(32, 32), chunks=(32, 32), dtype="uint8", compressors=None,
            serializer=CAECodec(quality=2, weights=digest),
        )  # fmt: skip
    embed_weights(store)
    elsewhere("second")
    assert len([*open_bottleneck(store).members(max_depth=None)]) == 42


def test_latents_refuse_damaged_and_missing_weights(tmp_path, elsewhere):
    store = LocalStore(tmp_path / "x.zarr")
    digest, _ = archive(store)
    embed_weights(store)
    (file,) = (tmp_path / "x.zarr/a/b" / FOLDER).iterdir()
    content = file.read_bytes()
    elsewhere("second")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    group = open_bottleneck(store)
    for open_array in (lambda: open_bottleneck(store, path="a/b"), lambda: group["a/b"]):
        with pytest.raises(CAEConfigurationError, match="damaged"):
            open_array()
    file.unlink()
    with pytest.raises(WeightsNotFoundError, match=f"{digest} are neither on this machine nor in the archive") as error:
        open_bottleneck(store, path="a/b")
    assert "zarr_cae.open" not in str(error.value)


def test_the_message_about_missing_weights_is_one_short_line(elsewhere):
    store = MemoryStore()
    digest, _ = archive(store)
    elsewhere("second")
    with pytest.raises(WeightsNotFoundError, match=digest) as error:
        zarr.open(store, path="a/b", mode="r")[...]
    message = str(error.value)
    assert "zarr_cae.open(...)" in message
    assert "zarr-cae weights import OUT.zarr" in message
    assert "\n" not in message
    assert len(message) < 250


def test_damaged_and_missing_weights_are_named(tmp_path, elsewhere):
    store = LocalStore(tmp_path / "x.zarr")
    digest, _ = archive(store)
    with pytest.raises(CAEConfigurationError, match="holds no weights"):
        import_weights(store)
    embed_weights(store)
    (file,) = (tmp_path / "x.zarr/a/b" / FOLDER).iterdir()
    elsewhere("second")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CAEConfigurationError, match="damaged"):
        zarr_cae.open(store)
    file.unlink()
    with pytest.raises(WeightsNotFoundError, match=digest):
        embed_weights(store)
