"""Measure what a fourth channel costs beside RGB: `CAECodec(colour=(0, 1, 2))` against RGB alone and four grey planes.

    python benchmarks/channels.py IMAGE [IMAGE ...] [--quality 4]

An image with an alpha channel is taken as it is. One without gets these fourth channels, one after the other:

* opaque: 255 everywhere.
* cut-out: the brighter half of the image, with soft outlines.
* fade: 255 at the left edge, falling to 0 at the right edge.
* grey: the luminance, as the stand-in for an infrared band, which has the outlines and the texture of the image.

Columns: bytes of the four channels with `colour`, and without, as multiples of the bytes of RGB alone; PSNR in dB of
the fourth channel with `colour`, and of RGB with it less that of RGB alone.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from PIL import Image, ImageFilter
from zarr.storage import MemoryStore

from zarr_cae import CAECodec
from zarr_cae.evaluation.measures import psnr

BEST = 99.0
"""PSNR in dB that counts for equal pixels, so that means over images are finite."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--quality", type=int, default=4)
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, ...]]] = {}
    for path in arguments.images:
        with Image.open(path) as image:
            pictures = with_fourth_channel(image)
        for name, pixels in pictures.items():
            found.setdefault(name, []).append(measured(pixels, arguments.quality))
    print(f"{'fourth channel':16} {'images':>6} {'colour / RGB':>12} {'grey / RGB':>10} {'PSNR':>6} {'of RGB':>7}")
    for name, rows in found.items():
        colour, grey, fourth, change = np.mean(rows, axis=0)
        print(f"{name:16} {len(rows):6} {colour:12.3f} {grey:10.2f} {fourth:6.2f} {change:+7.3f}")


def with_fourth_channel(image: Image.Image) -> dict[str, Any]:
    """Return pictures of four channels, (height, width, 4) uint8, by the kind of the fourth channel."""
    if "A" in image.getbands():
        return {"alpha of file": np.asarray(image.convert("RGBA"))}
    rgb, grey = np.asarray(image.convert("RGB")), np.asarray(image.convert("L"))
    bright = Image.fromarray(255 * (grey > np.median(grey)).astype(np.uint8)).filter(ImageFilter.MedianFilter(9))
    fourth = {
        "opaque": np.full_like(grey, 255),
        "cut-out": np.asarray(bright.filter(ImageFilter.GaussianBlur(1))),
        "fade": np.broadcast_to(np.linspace(255, 0, grey.shape[1]).astype(np.uint8), grey.shape),
        "grey": grey,
    }
    return {name: np.dstack([rgb, channel]) for name, channel in fourth.items()}


def measured(pixels: Any, quality: int) -> tuple[float, float, float, float]:
    """Return two ratios of bytes, the PSNR of the fourth channel, and the change of that of RGB."""
    alone, decoded_alone = coded(pixels[..., :3], CAECodec(quality, channel_axis=-1))
    colour, decoded = coded(pixels, CAECodec(quality, channel_axis=-1, colour=(0, 1, 2)))
    grey, _ = coded(pixels, CAECodec(quality, channel_axis=-1))
    change = psnr(decoded[..., :3], pixels[..., :3]) - psnr(decoded_alone, pixels[..., :3])
    return colour / alone, grey / alone, min(psnr(decoded[..., 3], pixels[..., 3]), BEST), change


def coded(pixels: Any, codec: CAECodec) -> tuple[int, Any]:
    """Return the bytes of all chunks, and the decoded pixels."""
    chunks = (min(256, pixels.shape[0]), min(256, pixels.shape[1]), pixels.shape[2])
    array = zarr.create_array(
        MemoryStore(), shape=pixels.shape, chunks=chunks, dtype="uint8", compressors=None, serializer=codec,
        config={"write_empty_chunks": True},
    )  # fmt: skip
    array[...] = pixels
    return array.nbytes_stored(), array[...]


if __name__ == "__main__":
    main()
