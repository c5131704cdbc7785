"""A chunk to its frame and back: plans for whole chunks, and the steps and conversions that all plans share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import RangeByteRequest
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, default_buffer_prototype, gpu

from zarr_cae.codec.plan import NetworkStep, Plan
from zarr_cae.coder import tiles as entropy
from zarr_cae.coder.frame import FrameHeader
from zarr_cae.coder.tables import Tables
from zarr_cae.config import Settings
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.pixels.layout import RGB, Chunk, ChunkForm, Layout, Planes, ValueRange, to_chunk, to_planes
from zarr_cae.weights.registry import Weights

if TYPE_CHECKING:
    from zarr_cae.networks.engine import Engine

_ON_GPU = gpu.NDBuffer
"""What zarr holds arrays in after `zarr.config.enable_gpu()`."""


class MissingChunkError(LookupError):
    """Ends a plan that needs bytes of a chunk that is not there; who runs the plan catches it."""


@dataclass(frozen=True)
class Fetch:
    """Bytes of the chunk, as one memoryview for each range; fewer than asked for where the chunk ends before."""

    ranges: Sequence[tuple[int, int]] | None
    """First byte and end of each; None for all bytes as one."""
    optional: bool = False
    """Whether a missing chunk gives None; if not, it raises MissingChunkError, which ends the plan."""
    last: ClassVar[bool] = False

    def now(self, store: Any) -> list[memoryview] | None:
        return self._views([store.get_sync(prototype=default_buffer_prototype(), byte_range=one) for one in self._list])

    async def later(self, store: Any) -> list[memoryview] | None:
        return self._views(await asyncio.gather(*(store.get(default_buffer_prototype(), one) for one in self._list)))

    @property
    def _list(self) -> list[RangeByteRequest | None]:
        return [None] if self.ranges is None else [RangeByteRequest(*one) for one in self.ranges]

    def _views(self, buffers: Sequence[Buffer | None]) -> list[memoryview] | None:
        found = [contiguous(buffer) for buffer in buffers if buffer is not None]
        if len(found) == len(buffers):
            return found
        if self.optional:
            return None
        raise MissingChunkError


def contiguous(buffer: Buffer) -> memoryview:
    """The bytes of a buffer."""
    return memoryview(cast("Any", np.ascontiguousarray(buffer.as_numpy_array()))).cast("B")


@dataclass(frozen=True)
class Put:
    """Store the chunk's frame; None deletes it."""

    frame: Buffer | None
    last: ClassVar[bool] = True

    def now(self, store: Any) -> None:
        if self.frame is None:
            store.delete_sync()
        else:
            store.set_sync(self.frame)

    async def later(self, store: Any) -> None:
        if self.frame is None:
            await store.delete()
        else:
            await store.set(self.frame)


@dataclass(frozen=True)
class Analyse(NetworkStep):
    """Planes (N, 3 or 1, H, W) to symbols (N, M, H/16, W/16)."""

    job: ChunkJob
    planes: Planes

    def queue(self, *, wait: bool) -> Future[entropy.Symbols]:
        return self.job.engine.begin_analysis(self.planes, self.job.quality, self.job.settings, wait=wait)


@dataclass(frozen=True)
class Synthesise(NetworkStep):
    """Symbols (N, M, h, w) to planes (N, 3 or 1, 16 h, 16 w)."""

    job: ChunkJob
    symbols: entropy.Symbols

    def queue(self, *, wait: bool) -> Future[Planes]:
        job = self.job
        return job.engine.begin_synthesis(self.symbols, job.quality, job.components, job.settings, wait=wait)


@dataclass(frozen=True)
class AnalyseChunk(NetworkStep):
    """A whole chunk, of the host or of the device, to symbols (N, M, H/16, W/16)."""

    job: ChunkJob
    chunk: Any

    def queue(self, *, wait: bool) -> Future[entropy.Symbols]:
        job = self.job
        return job.engine.begin_chunk_analysis(self.chunk, job.form, job.quality, job.settings, wait=wait)


