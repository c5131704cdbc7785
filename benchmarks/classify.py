"""Which stain does a slide have? A small network on latents, straight from an archive, and the same on pixels.

    python benchmarks/classify.py FOLDER [--quality 4] [--epochs 8] [--tiles 2] [--repeats 1]

FOLDER holds tiles of slides as files named SOURCE__CASE__STAIN__PLACE.jpg, such as those cut from the slides of the
Pathology Atlas (github.com/pathologyatlas). The classes are haematoxylin and eosin (HE), immunohistochemistry (IHC) and
special stains; a patient (case) may have slides of all three. No case is in training and test at once: the cases are
divided into four folds, and each fold is the test once, for a network that was trained on the three others.

1. The tiles of a slide side by side are an image, and `zarr-cae convert` makes one OME-Zarr group of all slides.
2. `slide_patches` finds the patches of 128 x 128 pixels (8 x 8 positions of latents) that show tissue.
3. A DataLoader reads all patches once as latents and once as decoded pixels: the speed of reading.
4. Networks are trained from memory: the speed of computing, and the accuracy. It is balanced: the mean over the classes
   of the part of their patches that is right, so that always answering HE gives 1/3. With --repeats, the deviation
   between runs from other random numbers follows.
5. One epoch reads from the archive and trains as it reads, as one does with more data than memory holds.

All networks end in the same layers, which see one position for 16 x 16 pixels. Their input there is

    latents           the latents, 192 or so channels, scaled by one number for all of them
    latents, normed   the same after a batch normalisation, which scales each channel by itself
    pixels, blocks    the 768 values of the 16 x 16 pixels
    pixels, CNN       what four convolutions with stride 2, trained with the rest, make of the pixels
    mean colour       the mean of the 16 x 16 pixels: how much is told by colour alone
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from images import read_rgb  # beside this file
from measuring import timed
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from zarr_cae.cli import main as zarr_cae
from zarr_cae.slides.patches import SlidePatches, slide_patches

CLASSES = ("HE", "IHC", "special")
IHC = {"CHR", "SYN", "IHC", "HBsAg", "trypsin"}
SPECIAL = {
    "EZN-ARB", "GMS", "MGG", "PAP", "PAS", "PASAB", "PASD", "congored", "crystalviolet", "giemsa", "warthinstarry",
}  # fmt: skip
SILVER = {"EAS28", "EAS29"}
"""Cases whose slides are called HE, but are silver stains."""
PATCH = 128
FOLDS = 4
Data = Dataset[tuple[Tensor, int]]


def stain_class(case: str, stain: str) -> int:
    """Return the number of the class of a slide."""
    if stain in IHC:
        return CLASSES.index("IHC")
    return CLASSES.index("special" if stain in SPECIAL or case in SILVER else "HE")


def write_slides(folder: Path, work: Path, tiles: int) -> list[Path]:
    """Write the first tiles of each slide side by side as an array, and return the files: CASE__STAIN.npy."""
    slides = defaultdict(list)
    for path in sorted(folder.glob("*__*__*__*.*")):
        slides["__".join(path.name.split("__")[1:3])].append(path)
    for name, paths in slides.items():
        pixels = [read_rgb(path) for path in paths[:tiles]]
        edges = [[length // PATCH * PATCH for length in one.shape[:2]] for one in pixels]
        rows = min(edge[0] for edge in edges)
        np.save(work / f"{name}.npy", np.hstack([one[:rows, : e[1]] for one, e in zip(pixels, edges, strict=True)]))
    return [work / f"{name}.npy" for name in slides]


class PixelPatches(Data):
    """The decoded pixels at the places of some patches of latents, (3, 128, 128) uint8, with the label."""

    def __init__(self, array: zarr.Array, patches: SlidePatches, label: int) -> None:
        self.array, self.positions, self.label = array, patches.positions, label

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row, column = self.positions[index]
        return torch.from_numpy(self.array[:, row : row + PATCH, column : column + PATCH]), self.label


def divide(cases: dict[str, set[int]]) -> dict[str, int]:
    """Return the fold of each case. Cases of rare classes are dealt out first, so that each fold has some."""
    counts = [sum(number in classes for classes in cases.values()) for number in range(len(CLASSES))]
    order = sorted(cases, key=lambda case: (min(counts[number] for number in cases[case]), case))
    return {case: place % FOLDS for place, case in enumerate(order)}


class Network(nn.Sequential):
    """The layers after `first`, which gives `channels` values for each position, are the same for all inputs."""

    def __init__(self, first: nn.Module, channels: int) -> None:
        super().__init__(
            first, nn.Conv2d(channels, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(CLASSES)),
        )  # fmt: skip


class Scaled(nn.Module):
    """Pixels or latents as floats, less the mean of all of them, in units of their deviation."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.mean, self.deviation = inputs.float().mean(), inputs.float().std()

    def forward(self, values: Tensor) -> Tensor:
        return (values.float() - self.mean) / self.deviation


def strided() -> nn.Sequential:
    """Return four convolutions of stride 2: (3, 128, 128) to (64, 8, 8)."""
    layers: list[nn.Module] = []
    for inner, outer in ((3, 8), (8, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers)


def new_network(name: str, inputs: Tensor) -> Network:
    """Return a network for one kind of inputs (N, channels, rows, columns)."""
    scaled = Scaled(inputs)
    channels = inputs.shape[1]
    if name == "latents":
        return Network(scaled, channels)
    if name == "latents, normed":
        return Network(nn.Sequential(scaled, nn.BatchNorm2d(channels)), channels)
    if name == "pixels, blocks":
        return Network(nn.Sequential(scaled, nn.PixelUnshuffle(16)), 768)
    if name == "pixels, CNN":
        return Network(nn.Sequential(scaled, strided()), 64)
    return Network(nn.Sequential(scaled, nn.AvgPool2d(16)), 3)


def train_epoch(network: Network, optimizer: torch.optim.Optimizer, data: Data, weights: Tensor) -> None:
    """Train on all patches once, in random order. Each class counts the same, however many patches it has."""
    network.train()
    for batch, labels in DataLoader(data, batch_size=32, shuffle=True, drop_last=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch), labels, weights).backward()
        optimizer.step()


