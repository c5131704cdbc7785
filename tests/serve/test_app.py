"""`zarr-cae serve`: HTTP semantics, Zarr readers in several languages, refused paths, and many requests at a time."""

import http.client
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import zarr
from archives import consolidate, create, fill
from hypothesis import given
from hypothesis import strategies as st
from serving import serving

from zarr_cae import BottleneckStore, CAECodec, DecodedStore, open_bottleneck

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def archive(tmp_path_factory, small):
    """Return the folder of a group: CAE arrays, one of them in shards, one of floats, and a mask."""
    folder = tmp_path_factory.mktemp("served") / "g.zarr"
    fill(folder, small)
    root = zarr.open_group(folder, mode="r+")
    for name, data, options in (
        ("sharded", small, {"shards": (64, 64, 3)}),
        ("floats", (small[..., 0] / np.float32(255)), {"serializer": CAECodec(quality=2, value_range=(0, 1))}),
    ):
        keywords = {"serializer": CAECodec(quality=2), "compressors": None, **options}
        array = root.create_array(
            name, shape=data.shape, chunks=(32, 32, 3)[: data.ndim], dtype=data.dtype, **keywords
        )  # fmt: skip
        array[...] = data
    consolidate(folder)
    (folder.parent / "secret").write_text("secret")
    (folder / "link").symlink_to(folder.parent / "secret")
    (folder / "linked").mkdir()
    (folder / "linked" / "zarr.json").symlink_to(folder.parent / "secret")
    return folder


@pytest.fixture(scope="module")
def server(archive):
    with serving(archive, latents=True) as address:
        yield address


def request(address, path, method="GET", **headers):
    """Send a request with an unchanged path, and return status, headers and body."""
    split = urlsplit(address)
    connection = http.client.HTTPConnection(split.hostname, split.port, timeout=120)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


CHUNK, PLAIN, DOCUMENT = "/zarr/photo/c/1/1/0", "/zarr/mask/c/0/0", "/zarr/photo/zarr.json"


@pytest.mark.parametrize("path", [CHUNK, PLAIN, DOCUMENT])
def test_http(server, path):
    status, headers, whole = request(server, path)
    size = len(whole)
    assert (status, headers["content-length"], headers["accept-ranges"]) == (200, str(size), "bytes")
    etag = headers["etag"]
    status, head, body = request(server, path, "HEAD")
    assert (status, head["content-length"], head["etag"], body) == (200, str(size), etag, b"")
    ranges = {
        "bytes=0-0": (0, 1), "bytes=5-19": (5, 20), "bytes=7-": (7, size), "bytes=-9": (size - 9, size),
        f"bytes=3-{size + 99}": (3, size),
    }  # fmt: skip
    for wanted, (start, end) in ranges.items():
        for conditions in ({}, {"If_Range": etag}):
            status, headers, body = request(server, path, Range=wanted, **conditions)
            assert (status, body) == (206, whole[start:end])
            assert headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    status, headers, body = request(server, path, Range=f"bytes={size}-")
    assert (status, headers["content-range"]) == (416, f"bytes */{size}")
    assert request(server, path, Range="bytes=0-4", If_Range='"other"')[0::2] == (200, whole)
    status, headers, body = request(server, path, If_None_Match=f'"x", {etag}')
    assert (status, headers["etag"], body) == (304, etag, b"")


def test_ranges_that_are_ignored(server):
    _, _, whole = request(server, CHUNK)
    for wanted in ("bytes=5-3", "bytes=a-b", "items=0-3", "bytes=0-1,3-4", "bytes=-", "bytes=" + "9" * 40 + "-"):
        assert request(server, CHUNK, Range=wanted)[0::2] == (200, whole)


@given(st.integers(0, 40), st.integers(0, 50), st.integers(0, 50))
def test_byte_ranges(length, first, last):
    from zarr_cae.serve.responses import byte_range

    content = bytes(range(length))

    def taken(header):
        found = byte_range(header, length)
        return None if found is None else bytes(content[i] for i in found)

    assert taken(f"bytes={first}-") == content[first:]
    assert taken(f"bytes=-{last}") == content[max(0, length - last) :]
    assert taken(f"bytes={first}-{last}") == (None if last < first else content[first : last + 1])


