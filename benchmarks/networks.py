"""Arithmetic and speed of each network.

    python benchmarks/networks.py [--threads 2] [--edge 512] [--batch 4] [--profile] [--compile]

Multiply-accumulates per pixel of every convolution, counted from the shapes that really pass through it (a transposed
convolution counts its input positions), and megapixels a second of a bare forward pass on this machine's CPU, for the
form of the bundled family and for `bmshj2018-factorized` (random weights both) in the same run: made ready for
inference in float32 and, for `cae-v1`, in the precisions of `cae.precision` (`auto` is float32 where bfloat16 is slow).

--profile   the share of the time of a forward pass, in the precision `auto`, in convolutions, in GDN, and in the rest
            (padding, additions, activations, conversions); a module's time is that of the operations in it
--compile   the speed of each network after `torch.compile`, beside it without, and the seconds of compiling
"""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from measuring import least_seconds, timed
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from zarr_cae.networks.inference import choose_precision, prepare
from zarr_cae.networks.transforms import (
    GDN,
    HIGH_RATE,
    LOW_RATE,
    Analysis,
    FactorizedAnalysis,
    FactorizedSynthesis,
    Synthesis,
)

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
NETWORKS = {
    "cae-v1, qualities 1-5": (Analysis(LOW_RATE), Synthesis(LOW_RATE)),
    "cae-v1, qualities 6-8": (Analysis(HIGH_RATE), Synthesis(HIGH_RATE)),
    "bmshj2018-factorized, 1-5": (FactorizedAnalysis(128, 192), FactorizedSynthesis(128, 192)),
    "bmshj2018-factorized, 6-8": (FactorizedAnalysis(192, 320), FactorizedSynthesis(192, 320)),
}


def multiplications(network: nn.Module, example: torch.Tensor) -> int:
    """Count the multiply-accumulates of one forward pass."""
    total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, GDN):
            total += module.gamma.numel() * output[0, 0].numel()
        elif isinstance(module, nn.ConvTranspose2d):
            total += module.weight.numel() * inputs[0][0, 0].numel()
        else:
            total += module.weight.numel() * output[0, 0].numel()

    kinds = (nn.Conv2d, nn.ConvTranspose2d, GDN)
    hooks = [module.register_forward_hook(count) for module in network.modules() if isinstance(module, kinds)]
    with torch.inference_mode():
        network(example)
    for hook in hooks:
        hook.remove()
    return total


def seconds(network: nn.Module, example: torch.Tensor) -> float:
    """Return the least seconds of five forward passes."""
    with torch.inference_mode():
        return least_seconds(lambda: network(example), 5)


@contextmanager
def labelled(network: nn.Module) -> Iterator[None]:
    """Let the profiler show convolutions and GDN under these names."""
    open_ones: list[record_function] = []

    def begin(label: str) -> None:
        open_ones.append(record_function(label))
        open_ones[-1].__enter__()

    def end(*_: object) -> None:
        open_ones.pop().__exit__(None, None, None)

    hooks = []
    for module in network.modules():
        label = "GDN" if isinstance(module, GDN) else "convolution" if isinstance(module, CONVOLUTIONS) else None
        if label is not None:
            hooks.append(module.register_forward_pre_hook(lambda *_, label=label: begin(label)))
            hooks.append(module.register_forward_hook(end))
    yield
    for hook in hooks:
        hook.remove()


def shares(network: nn.Module, example: torch.Tensor, passes: int = 5) -> dict[str, float]:
    """Return the share of each kind in the time of a forward pass. The padding of a convolution counts as rest."""
    with torch.inference_mode(), labelled(network):
        network(example)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(passes):
                with record_function("whole"):
                    network(example)
    times = {event.key: event.cpu_time_total for event in found.key_averages()}
    padding = times.get("aten::pad", 0)
    kinds = {"convolution": times["convolution"] - padding, "GDN": times["GDN"]}
    kinds["rest"] = times["whole"] - sum(kinds.values())
    return {kind: time / times["whole"] for kind, time in kinds.items()}


def compiled(network: nn.Module, example: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of compiling, and of a forward pass after it."""
    torch.compiler.reset()
    faster = torch.compile(network)
    with torch.inference_mode():
        took, _ = timed(lambda: faster(example))
    return took, seconds(faster, example)


def report_more(arguments: argparse.Namespace) -> None:
    """Print the tables of --profile and --compile."""
    cpu = torch.device("cpu")
    for name, networks in NETWORKS.items():
        example = torch.rand(arguments.batch, 3, arguments.edge, arguments.edge)
        for direction, network in zip(("analysis", "synthesis"), networks, strict=True):
            example = example.contiguous(memory_format=torch.channels_last)
            ready = prepare(copy.deepcopy(network), choose_precision("auto", cpu), cpu)
            line = f"{name:26} {direction:>10}"
            if arguments.profile:
                parts = shares(ready, example)
                line += "   " + ", ".join(f"{kind} {share:.0%}" for kind, share in parts.items())
            if arguments.compile:
                pixels = arguments.batch * arguments.edge**2 / 1e6
                eager = seconds(ready, example)
                took, faster = compiled(ready, example)
                line += f"   eager {pixels / eager:.2f}, compiled {pixels / faster:.2f} MP/s after {took:.0f} s"
            print(line, flush=True)
            with torch.inference_mode():
                example = network(example)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--edge", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, {arguments.batch} x {arguments.edge} x {arguments.edge} px, MP/s")
    print(f"{'network':26} {'direction':>10} {'KMAC/px':>9} {'float32':>9} {'auto':>9} {'bfloat16':>9}  parameters")
    cpu = torch.device("cpu")
    for name, networks in NETWORKS.items():
        example = torch.rand(arguments.batch, 3, arguments.edge, arguments.edge)
        for direction, network in zip(("analysis", "synthesis"), networks, strict=True):
            example = example.contiguous(memory_format=torch.channels_last)
            kmac = multiplications(network.eval(), example[:1]) / arguments.edge**2 / 1000
            speeds = []
            for precision in ("float32", "auto", "bfloat16") if name.startswith("cae") else ("float32",):
                ready = prepare(copy.deepcopy(network), choose_precision(precision, cpu), cpu)
                speeds.append(arguments.batch * arguments.edge**2 / seconds(ready, example) / 1e6)
            columns = "".join(f" {speed:9.2f}" for speed in speeds).ljust(30)
            count = sum(parameter.numel() for parameter in network.parameters())
            print(f"{name:26} {direction:>10} {kmac:9.2f}{columns}  {count:,}")
            with torch.inference_mode():
                example = network(example)
    if arguments.profile or arguments.compile:
        print()
        report_more(arguments)


if __name__ == "__main__":
    main()
