"""`zarr-cae demo`: write and read a photograph at three qualities through zarr, and show figures and a picture.

PSNR is the only measure that it prints: the others need the extra `compare`; see `zarr-cae evaluate`.

The photograph, `zarr_cae/data/astronaut.png`, is NASA's portrait of the astronaut Eileen Collins from the NASA Great
Images database (https://flic.kr/p/r9qvLn): no known copyright restrictions, released into the public domain. The
512 x 512 crop is the one that scikit-image distributes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zarr_cae.cli.arguments import Commands, command, progress, table
from zarr_cae.cli.images import Source, read_image, save_picture
from zarr_cae.cli.replacing import replacing_zarr
from zarr_cae.cli.writing import Options, new_array, stored_bytes, write
from zarr_cae.pixels.layout import Pixels

if TYPE_CHECKING:
    from PIL import Image

SOURCE = "Eileen Collins, NASA Great Images database (https://flic.kr/p/r9qvLn), public domain"
_QUALITIES = (1, 4, 8)
_DETAIL = (slice(64, 192), slice(160, 288))
"""Rows and columns of the part shown enlarged."""
_LABEL_HEIGHT, _GAP = 64, 8


@dataclass(frozen=True)
class _Result:
    quality: int
    pixels: Pixels
    nbytes: int
    encode_seconds: float
    decode_seconds: float


def add(commands: Commands) -> None:
    """Declare `demo`."""
    parser = command(
        commands, "demo", demo,
        "Encode a photograph that comes with the package at qualities 1, 4 and 8. Writes demo.zarr and a picture of "
        "original and reconstructions, demo.png, into a folder (earlier ones are replaced), and prints the figures.",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write; default: here")


def photograph() -> Pixels:
    """Return the photograph, (512, 512, 3) uint8."""
    with resources.as_file(resources.files("zarr_cae") / "data" / "astronaut.png") as path:
        return read_image(path)


def demo(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae demo`."""
    from zarr_cae.evaluation.measures import bits_per_pixel, psnr

    original = photograph()
    store = arguments.folder / "demo.zarr"
    results = _code(original, store)
    print(f"Photograph: {SOURCE}; {original.shape[1]} x {original.shape[0]} RGB\n")
    rows, captions = [], ["original"]
    for result in results:
        bpp = bits_per_pixel(result.nbytes, *original.shape[:2])
        decibels = psnr(original, result.pixels)
        rows.append(
            [
                str(result.quality), f"{bpp:.3f}", f"1 : {original.nbytes / result.nbytes:.1f}", f"{decibels:.2f}",
                f"{result.encode_seconds:.3f}", f"{result.decode_seconds:.3f}",
            ]
        )  # fmt: skip
        captions.append(f"quality {result.quality}: {bpp:.2f} bpp, {decibels:.1f} dB")
    print(table(["quality", "bpp", "ratio", "PSNR dB", "encode s", "decode s"], rows))
    picture = arguments.folder / "demo.png"
    save_picture(_side_by_side([original, *(result.pixels for result in results)], captions), picture)
    print(f"\nWrote {store} (zarr.open({str(store)!r})['q8'][...] reads it) and {picture}.")


def _code(original: Pixels, store: Path) -> list[_Result]:
    """Write all qualities into one group and read them back through zarr."""
    import zarr

    arrays = [
        new_array(Source(f"q{quality}", original, 2, ("y", "x", "c")), Options(quality)) for quality in _QUALITIES
    ]
    seconds = []
    with replacing_zarr(store, overwrite=True) as partial:
        zarr.create_group(partial)
        with progress(2 * len(arrays) + 1, "step", "demo") as bar:
            _warm_up(original)
            bar.update()
            for item in arrays:
                started = time.perf_counter()
                write([item], partial / item.source.name, item.megapixels, group=False)
                seconds.append(time.perf_counter() - started)
                bar.update()
            group = zarr.open_group(partial, mode="r")
            results = []
            for quality, item, encode_seconds in zip(_QUALITIES, arrays, seconds, strict=True):
                array = group[item.source.name]
                assert isinstance(array, zarr.Array)
                started = time.perf_counter()
                pixels = np.asarray(array[...])
                took = time.perf_counter() - started
                results.append(_Result(quality, pixels, stored_bytes(array), encode_seconds, took))
                bar.update()
    return results


def _warm_up(original: Pixels) -> None:
    """Load torch, the networks and the compiled coder, so that they are not part of the times."""
    import zarr

    from zarr_cae.codec.cae import CAECodec

    for quality in _QUALITIES:
        array = zarr.create_array(
            {}, data=original[:64, :64], chunks=(64, 64, 3), serializer=CAECodec(quality), compressors=None
        )
        array[...]


def _side_by_side(images: list[Pixels], captions: list[str]) -> Image.Image:
    """Draw the images in a row under their captions, and below each an enlarged detail."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = images[0].shape[:2]
    canvas = Image.new("RGB", (len(images) * (width + _GAP) + _GAP, _LABEL_HEIGHT + 2 * (height + _GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(32)
    for column, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        left = _GAP + column * (width + _GAP)
        draw.text((left + width // 2, _LABEL_HEIGHT // 2), caption, fill="black", font=font, anchor="mm")
        canvas.paste(Image.fromarray(pixels), (left, _LABEL_HEIGHT))
        detail = Image.fromarray(np.ascontiguousarray(pixels[_DETAIL]))
        canvas.paste(detail.resize((width, height), Image.Resampling.BICUBIC), (left, _LABEL_HEIGHT + height + _GAP))
    return canvas
