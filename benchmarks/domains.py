"""Bytes at equal PSNR on folders of images: given weights against the default ones and classical codecs.

    python benchmarks/domains.py FOLDER... [--weights DIGEST,...] [--every N] [--quality 2,3,4,5,6,7]
        [--against jpeg,webp,jpegxl,jpegxl3,avif] [--points 6] [--chunks 256]

Images are RGB or grey, 8 or 16 bits. All are coded in chunks by the weights for mse, through zarr in memory; the
classical codecs code whole images at `--points` settings (`zarr_cae.evaluation.classical`: AVIF at speed 6 and 4:4:4,
JPEG XL at efforts 7 and 3), all in the same run. The table has BD-rates in PSNR: bytes more (+) or less (-) than the
codec of the column needs. Points of a curve are means over the images of bits per pixel and of PSNR in dB.

--weights   digests of weights files, or names of bundled weights. Files of different ranges of quality that follow one
            another form one family, for instance the low and the high range.
--every     takes every Nth image of each folder, by name
--chunks    edge of a chunk in pixels. Where it does not divide the images, chunks are padded, as at the edge of an
            array

16-bit images: the largest value is taken as 2^b - 1, where b is the number of bits that the image needs. The classical
codecs get such images rounded to 8 bits, which costs them nothing at these rates, and PSNR is taken on the original.
An image that a codec gives back within 80 dB counts as 80 dB.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from images import image_files
from numpy.typing import NDArray

from zarr_cae import CAECodec
from zarr_cae.cli.arguments import table
from zarr_cae.cli.evaluate import code
from zarr_cae.cli.images import read_image
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.bd_rate import bd_rate
from zarr_cae.evaluation.classical import CLASSICAL, code_classical, spread
from zarr_cae.evaluation.measures import bits_per_pixel, psnr
from zarr_cae.weights.registry import available

BEST = 80.0
Curve = tuple[list[float], list[float]]
"""Mean bits per pixel, and mean PSNR in dB."""


@dataclass(frozen=True)
class Picture:
    """An image and its largest possible value."""

    pixels: NDArray[Any]
    peak: int

    def psnr(self, decoded: NDArray[Any]) -> float:
        return min(psnr(self.pixels, decoded, self.peak), BEST)

    def bpp(self, nbytes: int) -> float:
        return bits_per_pixel(nbytes, *self.pixels.shape[:2])


def read(file: Path) -> Picture:
    pixels = read_image(file)
    if pixels.dtype == np.uint8:
        return Picture(pixels, 255)
    if pixels.dtype != np.uint16:
        raise SystemExit(f"{file} is {pixels.dtype}; expected 8 or 16 bits")
    return Picture(pixels, 2 ** max(8, int(pixels.max()).bit_length()) - 1)


def families(digests: Iterable[str], qualities: list[int]) -> list[dict[int, str]]:
    """Return which weights code which quality, for each family."""
    covered = {info.digest: set(info.qualities) for info in available()}
    result: list[dict[int, str]] = []
    for digest in digests:
        if digest.startswith("sha256:") and digest not in covered:
            raise SystemExit(f"{digest} is not on this machine; see `zarr-cae weights import`")
        own = dict.fromkeys(sorted(covered.get(digest, set(qualities)) & set(qualities)), digest)
        if result and not own.keys() & result[-1].keys():
            result[-1].update(own)
        else:
            result.append(own)
    return result


def ours(pictures: list[Picture], family: dict[int, str | None], chunks: int) -> Curve:
    rates, decibels = [], []
    for quality in sorted(family):
        points = []
        for picture in pictures:
            axis = 2 if picture.pixels.ndim == 3 else None
            value_range = None if picture.pixels.dtype == np.uint8 else (0, picture.peak)
            codec = CAECodec(quality, weights=family[quality] or "", channel_axis=axis, value_range=value_range)
            coded = code(picture.pixels, codec, chunks)
            points.append((picture.bpp(coded.nbytes), picture.psnr(coded.pixels)))
        rate, level = np.mean(points, axis=0)
        rates.append(float(rate))
        decibels.append(float(level))
    return rates, decibels


def classical(pictures: list[Picture], name: str, count: int) -> Curve:
    rates, decibels = [], []
    for setting in spread(CLASSICAL[name].settings, count):
        points = []
        for picture in pictures:
            deep = picture.pixels.dtype != np.uint8
            shallow = np.rint(picture.pixels * (255 / picture.peak)).astype(np.uint8) if deep else picture.pixels
            coded = code_classical(CLASSICAL[name], shallow, setting)
            decoded = coded.pixels * (picture.peak / 255) if deep else coded.pixels
            points.append((picture.bpp(coded.nbytes), picture.psnr(decoded)))
        rate, level = np.mean(points, axis=0)
        rates.append(float(rate))
        decibels.append(float(level))
    return rates, decibels


def difference(anchor: Curve, tested: Curve) -> str:
    try:
        return f"{bd_rate(*anchor, *tested):+.1f} %"
    except CAEConfigurationError as error:  # for instance curves without a common range
        return f"- ({str(error).removeprefix('cae: ')})"


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    pictures = [read(file) for file in image_files([folder])[:: arguments.every]]
    pictures = [picture for picture in pictures if np.ptp(picture.pixels)]  # flat ones have no PSNR to speak of
    print(
        f"\n{folder.name}: {len(pictures)} images, {sum(p.pixels.ndim == 2 for p in pictures)} of them grey", flush=True
    )
    if not pictures:
        return
    curves = {"default": ours(pictures, dict.fromkeys(arguments.quality), arguments.chunks)}
    for family in families(arguments.weights, arguments.quality):
        name = ", ".join(digest[:15] for digest in dict.fromkeys(family.values()))
        curves[name] = ours(pictures, dict(family), arguments.chunks)
    others = {CLASSICAL[name].title: classical(pictures, name, arguments.points) for name in arguments.against}
    rows = [
        [name, "" if name == "default" else difference(curves["default"], curve)]
        + [difference(other, curve) for other in others.values()]
        for name, curve in curves.items()
    ]
    print(table(["weights", "against default", *others], rows))
    rows = [
        [name, f"{bpp:.3f}", f"{level:.2f}"]
        for name, curve in {**curves, **others}.items()
        for bpp, level in zip(*curve, strict=True)
    ]
    print("\n" + table(["points", "bpp", "PSNR dB"], rows), flush=True)


def main() -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--weights", type=names, default=[])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--quality", type=lambda text: [int(word) for word in text.split(",")], default=[*range(2, 8)])
    parser.add_argument("--against", type=names, default=["jpeg", "webp", "jpegxl", "jpegxl3", "avif"])
    parser.add_argument("--points", type=int, default=6)
    parser.add_argument("--chunks", type=int, default=256)
    arguments = parser.parse_args()
    if unknown := set(arguments.against) - set(CLASSICAL):
        parser.error(f"unknown codecs: {', '.join(sorted(unknown))}; choose from {', '.join(CLASSICAL)}")
    for folder in arguments.folders:
        measure(folder, arguments)


if __name__ == "__main__":
    main()
