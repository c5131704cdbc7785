"""`train`: networks for the user's own images, from the start or from weights that are there."""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from zarr_cae.cli.arguments import Commands, command, note, progress, refuse
from zarr_cae.cli.weights_files import described
from zarr_cae.weights import registry
from zarr_cae.weights.file import DEFAULT_MODEL, METRICS, WeightsInfo

if TYPE_CHECKING:
    from zarr_cae.training.data import Crops
    from zarr_cae.training.loop import Progress, Recipe, Trainer

_COLUMNS = ("step", "seconds", "quality", "bpp", "psnr", "ms_ssim")
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
    parser.add_argument("--metric", choices=METRICS, help="what to train for; default mse")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_positive(int), help="length of the schedule; default 20000")
    length.add_argument("--minutes", type=_positive(float), help="length of the schedule in minutes of training")
    parser.add_argument("--crop", type=_positive(int), help="edge of the training crops; default 128, ms-ssim 192")
    parser.add_argument("--crops-per-quality", type=_positive(int), help="crops a step at each quality; default 3")
    parser.add_argument("--rate", type=_positive(float), help="peak learning rate; default 2e-3, with --from 4e-4")
    parser.add_argument("--seed", type=int, help="default 0")
    parser.add_argument(
        "--holdout", type=_positive(float), metavar="SHARE", help="of the images, kept out of training; default 0.05"
    )
    parser.add_argument(
        "--lambdas", type=_numbers, metavar="A,B,...",
        help="weight of the distortion at each quality of the range, ascending: larger for a higher rate. With --from, "
        "default what that was trained with, and gains start between those that it has",
    )  # fmt: skip
    parser.add_argument(
        "--density-only", action="store_true", default=None,
        help="with --from: leave the transforms as they are; train only the density that the rate is estimated by, and "
        "fit contexts and tables to IMAGES. Minutes instead of hours",
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


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


_numbers.__name__ = "list of numbers"


def train(arguments: argparse.Namespace) -> None:
    """`zarr-cae train`."""
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
    crops = _export_only(arguments, checkpoint) if arguments.export_only else _run(arguments, folder, checkpoint)
    info = _export(folder, checkpoint, crops)
    print(described(info))
    print(f"Make it known with `zarr-cae weights import {info.path}`.")


def _crops(arguments: argparse.Namespace, recipe: Recipe) -> Crops:
    from zarr_cae.training.data import Crops

    paths = [Path(path) for path in arguments.paths]
    return Crops(paths, crop=recipe.crop, seed=recipe.seed, holdout=recipe.holdout)


def _export_only(arguments: argparse.Namespace, checkpoint: Path) -> Crops:
    """Only read the images."""
    from zarr_cae.training.loop import Recipe, prepare, read_checkpoint

    prepare(arguments.device, arguments.threads)
    return _crops(arguments, Recipe(**read_checkpoint(checkpoint)["recipe"]))


def _run(arguments: argparse.Namespace, folder: Path, checkpoint: Path) -> Crops:
    """Set up a trainer, run it to the end of its schedule, and return its images."""
    from zarr_cae.training.loop import Trainer, prepare, train

    device = prepare(arguments.device, arguments.threads)
    start = None if arguments.start is None else _Start.find(arguments.start)
    recipe = _recipe(arguments, checkpoint, start)
    crops = _crops(arguments, recipe)
    trainer = Trainer(recipe, crops, device=device)
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.resume:
        trainer.load(checkpoint)
    else:
        run = {
            "images": len(crops), "sources": [Path(path).name for path in arguments.paths], "device": device,
            "torch": version("torch"), "from": arguments.start if start is None else start.name,
        }  # fmt: skip
        (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n", "utf-8")
        if start is not None:
            start.put_into(trainer)
    note(f"{len(crops)} images, {device}, {'resumed at' if arguments.resume else 'from'} step {trainer.step}")
    with _Display(trainer, folder / "log.csv") as display, _interrupt_between_steps() as check:

        def report(progress: Progress) -> None:
            display(progress)
            check()

        try:
            train(trainer, checkpoint, report)
        except KeyboardInterrupt:
            trainer.save(checkpoint)
            note(f"saved {checkpoint} at step {trainer.step}; --resume goes on from it, --export-only exports it")
            raise
    return crops


@dataclass(frozen=True)
class _Start:
    """Where `--from` starts: an exported file or a checkpoint."""

    name: str
    rates: str
    metric: str
    lambdas: tuple[float, ...]
    exported: WeightsInfo | None
    checkpoint: Path | None

    @classmethod
    def find(cls, text: str) -> _Start:
        from zarr_cae.training.loop import Recipe, read_checkpoint, trained_lambdas
        from zarr_cae.training.model import RANGES

        if not text.startswith("sha256:"):
            if not Path(text).is_file():
                refuse(f"{text} is neither sha256:<digest> nor a checkpoint file")
            recipe = Recipe(**read_checkpoint(Path(text))["recipe"])
            return cls(Path(text).name, recipe.rates, recipe.metric, recipe.lambdas, None, Path(text))
        registry.check_digest(text)
        info = next((info for info in registry.available() if info.digest == text), None)
        if info is None:
            refuse(f"weights {text} are not on this machine; see `zarr-cae weights list`")
        rates = next((name for name, qualities in RANGES.items() if qualities == info.qualities), None)
        if rates is None or info.model != DEFAULT_MODEL:
            refuse(f"weights {text} are of {info.model!r}; only {DEFAULT_MODEL!r} can be trained")
        return cls(info.digest, rates, info.metric, trained_lambdas(info), info, None)

    def put_into(self, trainer: Trainer) -> None:
        """Give the trainer's network these weights."""
        if self.exported is not None:
            trainer.start_from(registry.load(self.exported.path))
        elif self.checkpoint is not None:
            trainer.start_from_checkpoint(self.checkpoint)


def _recipe(arguments: argparse.Namespace, checkpoint: Path, start: _Start | None) -> Recipe:
    """From the checkpoint or the defaults, and over these whatever was given."""
    from zarr_cae.training.loop import Recipe, read_checkpoint

    given = {
        "rates": arguments.range, "metric": arguments.metric, "crop": arguments.crop, "seed": arguments.seed,
        "crops_per_quality": arguments.crops_per_quality, "rate": arguments.rate,
        "bfloat16": arguments.bfloat16, "lambdas": arguments.lambdas, "density_only": arguments.density_only,
        "holdout": arguments.holdout,
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


def _export(folder: Path, checkpoint: Path, crops: Crops) -> WeightsInfo:
    """The averaged network of a checkpoint as a weights file, its tables fitted to the images."""
    from zarr_cae.training.export import export
    from zarr_cae.training.loop import Recipe, read_checkpoint
    from zarr_cae.training.model import GainedAutoencoder

    state = read_checkpoint(checkpoint)
    recipe = Recipe(**state["recipe"])
    model = GainedAutoencoder(recipe.rates)
    model.load_state_dict(state["average"])
    model.project()
    run = folder / "run.json"
    provenance = {
        "recipe": asdict(recipe), "steps": state["step"], "minutes": round(state["seconds"] / 60, 1),
        **(json.loads(run.read_text("utf-8")) if run.is_file() else {}),
    }  # fmt: skip
    return registry.store(export(model, recipe.metric, provenance, crops.tiles()), folder)


class _Display:
    """The progress bar, and validations in log.csv and on stderr."""

    def __init__(self, trainer: Trainer, log: Path) -> None:
        self._trainer, self._log, self._shown = trainer, log, 0.0
        qualities = trainer.model.qualities
        self._rows = sorted({0, len(qualities) // 2, len(qualities) - 1})

    def __enter__(self) -> Self:
        self._bar = progress(1, "run", "train", bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}{postfix}")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, report: Progress) -> None:
        if report.validation:
            self._write(report)
        elif time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            self._bar.n = report.fraction
            self._bar.set_postfix_str(f"step {report.step}, loss {report.loss:.3f}, {self._points(report)}")

    def _points(self, report: Progress) -> str:
        qualities = self._trainer.model.qualities
        return ", ".join(
            f"q{qualities[row]} {report.bits_per_pixel[row]:.3f} bpp {report.psnr[row]:.2f} dB" for row in self._rows
        )

    def _write(self, report: Progress) -> None:
        if not self._bar.disable:
            self._bar.write(f"step {report.step}, held-out images: {self._points(report)}", file=sys.stderr)
        new = not self._log.exists()
        with self._log.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(_COLUMNS)
            for row, level in enumerate(self._trainer.model.qualities):
                similarity = "" if report.ms_ssim is None else f"{report.ms_ssim[row]:.5f}"
                writer.writerow(
                    [
                        report.step, f"{self._trainer.seconds:.1f}", level, f"{report.bits_per_pixel[row]:.4f}",
                        f"{report.psnr[row]:.3f}", similarity,
                    ]
                )  # fmt: skip


@contextmanager
def _interrupt_between_steps() -> Iterator[Any]:
    """Put Ctrl-C off to the next call of what this gives, so that no checkpoint is of half a step."""
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
