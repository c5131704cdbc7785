"""Real payloads against the ideal code length under the trained density.

    python benchmarks/payload.py IMAGE... [--quality 1,4,8] [--metric mse]

For each quality: bits per pixel of the frames, and their length over the sum of -log2 p of the same symbols under the
float density that the network was trained with (stored in the weights file beside the integer tables), for the
entropy-coded streams alone and for whole frames, with 256 x 256 chunks and with one chunk an image.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zarr_cae import entropy, weights
from zarr_cae.engine import Settings, engine_for
from zarr_cae.framing import FrameHeader, unpack
from zarr_cae.pixels import Layout, to_planes
from zarr_cae.training.density import Density


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--quality", default="1,2,3,4,5,6,7,8")
    parser.add_argument("--metric", default="mse", choices=weights.METRICS)
    arguments = parser.parse_args()
    files = [file for path in arguments.images for file in (sorted(path.glob("*.png")) if path.is_dir() else [path])]
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    print(f"{len(images)} images, metric {arguments.metric}")
    print("quality  chunk   bpp      streams/ideal  frames/ideal")
    for quality in map(int, arguments.quality.split(",")):
        digest = weights.default_digest(weights.DEFAULT_MODEL, quality, arguments.metric)
        info = weights.find(digest, model=weights.DEFAULT_MODEL, quality=quality, metric=arguments.metric)
        for edge in (256, None):
            pixels = ideal = streams = frames = 0.0
            for image in images:
                step = (edge, edge) if edge else image.shape[:2]
                for top in range(0, image.shape[0] - step[0] + 1, step[0]):
                    for left in range(0, image.shape[1] - step[1] + 1, step[1]):
                        chunk = image[top : top + step[0], left : left + step[1]]
                        sizes = measure(weights.load(info.path), quality, chunk)
                        pixels += chunk.shape[0] * chunk.shape[1]
                        ideal, streams, frames = ideal + sizes[0], streams + sizes[1], frames + sizes[2]
            name = str(edge or "image")
            print(f"{quality:7d}  {name:6s}  {frames / pixels:.4f}  {streams / ideal:.4f}         {frames / ideal:.4f}")


def measure(loaded: weights.Weights, quality: int, chunk: np.ndarray) -> tuple[float, float, float]:
    """Bits of the ideal code, of the streams and of the frame of one chunk (rows, columns, 3)."""
    settings, row = Settings(), loaded.row(quality)
    planes = to_planes(chunk, Layout(chunk.shape, 2), (0, 255))
    symbols = engine_for(loaded, settings).analyse(planes, quality, settings)
    header = FrameHeader(1, chunk.shape[0], chunk.shape[1], grey=False)
    frame = entropy.encode(symbols, header, loaded.tables[row])
    streams = sum(len(stream) for stream in unpack(frame, header)[1])
    density = Density(len(loaded.info.qualities), loaded.latent_channels)
    density.load_state_dict(
        {name: torch.from_numpy(loaded.tensors[f"density.{name}"]) for name in density.state_dict()}
    )
    limit = int(np.abs(symbols.astype(int)).max())
    with torch.inference_mode():
        table = density.probabilities(max(limit, 1))[row].clamp(min=1e-12).log2().numpy()
    ideal = -np.take_along_axis(table, symbols[0].reshape(len(table), -1).astype(int) + max(limit, 1), 1).sum()
    return float(ideal), 8.0 * streams, 8.0 * len(frame)


if __name__ == "__main__":
    main()
