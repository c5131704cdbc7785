"""Speed of reading all latents of an RGB array, against CompressAI's entropy decoder and against decoding the pixels.

    python benchmarks/bottleneck.py [--images FOLDER] [--size 4096] [--qualities 1,4,8] [--chunks 256,512]
                                    [--pipeline batched,fused] [--repeats 5]

The array is size x size x 3 in chunks of 256 x 256 and 512 x 512, in memory. It is made of the images in FOLDER (by
default the photograph in the package) and their mirror images. The pipelines are zarr's: the default one, and the fused
one of zarr >= 3.3. Times are the least of the repeats, in seconds of wall clock and in seconds of CPU over all
threads; other programs disturb the latter less. Ratios are to the time for latents. All three start from the same
stored bytes or symbols, and take turns, so that other programs disturb them alike:

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
from images import image_files, mosaic  # beside this file
from rans import compressai_ans  # beside this file

from zarr_cae import CAECodec, open_bottleneck
from zarr_cae.codec.cae import loaded
from zarr_cae.coder.tables import PRECISION, Tables

PIPELINES = {"batched": "BatchedCodecPipeline", "fused": "FusedCodecPipeline"}


def best(works: list[Callable[[], Any]], repeats: int) -> list[tuple[float, float]]:
    """Return the least wall-clock and the least CPU seconds of each, run in turns."""
    seconds = np.full((2, len(works)), np.inf)
    for _ in range(repeats):
        for i, work in enumerate(works):
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            found = time.perf_counter() - wall, time.process_time() - cpu
            seconds[:, i] = np.minimum(seconds[:, i], found)
    return [(float(wall), float(cpu)) for wall, cpu in seconds.T]


class CompressAI:
    """The same symbols in CompressAI's streams, one for each chunk."""

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


def blocks(latents: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    """Yield the latents (M, h, w) of each chunk."""
    edge = chunk // 16
    for row in range(0, latents.shape[0], edge):
        for column in range(0, latents.shape[1], edge):
            yield latents[row : row + edge, column : column + edge].transpose(2, 0, 1)


def compressai(ans: Any, codec: CAECodec, latents: np.ndarray, chunk: int) -> CompressAI:
    """Return a decoder of the same latents; exit if they differ."""
    weights = loaded(codec)
    row = weights.row(codec.quality)
    step, offset = weights.tensors["step"][row], weights.tensors["offset"][row]
    symbols = [
        np.rint((block - offset[:, None, None]) / step[:, None, None]).astype(np.int16)
        for block in blocks(latents, chunk)
    ]
    theirs = CompressAI(ans, symbols, weights.tables[row], step, offset)
    if not all(map(np.array_equal, theirs.decompress(), blocks(latents, chunk))):
        sys.exit("compressai's latents differ")
    return theirs


def compared(theirs: tuple[float, float] | None, ours: tuple[float, float]) -> str:
    """Return wall-clock and CPU seconds, and both divided by ours, as columns."""
    if theirs is None:
        return f"{'-':>9}{'-':>8}{'-':>13}"
    ratios = f"{theirs[0] / ours[0]:.1f}, {theirs[1] / ours[1]:.1f}"
    return f"{theirs[0]:9.3f}{theirs[1]:8.3f}{ratios:>13}"


def opened(store: Any, pipeline: str) -> tuple[Any, Any]:
    """Return the array in `store` as pixels and as latents, each after a first read."""
    with zarr.config.set({"codec_pipeline.path": f"zarr.core.codec_pipeline.{PIPELINES[pipeline]}"}):
        array, view = zarr.open_array(store, mode="r"), open_bottleneck(store)
        array[:256, :256], view[:16, :16]
    return array, view


def measure(pixels: np.ndarray, chunk: int, quality: int, pipelines: list[str], repeats: int) -> Iterator[str]:
    """Yield a line of results for each pipeline."""
    stored: dict[str, Any] = {}
    codec, store, ans = CAECodec(quality=quality, channel_axis=2), zarr.storage.MemoryStore(stored), compressai_ans()
    zarr.create_array(
        store, shape=pixels.shape, chunks=(chunk, chunk, 3), dtype="uint8", serializer=codec, compressors=None
    )[...] = pixels
    megapixels = pixels.size / 3e6
    bits = 8e-6 * sum(len(value) for key, value in stored.items() if "zarr" not in key) / megapixels
    nodes = [opened(store, pipeline) for pipeline in pipelines]
    theirs = None if ans is None else compressai(ans, codec, nodes[0][1][...], chunk)
    works: list[Callable[[], Any]] = [lambda view=view: view[...] for _, view in nodes]  # type: ignore[misc]
    times = best([*works, *([] if theirs is None else [theirs.decompress])], repeats)
    networks = best([lambda array=array: array[...] for array, _ in nodes], 2)  # type: ignore[misc]
    decompress = None if theirs is None else times[-1]
    for pipeline, ours, network in zip(pipelines, times, networks, strict=False):
        line = f"{chunk:5}{quality:9}{bits:9.3f}{pipeline:>10}{ours[0]:8.3f}{ours[1]:7.3f}{megapixels / ours[0]:7.0f}"
        yield line + compared(decompress, ours) + compared(network, ours)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of reading latents.")
    parser.add_argument("--images", type=Path, metavar="FOLDER")
    parser.add_argument("--size", type=int, default=4096, help="a multiple of the chunks")
    parser.add_argument("--qualities", type=numbers, default=[1, 4, 8])
    parser.add_argument("--chunks", type=numbers, default=[256, 512], help="their edges, multiples of 16")
    available = [name for name, pipeline in PIPELINES.items() if hasattr(zarr.core.codec_pipeline, pipeline)]
    parser.add_argument("--pipeline", type=lambda text: text.split(","), default=available)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if any(chunk % 16 or arguments.size % chunk for chunk in arguments.chunks):
        parser.error("--chunks must be multiples of 16, and --size one of them")
    if not set(arguments.pipeline) <= set(available):
        parser.error(f"--pipeline: this zarr has {', '.join(available)}")
    pixels = mosaic(image_files([arguments.images] if arguments.images else []), arguments.size)
    print(f"{arguments.size} x {arguments.size} x 3, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(f"{'':33}{'latents':^22}{'compressai':^30}{'pixels':^30}")
    print(f"{'chunk':>5}{'quality':>9}{'bits/px':>9}{'pipeline':>10}{'wall':>8}{'cpu':>7}{'MP/s':>7}", end="")
    print(f"{'wall':>9}{'cpu':>8}{'ratios':>13}" * 2)
    for chunk in arguments.chunks:
        for quality in arguments.qualities:
            for line in measure(pixels, chunk, quality, arguments.pipeline, arguments.repeats):
                print(line, flush=True)
    if compressai_ans() is None:
        print("\ncompressai is not installed")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
