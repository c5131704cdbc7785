"""SIGTERM ends a command as Ctrl-C does: work stops, and the command says what it has kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TerminatedError(KeyboardInterrupt):
    """The process got SIGTERM."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise TerminatedError at SIGTERM, in the way in which Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return
    terminated = False

    def terminate(_: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # a shell that runs a command in its background lets it ignore Ctrl-C
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)  # an event loop has a handler of its own, which cancels the tasks

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        if not terminated:
            raise
        ended = TerminatedError()
        for text in getattr(error, "__notes__", ()):
            ended.add_note(text)
        raise ended from error
    finally:
        signal.signal(signal.SIGTERM, before)
