"""Requests a second of `zarr-cae serve` beside a static server of the same pixels in zstd chunks.

    python benchmarks/serve.py [--size 2048] [--chunk 256] [--quality 4] [--clients 16] [--repeats 3]

The array is size x size x 3, made of the photograph that the package holds. Each server is a process of its own on
loopback, the clients are threads with a connection each, and the servers take turns, so that other programs disturb
them alike. Rates are the best of the repeats:

decoded     `zarr-cae serve` without a cache: each chunk is decoded and compressed when it is asked for
cached      `zarr-cae serve` after each chunk was read once
local       `array[...]` in this process, without HTTP: the networks at their best
static      files of zstd chunks by the same HTTP server (starlette and uvicorn), as zarr wrote them
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import zarr
from images import image_files, mosaic  # beside this file

from zarr_cae import CAECodec

STATIC = """
import sys
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from zarr_cae.serve.app import listen, serve
app = Starlette(routes=[Mount("/zarr", StaticFiles(directory=sys.argv[1]))])
with listen("127.0.0.1", 0) as listening:
    print(f"look at http://127.0.0.1:{listening.getsockname()[1]}/ ", flush=True)
    serve(app, listening).run(sockets=[listening])
"""


@contextmanager
def running(*command: str) -> Iterator[int]:
    """Run a server until the block ends, and yield its port."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield int(line.partition("look at http://127.0.0.1:")[2].partition("/")[0])
    finally:
        process.terminate()
        process.wait(30)


def rate(port: int, paths: list[str], clients: int) -> tuple[float, float]:
    """Request each path once; return requests and megabytes a second."""
    local, size = threading.local(), [0] * len(paths)

    def fetch(number: int) -> None:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        local.connection.request("GET", paths[number])
        answer = local.connection.getresponse()
        size[number] = len(answer.read())
        if answer.status != 200:
            sys.exit(f"{paths[number]}: {answer.status}")

    with ThreadPoolExecutor(clients) as pool:
        begin = time.perf_counter()
        list(pool.map(fetch, range(len(paths))))
        seconds = time.perf_counter() - begin
    return len(paths) / seconds, sum(size) / seconds / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests a second of `zarr-cae serve`.")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--quality", type=int, default=4)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    pixels, chunks = mosaic(image_files([]), arguments.size), (arguments.chunk, arguments.chunk, 3)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        coded, plain = Path(folder) / "coded.zarr", Path(folder) / "plain.zarr"
        array = zarr.create_array(
            coded, shape=pixels.shape, chunks=chunks, dtype="uint8", serializer=CAECodec(arguments.quality),
            compressors=None,
        )  # fmt: skip
        array[...] = pixels
        zarr.create_array(plain, data=array[...], chunks=chunks, compressors=zarr.codecs.ZstdCodec(level=1))
        command = ("-m", "zarr_cae", "serve", str(coded), "--port", "0")
        ports = {
            "decoded": servers.enter_context(running(*command, "--cache", "0")),
            "cached": servers.enter_context(running(*command)),
            "static": servers.enter_context(running("-c", STATIC, str(plain))),
        }
        grid = range(-(-arguments.size // arguments.chunk))
        paths = [f"/zarr/c/{row}/{column}/0" for row, column in itertools.product(grid, grid)]
        for port in ports.values():
            rate(port, paths, arguments.clients)  # loads weights and networks, and fills the cache
        rates = dict.fromkeys(["local", *ports], (0.0, 0.0))
        for _ in range(arguments.repeats):
            begin = time.perf_counter()
            array[...]
            rates["local"] = max(rates["local"], (len(paths) / (time.perf_counter() - begin), 0.0))
            for name, port in ports.items():
                several = paths * (1 if name == "decoded" else 10)
                rates[name] = max(rates[name], rate(port, several, arguments.clients))
    print(
        f"{len(paths)} chunks of {arguments.chunk} x {arguments.chunk}, quality {arguments.quality}, "
        f"{arguments.clients} clients, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
    )
    print(f"{'server':<10}{'requests/s':>12}{'MB/s':>9}{'MP/s':>9}{'of static':>11}")
    for name, (requests, megabytes) in rates.items():
        megapixels = requests * arguments.chunk**2 / 1e6
        share = requests / rates["static"][0]
        print(f"{name:<10}{requests:12.1f}{megabytes:9.1f}{megapixels:9.1f}{share:11.3f}")


if __name__ == "__main__":
    main()
