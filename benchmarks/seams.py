"""How much larger errors are near the borders of chunks than in their middles; larger ones show as seams.

    python benchmarks/seams.py IMAGE [IMAGE ...] [--quality 3,4] [--metric mse] [--weights sha256:...]

Each image, cut to whole chunks of 256 x 256, is written and read through zarr. For pixels at a distance from the upper
or lower border of their chunk: the mean squared error in grey levels, and that of the means of 16 pixels along the
border, in which edges between smooth areas show. Columns less than 48 pixels from the sides are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import zarr
from images import image_files, read_rgb

from zarr_cae import CAECodec

CHUNK, SIDE, RUN = 256, 48, 16
DISTANCES = (0, 1, 2, 3, 4, 6, 8, 16, 32, 64, 127)


def errors(file: Path, codec: CAECodec) -> np.ndarray:
    """Return decoded less original of an image, (chunks, 256, 256, 3)."""
    pixels = read_rgb(file)
    rows, columns = (side // CHUNK for side in pixels.shape[:2])
    pixels = pixels[: rows * CHUNK, : columns * CHUNK]
    array = zarr.create_array(
        {}, shape=pixels.shape, chunks=(CHUNK, CHUNK, 3), dtype="uint8", serializer=codec, compressors=None
    )
    array[...] = pixels
    apart = np.asarray(array[...], np.float64) - pixels
    return apart.reshape(rows, CHUNK, columns, CHUNK, 3).swapaxes(1, 2).reshape(-1, CHUNK, CHUNK, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--quality", default="3,4")
    parser.add_argument("--metric", default="mse", choices=("mse", "ms-ssim"))
    parser.add_argument("--weights", metavar="DIGEST", help="other weights than the bundled ones")
    arguments = parser.parse_args()
    files = image_files(arguments.images)
    distance = np.minimum(np.arange(CHUNK), CHUNK - 1 - np.arange(CHUNK))
    print(f"{len(files)} images, {arguments.metric}\n{'px from the border':20}", end="")
    print("".join(f"{value:7d}" for value in DISTANCES))
    for quality in map(int, arguments.quality.split(",")):
        codec = CAECodec(quality, metric=arguments.metric, weights=arguments.weights, channel_axis=2)
        every = np.concatenate([errors(file, codec) for file in files])[:, :, SIDE : CHUNK - SIDE]
        means = every.reshape(*every.shape[:2], -1, RUN, 3).mean(3)
        for name, values in (("error", every), ("means along it", means)):
            line = [np.square(values[:, distance == value]).mean() for value in DISTANCES]
            print(f"q{quality} {name:17}" + "".join(f"{value:7.1f}" for value in line))


if __name__ == "__main__":
    main()
