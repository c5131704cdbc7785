"""Convert a slide to OME-Zarr: speed, bytes, memory over time, the cost of an interruption and of glass.

The slide is made here: an OME-TIFF of JPEG tiles, white glass with a disc of tissue in the middle, whose texture is the
photograph of the package or the images of a folder. All figures of one run are of the same machine and the same slide.

    python benchmarks/slides.py                              # 2,048 x 2,048, some minutes
    python benchmarks/slides.py --side 20000 --tissue 0.3 --quality 6 --images FOLDER
    python benchmarks/slides.py --side 40000 --tissue 0.01 --quality 1 --only memory    # memory of a large slide

Parts, all by default:

    speed     `convert` against JPEG and JPEG XL at equal PSNR, in one process, with the same levels and chunks:
              imagecodecs' codecs in zarr arrays. `network` is the codec alone on tissue that lies in memory.
    memory    `convert` in a process of its own, and what it takes over time
    resume    the seconds that are lost by a kill -9 in the middle
    glass     slides without tissue: white, of another colour, and with the noise of a camera

`--shards 4096` is the edge of a shard in pixels. Rates are megapixels of level 0 a second.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import zarr
from imagecodecs.numcodecs import Jpeg, Jpegxl, register_codecs
from images import image_files, read_rgb  # beside this file
from measuring import timed

from zarr_cae import CAECodec
from zarr_cae.cli import main as zarr_cae
from zarr_cae.evaluation.measures import psnr
from zarr_cae.slides.pyramid import level_sizes, reduced
from zarr_cae.slides.sources import Slide, open_slide

TILE = 512


def textures(folder: Path | None) -> list[np.ndarray]:
    """Return at most 64 tiles of tissue, (512, 512, 3) uint8, from images that are spread over the folder."""
    files = image_files([] if folder is None else [folder])
    return [np.tile(read_rgb(file), (4, 4, 1))[:TILE, :TILE] for file in files[:: -(-len(files) // 64)]]


def make_slide(path: Path, side: int, tissue: float, images: list[np.ndarray], glass: list[np.ndarray]) -> None:
    """Write a square slide whose tissue is a disc that covers a part of it; the rest is glass."""
    radius = math.sqrt(tissue / math.pi) * side
    middle = side / 2
    coded = [imagecodecs.jpeg8_encode(image, level=90, colorspace="RGB", outcolorspace="YCBCR", subsampling=(2, 2))
             for image in [*glass, *images]]  # fmt: skip

    def tiles() -> Iterator[bytes]:
        number = 0
        for row in range(0, side, TILE):
            for column in range(0, side, TILE):
                inside = math.hypot(row + TILE / 2 - middle, column + TILE / 2 - middle) < radius
                number += inside
                place = len(glass) + number % len(images) if inside else (row + column) // TILE % len(glass)
                yield coded[place]

    metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as file:
        file.write(
            tiles(), shape=(side, side, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="ycbcr", compression="jpeg",
            subsampling=(2, 2), metadata=metadata,
        )  # fmt: skip


def options(quality: int, shards: int) -> list[str]:
    """Return the options of `convert` that all parts share."""
    return ["--quality", str(quality), "--shards", str(shards)]


def watch(process: subprocess.Popen[bytes]) -> list[tuple[float, float]]:
    """Return (seconds, megabytes) of the memory of a process, about every half second until it ends. Linux only."""
    started, seen = time.perf_counter(), []
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            break
        now = time.perf_counter() - started
        seen.extend((now, int(line.split()[1]) / 1000) for line in lines if line.startswith("VmRSS:"))
        time.sleep(0.5)
    if process.wait():
        raise SystemExit("the conversion failed")
    return seen


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def convert(slide: Path, out: Path, chosen: list[str]) -> float:
    """Convert in this process, without output; return the seconds."""
    with contextlib.redirect_stdout(io.StringIO()):
        seconds, failed = timed(lambda: zarr_cae(["convert", str(slide), str(out), *chosen]))
    if failed:
        raise SystemExit("the conversion failed")
    return seconds


def process(slide: Path, out: Path, chosen: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "zarr_cae", "convert", str(slide), str(out), *chosen]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def memory(slide: Path, out: Path, chosen: list[str], side: int) -> float:
    """Convert in a process of its own, and print its speed and its memory; return the seconds."""
    seconds, seen = timed(lambda: watch(process(slide, out, chosen)))
    print(f"alone        {seconds:8.1f} s  {side**2 / seconds / 1e6:7.2f} MP/s with start-up  {size(out):,} bytes")
    if seen:
        print(f"  memory at most {max(megabytes for _, megabytes in seen):.0f} MB; over time (s: MB):")
        print("  " + ", ".join(f"{at:.0f}: {megabytes:.0f}" for at, megabytes in seen[:: max(1, len(seen) // 20)]))
    return seconds


def resume(slide: Path, out: Path, chosen: list[str], whole: float) -> None:
    """Kill a conversion at half its time, go on, and print the seconds that were lost."""
    started = time.perf_counter()
    running = process(slide, out, chosen)
    try:
        running.wait(whole / 2)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGKILL)
        running.wait()
    if not out.exists() and process(slide, out, chosen).wait():
        raise SystemExit("the conversion failed")
    took = time.perf_counter() - started
    print(f"resume       {took:8.1f} s, {took - whole:.1f} s lost by a kill after {whole / 2:.0f} s")


def in_memory(codec: CAECodec, pixels: np.ndarray) -> float:
    """Return the seconds of writing tissue to an array in memory, the second time."""
    array = zarr.create_array(
        {}, shape=pixels.shape, chunks=(TILE, TILE, 3), dtype="uint8", serializer=codec, compressors=None
    )
    array[...] = pixels
    return timed(lambda: array.__setitem__(..., pixels))[0]


def setting(encode: Callable[[np.ndarray, float], bytes], decode: Any, tiles: list[np.ndarray], goal: float,
            low: float, high: float, whole: bool) -> float:  # fmt: skip
    """Return the setting between `low` (worse) and `high` whose mean PSNR is nearest to the goal."""
    found = []
    for _ in range(7):
        middle = round((low + high) / 2) if whole else (low + high) / 2
        value = float(np.mean([psnr(np.asarray(decode(encode(tile, middle))), tile) for tile in tiles]))
        found.append((abs(value - goal), middle))
        low, high = (middle, high) if value < goal else (low, middle)
    return min(found)[1]


def through_zarr(slide: Path, out: Path, codec: Any) -> float:
    """Convert a slide to a pyramid of another codec; return the seconds."""

    def work() -> None:
        opened = open_slide(slide)
        side = opened.shape[-1]
        below = np.empty((-(-side // 2), -(-side // 2), 3), np.uint8)
        for level, (edge, _) in enumerate(level_sizes(side, side, TILE)):
            array = zarr.create_array(
                out, name=str(level), shape=(edge, edge, 3), chunks=(TILE, TILE, 3), dtype="uint8", zarr_format=2,
                compressors=codec, filters=None, fill_value=255, config={"write_empty_chunks": False},
            )  # fmt: skip
            current, below = below, np.empty((-(-edge // 2), -(-edge // 2), 3), np.uint8)
            for row in range(0, edge, 4096):
                for column in range(0, edge, 4096):
                    rows, columns = (slice(start, min(start + 4096, edge)) for start in (row, column))
                    if level == 0:
                        pixels = opened.read((slice(0, 3), rows, columns))
                    else:
                        pixels = current[rows, columns].transpose(2, 0, 1)
                    smaller = reduced(pixels).transpose(1, 2, 0)
                    array[rows, columns] = pixels.transpose(1, 2, 0)
                    below[row // 2 : row // 2 + smaller.shape[0], column // 2 : column // 2 + smaller.shape[1]] = (
                        smaller
                    )
        opened.close()

    return timed(work)[0]


def speed(slide: Path, folder: Path, arguments: argparse.Namespace) -> None:
    """Print speed and bytes of `convert` and of classical codecs at the same PSNR, and the network's own speed."""
    side, quality = arguments.side, arguments.quality
    tiles = tissue_tiles(slide, arguments.tissue)
    pixels = np.concatenate(list(tiles.values()))
    rate = pixels.size / 3e6 / in_memory(CAECodec(quality), pixels)
    seconds = convert(slide, folder / "speed.ome.zarr", options(quality, arguments.shards))
    goal = mean_psnr(folder / "speed.ome.zarr" / "0", tiles)
    stored = size(folder / "speed.ome.zarr")
    tissue = arguments.tissue * 4 / 3 * side**2 / 1e6
    print(f"network      {rate:7.2f} MP/s of tissue in memory")
    print(f"convert      {seconds:8.1f} s  {side**2 / seconds / 1e6:7.2f} MP/s  {stored:,} bytes, PSNR {goal:.2f} dB")
    print(
        f"             the network alone takes {100 * tissue / rate / seconds:.0f} % of it for the tissue of all levels"
    )
    jpeg = setting(lambda tile, level: imagecodecs.jpeg8_encode(tile, level=int(level)), imagecodecs.jpeg8_decode,
                    list(tiles.values()), goal, 1, 100, whole=True)  # fmt: skip
    others: list[tuple[str, Any]] = [(f"JPEG {jpeg}", Jpeg(level=int(jpeg)))]
    for effort in (3, 7):
        distance = setting(
            lambda tile, d, effort=effort: imagecodecs.jpegxl_encode(tile, distance=d, effort=effort),
            imagecodecs.jpegxl_decode, list(tiles.values()), goal, 15, 0.1, whole=False,
        )  # fmt: skip
        others.append(
            (f"JPEG XL {distance:.2f}, effort {effort}", Jpegxl(distance=distance, effort=effort, lossless=False))
        )
    for name, codec in others:
        out = folder / "other.zarr"
        took = through_zarr(slide, out, codec)
        at = mean_psnr(out / "0", tiles)
        print(f"{name:<24} {took:8.1f} s  {side**2 / took / 1e6:7.2f} MP/s, {seconds / took:.2f} times convert's  "
              f"{size(out):,} bytes, {size(out) / stored:.2f} times; PSNR {at:.2f} dB", flush=True)  # fmt: skip
        shutil.rmtree(out)


