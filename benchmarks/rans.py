"""Speed of `zarr_cae.coder.rans` and of `compressai.ans` on the same symbols, one core, one run.

    python benchmarks/rans.py [IMAGE ...] [--quality 1,4,8] [--repeats N]

The symbols are those of the images (default: the photograph that the package holds) under the bundled `mse` weights, in
tiles of at most 32 x 32 positions; `--quality 0` draws them from 192 Laplacian channels instead, whose scales fall from
3 to between 0.03 and 0.08, seed 1, 8 tiles of 32 x 32 positions (about 0.6 bit per pixel).

Two comparisons, both with the same probabilities, compressai's as 16-bit distribution functions. Ours finds the row of
each symbol from its context in the measured time; compressai is given the rows:

all symbols
    Every symbol of every tile, from arrays to arrays, as an image codec calls each coder. compressai's binding takes
    and returns Python lists. Making them is part of its time, as in CompressAI's own `EntropyBottleneck`; only the
    lists of distribution functions, which CompressAI also makes again for every image, are ready here.
without zero channels
    Only the channels of a tile that are not all zero, and only those symbols are counted: ours skips the others. All
    of compressai's lists are ready-made.

Times are CPU seconds (other programs on the machine disturb them less), the best of the repeats over all tiles.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from images import image_files, read_rgb
from measuring import least_seconds

from zarr_cae.coder import rans
from zarr_cae.coder.contexts import to_differences
from zarr_cae.coder.frequencies import trimmed_frequencies
from zarr_cae.coder.tables import PRECISION, Tables, ideal_bits, rows_of


def synthetic() -> tuple[np.ndarray, Tables]:
    rng = np.random.default_rng(1)
    scales = np.maximum(3 * np.exp(-np.arange(192) / 25), 0.03 + 0.05 * rng.random(192))
    edges = np.arange(-500, 502) - 0.5
    rows = []
    for scale in scales:
        tail = 0.5 * np.exp(-np.abs(edges) / scale)
        rows.append(trimmed_frequencies(np.abs(np.diff(np.where(edges < 0, tail, 1 - tail))), -500))
    tables = Tables(
        np.array([minimum for minimum, _ in rows]),
        np.array([row.size for _, row in rows]),
        np.concatenate([row for _, row in rows]),
    )
    return np.rint(rng.laplace(size=(8, 192, 32, 32)) * scales[:, None, None]).astype(np.int16), tables


def of_images(files: list[Path], quality: int) -> tuple[list[np.ndarray], Tables]:
    """Return the tiles of the images' symbols, each (M, h, w) int16, and their tables."""
    from zarr_cae.coder.frame import FrameHeader
    from zarr_cae.coder.tiles import tiles as tiles_of
    from zarr_cae.config import Settings
    from zarr_cae.networks.engine import engine_for
    from zarr_cae.pixels.convert import to_planes
    from zarr_cae.pixels.layout import Layout
    from zarr_cae.weights import registry
    from zarr_cae.weights.file import DEFAULT_MODEL

    digest = registry.default_digest(DEFAULT_MODEL, quality, "mse")
    loaded = registry.load(registry.find(digest, model=DEFAULT_MODEL, quality=quality, metric="mse").path)
    settings, tiles = Settings(), []
    for file in files:
        pixels = read_rgb(file)
        planes = to_planes(pixels, Layout(pixels.shape, 2), (0, 255))
        (symbols,) = engine_for(loaded, settings).analyse(planes, quality, settings).result()
        for _, _, patch in tiles_of(FrameHeader(1, *pixels.shape[:2], grey=False)):
            tiles.append(np.ascontiguousarray(symbols[:, patch.rows, patch.columns]))
    return tiles, loaded.tables[loaded.row(quality)]


