"""Megapixels a second through zarr, against bare networks, CompressAI one chunk at a time, and classical codecs.

    python benchmarks/throughput.py [IMAGE ...] [--edge 4096] [--chunks 256,512] [--quality 4,8] [--repeats 3]
        [--against compressai,networks,jpegxl,jpegxl3,avif,webp,jpeg] [--threads N]
        [--device auto] [--profile]

The picture is made of the images (default: the photograph in the package), mirrored at the seams, edge x edge
RGB, and is written to and read from a memory store with `zarr.create_array`. In the same process, in turn with each
repeat, on the same picture:

networks    forward passes of the same networks over the same chunks, in the batches that the engine makes, nothing
            else: what is left over is the cost of everything around the networks
zoo         the network of `bmshj2018-factorized` with random weights through `CAECodec`
compressai  CompressAI's `bmshj2018-factorized` with random weights, `compress` and `decompress`, one chunk at a time,
            as caecodec did (compressai must be importable); at --sample of the chunks
jpegxl, ... classical codecs (jpegxl3 is JPEG XL with effort 3 instead of 7), one chunk at a time on one thread, at the
            setting whose PSNR is nearest; `zarr_cae.evaluation.classical`; at --sample of the chunks

Seconds are the least of the repeats; ratios are to the first line of each table.

--device    where the networks run: auto, cpu, cuda or cuda:N; CompressAI's stay on the CPU
--profile   where the time goes: after each table the seconds of each stage, as overlap.py shows them, and on a GPU the
            share of the time in which it is busy, with the kernels and copies that take most of it
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import overlap
import torch
import zarr
from images import cut, image_files, mosaic
from measuring import timed
from torch.profiler import ProfilerActivity, profile
from zarr.storage import MemoryStore

from zarr_cae import CAECodec, configure
from zarr_cae.config import process_settings
from zarr_cae.evaluation.classical import CLASSICAL
from zarr_cae.evaluation.measures import psnr
from zarr_cae.networks.device import choose_device
from zarr_cae.networks.engine import PASS_PIXELS, engine_for
from zarr_cae.pixels.convert import to_planes
from zarr_cae.pixels.layout import Layout
from zarr_cae.weights.file import ZOO_MODEL
from zarr_cae.weights.registry import CACHE_VARIABLE, find, load, store

CODECS = ("jpegxl", "jpegxl3", "avif", "webp", "jpeg")
Chunk = np.ndarray[Any, np.dtype[np.uint8]]


def through_zarr(pixels: Chunk, edge: int, codec: CAECodec) -> tuple[float, float, int, Chunk]:
    memory = MemoryStore()
    array: zarr.Array[Any] = zarr.create_array(
        memory, shape=pixels.shape, chunks=(edge, edge, 3), dtype="uint8", serializer=codec, compressors=None
    )

    def write() -> None:
        array[...] = pixels

    written, _ = timed(write)
    read, decoded = timed(lambda: np.asarray(array[...]))
    return written, read, array.nbytes_stored(), decoded


def bare_networks(pixels: Chunk, edge: int, codec: CAECodec) -> tuple[float, float]:
    """Return the seconds of the forward passes alone."""
    info = find(codec.weights, model=codec.model, quality=codec.quality, metric=codec.metric)
    engine = engine_for(load(info.path), process_settings())
    layout = Layout((edge, edge, 3), 2)
    batch = max(1, PASS_PIXELS[engine.device.type] // edge**2)
    planes = [to_planes(chunk, layout, (0, 255)) for chunk in cut(pixels, edge)]
    batches = [
        torch.from_numpy(np.concatenate(planes[n : n + batch])).contiguous(memory_format=torch.channels_last)
        for n in range(0, len(planes), batch)
    ]
    batches = [part.to(engine.device) for part in batches]

    def passes(network: torch.nn.Module, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        found = [network(part) for part in parts]
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    with torch.inference_mode():
        written, latents = timed(lambda: passes(engine.networks[0], batches))
        read, _ = timed(lambda: passes(engine.networks[1], latents))
    return written, read


def show_profile(pixels: Chunk, edge: int, codec: CAECodec, repeats: int) -> None:
    """Print where the time of a write and of a read goes."""
    memory = MemoryStore()
    array: zarr.Array[Any] = zarr.create_array(
        memory, shape=pixels.shape, chunks=(edge, edge, 3), dtype="uint8", serializer=codec, compressors=None
    )
    works: dict[str, Callable[[], Any]] = {
        "write": lambda: array.__setitem__(..., pixels), "read": lambda: np.asarray(array[...])
    }  # fmt: skip
    for name, work in works.items():
        overlap.report(name, *overlap.best(work, memory, repeats))
        if torch.cuda.is_available() and choose_device(process_settings().device).type == "cuda":
            show_gpu(work)


def show_gpu(work: Callable[[], Any]) -> None:
    """Print the share of the time in which the GPU is busy, and what takes most of it."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        seconds, _ = timed(work)
        torch.cuda.synchronize()
    spent = {
        event.key: (getattr(event, "self_device_time_total", 0) or getattr(event, "self_cuda_time_total", 0)) / 1e6
        for event in found.key_averages()
    }
    print(f"  the GPU is busy in {sum(spent.values()) / seconds:.0%} of {seconds:.3f} s (streams add up)")
    for key, own in sorted(spent.items(), key=lambda item: -item[1])[:8]:
        print(f"    {own / seconds:6.1%}  {key[:100]}")


