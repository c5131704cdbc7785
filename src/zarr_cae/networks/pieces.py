"""Cut a large plane into pieces with enough of their surroundings for a network, and put the results together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import numpy.typing as npt

from zarr_cae.coder.tiles import Patch

Array = npt.NDArray[Any]

HALO = 6
"""Latent positions around a piece that can reach into it: 84 px in the analysis transform of `cae-v1`, 5.25 positions
in its synthesis transform."""
LEAST_COLUMNS = 51
"""Least number of latent columns in the input of a network, if the plane has as many.

In bfloat16 oneDNN sums a convolution whose output has more than 50 columns in another order than a narrower one. That
rounded a few symbols in a million to the other side, which showed as two grey levels. If pieces are on the
same side of 50 columns as the whole plane, at every scale, they get the same symbols.
"""


def pieces(shape: tuple[int, int], edge: int) -> Iterator[tuple[Patch, Patch]]:
    """Cut a plane of `shape` latent positions into patches of about `edge` positions a side, row by row.

    Yield pairs: the patch that the network needs as input, with a margin of `HALO` and at least `LEAST_COLUMNS` columns
    if the plane has them, and the patch itself.
    """
    across = shape[1] if shape[1] <= LEAST_COLUMNS else max(edge, LEAST_COLUMNS - 2 * HALO)
    for top in range(0, shape[0], edge):
        for left in range(0, shape[1], across):
            bottom, right = min(top + edge, shape[0]), min(left + across, shape[1])
            rows = slice(max(0, top - HALO), min(bottom + HALO, shape[0]))
            first = max(0, min(left - HALO, shape[1] - LEAST_COLUMNS))
            columns = slice(first, min(max(right + HALO, first + LEAST_COLUMNS), shape[1]))
            yield Patch(rows, columns), Patch(slice(top, bottom), slice(left, right))


class Whole:
    """The result of a request that runs in pieces, and its future."""

    def __init__(self, target: Array, finish: Callable[[Array], Any]) -> None:
        self.future: Future[Any] = Future()
        self._target, self._finish = target, finish
        self._lock = threading.Lock()
        self._parts: set[Future[Array]] = set()
        """Parts that are not done. Finished parts are removed: their callbacks would keep the whole in memory."""
        self._missing = 1

    def add(self, part: Future[Array], place: tuple[slice, ...], inner: tuple[slice, ...]) -> None:
        """Add a part; its `inner` is copied to `place` in the whole."""
        with self._lock:
            self._missing += 1
            self._parts.add(part)
        part.add_done_callback(lambda done: self._arrived(done, place, inner))

    def complete(self) -> None:
        """Finish adding parts."""
        parts, lock = self._parts, self._lock  # not `self`: that refers to the future

        def withdraw(_: Future[Array]) -> None:
            with lock:
                left = list(parts)
            for part in left:
                part.cancel()

        self.future.add_done_callback(withdraw)
        self._arrived_one()

    def _arrived(self, part: Future[Array], place: tuple[slice, ...], inner: tuple[slice, ...]) -> None:
        with self._lock:
            self._parts.discard(part)
        if part.cancelled():
            self.future.cancel()
        elif (error := part.exception()) is not None:
            with suppress(InvalidStateError):  # another part failed before, or all were cancelled
                self.future.set_exception(error)
            del error
        else:
            first, *rest = place
            self._target[first, :, *rest] = part.result()[:, :, *inner]
            self._arrived_one()

    def _arrived_one(self) -> None:
        with self._lock:
            self._missing -= 1
            last = self._missing == 0
        if not last:
            return
        with suppress(InvalidStateError):  # all parts were cancelled
            try:
                result = self._finish(self._target)
            except Exception as error:  # noqa: BLE001 - the future carries it to the thread that waits
                self.future.set_exception(error)
            else:
                self.future.set_result(result)
