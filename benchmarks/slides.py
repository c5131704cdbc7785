"""Convert a slide to OME-Zarr: speed, bytes, memory over time, and what an interruption costs.

The slide is made here: an OME-TIFF of JPEG tiles, white glass with tissue in the middle, whose texture is the
photograph of the package or the images of a folder. All figures of one run are of the same machine and the same slide.

    python benchmarks/slides.py                              # 2,048 x 2,048, a minute
    python benchmarks/slides.py --side 20000 --tissue 0.3 --quality 6 --images FOLDER
    python benchmarks/slides.py --side 40000 --tissue 0.01 --quality 1 --only convert    # memory of a large slide

Rates are megapixels of level 0 a second. `network` is the codec alone on chunks that lie in memory, `JPEG` and
`JPEG XL` are the same tiles read, coded by imagecodecs and written to files, one after the other, without a pyramid.
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import zarr
from PIL import Image

from zarr_cae import CAECodec
from zarr_cae.slides.sources import open_slide

TILE = 512


def textures(folder: Path | None) -> list[np.ndarray]:
    """Return tiles of tissue, (512, 512, 3) uint8."""
    if folder is None:
        with resources.as_file(resources.files("zarr_cae") / "data" / "astronaut.png") as path:
            files = [path]
            images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    else:
        images = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.glob("*.*"))[:64]]
    return [np.tile(image, (4, 4, 1))[:TILE, :TILE] for image in images]


def make_slide(path: Path, side: int, tissue: float, images: list[np.ndarray]) -> None:
    """Write a square slide whose tissue is a disc that covers a part of it."""
    radius = math.sqrt(tissue / math.pi) * side
    middle = side / 2
    glass = np.full((TILE, TILE, 3), 255, np.uint8)
    coded = [imagecodecs.jpeg8_encode(image, level=90, colorspace="RGB", outcolorspace="YCBCR", subsampling=(2, 2))
             for image in [glass, *images]]  # fmt: skip

    def tiles() -> Iterator[bytes]:
        number = 0
        for row in range(0, side, TILE):
            for column in range(0, side, TILE):
                inside = math.hypot(row + TILE / 2 - middle, column + TILE / 2 - middle) < radius
                number += inside
                yield coded[1 + number % len(images)] if inside else coded[0]

    metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as file:
        file.write(
            tiles(), shape=(side, side, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="ycbcr", compression="jpeg",
            subsampling=(2, 2), metadata=metadata,
        )  # fmt: skip


def command(slide: Path, out: Path, quality: int) -> list[str]:
    """Return the command that converts a slide."""
    return [sys.executable, "-m", "zarr_cae", "convert", str(slide), str(out), "--quality", str(quality)]


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


def convert(slide: Path, out: Path, quality: int, side: int) -> float:
    """Convert in a process of its own, print speed, bytes and memory; return the seconds."""
    started = time.perf_counter()
    seen = watch(subprocess.Popen(command(slide, out, quality)))
    seconds = time.perf_counter() - started
    level = size(out / "0")
    print(f"convert      {seconds:8.1f} s  {side**2 / seconds / 1e6:7.2f} MP/s  {size(out):,} bytes; level 0 {level:,}")
    if seen:
        print(f"  memory at most {max(megabytes for _, megabytes in seen):.0f} MB; over time (s: MB):")
        print("  " + ", ".join(f"{at:.0f}: {megabytes:.0f}" for at, megabytes in seen[:: max(1, len(seen) // 20)]))
    return seconds


def resume(slide: Path, out: Path, quality: int, whole: float) -> None:
    """Kill a conversion at half its time, go on, and print the seconds that were lost."""
    process = subprocess.Popen(command(slide, out, quality))
    started = time.perf_counter()
    try:
        process.wait(whole / 2)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not out.exists():
        subprocess.run(command(slide, out, quality), check=True)
    print(f"resume       {time.perf_counter() - started:8.1f} s, {time.perf_counter() - started - whole:.1f} s lost")


def network(images: list[np.ndarray], quality: int) -> None:
    """Print the speed of the codec alone on tissue."""
    pixels = np.concatenate([images[number % len(images)] for number in range(4)])
    array = zarr.create_array(
        {}, shape=pixels.shape, chunks=(TILE, TILE, 3), dtype="uint8", serializer=CAECodec(quality), compressors=None
    )
    array[:TILE] = pixels[:TILE]
    started = time.perf_counter()
    array[...] = pixels
    seconds = time.perf_counter() - started
    print(f"network      {seconds:8.1f} s  {pixels.size / 3e6 / seconds:7.2f} MP/s of tissue")


def tile_by_tile(slide: Path, out: Path, side: int) -> None:
    """Print speed and bytes of plain conversions to JPEG and JPEG XL."""
    for name, encode in (
        ("JPEG", lambda tile: imagecodecs.jpeg8_encode(tile, level=80)),
        ("JPEG XL", lambda tile: imagecodecs.jpegxl_encode(tile, distance=2.0, effort=3)),
    ):
        opened = open_slide(slide)
        total, started = 0, time.perf_counter()
        out.mkdir(exist_ok=True)
        for row in range(0, side, TILE):
            for column in range(0, side, TILE):
                window = (slice(0, 3), slice(row, min(row + TILE, side)), slice(column, min(column + TILE, side)))
                content = encode(np.ascontiguousarray(opened.read(window).transpose(1, 2, 0)))
                (out / f"{row}.{column}").write_bytes(content)
                total += len(content)
        seconds = time.perf_counter() - started
        opened.close()
        print(f"{name:<12} {seconds:8.1f} s  {side**2 / seconds / 1e6:7.2f} MP/s  {total:,} bytes, without a pyramid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048, help="rows and columns of the slide")
    parser.add_argument("--tissue", type=float, default=0.3, help="part of the slide that is no glass")
    parser.add_argument("--quality", type=int, default=1)
    parser.add_argument("--images", type=Path, help="folder of images to cut the tissue from")
    parser.add_argument("--only", choices=("convert", "resume", "network", "tiles"))
    arguments = parser.parse_args()
    images = textures(arguments.images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slide = folder / "slide.ome.tif"
        started = time.perf_counter()
        make_slide(slide, arguments.side, arguments.tissue, images)
        print(f"made {slide.stat().st_size:,} bytes in {time.perf_counter() - started:.0f} s", flush=True)
        only, whole = arguments.only, 0.0
        if only in (None, "convert", "resume"):
            whole = convert(slide, folder / "a.ome.zarr", arguments.quality, arguments.side)
        if only in (None, "resume"):
            resume(slide, folder / "b.ome.zarr", arguments.quality, whole)
        if only in (None, "network"):
            network(images, arguments.quality)
        if only in (None, "tiles"):
            tile_by_tile(slide, folder / "tiles", arguments.side)
        shutil.rmtree(folder / "tiles", ignore_errors=True)


if __name__ == "__main__":
    main()
