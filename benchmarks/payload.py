"""Real payloads against their ideal code lengths.

    python benchmarks/payload.py IMAGE... [--quality 1,4,8] [--metric mse]

For each quality: bits per pixel of the frames, and the bytes of their entropy-coded streams over the sum of -log2 p
of the same symbols, once with p of the integer tables that the coder uses, once with p of the float density that the
network was trained with (stored in the weights file beside the tables); then whole frames over the latter. Last, the
gain of contexts: the streams over the entropy of each channel's symbols, which is the least that a coder with one
table for each channel could need, even if its tables were made for these very images. With 256 x 256 chunks and with
one chunk an image.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from images import image_files, read_rgb

from zarr_cae.coder import tiles
from zarr_cae.coder.frame import FrameHeader, unpack
from zarr_cae.coder.tables import ideal_bits
from zarr_cae.config import Settings
from zarr_cae.networks.engine import engine_for
from zarr_cae.pixels.convert import to_planes
from zarr_cae.pixels.layout import Layout
from zarr_cae.training.density import Density
from zarr_cae.weights import registry
from zarr_cae.weights.file import DEFAULT_MODEL, METRICS, Weights

LARGEST = 2000
"""Symbols beyond are an IndexError; the largest on photographs are some hundreds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--quality", default="1,2,3,4,5,6,7,8")
    parser.add_argument("--metric", default="mse", choices=METRICS)
    arguments = parser.parse_args()
    images = [read_rgb(file) for file in image_files(arguments.images)]
    print(f"{len(images)} images, metric {arguments.metric}")
    print("quality  chunk   bpp      streams/tables  streams/density  frames/density  streams/blind")
    for quality in map(int, arguments.quality.split(",")):
        digest = registry.default_digest(DEFAULT_MODEL, quality, arguments.metric)
        info = registry.find(digest, model=DEFAULT_MODEL, quality=quality, metric=arguments.metric)
        for edge in (256, None):
            pixels, bits = 0, np.zeros(4)
            counts = np.zeros((registry.load(info.path).latent_channels, 2 * LARGEST + 1), np.int64)
            for image in images:
                step = (edge, edge) if edge else image.shape[:2]
                for top in range(0, image.shape[0] - step[0] + 1, step[0]):
                    for left in range(0, image.shape[1] - step[1] + 1, step[1]):
                        chunk = image[top : top + step[0], left : left + step[1]]
                        pixels += chunk.shape[0] * chunk.shape[1]
                        bits += measure(registry.load(info.path), quality, chunk, counts)
            tables, density, streams, frames = bits
            print(
                f"{quality:7d}  {edge or 'image':<6}  {frames / pixels:.4f}  {streams / tables:14.4f}  "
                f"{streams / density:15.4f}  {frames / density:14.4f}  "
                f"{streams / blind(counts):13.4f}"
            )


def blind(counts: np.ndarray) -> float:
    """Return the bits of all symbols with one ideal table for each channel; counts are (M, values)."""
    shares = counts / counts.sum(1, keepdims=True)
    return float(-(counts * np.log2(shares, where=counts > 0, out=np.zeros(counts.shape))).sum())


def measure(loaded: Weights, quality: int, chunk: np.ndarray, counts: np.ndarray) -> tuple[float, float, float, float]:
    """Return the bits of a chunk (rows, columns, 3): ideal under tables and density, of the streams, of the frame.

    The symbols are counted in `counts`, (M, 2 LARGEST + 1).
    """
    settings, row = Settings(), loaded.row(quality)
    tables = loaded.tables[row]
    planes = to_planes(chunk, Layout(chunk.shape, 2), (0, 255))
    symbols = engine_for(loaded, settings).analyse(planes, quality, settings).result()
    np.add.at(counts, (np.arange(len(counts))[:, None], symbols[0].reshape(len(counts), -1) + LARGEST), 1)
    header = FrameHeader(1, chunk.shape[0], chunk.shape[1], grey=False, version=tables.frame_version)
    frame = tiles.encode(symbols, header, tables)
    streams = sum(len(stream) for stream in unpack(frame, header)[1])
    count = len(loaded.info.qualities)
    density = Density(count, loaded.latent_channels)
    density.load_state_dict(
        {name: torch.from_numpy(loaded.tensors[f"density.{name}"].astype(np.float32)) for name in density.state_dict()}
    )
    under_tables = under_density = 0.0
    for _, _, patch in tiles.tiles(header):
        tile = np.ascontiguousarray(symbols[0, :, patch.rows, patch.columns])
        under_tables += ideal_bits(tile, tables)
        values = torch.from_numpy(tile).float().expand(count, 1, -1, -1, -1)
        with torch.inference_mode():
            under_density += float(density.bits(values, values)[row, 0])
    return under_tables, under_density, 8.0 * streams, 8.0 * len(frame)


if __name__ == "__main__":
    main()
