"""Plans of steps that have to be waited for, and what runs them with and without an event loop.

zarr calls a codec from coroutines and from threads. A plan is written once for both: a generator that yields each step
that has to be waited for (bytes from the store, a network's turn) and is sent its result. What it computes in between
runs on whichever thread the plan is run on; coroutines hand that to other threads.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from abc import ABC, abstractmethod
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar, cast

import zarr

from zarr_cae.coder import tiles as entropy
from zarr_cae.errors import CAEConfigurationError

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
            except (RuntimeError, CAEConfigurationError) as error:  # the interpreter exits, or settings became wrong
                self._arrive((error, None, None))

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


def _threads() -> ThreadPoolExecutor:
    """For what plans compute: as many as there are cores for it and zarr may use for its codecs."""
    cores = entropy.cores()
    return _pool(min(cores, zarr.config.get("threading.max_workers") or cores))


@lru_cache(maxsize=8)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "cae-plan")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