@dataclass(frozen=True)
class SynthesiseChunk(NetworkStep):
    """Symbols (N, M, h, w) to a whole chunk, on the device where zarr keeps arrays there."""

    job: ChunkJob
    symbols: entropy.Symbols

    def queue(self, *, wait: bool) -> Future[Any]:
        job = self.job
        return job.engine.begin_chunk_synthesis(self.symbols, job.form, job.quality, job.settings, wait=wait)


@dataclass(frozen=True)
class ChunkJob:
    """What the plans for a chunk need to know, and the conversions between its forms."""

    layout: Layout
    spec: ArraySpec
    value_range: ValueRange
    quality: int
    load: Callable[[], Weights]
    """Gives the verified weights; called only when something is coded."""

    @cached_property
    def weights(self) -> Weights:
        """Raises WeightsNotFoundError if they are not on this machine."""
        return self.load()

    @cached_property
    def settings(self) -> Settings:
        """Of this process, from `zarr.config`."""
        try:
            return Settings(**zarr.config.get("cae", {}))
        except TypeError as error:
            raise CAEConfigurationError(f"cae: zarr.config key cae.*: {error}") from error

    @cached_property
    def engine(self) -> Engine:
        """The network on its device; the first call in a process imports torch."""
        from zarr_cae.networks.engine import engine_for

        return engine_for(self.weights, self.settings)

    @property
    def form(self) -> ChunkForm:
        """Of the chunk, for the engine."""
        return ChunkForm(self.layout, self.dtype, self.value_range, issubclass(self.spec.prototype.nd_buffer, _ON_GPU))

    @property
    def tables(self) -> Tables:
        """The frequency tables of the quality."""
        return self.weights.tables[self.weights.row(self.quality)]

    @property
    def components(self) -> int:
        """Of a plane: 3 for RGB, 1 for grey."""
        return 1 if self.layout.grey else RGB

    @property
    def outline(self) -> FrameHeader:
        """What the chunk's frame must hold, but for its version, which only the weights know."""
        layout = self.layout
        return FrameHeader(layout.planes, layout.height, layout.width, layout.grey)

    @property
    def header(self) -> FrameHeader:
        """What the chunk's frame must hold."""
        return replace(self.outline, version=self.tables.frame_version)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the chunk."""
        return self.spec.dtype.to_native_dtype()

    def planes(self, pixels: Chunk, layout: Layout) -> Planes:
        """Pixels of this chunk, of the whole or of a box with this layout, as planes (N, 3 or 1, H, W)."""
        planes = to_planes(pixels, layout, self.value_range)
        # Three grey channels look like RGB to the layout of a box: the same numbers in another shape.
        return planes.reshape(-1, self.components, *planes.shape[2:])

    def pixels(self, planes: Planes, layout: Layout) -> Chunk:
        """The way back of `planes`."""
        return to_chunk(planes, layout, self.dtype, self.value_range)

    def buffer(self, frame: bytes) -> Buffer:
        """A frame as zarr takes it."""
        return self.spec.prototype.buffer.from_bytes(frame)


def encoding(job: ChunkJob, pixels: Any) -> Plan[Buffer]:
    """The frame of a whole chunk, an array of numpy or one of the device."""
    if job.engine.takes(job.form):  # the engine is made on this thread, not on the event loop's
        symbols = yield AnalyseChunk(job, pixels)
    else:
        symbols = yield Analyse(job, job.planes(on_host(pixels, job.spec), job.layout))
    return job.buffer(entropy.encode(symbols, job.header, job.tables))


def decoding(job: ChunkJob, frame: memoryview) -> Plan[Any]:
    """The pixels of a whole chunk's frame; a tensor of the device if both zarr's arrays and the engine are there."""
    whole = job.engine.takes(job.form)
    symbols = entropy.decode(frame, job.header, job.tables)
    if whole:
        return (yield SynthesiseChunk(job, symbols))
    planes = yield Synthesise(job, symbols)
    return job.pixels(planes, job.layout)


def on_host(pixels: Any, spec: ArraySpec) -> npt.NDArray[Any]:
    """An array as numpy's, from wherever it is."""
    if isinstance(pixels, np.ndarray):
        return pixels
    return np.asarray(spec.prototype.nd_buffer.from_ndarray_like(pixels).as_numpy_array())
