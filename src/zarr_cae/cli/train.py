"""`train`: the arguments and the display of `training.run.train_network`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from zarr_cae.cli.arguments import Commands, command, note, progress, refuse
from zarr_cae.cli.weights_files import described
from zarr_cae.weights.file import METRICS, NAME, WeightsInfo

if TYPE_CHECKING:
    from zarr_cae.training.start import Start
    from zarr_cae.training.trainer import Progress, Recipe

_FINE_TUNING_RATE = 4e-4
"""Peak learning rate from weights that are good already; a higher one would first undo them."""


def add(commands: Commands) -> None:
    """Declare `train`."""
    parser = command(
        commands, "train", train,
        "Train a network on images (files, folders, tar files). Writes checkpoint.pt, log.csv with validations on "
        "images kept out of training, and at the end <digest>.safetensors into a folder. Ctrl-C saves a checkpoint, "
        "from which --resume goes on.",
    )  # fmt: skip
    parser.add_argument("paths", nargs="*", metavar="IMAGES", help="image files, folders or tar files")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--range", choices=("low", "high"), help="qualities 1 to 5 (default) or 6 to 8")
    parser.add_argument("--metric", choices=METRICS, help="measure to train for; default mse")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_positive(int), help="length of the schedule; default 20000")
    length.add_argument("--minutes", type=_positive(float), help="length of the schedule in minutes of training")
    parser.add_argument("--crop", type=_positive(int), help="edge of the training crops; default 128, ms-ssim 192")
    parser.add_argument("--crops-per-quality", type=_positive(int), help="crops a step at each quality; default 3")
    parser.add_argument("--rate", type=_positive(float), help="peak learning rate; default 2e-3, with --from 4e-4")
    parser.add_argument("--seed", type=int, help="seed of the random choices; default 0")
    parser.add_argument(
        "--name", type=_family, help="name of the family, such as histology, for CAECodec(weights=NAME); default none"
    )
    parser.add_argument(
        "--holdout",
        type=_positive(float),
        metavar="SHARE",
        help="share of the images to keep out of training; default 0.05",
    )
    parser.add_argument(
        "--patterns", type=_share, metavar="SHARE",
        help="share of the crops that become checkerboards, dithers, mosaics and noise; default 0.03",
    )  # fmt: skip
    parser.add_argument(
        "--lambdas", type=_numbers, metavar="A,B,...",
        help="weight of the distortion at each quality of the range, ascending: larger for a higher rate. With --from, "
        "the default is the lambdas of those weights; the gains start from an interpolation of theirs",
    )  # fmt: skip
    parser.add_argument(
        "--density-only", action="store_true", default=None,
        help="with --from: leave the transforms as they are; train only the density that estimates the rate, and fit "
        "contexts and tables to IMAGES. Minutes instead of hours",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--bfloat16", action="store_true", default=None,
        help="multiply in bfloat16 where it does little harm: faster on GPUs and on CPUs with AMX",
    )  # fmt: skip
    parser.add_argument("--threads", type=_positive(int), metavar="N", help="CPU threads")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from FOLDER/checkpoint.pt and its settings")
    start.add_argument(
        "--from", dest="start", metavar="DIGEST|CHECKPOINT", help="start from these weights (sha256:...) or this .pt"
    )
    start.add_argument(
        "--export-only",
        action="store_true",
        help="only export FOLDER/checkpoint.pt as it stands, with tables fitted to IMAGES",
    )


def _positive(number: type[int | float]) -> Any:
    def parse(text: str) -> float:
        value = number(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {number.__name__}"
    return parse


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


_share.__name__ = "share"


def _family(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError
    return text


_family.__name__ = "name"


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


_numbers.__name__ = "list of numbers"


def train(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae train`."""
    folder: Path = arguments.out
    checkpoint = folder / "checkpoint.pt"
    if (arguments.resume or arguments.export_only) and not checkpoint.is_file():
        refuse(f"{checkpoint} does not exist")
    if not arguments.paths:
        refuse("give images to train on, or to fit the tables of the export to")
    if arguments.density_only and arguments.start is None and not arguments.resume:
        refuse("--density-only needs a trained network: give --from")
    if checkpoint.exists() and not (arguments.resume or arguments.export_only):
        refuse(f"{checkpoint} exists; go on with --resume, or give another --out")
    info = _export(arguments) if arguments.export_only else _train(arguments, folder, checkpoint)
    print(described(info))
    print(f"Make it known with `zarr-cae weights import {info.path}`.")