def test_other_sites_may_read(server):
    _, headers, _ = request(server, CHUNK, Origin="http://example.org")
    assert headers["access-control-allow-origin"] == "*"
    assert {"ETag", "Content-Range"} <= set(headers["access-control-expose-headers"].split(", "))
    asked = {"Origin": "http://example.org", "Access_Control_Request_Method": "GET",
             "Access_Control_Request_Headers": "range"}  # fmt: skip
    status, headers, _ = request(server, CHUNK, "OPTIONS", **asked)
    assert (status, headers["access-control-allow-origin"]) == (200, "*")


def test_one_site_may_read(archive):
    with serving(archive, origins="http://a.example") as address:
        for origin, allowed in (("http://a.example", "http://a.example"), ("http://b.example", None)):
            assert request(address, CHUNK, Origin=origin)[1].get("access-control-allow-origin") == allowed


@pytest.mark.parametrize("path", [
    "/zarr/../secret", "/zarr/%2e%2e/secret", "/zarr/..%2fsecret", "/zarr/%2e%2e%2fsecret", "/zarr//etc/passwd",
    "/zarr/%2fetc/passwd", "/zarr/photo/../../secret", "/zarr/..%5csecret", "/zarr/photo%00/zarr.json", "/zarr/.",
    "/zarr/c:/secret", "/zarr/link",
    "/zarr/linked/zarr.json", "/zarr/photo", "/zarr/", "/zarr", "/zarr/" + "a/" * 2000 + "0", "/%2e%2e/secret",
    "/..%2fapp.py", "/viewer.js/..%2fapp.py", "/zarr/none/zarr.json", "/zarr/photo/c/9/9/9", "/latents/../secret",
    "/tiles/0/pixels/99/0/0.png", "/tiles/0/pixels/0/99/0.png", "/tiles/99/pixels/0/0/0.png", "/tiles/0/x/0/0/0.png",
    "/tiles/0/latents/0/0/0.png?at=99999", "/tiles/0/latents/0/0/0.png", "/tiles/0/latents/0/0/0.png?at=a",
    "/tiles/0/pixels/99999999999999999999/0/0.png",
])  # fmt: skip
def test_refused_paths(server, path):
    status, _, body = request(server, path)
    assert status in {400, 404}
    assert b"secret" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_writing_is_refused(server, method):
    assert request(server, CHUNK, method)[0] == 405


def test_a_damaged_chunk_is_an_error_of_the_server(small, tmp_path):
    array = create(small, (32, 32, 3), tmp_path / "a.zarr")
    file = tmp_path / "a.zarr" / "c" / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with serving(tmp_path / "a.zarr") as address:
        status, _, body = request(address, "/zarr/c/1/0/0")
        assert (status, b"damaged" in body) == (500, True)
        assert request(address, "/zarr/c/0/0/0")[0] == 200
    assert array.shape == small.shape


# Readers.


def close(found, expected, tolerance):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert np.abs(found.astype(np.float64) - expected).max() <= tolerance


def test_zarr_python(server, archive):
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    local = zarr.open_group(archive, mode="r")
    served = zarr.open_group(f"{server}/zarr", mode="r")
    names = sorted(dict(served.members(max_depth=None)))
    assert names == ["deep", "deep/photo", "floats", "mask", "photo", "sharded"]
    for name in ("photo", "sharded", "deep/photo", "mask"):
        close(served[name][...].astype(np.uint8), local[name][...].astype(np.uint8), 1)
    close(served["floats"][20:60, 3:40], local["floats"][20:60, 3:40], 1 / 255)


def test_zarr_python_reads_latents(server, archive):
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    for name in ("photo", "sharded", "floats"):
        served = zarr.open_array(f"{server}/latents/{name}", mode="r")
        assert served[...].tobytes() == open_bottleneck(archive, path=name)[...].tobytes()


READ_WITHOUT_THIS_PACKAGE = """
import sys
import numpy, tensorstore
source = tensorstore.open({"driver": "zarr3", "kvstore": sys.argv[1]}, open=True, read=True).result()
numpy.save(sys.argv[2], source.read().result())
assert "zarr_cae" not in sys.modules
"""


