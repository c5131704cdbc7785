"""Bytes and PSNR with refined latents (`cae.effort`) against plain ones, and what they cost in time.

    python benchmarks/effort.py IMAGE... [--effort 0,10,20,100] [--quality 1,3,5,7] [--chunks 256] [--weights NAME]
        [--crop 256] [--every 1]

Each argument is an image or a folder of images, and has a table of its own; RGB or grey, 8 or 16 bits. All are written
and read through zarr in memory, in one run. For each effort and quality the table has means over the images: bits per
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
from domains import Picture
from domains import read as read_picture
from images import image_files, middle
from PIL import Image

import zarr_cae
from zarr_cae import CAECodec
from zarr_cae.cli.arguments import table
from zarr_cae.cli.evaluate import code
from zarr_cae.evaluation.bd_rate import bd_rate

Point = tuple[float, float, float]
"""Bits per pixel, PSNR in dB, seconds: of an image, or means."""


def read(file: Path, arguments: argparse.Namespace) -> Picture:
    picture = read_picture(file)
    pixels = picture.pixels[..., :3] if picture.pixels.ndim == 3 else picture.pixels
    if arguments.grey and pixels.dtype == np.uint8:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if arguments.crop is not None:
        pixels = middle(pixels, arguments.crop)
    return Picture(np.ascontiguousarray(pixels), picture.peak)


def codec_for(picture: Picture, quality: int, arguments: argparse.Namespace) -> CAECodec:
    value_range = None if picture.pixels.dtype == np.uint8 else (0, picture.peak)
    axis = 2 if picture.pixels.ndim == 3 else None
    return CAECodec(quality, weights=arguments.weights, channel_axis=axis, value_range=value_range)


def measure(pictures: list[Picture], effort: int, quality: int, arguments: argparse.Namespace) -> Point:
    points = []
    with zarr_cae.configure(effort=effort):
        for picture in pictures:
            coded = code(picture.pixels, codec_for(picture, quality, arguments), arguments.chunks)
            points.append((picture.bpp(coded.nbytes), picture.psnr(coded.pixels), coded.encode_seconds))
    bpp, level, seconds = np.mean(points, axis=0)
    return float(bpp), float(level), float(seconds)


def report(place: Path, arguments: argparse.Namespace) -> None:
    files = image_files([place])[:: arguments.every]
    pictures = [picture for file in files if np.ptp((picture := read(file, arguments)).pixels)]  # flat ones: no PSNR
    grey = sum(picture.pixels.ndim == 2 for picture in pictures)
    print(f"\n{place.name}: {len(pictures)} images, {grey} of them grey", flush=True)
    efforts = sorted({0, *arguments.effort})
    points: dict[tuple[int, int], Point] = {}
    rows = []
    for quality in arguments.quality:
        code(pictures[0].pixels, codec_for(pictures[0], quality, arguments), arguments.chunks)  # loads the networks
        for effort in efforts:
            bpp, level, seconds = points[effort, quality] = measure(pictures, effort, quality, arguments)
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
