"""Seconds and memory of work, for the benchmarks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Clock = Callable[[], float]


def timed(work: Callable[[], Any], clock: Clock = time.perf_counter) -> tuple[float, Any]:
    """Return the seconds of one call by this clock (wall clock or `time.process_time`), and its result."""
    start = clock()
    result = work()
    return clock() - start, result


def least_seconds(work: Callable[[], Any], repeats: int, clock: Clock = time.perf_counter) -> float:
    """Return the least seconds of `repeats` calls by this clock, after one call that is not counted."""
    work()
    return min(timed(work, clock)[0] for _ in range(repeats))


class Memory(NamedTuple):
    """Bytes of a process: all that it has reserved, and those that are in memory."""

    virtual: int
    resident: int


def memory_now() -> Memory:
    """Return the memory of this process."""
    virtual, resident = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[:2])
    page = os.sysconf("SC_PAGE_SIZE")
    return Memory(virtual * page, resident * page)
