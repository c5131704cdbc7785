"""The networks at work: device choice, one cached network per weights and device, tiled and batched.

Requests from any thread or event loop meet in one `MicroBatcher` per engine, whose single worker owns the device. On a
CPU it parts a batch between threads that run the whole network each: they need not wait for each other at every layer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.inference import Precision, choose_precision, prepare
from zarr_cae.microbatch import MicroBatcher
from zarr_cae.transforms import STRIDE, Analysis, FactorizedAnalysis, FactorizedSynthesis, Synthesis, Widths
from zarr_cae.weights import DEFAULT_MODEL, Weights
from zarr_cae.windows import HALO

Array = npt.NDArray[Any]

_LARGEST_SYMBOL = 32767


@dataclass(frozen=True)
class Settings:
    """How this process runs the networks; none of it changes what is stored."""

    device: str = "auto"
    """"auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N"."""
    threads: int | None = None
    """Threads of the networks on the CPU; None leaves torch's own choice."""
    tile: int = 1024
    """Edge in pixels of the pieces in which larger planes run; it bounds the memory of a forward pass."""
    precision: str = "auto"
    """"float32", "auto" (bfloat16 where it is faster and pixels stay within a grey level) or "bfloat16"."""

    def __post_init__(self) -> None:
        threads_fit = self.threads is None or (type(self.threads) is int and self.threads >= 1)
        if not threads_fit or type(self.tile) is not int or self.tile < STRIDE:
            raise CAEConfigurationError(
                f"cae: cae.tile must be an integer of at least {STRIDE} and cae.threads one of at least 1 (or None), "
                f"got {self.tile!r}, {self.threads!r}"
            )


PASS_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Pixels in one forward pass: on a CPU few enough for the caches of a core, on a GPU enough to fill it."""


def batch_pixels(device: torch.device) -> int:
    """Pixels in one batch: a forward pass for each thread."""
    return PASS_PIXELS[device.type] * (torch.get_num_threads() if device.type == "cpu" else 1)


def choose_device(name: str) -> torch.device:
    """The torch device for a `cae.device` setting. Raises CAEConfigurationError if it does not exist here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise CAEConfigurationError(f"cae: cae.device must be 'auto', 'cpu' or 'cuda[:N]', got {name!r}") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise CAEConfigurationError(
            f"cae: cae.device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here; use 'auto'"
        )
    if device.type not in ("cpu", "cuda"):
        raise CAEConfigurationError(f"cae: cae.device must be 'auto', 'cpu' or 'cuda[:N]', got {name!r}")
    return device


@dataclass(frozen=True)
class _Job:
    """The key of a batch: requests with equal jobs run together."""

    direction: Literal["analyse", "synthesise"]
    quality: int
    shape: tuple[int, ...]
    """Of one plane: (components, H, W) or (M, h, w)."""
    components: int
    settings: Settings


