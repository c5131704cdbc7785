"""Time and memory as work grows: more chunks, larger chunks, chunks that are missing.

    python benchmarks/growth.py [IMAGE ...] [--quality 4] [--largest 268]

Each line is a process of its own: an RGB array made of the images (default: the photograph in the package), repeated,
is written to and read from a folder. Seconds are those of one write and one read of the whole array after a first chunk
has warmed up the networks. Memory is the highest resident size of the process, less its size before and the array of
pixels itself (twice for reading, where the result is a second array). `--largest` limits the megapixels.

Missing chunks, 64 x 64 px each, are only read. The line beside them is of zarr's uncompressed chunks: the time and
memory that zarr itself needs to find that a chunk is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import zarr
from images import image_files, mosaic
from measuring import memory_now, timed

from zarr_cae import CAECodec

CHUNKED = [(256, 256), (1024, 256), (4096, 256), (16384, 256), (16384, 512)]
WHOLE = [(1024, 1024), (2048, 2048), (4096, 4096), (10240, 10240)]
MISSING = [(2048, 64), (6400, 64), (20224, 64)]


def peak() -> int:
    """Return the largest resident memory that this process ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def create(folder: str, edge: int, chunk: int, codec: CAECodec | None) -> zarr.Array[Any]:
    serializer = "auto" if codec is None else codec
    shape, chunks = (edge, edge, 3), (chunk, chunk, 3)
    return zarr.create_array(folder, shape=shape, chunks=chunks, dtype="uint8", serializer=serializer, compressors=None)


def one(edge: int, chunk: int, quality: int, files: list[Path], missing: str | None) -> dict[str, float]:
    """Return the memory that this process needs for one line, or to read missing chunks of "cae" or "uncompressed"."""
    codec = CAECodec(quality=quality, channel_axis=2)
    with tempfile.TemporaryDirectory() as folder:
        warm = create(f"{folder}/warm", 256, 256, codec)
        warm[...] = mosaic(files, 256)
        _ = warm[...]
        array = create(f"{folder}/array", edge, chunk, codec)
        before = memory_now().resident
        if missing:
            absent = array if missing == "cae" else create(f"{folder}/plain", edge, chunk, None)
            return {"read": timed(lambda: absent[...])[0], "memory": peak() - before - absent.nbytes}
        source = mosaic(files, edge)
        written = timed(lambda: array.__setitem__(..., source))[0]
        after_write = peak()
        read = timed(lambda: array[...])[0]
        after_read = peak()
    return {
        "write": written, "read": read, "write_memory": after_write - before - source.nbytes,
        "read_memory": after_read - before - 2 * source.nbytes,
    }  # fmt: skip


def measured(edge: int, chunk: int, arguments: argparse.Namespace, *flags: str) -> dict[str, float]:
    command = [sys.executable, __file__, *map(str, arguments.images), "--quality", str(arguments.quality)]
    done = subprocess.run(
        [*command, "--one", str(edge), str(chunk), *flags], check=True, stdout=subprocess.PIPE, text=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--quality", type=int, default=4)
    parser.add_argument("--largest", type=float, default=300, metavar="MP")
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--missing", choices=("cae", "uncompressed"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    files = image_files(arguments.images)
    if arguments.one:
        print(json.dumps(one(*arguments.one, arguments.quality, files, arguments.missing)))
        return
    print(f"quality {arguments.quality}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'array':>7}{'chunk':>7}{'chunks':>8}{'s/MP write':>12}{'read':>8}{'MB above: write':>17}{'read':>7}")
    for edge, chunk in [*CHUNKED, *WHOLE]:
        megapixels = edge**2 / 1e6
        if megapixels <= arguments.largest:
            line = measured(edge, chunk, arguments)
            print(
                f"{edge:7d}{chunk:7d}{(edge // chunk) ** 2:8d}{line['write'] / megapixels:12.3f}"
                f"{line['read'] / megapixels:8.3f}{line['write_memory'] / 1e6:17.0f}{line['read_memory'] / 1e6:7.0f}",
                flush=True,
            )
    print(f"\n{'missing chunks':>14}{'ms each':>9}{'uncompressed':>14}{'MB above':>10}{'uncompressed':>14}")
    for edge, chunk in MISSING:
        ours, plain = (measured(edge, chunk, arguments, "--missing", kind) for kind in ("cae", "uncompressed"))
        count = (edge // chunk) ** 2
        print(
            f"{count:14d}{ours['read'] / count * 1e3:9.3f}{plain['read'] / count * 1e3:14.3f}"
            f"{ours['memory'] / 1e6:10.0f}{plain['memory'] / 1e6:14.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
