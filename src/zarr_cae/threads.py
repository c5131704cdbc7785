"""The threads of this process: one pool, one rule for their number, and one hook for forks.

A forked child has only the thread that forked. Locks that other threads held stay locked in it, and data that they were
changing stay half changed. So a fork waits for running batches and compilations, and a child starts with fresh pools.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar, cast

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Lock(Protocol):
    """A lock of `threading`."""

    def acquire(self) -> Any:
        """Wait until the lock is free, and take it."""

    def release(self) -> None:
        """Free the lock."""


chosen_threads: Callable[[], int | None] | None = None
"""Returns the number of threads that the settings allow, or None. `config` sets this hook, so that the coder does not
import zarr."""


def cores() -> int:
    """Return how many threads may compute: the cores of this process, or fewer if the settings or OpenMP say so.

    `cae.threads` and zarr's `threading.max_workers` count first, then OMP_NUM_THREADS.
    """
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = chosen_threads() if chosen_threads is not None else None
    return min(present, chosen or _openmp_threads() or present)


def _openmp_threads() -> int | None:
    """Return OMP_NUM_THREADS for the outermost level: the variable may list one number for each level."""
    number = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(number) or None if number.isdecimal() else None


def pool() -> ThreadPoolExecutor:
    """Return the pool for work on chunks, with as many threads as `cores()` says now."""
    return _pool(cores())


@lru_cache(maxsize=8)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="cae")


def over_cores(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Return the results of a function for all items, in their order, computed on several cores.

    This thread takes items too, so it may itself be one of the pool's: it never waits for a thread that has not begun.
    The first error is raised here; items that no thread has begun are skipped then.
    """
    if len(items) < 2 or cores() < 2:
        return [function(item) for item in items]
    results: list[_Result | None] = [None] * len(items)
    left = iter(range(len(items)))
    lock = threading.Lock()

    def take() -> int | None:
        with lock:
            return next(left, None)

    def work() -> None:
        try:
            while (index := take()) is not None:
                results[index] = function(items[index])
        except BaseException:
            with lock:
                list(left)  # no thread begins another item
            raise

    executor = pool()
    others: list[Future[None]] = [executor.submit(work) for _ in range(min(cores(), len(items)) - 1)]
    try:
        work()
    finally:
        begun = [other for other in others if not other.cancel()]
        failures = [error for other in begun if (error := other.exception()) is not None]
    try:
        if failures:
            raise failures[0]
    finally:
        failures.clear()  # a traceback that holds its own exception would stay in memory
    return cast("list[_Result]", results)


class lazy_property(Generic[_Result]):  # noqa: N801 - used like `property`
    """A property that is computed at its first use, and kept in the instance.

    `functools.cached_property` of Python 3.11 holds a lock meanwhile, one for all instances: a child forked while
    another thread computes would wait for it for ever. This one has no lock; two threads may both compute.
    """

    def __init__(self, make: Callable[[Any], _Result]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> _Result:
        if instance is None:
            return cast("_Result", self)  # what `help` shows
        value = self._make(instance)
        instance.__dict__[self._name] = value  # found before this descriptor from now on
        return value


class _Gate:
    """Lets any number of threads work, or one fork happen, never both."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all threads: in a forked child there is only one."""
        self._changed = threading.Condition()
        self._working: dict[int, int] = {}
        self._forking = False

    def enter(self) -> None:
        """Begin to work. Wait while a fork happens, unless this thread works already."""
        this = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: not self._forking or this in self._working)
            self._working[this] = self._working.get(this, 0) + 1

    def leave(self) -> None:
        this = threading.get_ident()
        with self._changed:
            count = self._working.pop(this, 0) - 1  # 0 if this block forked, and this is the child
            if count > 0:
                self._working[this] = count
            self._changed.notify_all()

    def close(self) -> None:
        """Keep other threads from beginning, and wait until all others that work have ended."""
        this = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: not self._forking)
            self._forking = True
            self._changed.wait_for(lambda: not self._working.keys() - {this})

    def open(self) -> None:
        with self._changed:
            self._forking = False
            self._changed.notify_all()


_gate = _Gate()
_held: list[Lock] = []
_in_child: list[Callable[[], None]] = []


@contextmanager
def no_fork() -> Iterator[None]:
    """Make forks of other threads wait until this block ends.

    A child forked while a network runs would inherit the locks of oneDNN and OpenMP in a state that no thread there can
    change.
    """
    _gate.enter()
    try:
        yield
    finally:
        _gate.leave()


def hold_across_fork(lock: Lock) -> None:
    """Make forks wait for this lock. It is free in the parent and in the child afterwards."""
    _held.append(lock)


def call_in_child(function: Callable[[], None]) -> None:
    """Call a function in every forked child, in the order of these calls."""
    _in_child.append(function)


def _before_fork() -> None:
    _gate.close()
    for lock in _held:
        lock.acquire()


def _after_fork_in_parent() -> None:
    for lock in reversed(_held):
        lock.release()
    _gate.open()


def _after_fork_in_child() -> None:
    for lock in reversed(_held):
        lock.release()
    _gate.reset()
    _pool.cache_clear()  # a pool's threads are not in the child
    for function in _in_child:
        function()


if hasattr(os, "register_at_fork"):  # absent on platforms without fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
