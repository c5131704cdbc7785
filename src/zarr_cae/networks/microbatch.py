"""Collect concurrent requests from any thread or event loop into batches.

zarr gives a codec one chunk at a time, from many coroutines or threads at once. A network is fastest on many chunks at
a time. A `MicroBatcher` stands between the two. It knows nothing of chunks or networks.

There is no timer. A free worker takes its share of the queue at once, so a lone request doesn't wait; while batches
run, the next requests gather. Workers do not wait for each other.
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

# A worker ends after so many idle seconds, so that an unused batcher, and the network that `run` holds, can be freed.
# The time is long enough to make the cost of starting threads, and the thread pools that numerical libraries keep for
# each of them, negligible.
IDLE_SECONDS = 60.0

# The interpreter waits at its exit for running batches, since a daemon thread that is cut off inside C++ code can abort
# the process, but not for ever.
EXIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Counts of a `MicroBatcher` since it was made, or since the fork in a forked child."""

    batches: int
    """Calls of `run`, including those that repeat a failed batch one request at a time."""
    requests: int
    """Requests passed to `run`, over all those calls."""
    pending: int
    """Weight of the requests that are queued now, without those of running batches."""


@dataclass(slots=True, eq=False)
class _Entry(Generic[Request, Result]):
    """A queued request."""

    order: int
    request: Request
    weight: int
    max_weight: int
    future: Future[Result] = field(default_factory=Future)


class _Worker(threading.Thread):
    """A thread of a batcher. `submit` knows by this type that the thread must not wait for a full queue."""


