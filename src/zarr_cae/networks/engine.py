"""The networks at work: device choice, one cached network per weights and device, tiled and batched.

Requests from any thread or event loop meet in one `MicroBatcher` per engine, large ones in pieces. On a CPU it has a
lane for each core, which runs whole networks, so that cores need not wait for each other at every layer; only a request
that finds several cores free has them share each layer. On a GPU it has two, each with a stream of its own: while one
batch computes, another is copied. There whole chunks come and go as they are, and their pixels become planes and
pixels again on the device (`tensors`).
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zarr_cae.codec.windows import Patch, pieces
from zarr_cae.config import Settings
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.networks.inference import Precision, choose_precision, prepare
from zarr_cae.networks.microbatch import MicroBatcher
from zarr_cae.networks.transforms import STRIDE, Analysis, FactorizedAnalysis, FactorizedSynthesis, Synthesis, Widths
from zarr_cae.pixels import device as tensors
from zarr_cae.pixels.layout import ChunkForm
from zarr_cae.weights.registry import DEFAULT_MODEL, Weights

Array = npt.NDArray[Any]

_LARGEST_SYMBOL = 32767


PASS_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Pixels in one forward pass: on a CPU few enough for the caches of a core, on a GPU enough to fill it."""


def choose_device(name: str) -> torch.device:
    """The torch device for a `cae.device` setting, a GPU with its number.

    Raises CAEConfigurationError if it does not exist here, or can't be used because this process was forked from one
    that used a GPU; "auto" takes the CPU then.
    """
    forked = _forked_from_cuda()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not forked else "cpu"
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
    if device.type == "cuda" and forked:
        raise CAEConfigurationError(
            f"cae: cae.device is {name!r}, but CUDA was in use before this process was forked, and does not survive "
            "that; start processes with 'spawn' or 'forkserver', or use 'auto' or 'cpu' in them"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _forked_from_cuda() -> bool:
    """Whether torch refuses CUDA here because the parent had begun to use it; torch's own name for that is private."""
    in_bad_fork: Callable[[], bool] | None = getattr(torch.cuda, "_is_in_bad_fork", None)
    return in_bad_fork is not None and in_bad_fork()


_GPU_LANES = 2
"""Batches on a GPU at a time: one that computes, one that is copied."""


@dataclass(frozen=True)
class _Job:
    """The key of a batch: requests with equal jobs run together."""

    direction: Literal["analyse", "synthesise"]
    quality: int
    shape: tuple[int, ...]
    """Of one plane: (components, H, W) or (M, h, w)."""
    components: int
    settings: Settings
    chunk: ChunkForm | None = None
    """Where requests to analyse, or results of synthesis, are chunks."""


class Engine:
    """One network on one device."""

    def __init__(
        self, weights: Weights, device: torch.device, precision: Precision = "float32", *, compiled: bool = False
    ) -> None:
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
        if compiled:  # for batches of any number and size, or every new one would be compiled for
            self._analysis, self._synthesis = (
                cast("nn.Module", torch.compile(network, dynamic=True)) for network in self.networks
            )
        self._gains = {
            name: torch.from_numpy(weights.tensors[name])[:, :, None, None].to(device)
            for name in ("gain", "shift", "step", "offset")
        }
        self._usual_threads = torch.get_num_threads()
        self._streams = threading.local()
        largest = PASS_PIXELS[device.type]
        self.batcher: MicroBatcher[Any, Any] = MicroBatcher(
            self._run,
            name=f"cae-{weights.info.model}-{device}",
            max_weight=largest,
            max_pending=16 * largest * self._usual_threads,
            lanes=self._lanes,
        )

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """The analysis and the synthesis transform, on the device."""
        return self._analysis, self._synthesis

    def analyse(self, planes: Array, quality: int, settings: Settings) -> Array:
        """Planes (N, 3 or 1, H, W) float32 in [0, 1], sides multiples of 16, to symbols (N, M, H/16, W/16) int16."""
        return self.begin_analysis(planes, quality, settings).result()

    def begin_analysis(self, planes: Array, quality: int, settings: Settings, *, wait: bool = True) -> Future[Array]:
        """The future of `analyse`; to cancel it withdraws what has not begun. `wait` as in `MicroBatcher.submit`."""
        job = _Job("analyse", quality, planes.shape[1:], planes.shape[1], settings)
        return self._submit(job, planes, self.weights.latent_channels, STRIDE, 1, wait=wait)

    def synthesise(self, symbols: Array, quality: int, components: int, settings: Settings) -> Array:
        """Symbols (N, M, h, w) int16 to planes (N, components, 16 h, 16 w) float32, nominally in [0, 1]."""
        return self.begin_synthesis(symbols, quality, components, settings).result()

    def begin_synthesis(
        self, symbols: Array, quality: int, components: int, settings: Settings, *, wait: bool = True
    ) -> Future[Array]:
        """The future of `synthesise`, as that of `begin_analysis`."""
        job = _Job("synthesise", quality, symbols.shape[1:], components, settings)
        return self._submit(job, symbols, components, 1, STRIDE, wait=wait)

    def takes(self, chunk: ChunkForm) -> bool:
        """Whether such chunks may be given whole: on GPUs, up to a size. Others go as planes, which may be cut."""
        fits = chunk.pixels <= PASS_PIXELS[self.device.type]
        return self.device.type != "cpu" and fits and tensors.supported(chunk.dtype)

    def begin_chunk_analysis(
        self, pixels: Any, chunk: ChunkForm, quality: int, settings: Settings, *, wait: bool = True
    ) -> Future[Array]:
        """The future of the symbols (N, M, H/16, W/16) int16 of a chunk, an array of the host or of the device.

        It raises CAEDataError if a value lies outside the range.
        """
        job = _Job("analyse", quality, chunk.plane_shape, chunk.plane_shape[0], settings, chunk)
        return self.batcher.submit(job, pixels, chunk.pixels, wait=wait)

    def begin_chunk_synthesis(
        self, symbols: Array, chunk: ChunkForm, quality: int, settings: Settings, *, wait: bool = True
    ) -> Future[Any]:
        """The future of the chunk with these symbols: an array, or a tensor if it stays on the device."""
        job = _Job("synthesise", quality, symbols.shape[1:], chunk.plane_shape[0], settings, chunk)
        return self.batcher.submit(job, symbols, chunk.pixels, wait=wait)

    def _submit(self, job: _Job, source: Array, channels: int, given: int, made: int, *, wait: bool) -> Future[Array]:
        """Queue a request, in pieces of bounded size with their surroundings if it is large.

        The source has `given` samples a latent position along rows and columns, the result `made`, and `channels`.
        """
        rows, columns = (side // given for side in source.shape[2:])
        patches = list(pieces((rows, columns), job.settings.tile // STRIDE))
        pixels = STRIDE**2 * max(math.prod(outer.shape) for outer, _ in patches)
        count = max(1, PASS_PIXELS[self.device.type] // pixels)
        if len(patches) == 1 and len(source) <= count:
            return self.batcher.submit(job, source, pixels * len(source), wait=wait)
        dtype = np.int16 if job.direction == "analyse" else np.float32
        whole = _Whole(np.empty((len(source), channels, rows * made, columns * made), dtype))
        for first in range(0, len(source), count):
            some = slice(first, first + count)
            for outer, inner in patches:
                piece = source[some, :, *outer.scaled(given)]
                own = replace(job, shape=piece.shape[1:])
                part = self.batcher.submit(own, piece, len(piece) * STRIDE**2 * math.prod(outer.shape), wait=wait)
                whole.add(part, (some, *inner.scaled(made)), Patch(*inner.within(outer)).scaled(made))
        whole.complete()
        return whole.future

    def _lanes(self, key: Hashable) -> int:
        assert isinstance(key, _Job)
        return _GPU_LANES if self.device.type != "cpu" else key.settings.threads or self._usual_threads

    def _run(self, key: Hashable, requests: list[Any], lanes: int) -> Sequence[Any]:
        assert isinstance(key, _Job)
        if self.device.type == "cpu":
            _use_threads(lanes, self._usual_threads)
        with torch.inference_mode(), self._stream():
            parts = self._sources(key, requests)
            done = self._code(parts[0] if len(parts) == 1 else torch.cat(parts), key)
            counts = list(map(len, parts))
            if key.chunk is not None and key.direction == "synthesise":
                ends = np.cumsum(counts).tolist()
                return [
                    self._chunk(done[end - count : end], key.chunk) for count, end in zip(counts, ends, strict=True)
                ]
            return np.split(_on_host(done), np.cumsum(counts)[:-1])

    def _stream(self) -> AbstractContextManager[Any]:
        """On a GPU, a stream of this thread's own."""
        if self.device.type == "cpu":
            return nullcontext()
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._streams.own)

    def _sources(self, job: _Job, requests: list[Any]) -> list[Tensor]:
        """Planes or symbols on the device."""
        if job.chunk is None or job.direction == "synthesise":
            return [tensors.to_tensor(request, self.device) for request in requests]
        form = job.chunk
        return [
            tensors.to_planes(tensors.to_tensor(pixels, self.device), form.layout, form.value_range)
            for pixels in requests
        ]

    def _chunk(self, planes: Tensor, form: ChunkForm) -> Any:
        pixels = tensors.to_chunk(planes, form.layout, form.dtype, form.value_range)
        if not form.stays:
            return _on_host(pixels)
        if pixels.is_cuda:  # who uses it and frees it knows only the usual stream
            torch.cuda.current_stream(self.device).synchronize()
            pixels.record_stream(torch.cuda.default_stream(self.device))
        return pixels

    def _gain(self, name: str, job: _Job) -> Tensor:
        row = self.weights.row(job.quality)
        return self._gains[name][row : row + 1]

    def _code(self, source: Tensor, job: _Job) -> Tensor:
        if job.direction == "analyse":
            pixels = source.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            latents: Tensor = self._analysis(pixels) * self._gain("gain", job) - self._gain("shift", job)
            return latents.round_().clamp_(-_LARGEST_SYMBOL, _LARGEST_SYMBOL).to(torch.int16)
        latents = source.float() * self._gain("step", job) + self._gain("offset", job)
        planes: Tensor = self._synthesis(latents.contiguous(memory_format=torch.channels_last))
        return planes if job.components == 3 else planes.mean(1, keepdim=True)


def _on_host(values: Tensor) -> Array:
    """From a GPU by way of pinned memory, which it writes by itself."""
    if values.is_cuda:
        values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values)
    return values.numpy()


class _Whole:
    """The result of a request that runs in pieces, and its future."""

    def __init__(self, target: Array) -> None:
        self.future: Future[Array] = Future()
        self._target = target
        self._lock = threading.Lock()
        self._parts: set[Future[Array]] = set()
        """Those that are not done. One that is would keep the whole, and the whole's callback itself, in memory."""
        self._missing = 1

    def add(self, part: Future[Array], place: tuple[slice, ...], inner: tuple[slice, ...]) -> None:
        """Wait for one more part, of which `inner` belongs in a place of the whole."""
        with self._lock:
            self._missing += 1
            self._parts.add(part)
        part.add_done_callback(lambda done: self._arrived(done, place, inner))

    def complete(self) -> None:
        """Say that all parts were added."""
        parts, lock = self._parts, self._lock  # not `self`, which holds the future

        def withdraw(_: Future[Array]) -> None:
            with lock:
                left = list(parts)
            for part in left:
                part.cancel()

        self.future.add_done_callback(withdraw)
        self._arrived_one()

    def _arrived(self, part: Future[Array], place: tuple[slice, ...], inner: tuple[slice, ...]) -> None:
        with self._lock:
            self._parts.discard(part)
        if part.cancelled():
            self.future.cancel()
        elif (error := part.exception()) is not None:
            with suppress(InvalidStateError):  # another part failed before, or all were cancelled
                self.future.set_exception(error)
            del error
        else:
            first, *rest = place
            self._target[first, :, *rest] = part.result()[:, :, *inner]
            self._arrived_one()

    def _arrived_one(self) -> None:
        with self._lock:
            self._missing -= 1
            last = self._missing == 0
        if last:
            with suppress(InvalidStateError):
                self.future.set_result(self._target)


_threads_lock = threading.Lock()


def _use_threads(count: int, usual: int) -> None:
    """Have torch run on `count` threads what this thread calls, and leave its number for others what it was."""
    if torch.get_num_threads() != count:  # asked first: a thread's first operation would undo what was set before
        with _threads_lock:
            torch.set_num_threads(count)  # of this thread, and of every thread that starts later, whence:
            other = threading.Thread(target=torch.set_num_threads, args=(usual,))
            other.start()
            other.join()


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


_engines: dict[tuple[str, str, str, bool], Engine] = {}
_lock = threading.Lock()


def engine_for(weights: Weights, settings: Settings) -> Engine:
    """The engine of these weights on the chosen device in the chosen precision, made once a process."""
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    key = (weights.info.digest, str(device), precision, settings.compile)
    with _lock:
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = Engine(weights, device, precision, compiled=settings.compile)
        return engine


def _after_fork() -> None:
    """Start afresh in a forked child, where OpenMP's threads are gone and would be waited for without end."""
    global _lock, _threads_lock
    _lock, _threads_lock = threading.Lock(), threading.Lock()
    _engines.clear()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
