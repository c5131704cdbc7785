"""Windows and partial writes of one large chunk, against reading and rewriting it whole; one run.

    python benchmarks/windows.py [IMAGE ...] [--size 4096] [--window 256] [--quality 4] [--repeats 5] [--threads N]

One chunk of size x size pixels, filled with the images (default: the photograph in the package) and their mirror
images, in memory. `read` is a window at places all over the chunk, `write` puts other pixels there. Whole: the chunk as
zarr reads it; and, for the write, what zarr does without partial encoding (decode, merge, encode), which is what codecs
after ours (here crc32c) make it do. Bytes are those that the store hands out. Seconds are wall clock through zarr, the
median of the repeats; the first window, which compiles the coder, is not counted.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from images import image_files, mosaic
from measuring import timed
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from zarr_cae import CAECodec


class CountingStore(MemoryStore):
    """Counts the bytes that it hands out."""

    handed_out = 0

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        found = await super().get(key, prototype, byte_range)
        self.handed_out += 0 if found is None else len(found)
        return found


def create(pixels: np.ndarray, quality: int, compressor: Any = None) -> Any:
    array = zarr.create_array(
        CountingStore(), shape=pixels.shape, chunks=pixels.shape, dtype="uint8",
        serializer=CAECodec(quality=quality), compressors=compressor,
    )  # fmt: skip
    array[...] = pixels
    return array


def measured(array: Any, work: Callable[[int], Any], repeats: int) -> tuple[float, int]:
    """Return the median seconds of `work`, and the most bytes that one run of it reads."""
    seconds, read = [], []
    for n in range(repeats):
        array.store.handed_out = 0
        seconds.append(timed(lambda n=n: work(n))[0])
        read.append(array.store.handed_out)
    return statistics.median(seconds), max(read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--quality", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the network")
    arguments = parser.parse_args()
    size, side = arguments.size, arguments.window
    pixels = mosaic(image_files(arguments.images), size)
    rng = np.random.default_rng(1)
    places = rng.integers(0, size - side + 1, (arguments.repeats, 2))
    windows = [np.s_[y : y + side, x : x + side] for y, x in places]
    other = 255 - pixels[:side, :side]

    with zarr.config.set({"cae.threads": arguments.threads}):
        array, without = create(pixels, arguments.quality), create(pixels, arguments.quality, Crc32cCodec())
        array[windows[0]]
        print(f"one chunk of {size} x {size} RGB, quality {arguments.quality}, zarr {zarr.__version__}")
        few = min(arguments.repeats, 2)
        table = {
            "read": (
                measured(array, lambda n: array[windows[n]], arguments.repeats),
                measured(array, lambda _: array[...], few),
            ),
            "write": (
                measured(array, lambda n: array.__setitem__(windows[n], other), arguments.repeats),
                measured(without, lambda n: without.__setitem__(windows[n], other), few),
            ),
        }
    print(f"{'':8}{f'{side} x {side}':>12}{'whole':>12}{'ratio':>8}{'bytes read':>14}{'whole':>14}{'ratio':>8}")
    for name, ((part_s, part), (whole_s, whole)) in table.items():
        print(
            f"{name:8}{part_s:10.3f} s{whole_s:10.3f} s{whole_s / part_s:8.1f}{part:14,}{whole:14,}{whole / part:8.1f}"
        )


if __name__ == "__main__":
    main()
