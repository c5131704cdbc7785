"""Refine the symbols of planes: fewer bits and less error for the same decoder (the setting `cae.effort`).

The analysis transform gives each plane its symbols in one pass, and rounds every one of them alone. Here some of them
move by one, so that the Lagrangian of the plane falls: its bits plus lambda times its squared error. Frames, decoders
and weights do not change.

A step is one pass through the synthesis transform and one or two passes back. The first pass back gives the slope g of
the weighted error in each symbol. The second one, with random signs v in place of the error, gives (J^T v)^2, where J
is the Jacobian matrix of the transform. Its mean over several steps is the diagonal h of J^T J (Hutchinson's estimator,
Bekas et al. 2007). Then a move of a symbol by d = -1 or 1 changes the Lagrangian by about

    bits(symbol + d) - bits(symbol) + g d + h d^2,

where the bits come from the frequency tables of the weights, with the classes of the contexts held fixed. The transform
is nearly orthogonal, so this holds well for few moves far apart, but not for many close together, each of which would
correct the same error. So a step makes a move only if its gain is a given part of the largest one around it.

All planes, and all pieces of a large plane, take a step before any takes the next one: the same moves are made as in
one piece. At the end a plane keeps its own symbols if the refined ones did not lower its Lagrangian.

Sources: rate-distortion optimised quantisation, as in video coders (Karczewicz et al. 2008), here with gradients
through a learned transform. Yang et al. 2020, "Improving inference for neural image compression" (arXiv:2006.04240),
and Campos et al. 2019 (arXiv:1906.01223) refine latents by gradient descent for each image; moves of integers need 10
steps instead of hundreds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zarr_cae.coder.frame import STRIDE, Symbols
from zarr_cae.coder.tiles import Patch
from zarr_cae.config import Settings
from zarr_cae.networks.code_lengths import code_lengths
from zarr_cae.networks.device import PASS_PIXELS
from zarr_cae.networks.pieces import HALO
from zarr_cae.pixels.device import to_tensor
from zarr_cae.pixels.layout import Planes
from zarr_cae.weights.file import trade_off

if TYPE_CHECKING:
    from zarr_cae.networks.engine import Engine

_FIRST_SHARE, _LAST_SHARE = 0.3, 0.7
"""Share of the largest gain nearby that a move must reach, in the first step and in the last one."""
_AROUND = 3
"""Edge of the square of latent positions, of all channels, in which the largest gain counts."""
_PROBES, _EVERY = 4, 4
"""The first steps that estimate h, and the distance between those after them: estimates get better slowly."""
_PRIOR = 8
"""A symbol's own mean of n estimates of h has weight n / (n + 8); the rest is the product of the channel's mean and the
position's mean, which need few estimates."""
_EDGE = 512 // STRIDE
"""Largest edge of a piece in latent positions, without its surroundings."""
_REACH = 2 * HALO
"""Positions around a piece whose symbols take part in the error of pixels that its own symbols change."""
_KEPT = 4
"""Memory of a pixel in a pass with gradients, as a multiple of a pass without."""


def refine(
    engine: Engine,
    planes: Planes,
    counts: npt.NDArray[np.bool_],
    symbols: Symbols,
    quality: int,
    settings: Settings,
) -> Future[Symbols]:
    """Queue the refinement of the symbols of planes, in `settings.effort` steps.

    Parameters
    ----------
    engine
        Runs the networks of the weights.
    planes
        (N, 3 or 1, H, W) float32 in [0, 1]; H and W are multiples of 16. Leave them unchanged until the end.
    counts
        A boolean array of the same shape: which samples count in the error, such as those that are neither padding nor
        masked.
    symbols
        (N, M, H / 16, W / 16) int16, of these planes. They are not changed.
    quality
        The quality of the symbols.
    settings
        The settings of the machine.

    Returns
    -------
    Future
        Its result is the refined symbols, or `symbols` if there is nothing to do. Between steps other requests have
        their turn, and cancelling the future ends the work.
    """
    if settings.effort == 0 or trade_off(engine.weights.info, quality) is None:
        done: Future[Symbols] = Future()
        done.set_result(symbols)
        return done
    work = _Refinement(engine, planes, counts, symbols, quality, settings)
    work.begin_step()
    return work.future


class Inner(NamedTuple):
    """The inner part of a piece, in latent positions from the corner of its surroundings.

    A `Patch` would do, but slices can't be part of a key before Python 3.12.
    """

    top: int
    bottom: int
    left: int
    right: int

    def scaled(self, by: int) -> tuple[slice, slice]:
        """Return the slices of an array of the whole piece with `by` samples per position along each axis."""
        return slice(by * self.top, by * self.bottom), slice(by * self.left, by * self.right)