def train(name: str, inputs: Tensor, labels: Tensor, epochs: int) -> Network:
    network = new_network(name, inputs)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    weights = class_weights(labels)
    for _ in range(epochs):
        train_epoch(network, optimizer, TensorDataset(inputs, labels), weights)
        schedule.step()
    return network.eval()


def class_weights(labels: Tensor) -> Tensor:
    counts = torch.bincount(labels, minlength=len(CLASSES))
    return len(labels) / (len(CLASSES) * counts.clamp(1))


def balanced(answers: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes of the part of their patches that is right."""
    return float(np.mean([(answers[labels == k] == k).double().mean() for k in labels.unique().tolist()]))


def cross_validate(name: str, inputs: Tensor, labels: Tensor, folds: Tensor, epochs: int) -> tuple[float, float]:
    """Return the balanced accuracy on cases that the network did not see, and patches a second of training."""
    answers = torch.full_like(labels, -1)
    seconds = trained = 0.0
    for fold in folds.unique():
        held_out = folds == fold
        took, network = timed(lambda chosen=~held_out: train(name, inputs[chosen], labels[chosen], epochs))
        seconds, trained = seconds + took, trained + epochs * int((~held_out).sum())
        with torch.no_grad():
            answers[held_out] = torch.cat([network(batch).argmax(1) for batch in inputs[held_out].split(64)])
    return balanced(answers, labels), trained / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quality", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1, help="runs from other random numbers")
    parser.add_argument("--tiles", type=int, default=2, help="tiles of each slide, at most")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        files = write_slides(arguments.folder, work, arguments.tiles)
        if not files:
            raise SystemExit(f"{arguments.folder} has no files named SOURCE__CASE__STAIN__PLACE.jpg")
        archive = work / "slides.ome.zarr"
        options = ["--quality", str(arguments.quality), "--chunks", str(PATCH), "--shards", "none"]
        with contextlib.redirect_stdout(io.StringIO()):
            seconds, failed = timed(lambda: zarr_cae(["convert", *map(str, files), str(archive), *options]))
        if failed:
            raise SystemExit(failed)
        print(f"{len(files)} slides converted in {seconds:.0f} s", flush=True)
        measure(archive, [file.stem for file in files], arguments)


def measure(archive: Path, slides: list[str], arguments: argparse.Namespace) -> None:
    """Read, train, and print the table."""
    labels = [stain_class(*slide.split("__")) for slide in slides]
    cases = defaultdict(set)
    for slide, label in zip(slides, labels, strict=True):
        cases[slide.partition("__")[0]].add(label)
    fold_of = divide(cases)
    latents: list[Data] = []
    pixels: list[Data] = []
    folds = []
    for slide, label in zip(slides, labels, strict=True):
        patches = slide_patches(archive / slide, PATCH // 16, labels=lambda *_, label=label: label)
        if len(patches):
            latents.append(patches)
            pixels.append(PixelPatches(zarr.open_array(archive / slide / "0", mode="r"), patches, label))
            folds += [fold_of[slide.partition("__")[0]]] * len(patches)
    latents[0][0], pixels[0][0]  # loads torch and the weights
    data = {"latents": ConcatDataset(latents), "pixels": ConcatDataset(pixels)}
    memory, read = {}, {}
    for kind, one in data.items():
        seconds, batches = timed(lambda one=one: list(DataLoader(one, batch_size=32)))
        memory[kind] = torch.cat([batch for batch, _ in batches])
        known = torch.cat([label for _, label in batches])
        read[kind] = len(known) / seconds
    counts = ", ".join(f"{int((known == k).sum())} {one}" for k, one in enumerate(CLASSES))
    print(
        f"{len(cases)} cases, {len(known)} patches: {counts}; quality {arguments.quality}, {arguments.epochs} epochs\n"
    )
    print(f"{'':<16}{'accuracy':>16}{'read/s':>10}{'compute/s':>11}{'both/s':>9}   (patches)")
    for name in ("latents", "latents, normed", "pixels, blocks", "pixels, CNN", "mean colour"):
        kind = "latents" if name.startswith("latents") else "pixels"
        accuracies, speeds = [], []
        for seed in range(arguments.repeats):
            torch.manual_seed(seed)
            accuracy, speed = cross_validate(name, memory[kind], known, torch.tensor(folds), arguments.epochs)
            accuracies.append(accuracy)
            speeds.append(speed)
        both = from_archive(name, data[kind], memory[kind], class_weights(known))
        spread = f"{np.mean(accuracies):.3f}" + (f" +- {np.std(accuracies):.3f}" if len(accuracies) > 1 else "")
        print(f"{name:<16}{spread:>16}{read[kind]:10.0f}{np.mean(speeds):11.0f}{both:9.0f}", flush=True)


def from_archive(name: str, data: Any, inputs: Tensor, weights: Tensor) -> float:
    """Return patches a second of an epoch that reads from the archive as it trains."""
    network = new_network(name, inputs)
    start = time.perf_counter()
    train_epoch(network, torch.optim.AdamW(network.parameters(), 2e-3), data, weights)
    return len(data) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
