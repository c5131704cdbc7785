"""Make values on demand in bounded memory: a cache, work shared by equal requests, a limit on the work at one time."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from zarr_cae.threads import hold_across_fork

_LOCK = threading.Lock()
"""Of all caches; it is held for a few operations on dictionaries only."""
hold_across_fork(_LOCK)


class ByteCache:
    """The values used last, of at most `limit` bytes together. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: OrderedDict[str, bytes] = OrderedDict()
        self._size = 0

    def get(self, key: str) -> bytes | None:
        """Return the value of a key, or None."""
        with _LOCK:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: str, value: bytes) -> None:
        """Keep a value, and forget those used longest ago. A value above the limit is not kept."""
        with _LOCK:
            self._size += len(value) - len(self._values.pop(key, b""))
            self._values[key] = value
            while self._size > self.limit:
                _, oldest = self._values.popitem(last=False)
                self._size -= len(oldest)

    def forget(self, prefix: str) -> None:
        """Forget the values of all keys with this prefix."""
        with _LOCK:
            for key in [key for key in self._values if key.startswith(prefix)]:
                self._size -= len(self._values.pop(key))


@dataclass
class _Work:
    task: asyncio.Task[bytes | None]
    waiting: int = 0


class SharedWork:
    """Makes a value once for all coroutines that wait for it. When none waits any more, the work is cancelled."""

    def __init__(self) -> None:
        self._running: dict[tuple[int, str], _Work] = {}

    async def result(self, key: str, make: Callable[[], Coroutine[Any, Any, bytes | None]]) -> bytes | None:
        """Return the result of `make`, started here or by an earlier call with the same key on this event loop."""
        loop = asyncio.get_running_loop()
        own = id(loop), key
        work = self._running.get(own)
        if work is None or work.task.get_loop() is not loop:
            work = self._running[own] = _Work(loop.create_task(make()))
        work.waiting += 1
        try:
            return await asyncio.shield(work.task)
        finally:
            work.waiting -= 1
            if not work.waiting:
                work.task.cancel()
                if self._running.get(own) is work:
                    del self._running[own]


class ByteLimit:
    """Allows work on at most `limit` bytes at one time on one event loop. A larger piece of work runs alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def holding(self, size: int) -> AsyncIterator[None]:
        """Wait until `size` bytes are free, in the order of the calls, and hold them."""
        size = min(size, self._limit)
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((size, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._used -= size
            else:
                self._queue.remove((size, turn))
            self._admit()

    def _admit(self) -> None:
        while self._queue:
            size, turn = self._queue[0]
            if turn.cancelled() or self._used + size > self._limit:
                return  # the coroutine of a cancelled turn removes it, and calls this again
            self._queue.popleft()
            self._used += size
            turn.set_result(None)