def compressai_model(quality: int) -> Any:
    here = str(Path(__file__).parent)
    sys.path[:] = [path for path in sys.path if path != here]  # its bottleneck.py is not the one pandas asks for
    from compressai.models import FactorizedPrior

    torch.manual_seed(0)
    model = FactorizedPrior(*((128, 192) if quality <= 5 else (192, 320))).eval()
    for name, parameter in model.named_parameters():  # lively latents: some 100 of them are not zero at a position
        if name == "g_a.6.weight":
            parameter.data *= 30
    model.update()
    return model


def one_at_a_time(model: Any, chunks: list[Chunk]) -> tuple[float, float]:
    def tensor(chunk: Chunk) -> torch.Tensor:
        return torch.from_numpy(chunk.copy()).permute(2, 0, 1)[None].float() / 255

    with torch.no_grad():
        written, coded = timed(lambda: [model.compress(tensor(chunk)) for chunk in chunks])
        read, _ = timed(
            lambda: [
                (model.decompress(one["strings"], one["shape"])["x_hat"][0] * 255)
                .round()
                .byte()
                .permute(1, 2, 0)
                .numpy()
                for one in coded
            ]
        )
    return written, read


def random_zoo(quality: int, folder: Path) -> str:
    """Import a random network of CompressAI's form, and return its digest."""
    from zarr_cae.weights.compressai import convert

    path = folder / f"random-{quality}.pth.tar"
    torch.save(compressai_model(quality).state_dict(), path)
    return store(convert(path, quality=quality, metric="mse"), folder).digest


def matched(name: str, sample: list[Chunk], wanted: float) -> tuple[float, float, float, float]:
    """Return setting, bits per pixel and seconds of a classical codec, at the setting whose PSNR is nearest."""
    codec, best = CLASSICAL[name], (np.inf, 0.0, 0.0, 0.0, 0.0)
    for setting in codec.settings:
        written, coded = timed(lambda s=setting: [codec.encode(chunk, s) for chunk in sample])
        read, decoded = timed(lambda c=coded: [codec.decode(data, False) for data in c])
        off = abs(psnr(np.stack(sample), np.stack(decoded)) - wanted)
        bits = 8 * sum(map(len, coded)) / sum(chunk.shape[0] * chunk.shape[1] for chunk in sample)
        best = min(best, (off, setting, bits, written, read))
    return best[1:]


def row(name: str, megapixels: float, seconds: tuple[float, float], first: tuple[float, float], note: str = "") -> None:
    rates = [megapixels / value for value in seconds]
    ratios = [own / base for own, base in zip(seconds, first, strict=True)]
    print(f"  {name:32}{rates[0]:9.2f}{rates[1]:9.2f}{ratios[0]:9.2f}{ratios[1]:9.2f}  {note}", flush=True)


def compare(pixels: Chunk, edge: int, quality: int, arguments: argparse.Namespace, folder: Path) -> None:
    codec, megapixels = CAECodec(quality, channel_axis=2), pixels[..., 0].size / 1e6
    chunks = list(cut(pixels, edge))
    sample = chunks[:: max(1, len(chunks) // max(1, int(arguments.sample * len(chunks))))]
    share = len(chunks) / len(sample)
    through_zarr(pixels[: 2 * edge, : 2 * edge], edge, codec)  # loads networks and coder
    times: dict[str, list[tuple[float, float]]] = {}
    zoo = CAECodec(quality, model=ZOO_MODEL, weights=random_zoo(quality, folder), channel_axis=2) if (
        "compressai" in arguments.against
    ) else None  # fmt: skip
    model = compressai_model(quality) if zoo is not None else None
    for _ in range(arguments.repeats):
        written, read, stored, decoded = through_zarr(pixels, edge, codec)
        times.setdefault("cae-v1 through zarr", []).append((written, read))
        if "networks" in arguments.against:
            times.setdefault("its networks alone", []).append(bare_networks(pixels, edge, codec))
        if zoo is not None:
            times.setdefault("zoo network through zarr", []).append(through_zarr(pixels, edge, zoo)[:2])
            one, other = one_at_a_time(model, sample)
            times.setdefault("CompressAI, a chunk at a time", []).append((one * share, other * share))
    quality_db = psnr(pixels, decoded)
    print(f"\nquality {quality}, chunks of {edge}: {8 * stored / pixels[..., 0].size:.3f} bit/px, {quality_db:.2f} dB")
    print(f"  {'':32}{'MP/s write':>9}{'read':>8}{'time write':>11}{'read':>7}")
    least = {name: (min(w for w, _ in runs), min(r for _, r in runs)) for name, runs in times.items()}
    first = least["cae-v1 through zarr"]
    for name, seconds in least.items():
        row(name, megapixels, seconds, first)
    for name in CODECS:
        if name in arguments.against:
            setting, bits, written, read = matched(name, sample, quality_db)
            row(name, megapixels, (written * share, read * share), first, f"setting {setting:g}, {bits:.3f} bit/px")
    if arguments.profile:
        show_profile(pixels, edge, codec, arguments.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--edge", type=int, default=4096)
    parser.add_argument("--chunks", default="256,512")
    parser.add_argument("--quality", default="4,8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=float, default=0.1, help="share of the chunks for other codecs")
    parser.add_argument("--against", default=f"compressai,networks,{','.join(CODECS)}")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    arguments.against = arguments.against.split(",")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    configure(device=arguments.device)
    device = choose_device(process_settings().device)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    pixels = mosaic(image_files(arguments.images), arguments.edge)
    print(f"networks on {named}")
    print(f"{arguments.edge} x {arguments.edge} RGB, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_VARIABLE] = folder
        for edge in map(int, arguments.chunks.split(",")):
            for quality in map(int, arguments.quality.split(",")):
                compare(pixels, edge, quality, arguments, Path(folder))


if __name__ == "__main__":
    main()
