"""The cost of weights in half precision: a trained network as it is, and with its parameters rounded to float16.

    python benchmarks/half.py CHECKPOINT IMAGE... [--most 12]

CHECKPOINT is the `checkpoint.pt` of `zarr-cae train`, whose parameters are float32. Both networks code the centre of
each image with real rounding; rates are those of the density, which is rounded, too, as weights files store it. Prints
the share of bytes that half precision needs more (+) or less (-) at equal PSNR.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from images import image_files, read_rgb

from zarr_cae.training.fit import archive_saved, estimated_curves
from zarr_cae.training.model import GainedAutoencoder
from zarr_cae.training.trainer import Recipe, measure, read_checkpoint

EDGE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--most", type=int, default=12)
    arguments = parser.parse_args()
    files = image_files(arguments.images)
    pictures = []
    for file in files[:: max(1, len(files) // arguments.most)][: arguments.most]:
        pixels = read_rgb(file)
        top, left = (max(0, side - EDGE) // 2 for side in pixels.shape[:2])
        rows, columns = (min(EDGE, side) // 16 * 16 for side in pixels.shape[:2])
        window = pixels[top : top + rows, left : left + columns]
        pictures.append(torch.from_numpy(window.copy()).permute(2, 0, 1).float().div(255))
    state = read_checkpoint(arguments.checkpoint)
    recipe = Recipe(**state["recipe"])
    model = GainedAutoencoder(recipe.rates)
    model.load_state_dict(state["average"])
    model.project()
    whole = estimated_curves(measure(model, pictures, recipe.metric))
    gains = ("log_gain", "log_step")
    model.load_state_dict(
        {name: value if name in gains else value.half().float() for name, value in model.state_dict().items()}
    )
    half = estimated_curves(measure(model, pictures, recipe.metric))
    print(f"{len(pictures)} images, step {state['step']}: {-archive_saved(whole, half):+.3%}")


if __name__ == "__main__":
    main()
