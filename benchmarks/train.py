"""Train all bundled networks on, one after the other, in one command that can be given again after an interruption.

    python benchmarks/train.py IMAGES... --out FOLDER --minutes 240 [--device cuda] [--only mse-low,mse-high]
        [--crop 256] [--crops-per-quality 8] [--rate 1e-3] [--seed 0] [--name histology]
        [--rehearse]

IMAGES are folders and tar files, such as those that split.py makes: everything in train/ for the general family, one
domain for one with a --name. Each of the four networks (mse and ms-ssim, qualities 1 to 5 and 6 to 8) starts from the
bundled weights, or where an earlier command with the same --out left it, and gets an equal share of the minutes. Crops
are larger and batches bigger than on a CPU, in bfloat16.

FOLDER/mse-low and so on get checkpoint.pt every two minutes, log.csv with validations on held-out images, and at the
end the weights file. A checkpoint from an interrupted run can be exported as it stands: `zarr-cae train IMAGES --out
FOLDER/mse-low --export-only`. At the end the commands are printed that measure the new weights.

--rehearse trains each network for two steps of one small crop, to see that all of it works.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import cast

from zarr_cae.training.data import read_images
from zarr_cae.training.model import RANGES, Range
from zarr_cae.training.run import train_network
from zarr_cae.training.start import Start
from zarr_cae.training.trainer import Progress, Recipe
from zarr_cae.weights import registry
from zarr_cae.weights.file import DEFAULT_MODEL, Metric

NETWORKS = ("mse-low", "mse-high", "ms-ssim-low", "ms-ssim-high")
EVERY = 30


class Report:
    """Prints validations, and now and then the state of the training."""

    def __init__(self, name: str) -> None:
        self._name, self._last = name, 0.0

    def __call__(self, progress: Progress) -> None:
        if not progress.validation and time.monotonic() - self._last < EVERY:
            return
        self._last = time.monotonic()
        points = ", ".join(
            f"{bits:.3f}/{level:.2f}" for bits, level in zip(progress.bits_per_pixel, progress.psnr, strict=True)
        )
        kind = "held out" if progress.validation else f"loss {progress.loss:.3f}"
        print(
            f"{self._name} step {progress.step}, {progress.fraction:.1%}, "
            f"{progress.step / progress.seconds:.2f} steps/s, {kind}: bit/px and dB {points}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=240, help="of training, of all networks together")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(NETWORKS))
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--crops-per-quality", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the family; default none, which makes weights of the general one")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(NETWORKS):
        parser.error(f"unknown networks: {', '.join(sorted(unknown))}; choose from {', '.join(NETWORKS)}")
    images = read_images(arguments.images)
    digests: dict[str, str] = {}
    for name in arguments.only:
        metric, _, rates = name.rpartition("-")
        qualities = RANGES[cast("Range", rates)]
        start = Start.find(registry.default_digest(DEFAULT_MODEL, qualities[0], metric))
        length = {"steps": 2} if arguments.rehearse else {"minutes": arguments.minutes / len(arguments.only)}
        small = {"crop": 96, "crops_per_quality": 1} if arguments.rehearse else {}
        recipe = Recipe(
            cast("Range", rates), cast("Metric", metric), rate=arguments.rate, seed=arguments.seed,
            lambdas=start.lambdas, bfloat16=True,
            **{"crop": arguments.crop, "crops_per_quality": arguments.crops_per_quality, **small, **length},
        )  # fmt: skip
        folder = arguments.out / name
        resume = (folder / "checkpoint.pt").is_file()
        info = train_network(
            images, folder, recipe, start, resume, Report(name), device=arguments.device, name=arguments.name
        )
        digests[name] = info.digest
        print(f"{name}: {info.digest}\n  zarr-cae weights import {info.path}", flush=True)
    print("\nThen, for held-out images (mse) and for Kodak:")
    squared = [digest for name, digest in digests.items() if name.startswith("mse")]
    if squared:
        print(f"  python benchmarks/domains.py HELDOUT/* --weights {','.join(squared)}")
    for name, digest in digests.items():
        print(f"  zarr-cae evaluate KODAK --weights {digest} --chunks 256 --published CURVES.json  # {name}")


if __name__ == "__main__":
    main()