@pytest.mark.parametrize("name", ["zarr/photo", "zarr/sharded", "zarr/floats", "latents/floats"])
def test_tensorstore(server, archive, tmp_path, name):
    pytest.importorskip("tensorstore")
    target = tmp_path / "found.npy"
    command = [sys.executable, "-c", READ_WITHOUT_THIS_PACKAGE, f"{server}/{name}/", str(target)]
    subprocess.run(command, check=True, timeout=120)
    kind, _, path = name.partition("/")
    store = BottleneckStore(archive) if kind == "latents" else archive
    expected = zarr.open_array(store, path=path, mode="r")[...]
    close(np.load(target), expected, {"zarr/floats": 1 / 255, "latents/floats": 0}.get(name, 1))


def zarrita():
    """Return the folder of the package; skip the test without it."""
    folder = os.environ.get("ZARR_CAE_NODE_MODULES")
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if folder is None or not (Path(folder) / "zarrita").is_dir():
        pytest.skip("ZARR_CAE_NODE_MODULES does not name a node_modules folder with zarrita (npm install zarrita)")
    return Path(folder) / "zarrita"


@pytest.mark.parametrize("name", ["zarr/photo", "zarr/sharded", "zarr/floats", "latents/photo"])
def test_zarrita(server, archive, name):
    kind, _, path = name.partition("/")
    command = ["node", str(Path(__file__).with_name("zarrita_read.mjs")), str(zarrita()), f"{server}/{kind}/", path]
    local = zarr.open_array(BottleneckStore(archive) if kind == "latents" else archive, path=path, mode="r")
    for rows in ((), ("1", "5")):
        found = subprocess.run([*command, *rows], check=True, timeout=120, capture_output=True)
        described = json.loads(found.stderr)
        expected = local[1:5] if rows else local[...]
        assert (tuple(described["shape"]), described["dtype"]) == (expected.shape, expected.dtype.name)
        values = np.frombuffer(found.stdout, expected.dtype).reshape(expected.shape)
        close(values, expected, {"zarr/floats": 1 / 255, "latents/photo": 0}.get(name, 1))


# Load.


@pytest.mark.slow
def test_two_hundred_requests_at_a_time(photograph, tmp_path):
    """There is no error, and memory stays within the limits of cache and requests."""
    pixels = np.tile(photograph, (2, 2, 1))
    array = create(pixels, (128, 128, 3), tmp_path / "a.zarr")
    paths = [f"/zarr/c/{row}/{column}/0" for row in range(8) for column in range(8)] * 10
    paths += [f"/tiles/0/pixels/{scale}/0/0.png" for scale in range(3)] * 20 + ["/zarr/zarr.json"] * 100
    with serving(tmp_path / "a.zarr", cache_bytes=1 << 20) as address, ThreadPoolExecutor(200) as pool:
        meeting = threading.Barrier(200)
        list(pool.map(lambda _: meeting.wait(60), range(200)))  # wait for all threads
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answers = list(pool.map(lambda path: request(address, path), paths))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert {status for status, *_ in answers} == {200}
    bodies = dict(zip(paths, (body for *_, body in answers), strict=True))
    for path, (_, _, body) in zip(paths, answers, strict=True):
        if "tiles" not in path and path.endswith("json"):
            assert body == bodies[path]
    assert grown < 600 << 10, f"{grown >> 10} MiB"  # in KiB; the networks need most of it, for a batch of 64 chunks
    served = zarr.open_array(DecodedStore(tmp_path / "a.zarr"), mode="r")
    close(served[...], array[...], 1)


@pytest.mark.slow
def test_the_command(archive, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "zarr_cae", "serve", str(archive), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        address = line.partition("look at ")[2].partition("/ ")[0]
        assert request(address, CHUNK)[0] == 200
        assert request(address, "/latents/photo/zarr.json")[0] == 404
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("arguments", "reason"), [
    (["none.zarr"], "does not exist"),
    (["empty"], "zarr|node|found"),
    (["g.zarr", "--port", "70000"], "--port"),
])  # fmt: skip
def test_the_command_refuses_bad_arguments(tmp_path, monkeypatch, capsys, small, arguments, reason):
    from zarr_cae.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    create(small, (32, 32, 3), tmp_path / "g.zarr")
    assert main(["serve", *arguments]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(reason, error)


def test_the_extra_is_named(tmp_path, monkeypatch, capsys, small):
    from zarr_cae.cli import main

    create(small, (32, 32, 3), tmp_path / "g.zarr")
    monkeypatch.delitem(sys.modules, "zarr_cae.serve.app", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(tmp_path / "g.zarr")]) == 1
    assert "zarr-cae[serve]" in capsys.readouterr().err
