"""A chunk to its frame and back, as plans of steps, and what runs such plans with and without an event loop.

zarr calls a codec from coroutines and from threads. A plan is written once for both: a generator that yields each step
that has to be waited for (bytes from the store, a network's turn) and is sent its result. What it computes in between
runs on whichever thread the plan is run on; coroutines hand that to other threads.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import RangeByteRequest
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, default_buffer_prototype

from zarr_cae import entropy
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.framing import FrameHeader
from zarr_cae.pixels import RGB, Chunk, Layout, Planes, ValueRange, to_chunk, to_planes
from zarr_cae.tables import Tables
from zarr_cae.weights import Weights

if TYPE_CHECKING:
    from zarr_cae.engine import Engine, Settings

_Result = TypeVar("_Result")


class Step(Protocol):
    """Something that a plan waits for."""

    def now(self, store: Any) -> Any:
        """Do it, on this thread. `store` is what zarr gave to reach the chunk's bytes, or None."""


class StoreStep(Step, Protocol):
    """A step that an event loop takes by itself."""

    last: ClassVar[bool]
    """Whether nothing of the plan follows."""

    async def later(self, store: Any) -> Any:
        """Do it, without holding up the event loop."""


class NetworkStep(ABC):
    """A step that threads of the engine take, so that an event loop need not be woken for it."""

    @abstractmethod
    def queue(self, *, wait: bool) -> Future[Any]:
        """The future of its result; `wait` as in `MicroBatcher.submit`."""

    def now(self, store: Any) -> Any:  # noqa: ARG002
        return self.queue(wait=True).result()


Plan: TypeAlias = Generator[Step, Any, _Result]


class MissingChunkError(LookupError):
    """Ends a plan that needs bytes of a chunk that is not there; who runs the plan catches it."""


def run(plan: Plan[_Result], store: Any = None) -> _Result:
    """Run a plan on this thread. `store` is what zarr gave to reach the chunk's bytes, if the plan does."""
    step, result = _advance(plan, None)
    while step is not None:
        step, result = _advance(plan, step.now(store))
    return cast("_Result", result)


async def run_async(plan: Plan[_Result], store: Any = None, *, light_start: bool = False) -> _Result:
    """`run` for coroutines; `light_start` if the plan computes next to nothing before its first step.

    The event loop is woken only for what the store does and for the result. To cancel the task withdraws what is
    queued for the networks.
    """
    step, result = _advance(plan, None) if light_start else await _travel(plan, None)
    while step is not None:
        answer = await cast("StoreStep", step).later(store)
        step, result = _advance(plan, answer) if cast("StoreStep", step).last else await _travel(plan, answer)
    return cast("_Result", result)


def _advance(plan: Plan[_Result], answer: Any) -> tuple[Step | None, _Result | None]:
    """The plan's next step, or None and its result; StopIteration can't pass through a future."""
    try:
        return plan.send(answer), None
    except StopIteration as end:
        return None, end.value


async def _travel(plan: Plan[_Result], answer: Any) -> tuple[Step | None, _Result | None]:
    """`_advance` on other threads, through all steps of the networks."""
    arrival: asyncio.Future[_Outcome] = asyncio.get_running_loop().create_future()
    journey = _Journey(plan, arrival)
    try:
        _threads().submit(contextvars.copy_context().run, journey.go, answer)
        error, step, result = await arrival
    finally:
        journey.leave()
        del journey, arrival
    try:
        if error is not None:
            raise error
        return cast("Step | None", step), result
    finally:
        del error  # it holds this frame by its traceback


_Outcome: TypeAlias = tuple[BaseException | None, Step | Future[Any] | None, Any]
"""What stopped a plan; the step that it waits for; its result."""


class _Journey:
    """A plan on its way over threads to its end, or to a step that is none of the networks'.

    The traceback of an exception holds the frames of those who called what raised it, with all their variables, and
    these what they refer to: whatever leads from there back to the exception, or from a future to itself, would keep
    the planes of a chunk in memory until a garbage collection.
    """

    def __init__(self, plan: Plan[Any], arrival: asyncio.Future[_Outcome]) -> None:
        self._plan = plan
        self._arrival: asyncio.Future[_Outcome] | None = arrival
        self._waits_for: Future[Any] | None = None
        self._left = False

    def go(self, answer: Any) -> None:
        """Take the plan to its next step."""
        outcome = _tried(self._plan, answer)
        step = outcome[1]
        if not isinstance(step, Future):
            self._arrive(outcome)
            del outcome
            return
        self._waits_for = step
        if self._left:
            step.cancel()
        context = contextvars.copy_context()
        step.add_done_callback(lambda done: self._go_on(done, context))

    def _go_on(self, done: Future[Any], context: contextvars.Context) -> None:
        """On the engine's thread, which has other work: hand what it made to a thread of ours."""
        self._waits_for = None
        if done.cancelled():
            self._arrive((asyncio.CancelledError(), None, None))
        elif done.exception() is not None:
            self._arrive((done.exception(), None, None))
        else:
            try:
                _threads().submit(context.run, self.go, done.result())
            except RuntimeError as exiting:  # the interpreter, so that no more threads run
                self._arrive((exiting, None, None))

    def leave(self) -> None:
        """Withdraw what is queued: nobody waits for it any more."""
        self._left = True
        waits_for = self._waits_for
        if waits_for is not None:
            waits_for.cancel()

    def _arrive(self, outcome: _Outcome) -> None:
        arrival, self._arrival = self._arrival, None
        assert arrival is not None
        with suppress(RuntimeError):  # the loop was closed in the meantime
            arrival.get_loop().call_soon_threadsafe(_settle, arrival, outcome)


def _settle(arrival: asyncio.Future[Any], outcome: Any) -> None:
    if not arrival.done():
        arrival.set_result(outcome)


def _tried(plan: Plan[Any], answer: Any) -> _Outcome:
    """`_advance`, with a network's step queued. Exceptions are given as values, whose tracebacks end here."""
    try:
        step, result = _advance(plan, answer)
        return None, step.queue(wait=False) if isinstance(step, NetworkStep) else step, result
    except BaseException as error:  # noqa: BLE001 - the coroutine that waits shall have it
        return error, None, None


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """For what plans compute: as many as zarr may use for its codecs."""
    return ThreadPoolExecutor(zarr.config.get("threading.max_workers") or entropy.cores(), "cae-plan")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)


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
        """Of this process, from `zarr.config`; the first call in a process imports torch."""
        from zarr_cae.engine import Settings

        try:
            return Settings(**zarr.config.get("cae", {}))
        except TypeError as error:
            raise CAEConfigurationError(f"cae: zarr.config key cae.*: {error}") from error

    @cached_property
    def engine(self) -> Engine:
        """The network on its device; the first call in a process imports torch."""
        from zarr_cae.engine import engine_for

        return engine_for(self.weights, self.settings)

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


def encoding(job: ChunkJob, pixels: npt.NDArray[Any]) -> Plan[Buffer]:
    """The frame of a whole chunk."""
    _ = job.engine  # on this thread, not on the event loop's
    symbols = yield Analyse(job, job.planes(pixels, job.layout))
    return job.buffer(entropy.encode(symbols, job.header, job.tables))


def decoding(job: ChunkJob, frame: memoryview) -> Plan[Chunk]:
    """The pixels of a whole chunk's frame."""
    _ = job.engine
    planes = yield Synthesise(job, entropy.decode(frame, job.header, job.tables))
    return job.pixels(planes, job.layout)
