"""A small classifier on latents straight from an archive, against the same one on the decoded pixels.

    python benchmarks/classify.py [IMAGE...] [--quality 4] [--patch 64] [--epochs 30] [--limit 60]

The classifier tells from which photograph a patch is (without images: from which quarter of the photograph in the
package). Patches of `patch` x `patch` pixels that do not overlap are written once as an array (n, patch, patch, 3), one
chunk for each patch. Half of each class is for training, the other half for the test. Both runs read the same archive
for every batch of every epoch, as one reads a data set larger than memory.

Network, the same for both: 1 x 1 convolution to 64 channels, ReLU, mean over positions, linear. Its input has one
position for 16 x 16 pixels: M latents, or the 768 values of the decoded pixels there. Inputs are standardised by the
mean and deviation of each channel over the training half.

Images per second are patches, wall clock: `read` alone, and `train`, reading and training together.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from images import PHOTOGRAPH, read_rgb  # beside this file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from zarr_cae import CAECodec, as_torch_dataset, open_bottleneck


class PixelPatches:
    """(768, patch / 16, patch / 16) float32 and label, from the decoded pixels."""

    def __init__(self, array: Any, labels: np.ndarray) -> None:
        self.array, self.labels = array, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = torch.from_numpy(self.array[index]).permute(2, 0, 1).float() / 255
        return nn.functional.pixel_unshuffle(pixels, 16), self.labels[index]


def classes(paths: list[Path]) -> Iterator[np.ndarray]:
    if not paths:
        pixels = read_rgb(PHOTOGRAPH)
        half = len(pixels) // 2
        yield from (pixels[y : y + half, x : x + half] for y in (0, half) for x in (0, half))
    yield from map(read_rgb, paths)


def patches(pixels: np.ndarray, edge: int) -> np.ndarray:
    rows, columns = (side // edge for side in pixels.shape[:2])
    grid = pixels[: rows * edge, : columns * edge].reshape(rows, edge, columns, edge, 3)
    return grid.swapaxes(1, 2).reshape(-1, edge, edge, 3)


def run(data: Any, train: list[int], test: list[int], count: int, epochs: int) -> tuple[float, float, float]:
    """Return the accuracy on the test half, and patches a second of reading alone and of training."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    first = torch.cat([batch for batch, _ in DataLoader(Subset(data, train), batch_size=64)])
    read = len(train) / (time.perf_counter() - begin)
    mean, deviation = first.mean((0, 2, 3), keepdim=True), first.std((0, 2, 3), keepdim=True)
    deviation += 0.1 * first.std()  # some channels are nearly always zero
    network = nn.Sequential(
        nn.Conv2d(first.shape[1], 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, count)
    )
    optimizer = torch.optim.Adam(network.parameters(), 2e-3, weight_decay=1e-4)
    begin = time.perf_counter()
    for _ in range(epochs):
        for batch, labels in DataLoader(Subset(data, train), batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network((batch - mean) / deviation), labels).backward()
            optimizer.step()
    speed = epochs * len(train) / (time.perf_counter() - begin)
    with torch.no_grad():
        right = sum(
            int((network((batch - mean) / deviation).argmax(1) == labels).sum())
            for batch, labels in DataLoader(Subset(data, test), batch_size=64)
        )
    return right / len(test), read, speed


def main() -> None:
    parser = argparse.ArgumentParser(description="The same classifier on latents and on decoded pixels.")
    parser.add_argument("images", nargs="*", type=Path, help="image files, a class each")
    parser.add_argument("--quality", type=int, default=4)
    parser.add_argument("--patch", type=int, help="pixels; a multiple of 16 (default 64, without images 32)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--limit", type=int, default=60, help="patches of each class")
    arguments = parser.parse_args()
    edge = arguments.patch or (64 if arguments.images else 32)
    random = np.random.default_rng(0)
    groups = [random.permutation(patches(pixels, edge))[: arguments.limit] for pixels in classes(arguments.images)]
    pixels = np.concatenate(groups)
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    order = random.permutation(len(labels))
    train = [i for k in range(len(groups)) for i in order[labels[order] == k][::2].tolist()]
    test = sorted(set(range(len(labels))) - set(train))
    with tempfile.TemporaryDirectory() as folder:
        array = zarr.create_array(
            Path(folder) / "patches.zarr", shape=pixels.shape, chunks=(1, edge, edge, 3), dtype="uint8",
            serializer=CAECodec(quality=arguments.quality, channel_axis=3), compressors=None,
            config={"write_empty_chunks": True},  # or an all-black patch has no latents
        )  # fmt: skip
        array[...] = pixels
        view = open_bottleneck(array.store)
        print(
            f"{len(groups)} classes, {len(train)} patches of {edge} x {edge} px to train, {len(test)} to test, ", end=""
        )
        print(f"quality {arguments.quality}, {arguments.epochs} epochs; chance {1 / len(groups):.3f}\n")
        print(f"{'input':<8}{'channels':>9}{'accuracy':>10}{'read/s':>9}{'train/s':>9}")
        inputs = {
            "latents": (as_torch_dataset(view, edge // 16, labels=labels), view.shape[-1]),
            "pixels": (PixelPatches(array, labels), 768),
        }
        for name, (data, channels) in inputs.items():
            data[0]
            accuracy, read, speed = run(data, train, test, len(groups), arguments.epochs)
            print(f"{name:<8}{channels:>9}{accuracy:10.3f}{read:9.0f}{speed:9.0f}", flush=True)


if __name__ == "__main__":
    main()
