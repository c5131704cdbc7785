"""Bytes and PSNR with refined latents (`cae.effort`) against plain ones, and what they cost in time.

    python benchmarks/effort.py IMAGE... [--effort 0,10,20,100] [--quality 1,3,5,7] [--chunks 256] [--weights NAME]
        [--crop 256] [--every 1]

Each argument is an image or a folder of images, and has a table of its own; RGB or grey, 8 bits. All are written and
read through zarr in memory, in one run. For each effort and quality the table has means over the images: bits per
pixel, PSNR in dB, and the time of encoding as a ratio to that of effort 0. Below are BD-rates in PSNR against effort 0:
bytes more (+) or less (-) at equal PSNR, between the lowest and the highest of the qualities. Points of a curve are
means over the images.

--effort    steps; 0 is always measured
--weights   a name or a digest that `zarr-cae weights list` shows
--crop      takes the middle of each image, of so many pixels a side
--every     takes every Nth image of each folder, by name
--grey      converts images to grey
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from images import Pixels, image_files
from PIL import Image

import zarr_cae
from zarr_cae import CAECodec
from zarr_cae.cli.arguments import table
from zarr_cae.cli.evaluate import code
from zarr_cae.cli.images import read_image
from zarr_cae.evaluation.bd_rate import bd_rate
from zarr_cae.evaluation.measures import bits_per_pixel, psnr

BEST = 80.0
"""PSNR in dB of an image that comes back with hardly an error."""
Point = tuple[float, float, float]
"""Bits per pixel, PSNR in dB, seconds: of an image, or means."""


def read(file: Path, arguments: argparse.Namespace) -> Pixels:
    pixels = read_image(file)
    if pixels.dtype != np.uint8:
        raise SystemExit(f"{file} is {pixels.dtype}; expected 8 bits")
    if arguments.grey:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if arguments.crop is not None:
        rows, columns = (max(0, side - arguments.crop) // 2 for side in pixels.shape[:2])
        pixels = pixels[rows : rows + arguments.crop, columns : columns + arguments.crop]
    return np.ascontiguousarray(pixels[..., :3] if pixels.ndim == 3 else pixels)


def measure(images: list[Pixels], effort: int, quality: int, arguments: argparse.Namespace) -> Point:
    points = []
    with zarr_cae.configure(effort=effort):
        for pixels in images:
            codec = CAECodec(quality, weights=arguments.weights, channel_axis=2 if pixels.ndim == 3 else None)
            coded = code(pixels, codec, arguments.chunks)
            level = min(psnr(pixels, coded.pixels), BEST)
            points.append((bits_per_pixel(coded.nbytes, *pixels.shape[:2]), level, coded.encode_seconds))
    bpp, level, seconds = np.mean(points, axis=0)
    return float(bpp), float(level), float(seconds)


def report(place: Path, arguments: argparse.Namespace) -> None:
    files = image_files([place])[:: arguments.every]
    images = [pixels for file in files if np.ptp(pixels := read(file, arguments))]
    print(f"\n{place.name}: {len(images)} images, {sum(image.ndim == 2 for image in images)} of them grey", flush=True)
    efforts = sorted({0, *arguments.effort})
    points: dict[tuple[int, int], Point] = {}
    rows = []
    for quality in arguments.quality:
        code(images[0], CAECodec(quality, weights=arguments.weights, channel_axis=None), arguments.chunks)  # warm up
        for effort in efforts:
            bpp, level, seconds = points[effort, quality] = measure(images, effort, quality, arguments)
            plain = points[0, quality]
            rows.append(
                [str(quality), str(effort), f"{bpp:.4f}", f"{100 * (bpp / plain[0] - 1):+.1f} %", f"{level:.2f}",
                 f"{level - plain[1]:+.2f}", f"{seconds / plain[2]:.0f}"]
            )  # fmt: skip
    print(table(["quality", "effort", "bpp", "bytes", "PSNR dB", "gain dB", "time ratio"], rows))
    if len(arguments.quality) < 2:
        return
    curves = {effort: [points[effort, quality] for quality in arguments.quality] for effort in efforts}
    (anchor_rate, anchor_level, _), *_ = (tuple(zip(*curve, strict=True)) for curve in curves.values())
    for effort in efforts[1:]:
        rate, level, seconds = zip(*curves[effort], strict=True)
        ratio = sum(seconds) / sum(second for _, _, second in curves[0])
        change = bd_rate(anchor_rate, anchor_level, rate, level)
        print(f"effort {effort}: BD-rate {change:+.1f} %, time of encoding x {ratio:.0f}", flush=True)


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--effort", type=numbers, default=[0, 10, 20, 100])
    parser.add_argument("--quality", type=numbers, default=[1, 3, 5, 7])
    parser.add_argument("--chunks", type=int, default=256)
    parser.add_argument("--weights", default="")
    parser.add_argument("--crop", type=int)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--grey", action="store_true")
    arguments = parser.parse_args()
    for place in arguments.images:
        report(place, arguments)


if __name__ == "__main__":
    main()