@dataclass(frozen=True)
class StepKey:
    """The properties that steps must share to run in one batch."""

    number: int
    """The step, from 0. The one after the last only measures."""
    quality: int
    shape: tuple[int, ...]
    """(components, H, W) of a piece with its surroundings."""
    inner: Inner
    settings: Settings

    @property
    def probes(self) -> bool:
        """Whether the step estimates h."""
        return self.number < _PROBES or self.number % _EVERY == 0

    @property
    def estimates(self) -> int:
        """The number of estimates of h by the end of this step."""
        later = max(0, self.number // _EVERY - (_PROBES - 1) // _EVERY)
        return min(self.number + 1, _PROBES) + later

    @property
    def share(self) -> float:
        """The part of the largest gain around it that a move must bring."""
        return _FIRST_SHARE + (_LAST_SHARE - _FIRST_SHARE) * self.number / self.settings.effort


class Piece(NamedTuple):
    """A piece of some planes as a step receives it: with its surroundings, but for `spread`."""

    planes: Planes
    counts: npt.NDArray[np.bool_]
    symbols: Symbols
    spread: npt.NDArray[np.float32]
    """The sum of the estimates of h so far (N, M, h, w), in the inner part."""


class Moved(NamedTuple):
    """The inner part of a piece after a step."""

    symbols: Symbols
    spread: npt.NDArray[np.float32]
    costs: npt.NDArray[np.float64]
    """The Lagrangian of each plane before the step, in bits."""


def take_step(engine: Engine, key: StepKey, pieces: Sequence[Piece]) -> list[Moved]:
    """Take one step with a batch of pieces: called by the batcher of the engine on one of its threads."""
    planes, counts, given, spread = (
        torch.cat([to_tensor(array, engine.device) for array in arrays]) for arrays in zip(*pieces, strict=True)
    )
    last = key.number == key.settings.effort
    lambda_ = trade_off(engine.weights.info, key.quality)
    assert lambda_ is not None
    weight = counts * (lambda_ * 255**2 / key.shape[0])
    inner, pixels = key.inner.scaled(1), key.inner.scaled(STRIDE)
    with torch.set_grad_enabled(not last):
        symbols = given.float().requires_grad_(not last)
        decoded = _decode(engine, symbols, key)
        squares = weight * (decoded.clamp(0, 1) - planes).square()
        if not last:
            probes = key.probes
            (slope,) = torch.autograd.grad(squares.sum(), symbols, retain_graph=probes)
            if probes:
                signs = _signs(key).to(engine.device)
                (response,) = torch.autograd.grad((decoded * weight.sqrt() * signs).sum(), symbols)
                spread += response[:, :, *inner].square()
    with torch.no_grad():
        bits = code_lengths(engine.weights.tables[engine.weights.row(key.quality)], str(engine.device))
        now, up, down = (part[:, :, *inner] for part in bits.around(given.float()))
        costs = squares[:, :, *pixels].sum((1, 2, 3), dtype=torch.float64) + now.sum((1, 2, 3), dtype=torch.float64)
        moved = given[:, :, *inner]
        if not last:
            slope, curvature = slope[:, :, *inner], _smoothed(spread, key.estimates)
            change = _moves(up - now + slope + curvature, down - now - slope + curvature, key.share)
            moved = moved + change * ~bits.predicted[:, None, None]
    results = zip(*(torch.split(one.cpu(), [len(piece.symbols) for piece in pieces]) for one in (moved, spread, costs)),
                  strict=True)  # fmt: skip
    return [Moved(*(part.numpy() for part in parts)) for parts in results]


def _decode(engine: Engine, symbols: Tensor, key: StepKey) -> Tensor:
    received = symbols * engine.row_value("step", key.quality) + engine.row_value("offset", key.quality)
    planes: Tensor = engine.plain_synthesis(received.contiguous(memory_format=torch.channels_last))
    return planes if key.shape[0] == 3 else planes.mean(1, keepdim=True)


def _signs(key: StepKey) -> Tensor:
    """Return random signs for the samples of a piece: the same ones in every process, so that results are the same."""
    generator = torch.Generator().manual_seed(key.number)
    return torch.randint(2, key.shape, generator=generator).float() * 2 - 1


def _smoothed(spread: Tensor, count: int) -> Tensor:
    """Return h (N, M, h, w) from the sum of `count` estimates; see `_PRIOR`."""
    own = spread / count
    channel, position = own.mean((2, 3), keepdim=True), own.mean(1, keepdim=True)
    usual = channel * position / channel.mean(1, keepdim=True).clamp(min=1e-30)
    return torch.lerp(usual, own, count / (count + _PRIOR))


def _moves(up: Tensor, down: Tensor, share: float) -> Tensor:
    """Return the moves (N, M, h, w) int16 to make, from the changes of the Lagrangian by each single one."""
    gain = -torch.minimum(up, down).clamp(max=0)
    largest = nn.functional.max_pool2d(gain.amax(1, keepdim=True), _AROUND, 1, _AROUND // 2)
    chosen = (gain > 0) & (gain >= share * largest)
    return torch.where(up < down, 1, -1).mul_(chosen).to(torch.int16)


class _Part(NamedTuple):
    """Where a piece lies."""

    planes: slice
    outer: Patch
    inner: Patch

    @property
    def place(self) -> tuple[slice, ...]:
        return self.planes, slice(None), self.inner.rows, self.inner.columns


def _parts(count: int, shape: tuple[int, int], edge: int, most: int) -> Iterator[_Part]:
    """Cut `count` planes of `shape` latent positions into pieces of at most `most` pixels, or one plane each."""
    for top in range(0, shape[0], edge):
        for left in range(0, shape[1], edge):
            inner = Patch(slice(top, min(top + edge, shape[0])), slice(left, min(left + edge, shape[1])))
            outer = inner.widened(_REACH, shape)
            at_once = max(1, most // (STRIDE**2 * math.prod(outer.shape)))
            for first in range(0, count, at_once):
                yield _Part(slice(first, min(first + at_once, count)), outer, inner)


class _Refinement:
    """The refinement of the symbols of one request: step by step, each through the batcher of the engine."""

    def __init__(
        self,
        engine: Engine,
        planes: Planes,
        counts: npt.NDArray[np.bool_],
        symbols: Symbols,
        quality: int,
        settings: Settings,
    ) -> None:
        self.future: Future[Symbols] = Future()
        self._engine, self._quality, self._settings = engine, quality, settings
        self._planes, self._counts, self._plain = planes, counts, symbols
        self._symbols, self._moved = symbols, symbols.copy()
        self._spread = np.zeros(symbols.shape, np.float32)
        edge, most = min(settings.tile // STRIDE, _EDGE), PASS_PIXELS[engine.device.type] // _KEPT
        self._parts = list(_parts(len(symbols), (symbols.shape[2], symbols.shape[3]), edge, most))
        self._costs = np.zeros((2, len(symbols)))
        """The Lagrangian of each plane before the first step, and before the one that runs."""
        self._step, self._missing = 0, 0
        self._lock = threading.Lock()
        self._queued: set[Future[Moved]] = set()
        queued, lock = self._queued, self._lock  # not `self`, which refers to the future

        def withdraw(_: Future[Symbols]) -> None:
            with lock:
                left = list(queued)
            for part in left:
                part.cancel()

        self.future.add_done_callback(withdraw)

    def begin_step(self) -> None:
        """Queue the pieces of the next step."""
        self._missing = len(self._parts) + 1
        self._costs[1] = 0
        for part in self._parts:
            if self.future.done():  # it was cancelled
                return
            queued = self._engine.batcher.submit(*self._request(part))
            with self._lock:
                self._queued.add(queued)
            queued.add_done_callback(partial(self._arrived, part))
        self._arrived_one()

    def _request(self, part: _Part) -> tuple[StepKey, Piece, int]:
        """Return key, input and weight of a piece in this step."""
        here = (part.planes, slice(None), *part.outer.scaled(STRIDE))
        planes, counts = self._planes[here], self._counts[here]
        if part.inner != part.outer:  # pixels that the inner symbols can't change do not count
            near = np.zeros(counts.shape[2:], np.bool_)
            shape = self._plain.shape[2], self._plain.shape[3]
            seen = Patch(*part.inner.widened(HALO, shape).within(part.outer))
            near[seen.scaled(STRIDE)] = True
            counts = counts & near
        rows, columns = part.inner.within(part.outer)
        inner = Inner(rows.start, rows.stop, columns.start, columns.stop)
        key = StepKey(self._step, self._quality, planes.shape[1:], inner, self._settings)
        symbols = self._symbols[part.planes, :, *part.outer.scaled(1)]
        piece = Piece(planes, counts, symbols, self._spread[part.place])
        return key, piece, _KEPT * len(planes) * planes.shape[2] * planes.shape[3]

    def _arrived(self, part: _Part, done: Future[Moved]) -> None:
        with self._lock:
            self._queued.discard(done)
        if done.cancelled():
            self.future.cancel()
        elif (error := done.exception()) is not None:
            self._fail(error)
            del error
        else:
            moved = done.result()
            self._moved[part.place], self._spread[part.place] = moved.symbols, moved.spread
            with self._lock:
                self._costs[1, part.planes] += moved.costs
            self._arrived_one()

    def _arrived_one(self) -> None:
        with self._lock:
            self._missing -= 1
            last = self._missing == 0
        if last and not self.future.done():
            try:
                self._end_step()
            except Exception as error:  # noqa: BLE001 - the future carries it to the thread that waits
                self._fail(error)

    def _end_step(self) -> None:
        if self._step == 0:
            self._costs[0] = self._costs[1]
        if self._step == self._settings.effort:
            better = self._costs[1] < self._costs[0]
            with suppress(InvalidStateError):  # it was cancelled
                self.future.set_result(np.where(better[:, None, None, None], self._symbols, self._plain))
            return
        # Views of the old symbols belong to requests that are done.
        self._symbols, self._moved = self._moved, np.empty_like(self._moved)
        self._step += 1
        self.begin_step()

    def _fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):  # another piece failed before, or all were cancelled
            self.future.set_exception(error)