def compressai_ans() -> ModuleType | None:
    """Load the extension module alone: the package around it needs a torchvision that matches torch."""
    package = importlib.util.find_spec("compressai")
    if package is None or not package.submodule_search_locations:
        return None
    spec = importlib.machinery.PathFinder.find_spec("ans", list(package.submodule_search_locations))
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(tiles: list[np.ndarray], tables: Tables, repeats: int) -> None:
    times = {version: ours(tiles, tables, version, repeats) for version in (tables.frame_version, 3)}
    total = sum(tile.size for tile in tiles)
    counted = sum(int(tile.any(axis=(1, 2)).sum()) * tile[0].size for tile in tiles)
    print(
        f"{len(tiles)} tiles, {tables.channels} channels, {total / 1e6:.2f} million symbols, {counted / total:.1%} of"
    )
    print("them in channels that are not all zero")
    ans = compressai_ans()
    if ans is None:
        print("compressai.ans is not installed: zarr_cae.rans alone")
    for name, all_symbols, count in (("all symbols", True, total), ("without zero channels", False, counted)):
        print(f"  {name:34}{'encode':>10}{'decode':>10}   million symbols/s")
        for version, (encode_s, decode_s) in times.items():
            print(
                f"    {f'zarr_cae.rans, version {version}':32}"
                f"{count / encode_s / 1e6:10.1f}{count / decode_s / 1e6:10.1f}"
            )
        if ans is not None:
            theirs = theirs_on(ans, tiles, tables, max(repeats // 5, 2), all_symbols=all_symbols)
            print(f"    {'compressai.ans':32}{count / theirs[0] / 1e6:10.1f}{count / theirs[1] / 1e6:10.1f}")
            print(f"    {'ratio to version 3':32}{theirs[0] / times[3][0]:10.1f}{theirs[1] / times[3][1]:10.1f}")


def ours(tiles: list[np.ndarray], tables: Tables, version: int, repeats: int) -> tuple[float, float]:
    """Return the CPU seconds of encoding and of decoding the streams of frames of this version."""

    def encode() -> list[bytes]:
        return [rans.encode(tile, tables, version) for tile in tiles]

    streams = encode()
    pairs = [(stream, tile.shape[1:]) for stream, tile in zip(streams, tiles, strict=True)]

    def decode() -> list[np.ndarray]:
        return [rans.decode(*pair, tables, version) for pair in pairs]

    encode_s = least_seconds(encode, repeats, time.process_time)
    decode_s, decoded = least_seconds(decode, repeats, time.process_time), decode()
    if not all(map(np.array_equal, decoded, tiles)):
        sys.exit("zarr_cae.coder.rans: decoded symbols differ")
    payload, ideal = sum(map(len, streams)), sum(ideal_bits(tile, tables) for tile in tiles) / 8
    print(f"version {version}: {payload} bytes, {payload / ideal:.4f} of the length under the integer tables")
    return encode_s, decode_s


def theirs_on(
    ans: ModuleType, tiles: list[np.ndarray], tables: Tables, repeats: int, *, all_symbols: bool
) -> tuple[float, float]:
    """Return the CPU seconds of compressai.ans for encoding and for decoding."""
    ends = [np.cumsum(row) for row in np.split(tables.frequency.astype(int), np.cumsum(tables.length)[:-1])]
    cdfs = [[0, *(end << (16 - PRECISION)).tolist()] for end in ends]
    model = (cdfs, [len(cdf) for cdf in cdfs], tables.minimum.tolist())
    kept, rows = [], []
    for tile in tiles:
        predicted = np.zeros(len(tile), bool) if tables.contexts is None else tables.contexts.predicted
        coded = to_differences(tile, predicted)
        chosen = np.arange(len(tile)) if all_symbols else np.flatnonzero(coded.any(axis=(1, 2)))
        kept.append(coded[chosen].ravel().astype(np.int32))
        rows.append(rows_of(coded, tables)[chosen].ravel())
    lists = [(symbols.tolist(), indexes.tolist()) for symbols, indexes in zip(kept, rows, strict=True)]
    encoder, decoder = ans.RansEncoder(), ans.RansDecoder()

    def encode() -> list[bytes]:
        if all_symbols:
            pairs = zip(kept, rows, strict=True)
            return [encoder.encode_with_indexes(s.tolist(), i.tolist(), *model) for s, i in pairs]
        return [encoder.encode_with_indexes(s, i, *model) for s, i in lists]

    streams = encode()

    def decode() -> list[Any]:
        if all_symbols:
            pairs = zip(streams, rows, strict=True)
            return [np.array(decoder.decode_with_indexes(s, i.tolist(), *model), np.int32) for s, i in pairs]
        return [decoder.decode_with_indexes(s, i, *model) for s, (_, i) in zip(streams, lists, strict=True)]

    encode_s = least_seconds(encode, repeats, time.process_time)
    decode_s, decoded = least_seconds(decode, repeats, time.process_time), decode()
    if not all(map(np.array_equal, decoded, kept)):
        sys.exit("compressai.ans: decoded symbols differ")
    return encode_s, decode_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--quality", default="1,4,8")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    files = image_files(arguments.images)
    for quality in map(int, arguments.quality.split(",")):
        if quality:
            print(f"\nquality {quality}, {len(files)} images")
            compare(*of_images(files, quality), arguments.repeats)
        else:
            print("\nLaplacian channels")
            tiles, tables = synthetic()
            compare(list(tiles), tables, arguments.repeats)


if __name__ == "__main__":
    main()
