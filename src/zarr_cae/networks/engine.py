"""Run the networks: one engine for each weights file and device, with requests in batches and large planes in pieces.

Requests from any thread or event loop meet in the `MicroBatcher` of an engine. On a CPU it has a lane for each core,
and each lane runs whole networks, so that cores need not wait for each other at every layer. Only a request that finds
several cores free has them share each layer. On a GPU it has two lanes, each with a stream of its own: one batch
computes while another is copied. On a GPU, chunks travel in their own dtype and become planes there (`pixels.device`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from zarr_cae.coder.frame import STRIDE, Symbols
from zarr_cae.coder.header import LARGEST_SYMBOL
from zarr_cae.coder.tiles import Patch
from zarr_cae.config import Settings
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.networks.device import PASS_PIXELS, choose_device, use_threads
from zarr_cae.networks.inference import Precision, choose_precision, prepare
from zarr_cae.networks.microbatch import MicroBatcher
from zarr_cae.networks.pieces import Array, Whole, pieces
from zarr_cae.networks.refine import StepKey, take_step
from zarr_cae.networks.transforms import Analysis, FactorizedAnalysis, FactorizedSynthesis, Synthesis, Widths
from zarr_cae.pixels import device as on_device
from zarr_cae.pixels.convert import to_chunk, to_planes, to_root
from zarr_cae.pixels.correct import Area, correct
from zarr_cae.pixels.layout import PixelFormat, Planes
from zarr_cae.threads import call_in_child, hold_across_fork
from zarr_cae.weights.file import DEFAULT_MODEL, Weights

_GPU_LANES = 2
"""Batches on a GPU at a time: one that computes, one that is copied."""


@dataclass(frozen=True)
class _BatchKey:
    """The properties that requests must share to run in one batch."""

    direction: Literal["analyse", "synthesise"]
    quality: int
    shape: tuple[int, ...]
    """Shape of one plane: (components, H, W) to analyse, (M, h, w) to synthesise."""
    components: int
    settings: Settings


class _Request(NamedTuple):
    """The input of one request, and the functions that move it to the device and its result back."""

    source: Any
    load: Callable[[Any], Tensor]
    """Turns the source into a tensor on the device: planes (N, components, H, W) or symbols (N, M, h, w)."""
    finish: Callable[[Tensor], Any]
    """Turns the result of the network, a tensor on the device, into the result of the request."""


class Engine:
    """One pair of networks on one device.

    Parameters
    ----------
    weights
        The parameters.
    device
        Where the networks run.
    precision
        "float32" or "bfloat16"; see `networks.inference`.
    compiled
        Whether `torch.compile` makes the networks.
    """

    def __init__(
        self, weights: Weights, device: torch.device, precision: Precision = "float32", *, compiled: bool = False
    ) -> None:
        self.weights, self.device = weights, device
        self._analysis, self._synthesis = _networks(weights)
        for name, module in (("analysis", self._analysis), ("synthesis", self._synthesis)):
            module.float()  # torch's default dtype may be another one in this process
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
        self.plain_synthesis = self._synthesis
        """The synthesis transform as it is before `torch.compile`: for passes with gradients."""
        if compiled:  # with dynamic shapes: otherwise each new size of a batch would be compiled
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

    def analyse(self, planes: Planes, quality: int, settings: Settings) -> Future[Symbols]:
        """Queue planes for the analysis transform.

        Parameters
        ----------
        planes
            (N, 3 or 1, H, W) float32 in [0, 1]; H and W are multiples of 16. Leave them unchanged until the end.
        quality
            1 to 8, one that the weights have.
        settings
            The settings of the machine.

        Returns
        -------
        Future
            Its result is the symbols (N, M, H / 16, W / 16) int16. Cancelling it withdraws work that has not begun.
        """
        key = _BatchKey("analyse", quality, planes.shape[1:], planes.shape[1], settings)
        return self._submit(key, planes, self.weights.latent_channels, STRIDE, 1)

    def synthesise(
        self, symbols: Symbols, quality: int, components: int, settings: Settings, areas: Sequence[Area] = ()
    ) -> Future[Planes]:
        """Queue symbols (N, M, h, w) int16 for the synthesis transform, and correct areas of its result.

        Returns
        -------
        Future
            Its result is the planes (N, components, 16 h, 16 w) float32, nominally in [0, 1]. Cancelling it withdraws
            work that has not begun.
        """
        key = _BatchKey("synthesise", quality, symbols.shape[1:], components, settings)

        def finish(planes: Array) -> Array:
            correct(planes, areas)
            return planes

        return self._submit(key, symbols, components, 1, STRIDE, finish)

    def analyse_chunk(self, pixels: Any, form: PixelFormat, quality: int, settings: Settings) -> Future[Symbols]:
        """Queue a whole chunk for the analysis transform.

        A GPU gets the chunk in its own dtype, if torch knows that; otherwise the host makes planes of it.

        Parameters
        ----------
        pixels
            The chunk, a NumPy array or an array on a GPU.
        form
            How the chunk maps to planes.
        quality, settings
            As for `analyse`.

        Returns
        -------
        Future
            Its result is the symbols (N, M, H / 16, W / 16) int16.

        Raises
        ------
        CAEDataError
            If a value lies outside the value range; for chunks on a GPU the future raises it.
        """
        if not self._runs_whole(form):
            planes = to_planes(_on_host(pixels), form.layout, form.value_range)
            if form.transform == "sqrt":
                planes = to_root(planes, form.value_range)
            return self.analyse(planes, quality, settings)

        def load(chunk: Any) -> Tensor:
            tensor = on_device.to_planes(on_device.to_tensor(chunk, self.device), form.layout, form.value_range)
            return on_device.to_root(tensor, form.value_range) if form.transform == "sqrt" else tensor

        key = _BatchKey("analyse", quality, form.plane_shape, form.plane_shape[0], settings)
        return self.batcher.submit(key, _Request(pixels, load, _to_numpy), form.pixels)

    def synthesise_chunk(
        self, symbols: Symbols, form: PixelFormat, quality: int, settings: Settings, areas: Sequence[Area] = ()
    ) -> Future[Any]:
        """Queue the symbols (N, M, h, w) of a whole chunk for the synthesis transform, and correct areas of its result.

        Returns
        -------
        Future
            Its result is the chunk: a NumPy array, or a tensor on the GPU if the form says that arrays stay there.
        """
        components = form.plane_shape[0]
        key = _BatchKey("synthesise", quality, symbols.shape[1:], components, settings)
        if not self._runs_whole(form):

            def finish_on_host(planes: Array) -> Array:
                correct(planes, areas)
                return to_chunk(planes, form.layout, form.dtype, form.value_range, form.transform)

            return self._submit(key, symbols, components, 1, STRIDE, finish_on_host)

        def finish(planes: Tensor) -> Any:
            correct(planes, areas)
            pixels = on_device.to_chunk(planes, form.layout, form.dtype, form.value_range, form.transform)
            if not form.stays:
                return _to_numpy(pixels)
            if pixels.is_cuda:  # the reader of this tensor knows only the default stream
                torch.cuda.current_stream(self.device).synchronize()
                pixels.record_stream(torch.cuda.default_stream(self.device))
            return pixels

        return self.batcher.submit(key, _Request(symbols, self._to_tensor, finish), form.pixels)

    def _runs_whole(self, form: PixelFormat) -> bool:
        """Return whether such chunks go to the device in their own dtype: on GPUs, if torch has it, up to a size."""
        fits = form.pixels <= PASS_PIXELS[self.device.type]
        return self.device.type != "cpu" and fits and on_device.supported(form.dtype)

    def _submit(
        self,
        key: _BatchKey,
        source: Array,
        channels: int,
        given: int,
        made: int,
        finish: Callable[[Array], Any] = lambda result: result,
    ) -> Future[Any]:
        """Queue a request of NumPy arrays; cut a large one into pieces of bounded size with their surroundings.

        The source has `given` samples per latent position along rows and columns. The result has `made`, and `channels`
        channels. `finish` turns the result of the network into that of the request, on a thread of the batcher.
        """
        rows, columns = (side // given for side in source.shape[2:])
        patches = list(pieces((rows, columns), key.settings.tile // STRIDE))
        pixels = STRIDE**2 * max(math.prod(outer.shape) for outer, _ in patches)
        count = max(1, PASS_PIXELS[self.device.type] // pixels)
        if len(patches) == 1 and len(source) <= count:
            request = _Request(source, self._to_tensor, lambda result: finish(_to_numpy(result)))
            return self.batcher.submit(key, request, pixels * len(source))
        dtype = np.int16 if key.direction == "analyse" else np.float32
        whole = Whole(np.empty((len(source), channels, rows * made, columns * made), dtype), finish)
        for first in range(0, len(source), count):
            some = slice(first, first + count)
            for outer, inner in patches:
                piece = source[some, :, *outer.scaled(given)]
                own = _BatchKey(key.direction, key.quality, piece.shape[1:], key.components, key.settings)
                weight = len(piece) * STRIDE**2 * math.prod(outer.shape)
                part = self.batcher.submit(own, _Request(piece, self._to_tensor, _to_numpy), weight)
                whole.add(part, (some, *inner.scaled(made)), Patch(*inner.within(outer)).scaled(made))
        whole.complete()
        return whole.future

    def _lanes(self, key: Hashable) -> int:
        assert isinstance(key, _BatchKey | StepKey)
        return _GPU_LANES if self.device.type != "cpu" else key.settings.threads or self._usual_threads

    def _run(self, key: Hashable, requests: list[Any], lanes: int) -> Sequence[Any]:
        """Run a batch: called by the batcher on one of its threads."""
        if self.device.type == "cpu":
            use_threads(lanes, self._usual_threads)
        if isinstance(key, StepKey):
            with self._stream():
                return take_step(self, key, requests)
        assert isinstance(key, _BatchKey)
        with torch.inference_mode(), self._stream():
            parts = [request.load(request.source) for request in requests]
            done = self._code(parts[0] if len(parts) == 1 else torch.cat(parts), key)
            results = torch.split(done, list(map(len, parts)))
            return [request.finish(result) for request, result in zip(requests, results, strict=True)]

    def _stream(self) -> AbstractContextManager[Any]:
        """Return the context of this thread's own stream on a GPU, or an empty context on a CPU."""
        if self.device.type == "cpu":
            return nullcontext()
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._streams.own)

    def _to_tensor(self, array: Any) -> Tensor:
        return on_device.to_tensor(array, self.device)

    def row_value(self, name: str, quality: int) -> Tensor:
        """Return "gain", "shift", "step" or "offset" of a quality, (1, M, 1, 1) on the device."""
        row = self.weights.row(quality)
        return self._gains[name][row : row + 1]

    def _code(self, source: Tensor, key: _BatchKey) -> Tensor:
        """Apply the network and the gains of the quality, and round or dequantise."""
        if key.direction == "analyse":
            pixels = source.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            gain, shift = (self.row_value(name, key.quality) for name in ("gain", "shift"))
            latents: Tensor = self._analysis(pixels) * gain - shift
            return latents.round_().clamp_(-LARGEST_SYMBOL, LARGEST_SYMBOL).to(torch.int16)
        latents = source.float() * self.row_value("step", key.quality) + self.row_value("offset", key.quality)
        planes: Tensor = self._synthesis(latents.contiguous(memory_format=torch.channels_last))
        return planes if key.components == 3 else planes.mean(1, keepdim=True)