class MicroBatcher(Generic[Request, Result]):
    """Run concurrent requests in batches, on as many worker threads as there are lanes.

    Requests with equal keys may share a batch. The oldest request decides the key of the next batch, so no key
    starves. Requests of one key start in the order in which they came. A batch weighs at most the `max_weight` of its
    oldest request; a heavier request runs alone.

    A lane stands for a resource that a batch needs, such as a core. The queue is divided evenly between the free lanes.
    If there are fewer requests than lanes, a batch gets several lanes; a lone request gets all of them.

    If `run` raises for a batch of several requests, it is called again for each of them alone. Then only the culprits
    fail, and a batch that was too large for the memory still succeeds. So `run` must have no side effects. If `run`
    returns the wrong number of results, or raises something that is not an `Exception` (`SystemExit`, ...), the whole
    batch fails with a `CAEError`, and the worker goes on. An exception that `run` *returns* is a result like any other.
    Requests that are cancelled while they are queued never reach `run`.

    The queue is bounded: threads that add to a full queue wait, unless they must not.

    Workers are daemon threads. They start when requests come, end after an idle minute, and start again when
    needed. At interpreter exit running batches get `EXIT_SECONDS` to finish, and queued requests are cancelled. A
    forked child starts with an empty queue; futures made before the fork belong to the parent. A fork waits until no
    batch runs.

    Parameters
    ----------
    run
        Called as `run(key, requests, lanes)` on a worker thread, in several at a time if there are several lanes.
        Returns one result for each request, in their order. It may submit further requests, as may a callback of a
        future, but neither may wait for their results: they would wait for themselves.
    name
        The name of the worker threads, also in error messages.
    max_weight
        The largest weight of a batch. A function is called at each submit, in the submitting thread.
    max_pending
        The weight of queued requests above which `submit` waits. A function is called likewise.
    lanes
        The number of lanes, or a function of the key that returns how many lanes batches of that key may use together.
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
        """Queue a request, and wait while the queue is full, if this thread may wait.

        A thread with a running event loop never waits here, since all its coroutines would stop. A worker of any
        batcher never waits either, since it would wait for itself.

        Parameters
        ----------
        key
            Requests with equal keys may share a batch.
        request
            Passed to `run`. It is not copied: leave it unchanged until the result is there.
        weight
            The weight that the request adds to its batch and to the queue, at least 1.

        Returns
        -------
        Future
            It gets the result. Cancelling it before it runs withdraws the request.

        Raises
        ------
        CAEConfigurationError
            If the weight, a limit or the number of lanes is below 1.
        CAEError
            If the batcher is closed.
        """
        future, max_pending = self._enqueue(key, request, weight)
        if self._pending > max_pending and _may_wait():
            try:
                with self._space:
                    self._space.wait_for(lambda: self._pending <= max_pending or future.running() or future.done())
            except BaseException:  # KeyboardInterrupt: the caller will never see the future
                future.cancel()
                raise
        return future

    @property
    def statistics(self) -> BatchStatistics:
        """The present counts."""
        with self._lock:
            return BatchStatistics(self._batches, self._requests, self._pending)

    def close(self, timeout: float | None = None) -> None:
        """Cancel the queued requests, refuse new ones, and wait for the running batches.

        Parameters
        ----------
        timeout
            Seconds to wait at most; None waits until they end. A worker does not wait.
        """
        with self._lock:
            self._closed = True
            workers = list(self._workers)
            dropped = [entry.future for queue in self._queues.values() for entry in queue]
            self._queues.clear()
            self._pending = self._queued = 0
            self._work.notify_all()
            self._space.notify_all()
        for future in dropped:
            if future.cancel():
                future.set_running_or_notify_cancel()
        if not isinstance(threading.current_thread(), _Worker):
            end = None if timeout is None else time.monotonic() + timeout
            for worker in workers:
                worker.join(None if end is None else max(0.0, end - time.monotonic()))

    def reset_after_fork(self) -> None:
        """Start with an empty queue and no worker. A forked child calls this by itself."""
        # New locks, because a thread that does not exist in the child may have held the old ones.
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._space = threading.Condition(self._lock)
        self._queues: dict[Hashable, deque[_Entry[Request, Result]]] = {}
        self._order = itertools.count()
        self._queued = 0
        self._pending = 0
        self._batches = 0
        self._requests = 0
        self._workers: dict[threading.Thread, int] = {}
        """Number of lanes that each worker uses now; 0 if it waits for work."""

    def _enqueue(self, key: Hashable, request: Request, weight: int) -> tuple[Future[Result], int]:
        """Queue a request, even if the queue is full, and return its future and the `max_pending` that applies."""
        _check_positive("weight", weight)
        max_weight = _value(self._max_weight, "max_weight")
        max_pending = _value(self._max_pending, "max_pending")
        lanes = self._lanes_for(key)
        with self._lock:
            if self._closed:
                raise CAEError(f"cae: {self._name} is closed and takes no more requests")
            self._ensure_workers(lanes)
            entry: _Entry[Request, Result] = _Entry(next(self._order), request, weight, max_weight)
            self._queues.setdefault(key, deque()).append(entry)
            self._queued += 1
            self._pending += weight
            self._work.notify()
        return entry.future, max_pending

    def _ensure_workers(self, lanes: int) -> None:
        """Forget workers that died, and start another one if the idle ones have requests already."""
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
        """Wait for a batch and run it. Return False if the worker must end."""
        taken = self._take()
        if taken is None:
            return False
        key, batch, lanes = taken
        try:
            if not self._attempt(key, batch, lanes):
                for index in range(len(batch)):
                    self._attempt(key, batch[index : index + 1], lanes)
        except BaseException as error:  # noqa: BLE001 - after any error no request may be left waiting
            # The exception itself would end the event loop or the thread that receives it.
            self._fail(batch, f"was interrupted by {error!r}", error)
        batch.clear()  # this frame can be kept alive by the traceback of an exception of `run`
        return True

    def _take(self) -> tuple[Hashable, list[_Entry[Request, Result]], int] | None:
        """Free the lanes of the last batch, wait for requests and a lane, and return the next batch.

        The batch is empty if all its requests were cancelled. Return None after `IDLE_SECONDS` without requests.
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
            left = min(queue[0].max_weight, -(-self._pending // free))
            lanes = self._workers[this] = max(1, free // self._queued)
            batch: list[_Entry[Request, Result]] = []
            while queue and (not batch or queue[0].weight <= left):
                entry = queue.popleft()
                self._queued -= 1
                self._pending -= entry.weight
                if entry.future.set_running_or_notify_cancel():
                    batch.append(entry)
                    left -= entry.weight
            if not queue:
                del self._queues[key]
            self._space.notify_all()
            if self._queues:
                self._work.notify()  # for the remaining lanes
            return key, batch, lanes

    def _oldest(self) -> Hashable:
        """Return the key of the oldest request."""
        return min(self._queues.items(), key=lambda item: item[1][0].order)[0]

    def _free(self) -> int:
        """Return the number of free lanes for the oldest request; 0 if there is no request."""
        return self._lanes_for(self._oldest()) - sum(self._workers.values()) if self._queues else 0

    def _lanes_for(self, key: Hashable) -> int:
        lanes = self._lanes(key) if callable(self._lanes) else self._lanes
        _check_positive("lanes", lanes)
        return lanes

    def _attempt(self, key: Hashable, batch: list[_Entry[Request, Result]], lanes: int) -> bool:
        """Run a batch and settle its futures. Return False, with none settled, if its requests must run one by one."""
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
    """Return whether this thread may block: it runs no event loop and is not a worker of a batcher."""
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
