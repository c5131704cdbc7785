"""Would 8-bit integers pay? The speed of convolutions, and the cost in rate and distortion.

    python benchmarks/int8.py IMAGE... [--metric mse]

Speed, on one thread: the 3 x 3 convolutions of the residual branches in float32, bfloat16 and int8, the last with and
without the quantisation of its input. Cost: BD-rate (PSNR) of the network with those branches at 8 bits against itself
in float32, one chunk an image, ideal code lengths under its tables: weights symmetric for each output channel,
activations with the scale of their own largest magnitude in each image, which no faster scheme could beat.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import image_files, read_rgb
from measuring import least_seconds
from torch import Tensor, nn

from zarr_cae.coder.tables import ideal_bits
from zarr_cae.evaluation.curves import Curve
from zarr_cae.networks.engine import Engine
from zarr_cae.networks.transforms import HIGH_RATE, LOW_RATE, Residual
from zarr_cae.pixels.convert import to_planes
from zarr_cae.pixels.layout import Layout
from zarr_cae.weights.file import DEFAULT_MODEL, METRICS
from zarr_cae.weights.registry import default_digest, find, load

TILE = 512


def rounded(values: Tensor, largest: Tensor) -> Tensor:
    """Return the values after rounding to 8 bits, symmetric around zero."""
    scale = largest.clamp(min=1e-9) / 127
    return (values / scale).round().clamp(-127, 127) * scale


class EightBits(nn.Module):
    """A convolution with the values that 8-bit integers would give it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.weight = conv, conv.weight  # whose dtype is asked for
        conv.weight.data = rounded(conv.weight.data, conv.weight.data.abs().amax((1, 2, 3), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(rounded(x, x.abs().amax()))
        return result


def speeds() -> None:
    torch.set_num_threads(1)
    print(
        f"{'convolution, 256 x 256 px':28}{'float32':>9}{'bfloat16':>10}{'int8':>8}{'int8, input in float32':>24}  ms"
    )
    for widths, scale in ((LOW_RATE, 4), (LOW_RATE, 8), (LOW_RATE, 16), (HIGH_RATE, 16)):
        inputs, hidden = {
            4: (widths.quarter, widths.quarter_hidden), 8: (widths.eighth, widths.eighth_hidden),
            16: (widths.latent, widths.latent_hidden),
        }[scale]  # fmt: skip
        x = torch.rand(1, inputs, 256 // scale, 256 // scale).contiguous(memory_format=torch.channels_last)
        conv = nn.Conv2d(inputs, hidden, 3, padding=1).to(memory_format=torch.channels_last)
        half, x_half = nn.Conv2d(inputs, hidden, 3, padding=1).to(torch.bfloat16), x.to(torch.bfloat16)
        with torch.inference_mode():
            weight = torch.randint(-127, 127, conv.weight.shape, dtype=torch.int8)
            ones, zeros = torch.ones(hidden), torch.zeros(hidden, dtype=torch.int)
            packed = torch.ops.onednn.qconv_prepack(weight, ones, 1 / 255, 0, [1, 1], [1, 1], [1, 1], 1, list(x.shape))

            def integers(x: Tensor) -> Tensor:
                return (x * 255).round_().to(torch.uint8)

            def quantised(x: Tensor, packed: Any = packed, ones: Any = ones, zeros: Any = zeros) -> Tensor:
                result: Tensor = torch.ops.onednn.qconv2d_pointwise(
                    x, 1 / 255, 0, packed, ones, zeros, None, [1, 1], [1, 1], [1, 1], 1, 1.0, 0, torch.float32,
                    "none", [], "",
                )  # fmt: skip
                return result

            x_integers = integers(x)
            found = (
                least_seconds(lambda c=conv, x=x: c(x), 20), least_seconds(lambda c=half, x=x_half: c(x), 20),
                least_seconds(lambda q=quantised, x=x_integers: q(x), 20),
                least_seconds(lambda q=quantised, x=x: q(integers(x)), 20),
            )  # fmt: skip
        line = "".join(f"{1e3 * value:{width}.3f}" for value, width in zip(found, (9, 10, 8, 24), strict=True))
        print(f"{f'{inputs} to {hidden} at 1/{scale}':28}{line}")


def curve(engine: Engine, metric: str, images: list[np.ndarray]) -> Curve:
    """Return rate and distortion of one network at each quality of its weights."""
    rates, decibels = [], []
    for quality in engine.weights.info.qualities:
        row = engine.weights.row(quality)
        gain, step = (torch.from_numpy(engine.weights.tensors[name][row])[:, None, None] for name in ("gain", "step"))
        bits, psnr = [], []
        for image in images:
            planes = torch.from_numpy(to_planes(image, Layout(image.shape, 2), (0, 255)).copy())
            with torch.inference_mode():
                symbols = (engine.networks[0](planes)[0] * gain).round()
                decoded = engine.networks[1]((symbols * step)[None])[0].clamp(0, 1).permute(1, 2, 0).numpy()
            decoded = np.rint(decoded[: image.shape[0], : image.shape[1]] * 255)
            bits.append(ideal_bits(symbols.numpy().astype(np.int16), engine.weights.tables[row]) / image[..., 0].size)
            psnr.append(10 * np.log10(255**2 / np.square(decoded - image).mean()))
        rates.append(float(np.mean(bits)))
        decibels.append(float(np.mean(psnr)))
    return Curve(metric, tuple(rates), tuple(decibels), tuple(0.5 for _ in rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--metric", default="mse", choices=METRICS)
    arguments = parser.parse_args()
    speeds()
    images = [read_rgb(file)[:TILE, :TILE] for file in image_files(arguments.images)]
    print(f"\n{len(images)} images, {arguments.metric}: BD-rate (PSNR) of residual branches at 8 bits")
    for quality in (1, 6):
        digest = default_digest(DEFAULT_MODEL, quality, arguments.metric)
        info = find(digest, model=DEFAULT_MODEL, quality=quality, metric=arguments.metric)
        engine = Engine(load(info.path), torch.device("cpu"))
        exact = curve(engine, "float32", images)
        for network in engine.networks:
            for module in network.modules():
                if isinstance(module, Residual):
                    module.reduce, module.expand = EightBits(module.reduce), EightBits(module.expand)
        cost = curve(engine, "int8", images).bd_rate(exact, "psnr")
        print(f"qualities {info.qualities[0]} to {info.qualities[-1]}: {cost:+.2f} %", flush=True)


if __name__ == "__main__":
    main()
