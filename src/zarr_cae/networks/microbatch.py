"""Coalesce concurrent requests from any thread or event loop into batches.

zarr hands a codec one chunk at a time, from many coroutines or threads at once; a network is fastest on many chunks
at a time. A `MicroBatcher` stands between the two. It knows nothing of chunks or networks.

There is no timer: a free worker takes its share of whatever is queued, so a lone request runs at once, and while
batches run the next ones gather. Workers do not wait for each other.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from zarr_cae.errors import CAEConfigurationError, CAEError
from zarr_cae.threads import call_in_child, no_fork

__all__ = ["BatchStatistics", "Limit", "MicroBatcher"]

Request = TypeVar("Request")
Result = TypeVar("Result")

Limit: TypeAlias = int | Callable[[], int]
"""A positive weight, or a function that returns one (a configuration that may change)."""

# A worker idle for this long ends, which lets an unused batcher, and the network that its `run` holds, be collected.
# Long enough that a thread start, and the thread pools that numerical libraries keep per thread, cost nothing.
IDLE_SECONDS = 60.0

# At interpreter exit a running batch is waited for, because a daemon thread that is cut off inside C++ code can
# abort the process; but not for ever.
EXIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """What a `MicroBatcher` has done since it was made (in a forked child: since the fork)."""

    batches: int
    """Calls of `run`, including those that repeat a failed batch one request at a time."""
    requests: int
    """Requests passed to `run`, over all those calls."""
    pending: int
    """Weight of the requests that are queued now, without the running batch."""


@dataclass(slots=True, eq=False)
class _Entry(Generic[Request, Result]):
    """A queued request."""

    order: int
    request: Request
    weight: int
    max_weight: int
    future: Future[Result] = field(default_factory=Future)


class _Worker(threading.Thread):
    """A thread of a batcher; its type is how `submit` knows a thread that must never wait for room."""


class MicroBatcher(Generic[Request, Result]):
    """Run concurrent requests in batches, on as many worker threads as there are lanes.

    Requests with equal keys may share a batch. The oldest request decides the key of the next batch, so no key
    starves, and within a key requests start in the order in which they came. A batch weighs at most the `max_weight`
    of its oldest request; a heavier request runs alone.

    A lane stands for what a batch needs to run, such as a core. What is queued is parted evenly between the lanes that
    are free: where there are fewer requests than lanes, a batch gets several, so that a lone one has them all.

    If `run` raises for a batch of several, it is called again for each of its requests alone, so that only the
    culprits fail (and a batch too big for the memory still succeeds); `run` must therefore be free of side effects.
    A `run` that returns the wrong number of results, or raises something that is no `Exception` (`SystemExit`, ...),
    fails the whole batch with a `CAEError`; the worker lives on. An exception *returned* by `run` is a result like
    any other. Requests cancelled while queued never reach `run`.

    The queue is bounded by making those threads wait who add to it. Who must not wait holds the requests in any case.

    Workers are daemon threads: they start when requests come, end when idle for a minute, and start again when
    needed. At interpreter exit running batches are given `EXIT_SECONDS` to finish and queued requests are cancelled.
    A forked child starts with an empty queue; futures made before the fork belong to the parent.

    Args:
        run: called as `run(key, requests, lanes)` on a worker thread, in several at a time if there are several lanes;
            returns one result per request, in their order. It may submit further requests, as may a future's
            done-callback, but neither may wait for their results: they would wait for themselves.
        name: of the worker threads, and in error messages.
        max_weight: of a batch. A function is called at each submit, in the submitting thread.
        max_pending: weight of queued requests above which `submit` waits. A function is called likewise.
        lanes: how many there are, or a function of the key that says how many batches of that key may share.

    """

    def __init__(
        self,
        run: Callable[[Hashable, list[Request], int], Sequence[Result]],
        *,
        name: str,
        max_weight: Limit,
        max_pending: Limit,
        lanes: int | Callable[[Hashable], int] = 1,
    ) -> None:
        self._run = run
        self._name = name
        self._max_weight = max_weight
        self._max_pending = max_pending
        self._lanes = lanes
        self._closed = False
        self.reset_after_fork()
        _live.add(self)

    def submit(self, key: Hashable, request: Request, weight: int = 1) -> Future[Result]:
        """Queue a request; wait while the queue is full, where waiting is safe.

        Waiting would stop every coroutine of an event loop, and a worker would wait for itself; so in a thread with
        a running event loop, and in the worker of any batcher, this never waits.

        Args:
            key: requests with equal keys may share a batch.
            request: passed to `run`. Not copied: leave it unchanged until the result is there.
            weight: what the request adds to its batch and to the queue, at least 1.

        Returns:
            The future of the result. To cancel it, before it runs, withdraws the request.

        Raises:
            CAEConfigurationError: the weight, a limit or the number of lanes is below 1.
            CAEError: the batcher is closed.

        """
        future, max_pending = self._enqueue(key, request, weight)
        if self._pending > max_pending and _may_wait():
            try:
                with self._room:
                    self._room.wait_for(lambda: self._pending <= max_pending or future.running() or future.done())
            except BaseException:  # KeyboardInterrupt: the caller will never see the future
                future.cancel()
                raise
        return future

    @property
    def statistics(self) -> BatchStatistics:
        """A snapshot of what was run and what is queued."""
        with self._lock:
            return BatchStatistics(self._batches, self._requests, self._pending)

    def close(self, timeout: float | None = None) -> None:
        """Cancel the queued requests, refuse new ones, and wait for the running batches.

        The wait is at most `timeout` seconds, unless that is `None`. On a worker there is none.
        """
        with self._lock:
            self._closed = True
            workers = list(self._workers)
            dropped = [entry.future for queue in self._queues.values() for entry in queue]
            self._queues.clear()
            self._pending = self._queued = 0
            self._work.notify_all()
            self._room.notify_all()
        for future in dropped:
            if future.cancel():
                future.set_running_or_notify_cancel()
        if not isinstance(threading.current_thread(), _Worker):
            end = None if timeout is None else time.monotonic() + timeout
            for worker in workers:
                worker.join(None if end is None else max(0.0, end - time.monotonic()))

    def reset_after_fork(self) -> None:
        """Start afresh with an empty queue and no worker; called by itself in a forked child."""
        # New locks, because a thread that does not exist in the child may have held the old ones.
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._queues: dict[Hashable, deque[_Entry[Request, Result]]] = {}
        self._order = itertools.count()
        self._queued = 0
        self._pending = 0
        self._batches = 0
        self._requests = 0
        self._workers: dict[threading.Thread, int] = {}
        """The lanes that each uses now; 0 if it waits for work."""

    def _enqueue(self, key: Hashable, request: Request, weight: int) -> tuple[Future[Result], int]:
        """Queue a request, full or not; give its future and the `max_pending` in force."""
        _check_positive("weight", weight)
        max_weight = _value(self._max_weight, "max_weight")
        max_pending = _value(self._max_pending, "max_pending")
        lanes = self._lanes_for(key)
        with self._lock:
            if self._closed:
                raise CAEError(f"cae: {self._name} is closed and takes no more requests")
            self._see_to_workers(lanes)
            entry: _Entry[Request, Result] = _Entry(next(self._order), request, weight, max_weight)
            self._queues.setdefault(key, deque()).append(entry)
            self._queued += 1
            self._pending += weight
            self._work.notify()
        return entry.future, max_pending

    def _see_to_workers(self, lanes: int) -> None:
        """Before a request is queued: replace workers that died, and start another if all that wait have work."""
        for dead in [worker for worker in self._workers if not worker.is_alive()]:
            del self._workers[dead]
        waiting = list(self._workers.values()).count(0)
        if self._queued >= waiting and len(self._workers) < lanes:
            worker = _Worker(target=self._work_until_idle, name=self._name, daemon=True)
            worker.start()  # it waits for the lock
            self._workers[worker] = 0

    def _work_until_idle(self) -> None:
        # One call per batch: no local of this frame keeps the last batch alive while the worker waits.
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Wait for a batch and run it; False when the worker shall end."""
        taken = self._take()
        if taken is None:
            return False
        key, batch, lanes = taken
        try:
            if not self._attempt(key, batch, lanes):
                for index in range(len(batch)):
                    self._attempt(key, batch[index : index + 1], lanes)
        except BaseException as error:  # noqa: BLE001 - whatever it is, nobody may be left waiting
            # The exception itself would end the event loop or the thread that receives it.
            self._fail(batch, f"was interrupted by {error!r}", error)
        batch.clear()  # this frame can be kept alive by the traceback of an exception of `run`
        return True

    def _take(self) -> tuple[Hashable, list[_Entry[Request, Result]], int] | None:
        """Give the last batch's lanes back, wait for requests and a lane, and take the next batch.

        It is empty if all were cancelled. None when idle too long.
        """
        this = threading.current_thread()
        with self._lock:
            if this not in self._workers:  # `run` forked, or this start was interrupted
                return None
            self._workers[this] = 0
            while not self._work.wait_for(lambda: self._closed or self._free() > 0, IDLE_SECONDS):
                if not self._queues:
                    break
            if not self._queues:
                del self._workers[this]
                return None
            key, free = self._oldest(), self._free()
            queue = self._queues[key]
            room = min(queue[0].max_weight, -(-self._pending // free))
            lanes = self._workers[this] = max(1, free // self._queued)
            batch: list[_Entry[Request, Result]] = []
            while queue and (not batch or queue[0].weight <= room):
                entry = queue.popleft()
                self._queued -= 1
                self._pending -= entry.weight
                if entry.future.set_running_or_notify_cancel():
                    batch.append(entry)
                    room -= entry.weight
            if not queue:
                del self._queues[key]
            self._room.notify_all()
            if self._queues:
                self._work.notify()  # of the lanes that are left
            return key, batch, lanes

    def _oldest(self) -> Hashable:
        """The key of the oldest request."""
        return min(self._queues.items(), key=lambda item: item[1][0].order)[0]

    def _free(self) -> int:
        """Lanes for a batch of the oldest request; 0 if there is none."""
        return self._lanes_for(self._oldest()) - sum(self._workers.values()) if self._queues else 0

    def _lanes_for(self, key: Hashable) -> int:
        lanes = self._lanes(key) if callable(self._lanes) else self._lanes
        _check_positive("lanes", lanes)
        return lanes

    def _attempt(self, key: Hashable, batch: list[_Entry[Request, Result]], lanes: int) -> bool:
        """Run a batch and settle its futures; False, with none settled, if it is to be repeated one by one."""
        if not batch:
            return True
        with self._lock:
            self._batches += 1
            self._requests += len(batch)
        try:
            with no_fork():
                results = self._run(key, [entry.request for entry in batch], lanes)
        except Exception as error:
            # Leaving this block frees the traceback, and the memory it holds, before anything is run again.
            if len(batch) > 1:
                return False
            if isinstance(error, StopIteration):  # an asyncio future refuses it, and its task would wait for ever
                raise
            batch.pop().future.set_exception(error)  # popped: else future -> error -> this frame -> future
            return True
        if len(results) != len(batch):
            self._fail(batch, f"returned {len(results)} results for {len(batch)} requests")
            return True
        for entry, result in zip(batch, results, strict=True):
            entry.future.set_result(result)
        return True

    def _fail(self, batch: list[_Entry[Request, Result]], reason: str, cause: BaseException | None = None) -> None:
        for entry in batch:
            if not entry.future.done():
                failure = CAEError(f"cae: {self._name} {reason}")
                failure.__cause__ = cause
                entry.future.set_exception(failure)


def _may_wait() -> bool:
    """Whether this thread may block: it runs no event loop and is no batcher's worker."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return not isinstance(threading.current_thread(), _Worker)
    return False


def _value(limit: Limit, name: str) -> int:
    value = limit() if callable(limit) else limit
    _check_positive(name, value)
    return value


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise CAEConfigurationError(f"cae: {name} of a micro-batch must be at least 1, got {value}")


_live: weakref.WeakSet[MicroBatcher[Any, Any]] = weakref.WeakSet()


def _reset_live() -> None:
    for batcher in list(_live):
        batcher.reset_after_fork()


def _close_live() -> None:
    for batcher in list(_live):
        batcher.close(EXIT_SECONDS)


call_in_child(_reset_live)
atexit.register(_close_live)