class Engine:
    """One network on one device."""

    def __init__(self, weights: Weights, device: torch.device, precision: Precision = "float32") -> None:
        self.weights, self.device = weights, device
        self._analysis, self._synthesis = _networks(weights)
        for name, module in (("analysis", self._analysis), ("synthesis", self._synthesis)):
            state = {
                key.removeprefix(f"{name}."): torch.from_numpy(value.astype(np.float32))
                for key, value in weights.tensors.items()
                if key.startswith(f"{name}.")
            }
            try:
                module.load_state_dict(state)
            except RuntimeError as error:
                raise CAEConfigurationError(f"cae: weights file {weights.info.path}: {error}") from error
            prepare(module, precision, device)
        self._gains = {
            name: torch.from_numpy(weights.tensors[name])[:, :, None, None].to(device)
            for name in ("gain", "shift", "step", "offset")
        }
        self.batcher: MicroBatcher[Array, Array] = MicroBatcher(
            self._run,
            name=f"cae-{weights.info.model}-{device}",
            max_weight=batch_pixels(device),
            max_pending=16 * batch_pixels(device),
        )

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """The analysis and the synthesis transform, on the device."""
        return self._analysis, self._synthesis

    def analyse(self, planes: Array, quality: int, settings: Settings) -> Array:
        """Planes (N, 3 or 1, H, W) float32 in [0, 1], sides multiples of 16, to symbols (N, M, H/16, W/16) int16."""
        return self.batcher.submit(*_analysis_request(planes, quality, settings)).result()

    async def analyse_async(self, planes: Array, quality: int, settings: Settings) -> Array:
        """`analyse` for coroutines."""
        return await self.batcher.submit_async(*_analysis_request(planes, quality, settings))

    def synthesise(self, symbols: Array, quality: int, components: int, settings: Settings) -> Array:
        """Symbols (N, M, h, w) int16 to planes (N, components, 16 h, 16 w) float32, nominally in [0, 1]."""
        return self.batcher.submit(*_synthesis_request(symbols, quality, components, settings)).result()

    async def synthesise_async(self, symbols: Array, quality: int, components: int, settings: Settings) -> Array:
        """`synthesise` for coroutines."""
        return await self.batcher.submit_async(*_synthesis_request(symbols, quality, components, settings))

    def _run(self, key: Hashable, requests: list[Array]) -> list[Array]:
        assert isinstance(key, _Job)
        if key.settings.threads is not None:
            torch.set_num_threads(key.settings.threads)
        counts = [len(request) for request in requests]
        whole = requests[0] if len(requests) == 1 else np.concatenate(requests)
        result = self._analyse(whole, key) if key.direction == "analyse" else self._synthesise(whole, key)
        return np.split(result, np.cumsum(counts)[:-1])

    def _gain(self, name: str, job: _Job) -> Tensor:
        row = self.weights.row(job.quality)
        return self._gains[name][row : row + 1]

    def _analyse(self, planes: Array, job: _Job) -> Array:
        gain, shift = self._gain("gain", job), self._gain("shift", job)

        def code(piece: Tensor) -> Tensor:
            pixels = piece.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            latents: Tensor = self._analysis(pixels) * gain - shift
            return latents.round_().clamp_(-_LARGEST_SYMBOL, _LARGEST_SYMBOL).to(torch.int16)

        rows, columns = (side // STRIDE for side in planes.shape[2:])
        symbols = np.empty((len(planes), self.weights.latent_channels, rows, columns), np.int16)
        self._pieces(code, planes, symbols, job.settings, 1, STRIDE)
        return symbols

    def _synthesise(self, symbols: Array, job: _Job) -> Array:
        step, offset = self._gain("step", job), self._gain("offset", job)

        def code(piece: Tensor) -> Tensor:
            latents = (piece.float() * step + offset).contiguous(memory_format=torch.channels_last)
            pixels: Tensor = self._synthesis(latents)
            return pixels if job.components == 3 else pixels.mean(1, keepdim=True)

        rows, columns = (side * STRIDE for side in symbols.shape[2:])
        planes = np.empty((len(symbols), job.components, rows, columns), np.float32)
        self._pieces(code, symbols, planes, job.settings, STRIDE, 1)
        return planes

    def _pieces(
        self, code: Callable[[Tensor], Tensor], source: Array, target: Array, settings: Settings, up: int, down: int
    ) -> None:
        """Run `code` over pieces of bounded size, with their surroundings; small ones each on a thread of their own."""
        side = STRIDE // up
        tile = min(settings.tile, up * source.shape[2]) * min(settings.tile, up * source.shape[3])
        threads = torch.get_num_threads() if self.device.type == "cpu" and tile <= PASS_PIXELS["cpu"] else 1
        shared = 1 < threads <= len(source)
        count = max(1, PASS_PIXELS[self.device.type] // tile)
        if shared:
            count = min(count, -(-len(source) // threads))

        def run(piece: tuple[int, tuple[Window, Window, Window]]) -> None:
            first, (outer, inner, place) = piece
            part = torch.from_numpy(np.ascontiguousarray(source[first : first + count, :, outer[0], outer[1]]))
            with torch.inference_mode():
                result = code(part.to(self.device)).cpu().numpy()
            rows, columns = (slice(s.start * up // down, s.stop * up // down) for s in place)
            cut = tuple(slice(s.start * up // down, s.stop * up // down) for s in inner)
            target[first : first + count, :, rows, columns] = result[:, :, cut[0], cut[1]]

        tiles = list(_tiles(source.shape[2:], settings, side))
        pieces = [(first, tile) for first in range(0, len(source), count) for tile in tiles]
        for _ in _lanes(threads).map(run, pieces) if shared else map(run, pieces):
            pass


@lru_cache
def _lanes(count: int) -> ThreadPoolExecutor:
    """Threads in which torch runs each operation on one thread."""

    def alone(usual: int) -> None:
        torch.get_num_threads()  # or the next line would be undone at the first operation
        torch.set_num_threads(1)  # of this thread, and of every thread that starts later, whence:
        other = threading.Thread(target=torch.set_num_threads, args=(usual,))
        other.start()
        other.join()

    return ThreadPoolExecutor(count, "cae-lane", alone, (torch.get_num_threads(),))


def _networks(weights: Weights) -> tuple[nn.Module, nn.Module]:
    """Analysis and synthesis, before they are given their parameters."""
    info = weights.info
    try:
        architecture = dict(info.architecture)
        if info.model == DEFAULT_MODEL:
            widths = Widths(**architecture)
            return Analysis(widths), Synthesis(widths)
        return FactorizedAnalysis(**architecture), FactorizedSynthesis(**architecture)
    except (TypeError, ValueError, RuntimeError) as error:  # what dict, signatures and torch say to senseless ones
        raise CAEConfigurationError(
            f"cae: weights file {info.path}: there is no network of architecture {info.architecture!r}: {error}"
        ) from error


Window = tuple[slice, slice]


def _tiles(shape: tuple[int, ...], settings: Settings, unit: int) -> Iterator[tuple[Window, Window, Window]]:
    """Windows in which a plane is run: with halo, the wanted part of that, and its place; `unit` samples a latent."""
    edge, halo = settings.tile // STRIDE * unit, HALO * unit
    for top in range(0, shape[0], edge):
        for left in range(0, shape[1], edge):
            place = tuple(slice(start, min(start + edge, size)) for start, size in zip((top, left), shape, strict=True))
            outer = tuple(
                slice(max(0, s.start - halo), min(size, s.stop + halo)) for s, size in zip(place, shape, strict=True)
            )
            inner = tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(place, outer, strict=True))
            yield outer, inner, place  # type: ignore[misc]


def _analysis_request(planes: Array, quality: int, settings: Settings) -> tuple[_Job, Array, int]:
    job = _Job("analyse", quality, planes.shape[1:], planes.shape[1], settings)
    return job, planes, planes.size // planes.shape[1]


def _synthesis_request(symbols: Array, quality: int, components: int, settings: Settings) -> tuple[_Job, Array, int]:
    job = _Job("synthesise", quality, symbols.shape[1:], components, settings)
    return job, symbols, symbols.size // symbols.shape[1] * STRIDE**2


_engines: dict[tuple[str, str, str], Engine] = {}
_lock = threading.Lock()


def engine_for(weights: Weights, settings: Settings) -> Engine:
    """The engine of these weights on the chosen device in the chosen precision, made once a process."""
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    key = (weights.info.digest, str(device), precision)
    with _lock:
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = Engine(weights, device, precision)
        return engine


def _after_fork() -> None:
    """Start afresh in a forked child, where OpenMP's threads are gone and would be waited for without end."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    _engines.clear()
    _lanes.cache_clear()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