def read_tile(opened: Slide, row: int, column: int) -> np.ndarray:
    window = (slice(0, 3), slice(row, row + TILE), slice(column, column + TILE))
    return np.ascontiguousarray(opened.read(window).transpose(1, 2, 0))


def tissue_tiles(slide: Path, tissue: float) -> dict[tuple[int, int], np.ndarray]:
    """Return up to 16 tiles of tissue, (512, 512, 3), from the middle of a slide, by their first row and column."""
    opened = open_slide(slide)
    side = opened.shape[-1]
    radius = math.sqrt(tissue / math.pi) * side
    row = side // 2 // TILE * TILE
    columns = [start for start in range(0, side - TILE + 1, TILE) if abs(start + TILE / 2 - side / 2) < radius - TILE]
    tiles = {}
    for column in (columns or [row])[:16]:
        tiles[row, column] = read_tile(opened, row, column)
    opened.close()
    return tiles


def mean_psnr(archive: Path, tiles: dict[tuple[int, int], np.ndarray]) -> float:
    """Return the mean PSNR of an archive at the places of some tiles."""
    opened = open_slide(archive)
    found = [psnr(read_tile(opened, row, column), tile) for (row, column), tile in tiles.items()]
    return float(np.mean(found))


def glass(folder: Path, side: int, quality: int, shards: int) -> None:
    """Print the speed and the bytes of slides that show nothing."""
    white = np.full((TILE, TILE, 3), 255, np.uint8)
    noise = np.random.default_rng(0).normal(0, 4, (7, *white.shape))
    kinds = {
        "white": [white],
        "one colour": [np.full_like(white, 243)],
        "noisy": list(np.clip(243 + noise, 0, 255).astype(np.uint8)),
    }
    for name, tiles in kinds.items():
        slide = folder / "glass.ome.tif"
        make_slide(slide, side, 0, [], tiles)
        out = folder / "glass.ome.zarr"
        seconds = convert(slide, out, options(quality, shards))
        stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != "zarr.json")
        print(f"glass, {name:<12} {seconds:8.1f} s  {side**2 / seconds / 1e6:7.2f} MP/s  {stored:,} bytes of chunks")
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048, help="rows and columns of the slide")
    parser.add_argument("--tissue", type=float, default=0.3, help="part of the slide that is no glass")
    parser.add_argument("--quality", type=int, default=1)
    parser.add_argument("--shards", type=int, default=4096, help="rows and columns of a shard")
    parser.add_argument("--images", type=Path, help="folder of images to cut the tissue from")
    parser.add_argument("--only", choices=("speed", "memory", "resume", "glass"))
    arguments = parser.parse_args()
    register_codecs()
    images = textures(arguments.images)
    chosen = options(arguments.quality, arguments.shards)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slide = folder / "slide.ome.tif"
        white = np.full((TILE, TILE, 3), 255, np.uint8)
        seconds, _ = timed(lambda: make_slide(slide, arguments.side, arguments.tissue, images, [white]))
        print(f"made {slide.stat().st_size:,} bytes in {seconds:.0f} s", flush=True)
        only, whole = arguments.only, 0.0
        if only in (None, "speed"):
            speed(slide, folder, arguments)
        if only in (None, "memory", "resume"):
            whole = memory(slide, folder / "a.ome.zarr", chosen, arguments.side)
        if only in (None, "resume"):
            resume(slide, folder / "b.ome.zarr", chosen, whole)
        if only in (None, "glass"):
            glass(folder, arguments.side, arguments.quality, arguments.shards)


if __name__ == "__main__":
    main()
