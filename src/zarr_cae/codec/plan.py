"""Plans, and the two runners that execute them: one for threads, one for coroutines.

zarr calls a codec from threads and from coroutines. A plan is written once for both, as a generator. It yields each
operation that it waits for: bytes from the store (`Fetch`, `Put`), or the future of a network's work. The runner sends
the result back. The plan computes on the thread of the runner; `run_async` uses the pool's threads for that, so that
zarr's event loop stays free. (httpx runs its authentication flows in this way.)
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from zarr.abc.buffer import Buffer
from zarr.abc.store import RangeByteRequest
from zarr.buffer import default_buffer_prototype

from zarr_cae.threads import pool

_Result = TypeVar("_Result")


class MissingChunkError(LookupError):
    """A plan needs bytes of a chunk that is not stored. The caller of the runner catches it."""


@dataclass(frozen=True)
class Fetch:
    """Get bytes of the chunk: one memoryview for each range, shorter than asked for if the chunk ends before."""

    ranges: Sequence[tuple[int, int]] | None = None
    """First byte and end of each range; None for the whole chunk."""
    optional: bool = False
    """Whether a missing chunk gives None; otherwise it raises MissingChunkError, which ends the plan."""

    def now(self, store: Any) -> list[memoryview] | None:
        """Get the bytes on this thread."""
        return self._views([store.get_sync(prototype=default_buffer_prototype(), byte_range=one) for one in self._list])

    async def later(self, store: Any) -> list[memoryview] | None:
        """Get the bytes in an event loop."""
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


@dataclass(frozen=True)
class Put:
    """Store the frame of the chunk, or delete the chunk if the frame is None."""

    frame: Buffer | None

    def now(self, store: Any) -> None:
        """Store or delete on this thread."""
        if self.frame is None:
            store.delete_sync()
        else:
            store.set_sync(self.frame)

    async def later(self, store: Any) -> None:
        """Store or delete in an event loop."""
        if self.frame is None:
            await store.delete()
        else:
            await store.set(self.frame)


Wait: TypeAlias = Fetch | Put | Future[Any]
Plan: TypeAlias = Generator[Wait, Any, _Result]


def contiguous(buffer: Buffer) -> memoryview:
    """Return the bytes of a buffer."""
    return memoryview(cast("Any", np.ascontiguousarray(buffer.as_numpy_array()))).cast("B")


def run(plan: Plan[_Result], store: Any = None) -> _Result:
    """Run a plan on this thread and return its result.

    Parameters
    ----------
    plan
        The plan.
    store
        zarr's `ByteGetter` or `ByteSetter` for the chunk, if the plan fetches or stores bytes.
    """
    wait, result = _advance(plan, None)
    while wait is not None:
        answer = wait.result() if isinstance(wait, Future) else wait.now(store)
        wait, result = _advance(plan, answer)
    return cast("_Result", result)


async def run_async(plan: Plan[_Result], store: Any = None) -> _Result:
    """Run a plan from a coroutine: like `run`, but the plan computes on the pool's threads.

    Cancelling the task withdraws the work that is queued for a network.
    """
    wait, result = await _advance_on_pool(plan, None)
    while wait is not None:
        try:
            answer = await (asyncio.wrap_future(wait) if isinstance(wait, Future) else wait.later(store))
        finally:
            wait = None  # else a failed future would be held by its own traceback, and stay in memory
        wait, result = await _advance_on_pool(plan, answer)
        answer = None
    return cast("_Result", result)


def _advance(plan: Plan[_Result], answer: Any) -> tuple[Wait | None, _Result | None]:
    """Return the next operation that a plan waits for and None, or None and the plan's result.

    The end is no exception, since a future can't carry StopIteration.
    """
    try:
        return plan.send(answer), None
    except StopIteration as end:
        return None, end.value


async def _advance_on_pool(plan: Plan[_Result], answer: Any) -> tuple[Wait | None, _Result | None]:
    advance = pool().submit(contextvars.copy_context().run, _advance, plan, answer)
    try:
        return await asyncio.wrap_future(advance)
    except asyncio.CancelledError:
        advance.add_done_callback(_withdraw)
        raise
    finally:
        del advance  # for the same reason


def _withdraw(advance: Future[tuple[Wait | None, Any]]) -> None:
    """Cancel the network's work that a plan has queued after its task was cancelled."""
    try:
        wait, _ = advance.result()
    except (Exception, CancelledError):  # noqa: BLE001 - the plan ended; no caller waits for its error
        return
    if isinstance(wait, Future):
        wait.cancel()
