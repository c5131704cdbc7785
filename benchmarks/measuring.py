"""Seconds of work, for the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall-clock seconds of one call and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def least_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the least wall-clock seconds of `repeats` calls, after one that is not counted."""
    work()
    return min(timed(work)[0] for _ in range(repeats))
