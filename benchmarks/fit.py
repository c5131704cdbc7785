"""Bytes that fitted weights save over the minutes of a fit, on images of the collection that were held out.

    python benchmarks/fit.py FOLDER [--held-out FOLDER] [--minutes 1,2,5,10] [--quality 4] [--every 10] [--most 16]
        [--pattern '*'] [--held-out-pattern '*'] [--unlike FOLDER] [--clock wall]

For each time, weights are fitted to the images in FOLDER from the bundled ones (`zarr_cae.training.fit`). Those of
--held-out, or else every tenth by name, take no part. They are coded in chunks of 256 through zarr in memory, at all
qualities of the range, by the weights of the start and by the fitted ones. The table has the BD-rate in PSNR: bytes
more (+) or less (-) at equal PSNR, of means over the images, for the weights that the fit returns: if it does not take
the fitted ones, those of the start, and the last column says why. `own check` is the change on windows that the fit
itself held out. `unlike` is for images unlike the collection: those in --unlike FOLDER, or else the photograph in the
package. --pattern and --held-out-pattern take only the files whose names match, such as 'naip*'.

A fit runs by the clock. Where other work shares the machine, `--clock cpu` counts the processor time of this process
instead; with OMP_NUM_THREADS=1 these are minutes of one core.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from domains import Picture, difference, ours, read
from images import PHOTOGRAPH, image_files
from PIL import Image

from zarr_cae.cli.arguments import table
from zarr_cae.training import sampling
from zarr_cae.training.fit import fit_weights
from zarr_cae.training.model import RANGES
from zarr_cae.training.trainer import Trainer
from zarr_cae.weights.registry import CACHE_VARIABLE


def part(file: Path) -> sampling.ImageSource:
    """Return an image as a part of a collection, which is read when the fit samples it."""

    def opened() -> sampling.ImageStack:
        picture = read(file)
        value_range = None if picture.pixels.dtype == np.uint8 else (0, picture.peak)
        return sampling.ImageStack(picture.pixels, None if picture.pixels.ndim == 2 else 2, value_range)

    with Image.open(file) as image:
        return sampling.ImageSource(image.width * image.height, opened)


def main() -> None:
    def numbers(text: str) -> list[float]:
        return [float(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pattern", default="*", help="names of the images in FOLDER")
    parser.add_argument("--held-out", type=Path, help="folder of held-out images")
    parser.add_argument("--held-out-pattern", default="*")
    parser.add_argument("--unlike", type=Path, help="folder of images unlike the collection")
    parser.add_argument("--minutes", type=numbers, default=[1, 2, 5, 10])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--quality", type=int, default=4, help="any of the range to fit")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--most", type=int, default=16, help="held-out images")
    arguments = parser.parse_args()
    if arguments.clock == "cpu":
        Trainer.clock = staticmethod(time.process_time)
    files = [file for file in image_files([arguments.folder]) if file.match(arguments.pattern)]
    if arguments.held_out is None:
        held_out, files = (
            files[:: arguments.every],
            [file for place, file in enumerate(files) if place % arguments.every],
        )
    else:
        held_out = [file for file in image_files([arguments.held_out]) if file.match(arguments.held_out_pattern)]
    held_out = held_out[:: max(1, len(held_out) // arguments.most)][: arguments.most]
    unlike = [PHOTOGRAPH] if arguments.unlike is None else image_files([arguments.unlike])[: arguments.most]
    qualities = next(one for one in RANGES.values() if arguments.quality in one)
    tests: list[list[Picture]] = [[read(file) for file in group] for group in (held_out, unlike)]
    print(f"{len(files)} images to fit to, {len(held_out)} held out, {len(unlike)} unlike them", flush=True)
    parts = [part(file) for file in files]
    rows = []
    with TemporaryDirectory() as cache:
        os.environ[CACHE_VARIABLE] = cache
        for minutes in arguments.minutes:
            steps = [0]
            found = fit_weights(
                parts, minutes, quality=arguments.quality, report=lambda state, steps=steps: steps.append(state.step)
            )
            cells = []
            for pictures in tests:
                before, after = (
                    ours(pictures, dict.fromkeys(qualities, digest), 256) for digest in (found.start, found.digest)
                )
                cells.append(difference(before, after))
            own = f"{-100 * found.saved:+.1f} %"
            rows.append([f"{minutes:g}", str(steps[-1]), own, *cells, found.reason or "taken"])
            print(" | ".join(rows[-1]), flush=True)
    print(table(["minutes", "steps", "own check", "held out", "unlike", "result"], rows))


if __name__ == "__main__":
    main()
