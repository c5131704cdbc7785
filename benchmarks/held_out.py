"""The photographs that `zarr-cae train` keeps out of training, as PNG files, to measure weights on.

    python benchmarks/held_out.py IMAGES... OUT [--crop 128] [--every 2]

IMAGES are the paths that training was given, --crop its crops (smaller images are never used), --every takes each
second (third, ...) of them. For the table in RUNS.md, OLD and NEW being digests of weights of one range and metric:

    zarr-cae evaluate OUT --weights OLD --csv old.csv
    zarr-cae evaluate OUT --weights NEW --published old.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from zarr_cae.training.data import Crops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = Crops(arguments.images, crop=arguments.crop, seed=0).held_out_images[:: arguments.every]
    for number, pixels in enumerate(chosen):
        Image.fromarray(pixels).save(arguments.out / f"{number:03}.png")
    print(f"{len(chosen)} images in {arguments.out}")


if __name__ == "__main__":
    main()