def _to_numpy(values: Tensor) -> Array:
    """Return a tensor as a NumPy array; a GPU copies it through pinned memory, without a core's help."""
    if values.is_cuda:
        values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values)
    return values.numpy()


def _on_host(pixels: Any) -> Array:
    """Return a chunk as a NumPy array, wherever it is."""
    return pixels if isinstance(pixels, np.ndarray) else on_device.to_tensor(pixels, torch.device("cpu")).numpy()


def _networks(weights: Weights) -> tuple[nn.Module, nn.Module]:
    """Return the analysis and the synthesis transform, not yet with their parameters."""
    info = weights.info
    try:
        architecture = dict(info.architecture)
        if info.model == DEFAULT_MODEL:
            widths = Widths(**architecture)
            return Analysis(widths), Synthesis(widths)
        return FactorizedAnalysis(**architecture), FactorizedSynthesis(**architecture)
    except (TypeError, ValueError, RuntimeError) as error:  # from dict(), the signatures, and torch
        raise CAEConfigurationError(
            f"cae: weights file {info.path}: there is no network of architecture {info.architecture!r}: {error}"
        ) from error


_engines: dict[tuple[str, str, str, bool], Engine] = {}
_lock = threading.Lock()


def engine_for(weights: Weights, settings: Settings) -> Engine:
    """Return the engine of these weights on the device and in the precision of the settings, made once per process."""
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    key = (weights.info.digest, str(device), precision, settings.compile)
    with _lock:
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = Engine(weights, device, precision, compiled=settings.compile)
        return engine


hold_across_fork(_lock)
call_in_child(_engines.clear)  # the threads of their batchers are not in the child
