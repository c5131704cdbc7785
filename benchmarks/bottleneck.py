"""Speed of reading all latents of an RGB array, against CompressAI's entropy decoder and against decoding the pixels.

    python benchmarks/bottleneck.py [--images FOLDER] [--size 4096] [--qualities 1,4,8] [--repeats 3]

The array is size x size x 3 in chunks of 256 x 256, in memory, made of the images in FOLDER (by default the
photograph that the package holds), each mirrored in turn. Times are seconds of wall clock and, less disturbed by other
programs, of CPU over all threads, the best of the repeats each; ratios are to the latents. All three start from the
same stored bytes or the same symbols:

latents     `open_bottleneck(store)[...]`: float32 latents of the whole array, all cores
compressai  what `EntropyBottleneck.decompress` does, one chunk at a time as caecodec did: argument lists from arrays,
            `RansDecoder.decode_with_indexes`, an array from the list, dequantisation. Same tables, in 16 bits
pixels      `array[...]`: the same latents, and the synthesis network
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from PIL import Image
from rans import compressai_ans  # beside this file

import zarr_cae
from zarr_cae import CAECodec, open_bottleneck
from zarr_cae.codec import loaded
from zarr_cae.tables import PRECISION, Tables

CHUNK = 256
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".webp"}


def images(folder: Path | None) -> Iterator[np.ndarray]:
    bundled = Path(zarr_cae.__file__).parent / "data" / "astronaut.png"
    paths = [bundled] if folder is None else sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        sys.exit(f"no images in {folder}")
    for i in range(1 << 20):
        with Image.open(paths[i % len(paths)]) as image:
            pixels = np.asarray(image.convert("RGB"))
        turn = i // len(paths)
        yield pixels[:: -1 if turn & 1 else 1, :: -1 if turn & 2 else 1]


def mosaic(folder: Path | None, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the images in rows, cut where they stick out."""
    result = np.empty((size, size, 3), np.uint8)
    source, top = images(folder), 0
    while top < size:
        left, height = 0, 1 << 30
        row = []
        while left < size:
            row.append(next(source))
            height, left = min(height, len(row[-1])), left + row[-1].shape[1]
        strip = np.concatenate([image[:height] for image in row], 1)[: size - top, :size]
        result[top : top + len(strip)] = strip
        top += height
    return result


def best(work: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """Least wall-clock and least CPU seconds, and the result."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus), result


class CompressAI:
    """The same symbols in CompressAI's streams, one a chunk."""

    def __init__(self, ans: Any, symbols: list[np.ndarray], tables: Tables, step: np.ndarray, offset: np.ndarray):
        self.step, self.offset, self.shape = step[:, None, None], offset[:, None, None], symbols[0].shape
        rows = np.split(tables.frequency.astype(int), np.cumsum(tables.length)[:-1])
        self.cdf = np.zeros((len(rows), max(map(len, rows)) + 1), np.int32)
        for cdf, row in zip(self.cdf, rows, strict=True):
            cdf[1 : len(row) + 1] = np.cumsum(row) << (16 - PRECISION)
        self.length, self.minimum, self.decoder = tables.length + 1, tables.minimum, ans.RansDecoder()
        lists = [chunk.ravel().tolist() for chunk in symbols]
        self.streams = [ans.RansEncoder().encode_with_indexes(chunk, self.indexes(), *self.model()) for chunk in lists]

    def indexes(self) -> list[int]:
        channels, *sides = self.shape
        return np.broadcast_to(np.arange(channels)[:, None, None], (channels, *sides)).reshape(-1).tolist()

    def model(self) -> tuple[list[list[int]], list[int], list[int]]:
        return self.cdf.tolist(), self.length.tolist(), self.minimum.tolist()

    def decompress(self) -> list[np.ndarray]:
        result = []
        for stream in self.streams:
            values = self.decoder.decode_with_indexes(stream, self.indexes(), *self.model())
            result.append(np.array(values, np.float32).reshape(self.shape) * self.step + self.offset)
        return result


def blocks(latents: np.ndarray) -> Iterator[np.ndarray]:
    """(M, h, w) of each chunk."""
    edge = CHUNK // 16
    for row in range(0, latents.shape[0], edge):
        for column in range(0, latents.shape[1], edge):
            yield latents[row : row + edge, column : column + edge].transpose(2, 0, 1)


def compared(theirs: list[float], ours: list[float]) -> str:
    """Wall, CPU, and both divided by ours."""
    ratios = f"{theirs[0] / ours[0]:.1f}, {theirs[1] / ours[1]:.1f}"
    return f"{theirs[0]:9.3f}{theirs[1]:8.3f}{ratios:>13}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of reading latents.")
    parser.add_argument("--images", type=Path, metavar="FOLDER")
    parser.add_argument("--size", type=int, default=4096, help="a multiple of 256")
    parser.add_argument("--qualities", type=lambda text: [int(q) for q in text.split(",")], default=[1, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.size % CHUNK:
        parser.error("--size must be a multiple of 256")
    pixels = mosaic(arguments.images, arguments.size)
    ans, megapixels = compressai_ans(), pixels.size / 3e6
    print(f"{arguments.size} x {arguments.size} x 3, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(f"{'':16}{'latents':^21}{'compressai':^30}{'pixels':^30}")
    print(f"{'quality':>7}{'bits/px':>9}{'wall':>7}{'cpu':>7}{'MP/s':>7}" + f"{'wall':>9}{'cpu':>8}{'ratios':>13}" * 2)
    for quality in arguments.qualities:
        codec = CAECodec(quality=quality, channel_axis=2)
        store = zarr.storage.MemoryStore()
        array = zarr.create_array(
            store, shape=pixels.shape, chunks=(CHUNK, CHUNK, 3), dtype="uint8", serializer=codec, compressors=None
        )
        array[...] = pixels
        bits = 8e-6 * sum(len(value) for key, value in store._store_dict.items() if "zarr" not in key) / megapixels  # noqa: SLF001
        view = open_bottleneck(store)
        view[:16, :16]
        *seconds, latents = best(lambda view=view: view[...], arguments.repeats)
        line = f"{quality:7}{bits:9.3f}{seconds[0]:7.3f}{seconds[1]:7.3f}{megapixels / seconds[0]:7.0f}"
        if ans is None:
            line += f"{'-':>9}{'-':>8}{'-':>13}"
        else:
            weights = loaded(codec)
            row = weights.row(quality)
            step, offset = weights.tensors["step"][row], weights.tensors["offset"][row]
            symbols = [
                np.rint((block - offset[:, None, None]) / step[:, None, None]).astype(np.int16)
                for block in blocks(latents)
            ]
            theirs = CompressAI(ans, symbols, weights.tables[row], step, offset)
            *their_seconds, found = best(theirs.decompress, max(1, arguments.repeats - 1))
            if not all(map(np.array_equal, found, blocks(latents))):
                sys.exit("compressai's latents differ")
            line += compared(their_seconds, seconds)
        array[:CHUNK, :CHUNK]
        *pixel_seconds, _ = best(lambda array=array: array[...], max(1, arguments.repeats - 1))
        print(line + compared(pixel_seconds, seconds), flush=True)
    if ans is None:
        print("\ncompressai is not installed")


if __name__ == "__main__":
    main()