def _export(arguments: argparse.Namespace) -> WeightsInfo:
    from zarr_cae.training.run import export_checkpoint, load_crops, prepare_process
    from zarr_cae.training.trainer import Recipe, read_checkpoint

    prepare_process(arguments.device, arguments.threads)
    recipe = Recipe(**read_checkpoint(arguments.out / "checkpoint.pt")["recipe"])
    return export_checkpoint(arguments.out, load_crops(arguments.paths, recipe), arguments.name)


def _train(arguments: argparse.Namespace, folder: Path, checkpoint: Path) -> WeightsInfo:
    from zarr_cae.training.run import train_network
    from zarr_cae.training.start import Start

    start = None if arguments.start is None else Start.find(arguments.start)
    recipe = _recipe(arguments, checkpoint, start)
    with _Display(folder) as display, _interrupt_between_steps() as check:

        def report(progress: Progress) -> None:
            display(progress)
            check()

        try:
            return train_network(
                arguments.paths, folder, recipe, start, arguments.resume, report,
                device=arguments.device, threads=arguments.threads, name=arguments.name,
            )  # fmt: skip
        except KeyboardInterrupt:
            if checkpoint.is_file():
                note(f"saved {checkpoint}; --resume goes on from it, --export-only exports it")
            raise


def _recipe(arguments: argparse.Namespace, checkpoint: Path, start: Start | None) -> Recipe:
    """Return the recipe of the checkpoint, or the default one, changed by the arguments that were given."""
    from zarr_cae.training.trainer import Recipe, read_checkpoint

    given = {
        "rates": arguments.range, "metric": arguments.metric, "crop": arguments.crop, "seed": arguments.seed,
        "crops_per_quality": arguments.crops_per_quality, "rate": arguments.rate,
        "bfloat16": arguments.bfloat16, "lambdas": arguments.lambdas, "density_only": arguments.density_only,
    "holdout": arguments.holdout, "patterns": arguments.patterns,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    length: dict[str, Any] = {}
    if arguments.steps is not None:
        length = {"steps": arguments.steps, "minutes": None}
    elif arguments.minutes is not None:
        length = {"minutes": arguments.minutes}
    if arguments.resume:
        recipe = Recipe(**read_checkpoint(checkpoint)["recipe"])
        changed = sorted(name for name, value in given.items() if getattr(recipe, name) != value)
        if changed:
            refuse(f"--resume keeps the checkpoint's {', '.join(changed)}; only --steps or --minutes may change")
        return replace(recipe, **length)
    chosen: dict[str, Any] = {"rates": "low"}
    if start is not None:
        chosen = {"rates": start.rates, "metric": start.metric, "rate": _FINE_TUNING_RATE}
        if given.get("rates", start.rates) != start.rates:
            refuse(f"{start.name} is a network of the {start.rates} range, not {given['rates']}")
        if given.get("metric", start.metric) == start.metric:
            chosen["lambdas"] = start.lambdas
    if given.get("metric", chosen.get("metric")) == "ms-ssim":
        chosen["crop"] = 192
    return Recipe(**{**chosen, **given, **length})


class _Display:
    """The progress bar, and validations on stderr."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._begun, self._shown = folder, False, 0.0

    def __enter__(self) -> Self:
        self._bar = progress(1, "run", "train", bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}{postfix}")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, report: Progress) -> None:
        if not self._begun:
            self._begun = True
            run = json.loads((self._folder / "run.json").read_text("utf-8"))
            note(f"{run['images']} images, {run['device']}, from step {report.step - (not report.validation)}")
        if report.validation:
            if not self._bar.disable:
                self._bar.write(f"step {report.step}, held-out images: {_points(report)}", file=sys.stderr)
        elif time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            self._bar.n = report.fraction
            self._bar.set_postfix_str(f"step {report.step}, loss {report.loss:.3f}, {_points(report)}")


def _points(report: Progress) -> str:
    """Return rate and PSNR at the lowest, the middle and the highest quality."""
    last = len(report.qualities) - 1
    return ", ".join(
        f"q{report.qualities[row]} {report.bits_per_pixel[row]:.3f} bpp {report.psnr[row]:.2f} dB"
        for row in sorted({0, (last + 1) // 2, last})
    )


@contextmanager
def _interrupt_between_steps() -> Iterator[Any]:
    """Delay Ctrl-C until the next call of the function that this yields: between two steps."""
    asked = threading.Event()

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    def ask(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt  # the second time at once
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
