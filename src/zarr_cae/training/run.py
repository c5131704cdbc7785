"""Train a network, from images to a weights file: `train_network` and its parts."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.pixels.layout import Pixels
from zarr_cae.training.data import Crops, read_images
from zarr_cae.training.export import export
from zarr_cae.training.model import GainedAutoencoder
from zarr_cae.training.start import Start
from zarr_cae.training.trainer import Progress, Recipe, Trainer, read_checkpoint
from zarr_cae.weights import registry
from zarr_cae.weights.file import WeightsInfo

_VALIDATION_STEPS = 500
_CHECKPOINT_SECONDS = 120
_COLUMNS = ("step", "seconds", "quality", "bpp", "psnr", "ms_ssim")


def train_network(
    images: Sequence[str | Path] | Sequence[Pixels],
    out: str | Path,
    recipe: Recipe,
    start: Start | str | Path | None = None,
    resume: bool = False,
    report: Callable[[Progress], None] | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    name: str | None = None,
) -> WeightsInfo:
    """Train a network on images and export it as a weights file.

    Writes `run.json` (where the data came from), `checkpoint.pt` every two minutes, `log.csv` with the validations on
    images kept out of training, and at the end `<digest>.safetensors`.

    Parameters
    ----------
    images
        Image files, folders or tar files of 8-bit images; or images in memory, uint8 (H, W, 3) each.
    out
        The folder of the run. It is made if it does not exist.
    recipe
        Range of qualities, metric, length and all other settings of the run.
    start
        Weights to start from: `sha256:<digest>`, a checkpoint or what `Start.find` returns. None starts from a
        Karhunen-Loève transform of the images.
    resume
        Go on from `checkpoint.pt` in the folder. `start` is ignored then.
    report
        Called after each step and each validation. If it raises KeyboardInterrupt, a checkpoint is saved first.
    device
        "auto" (CUDA if there is any), "cpu" or "cuda".
    threads
        Threads of torch on the CPU. None leaves torch's own choice.
    name
        The name of the family that the weights get, such as "histology", for `CAECodec(weights=...)`. None for none.

    Returns
    -------
    WeightsInfo
        The exported file, in the folder `out`. `zarr_cae.weights.registry.store` makes it known to codecs.

    Raises
    ------
    CAEConfigurationError
        If images or weights cannot be read or do not fit the recipe, the device does not exist, or the loss is not
        finite.

    Examples
    --------
    >>> from zarr_cae.training.run import Recipe, train_network
    >>> info = train_network(["photos.tar"], "run", Recipe("low", minutes=60))  # doctest: +SKIP
    """
    folder = Path(out)
    device = prepare_process(device, threads)
    begin = start if start is None or isinstance(start, Start) else Start.find(start)

    # The data, and a network that begins as a KLT of them, as the weights given, or as the checkpoint left it.
    crops = load_crops(images, recipe)
    trainer = Trainer(recipe, crops, device=device)
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        trainer.load(folder / "checkpoint.pt")
    else:
        if begin is not None:
            begin.put_into(trainer)
        run = {
            "images": len(crops), "device": device,
            "sources": [Path(one).name for one in images if isinstance(one, str | Path)],
            "torch": version("torch"), "from": None if begin is None else begin.name,
        }  # fmt: skip
        (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n", "utf-8")

    _train(trainer, folder, report or (lambda _: None))

    # The averaged network in half precision, with contexts and tables fitted to the images.
    return export_checkpoint(folder, crops, name)


def _train(trainer: Trainer, folder: Path, report: Callable[[Progress], None]) -> None:
    """Train to the end: a step, now and then a validation, now and then a checkpoint."""
    checkpoint, log = folder / "checkpoint.pt", folder / "log.csv"
    saved = time.monotonic()
    try:
        while trainer.fraction < 1:
            report(trainer.train_step())
            if trainer.step % _VALIDATION_STEPS == 0:
                report(_logged(trainer.validate(), log))
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                trainer.save(checkpoint)
                saved = time.monotonic()
    except KeyboardInterrupt:
        trainer.save(checkpoint)
        raise
    trainer.save(checkpoint)
    report(_logged(trainer.validate(), log))


def load_crops(images: Sequence[str | Path] | Sequence[Pixels], recipe: Recipe) -> Crops:
    """Return crops of images, which are read if they are files, as a recipe says."""
    paths = [Path(one) for one in images if isinstance(one, str | Path)]
    return Crops.of(read_images(paths) if paths else cast("Sequence[Pixels]", images), recipe)


def export_checkpoint(folder: Path, crops: Crops, name: str | None = None) -> WeightsInfo:
    """Export `checkpoint.pt` in a folder as a weights file in the same folder, with tables fitted to the images."""
    state = read_checkpoint(folder / "checkpoint.pt")
    recipe = Recipe(**state["recipe"])
    model = GainedAutoencoder(recipe.rates)
    model.load_state_dict(state["average"])
    model.project()
    run = folder / "run.json"
    provenance = {
        "recipe": state["recipe"], "steps": state["step"], "minutes": round(state["seconds"] / 60, 1),
        **(json.loads(run.read_text("utf-8")) if run.is_file() else {}),
    }  # fmt: skip
    return registry.store(export(model, recipe.metric, provenance, crops.tiles(), name), folder)


def prepare_process(device: str, threads: int | None) -> str:
    """Set this process up for training and return the device, with "auto" resolved.

    Raises
    ------
    CAEConfigurationError
        If the device does not exist on this machine.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    if device == "cuda" and not torch.cuda.is_available():
        raise CAEConfigurationError("cae: torch sees no CUDA device here; use the CPU")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _logged(validation: Progress, log: Path) -> Progress:
    """Append a validation to a CSV file, a row for each quality."""
    new = not log.exists()
    with log.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_COLUMNS)
        similarities: Sequence[float | None] = validation.ms_ssim or [None] * len(validation.qualities)
        for level, bits, psnr, similarity in zip(
            validation.qualities, validation.bits_per_pixel, validation.psnr, similarities, strict=True
        ):
            writer.writerow(
                [
                    validation.step, f"{validation.seconds:.1f}", level, f"{bits:.4f}", f"{psnr:.3f}",
                    "" if similarity is None else f"{similarity:.5f}",
                ]
            )  # fmt: skip
    return validation
