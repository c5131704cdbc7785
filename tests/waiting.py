"""Wait in tests of threads."""

from __future__ import annotations

import time
from collections.abc import Callable

TIMEOUT = 30.0
"""Seconds of every wait: a bug fails its test and does not hang the suite."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a state that no event announces, such as another thread asleep in `submit`."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
