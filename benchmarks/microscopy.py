"""Is quality monotone on dark and sparse images? PSNR and bytes of each quality, against JPEG XL at the same bytes.

    python benchmarks/microscopy.py FOLDER [--every N] [--crop 256] [--quality 1,2,3,4,5,6,7,8] [--against jpegxl]
        [--weights NAME]

The images are grey, 8 or 16 bits. A square of `--crop` pixels is cut from the middle of each, and coded as one chunk
by the bundled weights (those for photographs, or those of --weights), as it is and with value_transform="sqrt". JPEG XL
(effort 7) codes the same square at the setting whose bytes come nearest, in the same run. PSNR is in dB of the largest
value: 255 for 8 bits; for 16 bits 2^b - 1, where b is the number of bits that the image needs. JPEG XL gets such images
rounded to 8 bits.

The first table has means over the images. The second names the images on which a quality has a lower PSNR than the one
before it. `bias` is the mean of decoded minus original samples among the darkest half of an image, in thousandths of
the range.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
from domains import Picture, read
from images import image_files, middle

from zarr_cae import CAECodec
from zarr_cae.cli.arguments import several, table
from zarr_cae.cli.evaluate import code
from zarr_cae.evaluation.classical import CLASSICAL, match

TRANSFORMS = (None, "sqrt")


def at_the_same_bytes(picture: Picture, name: str, nbytes: int) -> float:
    """Return the PSNR of a classical codec at about the same number of bytes."""
    shallow = picture.pixels
    if shallow.dtype != np.uint8:
        shallow = np.rint(shallow * (255 / picture.peak)).astype(np.uint8)
    _, coded = match(CLASSICAL[name], shallow, "bytes", nbytes)
    decoded = coded.pixels if shallow is picture.pixels else coded.pixels * (picture.peak / 255)
    return picture.psnr(decoded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--quality", type=several(int), default=[*range(1, 9)])
    parser.add_argument("--weights", help="a name, such as histology, or a digest")
    parser.add_argument("--against", choices=[*CLASSICAL, "none"], default="jpegxl")
    arguments = parser.parse_args()
    files = image_files([arguments.folder])[:: arguments.every]
    whole = {file.name: read(file) for file in files}
    pictures = {name: Picture(middle(one.pixels, arguments.crop), one.peak) for name, one in whole.items()}
    pictures = {name: one for name, one in pictures.items() if one.pixels.ndim == 2 and np.ptp(one.pixels)}
    points: dict[tuple[str | None, int], list[tuple[float, ...]]] = defaultdict(list)
    falls = []
    for name, picture in pictures.items():
        dark = picture.pixels <= np.median(picture.pixels)
        for transform in TRANSFORMS:
            levels = []
            for quality in arguments.quality:
                value_range = None if picture.pixels.dtype == np.uint8 else (0, picture.peak)
                codec = CAECodec(
                    quality,
                    weights=arguments.weights,
                    channel_axis=None,
                    value_range=value_range,
                    value_transform=transform,
                )
                coded = code(picture.pixels, codec, None)
                levels.append(picture.psnr(coded.pixels))
                bias = 1000 * (coded.pixels[dark].astype(float) - picture.pixels[dark]).mean() / picture.peak
                against = arguments.against
                other = np.nan if against == "none" else at_the_same_bytes(picture, against, coded.nbytes)
                points[transform, quality].append((picture.bpp(coded.nbytes), levels[-1], other, bias))
            for (low, one), (high, two) in itertools.pairwise(zip(arguments.quality, levels, strict=True)):
                if two < one:
                    falls.append([name[:40], str(transform), f"{low} to {high}", f"{one:.2f}", f"{two:.2f}"])
    print(f"{len(pictures)} images, {arguments.crop} px\n")
    rows = [
        [str(transform), str(quality)]
        + [f"{value:.{n}f}" for value, n in zip(np.mean(found, 0), (3, 2, 2, 2), strict=True)]
        for (transform, quality), found in sorted(points.items(), key=str)
    ]
    print(table(["transform", "quality", "bpp", "PSNR dB", f"{arguments.against} dB", "bias"], rows))
    print(f"\nPSNR falls {len(falls)} times:\n")
    print(table(["image", "transform", "qualities", "dB before", "dB after"], falls) if falls else "never")


if __name__ == "__main__":
    main()
