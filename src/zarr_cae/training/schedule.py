"""The schedules of training and of fitting: their phases and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_WARM_UP_STEPS, _FIT_WARM_UP_STEPS = 200, 100

Schedule = Literal["train", "fit"]
Trained = Literal["densities", "decoder", "all"]
"""The parameters that a phase trains. "decoder" is the synthesis with the densities: the symbols no longer change."""


@dataclass(frozen=True)
class Phase:
    """A part of the schedule, and how the network is run in it."""

    begin: float
    """Share of the schedule, 0 to 1, at which the phase begins."""
    straight_through: bool
    """Whether the decoder sees rounded latents, with gradients that pass the rounding. Otherwise it sees latents with
    uniform noise."""
    trains: Trained
    """Unless it is "all", the rate is that of rounded latents instead of noisy ones."""


PHASES = (
    Phase(0.0, straight_through=False, trains="all"),
    Phase(0.6, straight_through=True, trains="all"),
    Phase(0.88, straight_through=True, trains="decoder"),
)
"""Noise, then rounding, then the decoder and the densities alone.

Uniform noise stands for rounding while gains still move: its gradients are unbiased, and steps may be coarse. From 0.6
on the decoder sees the rounded values that it will get, so that it learns the effect of rounding; the rate keeps the
noise, whose derivative exists. At that point the transforms have nearly settled, so that the biased gradients of
rounding do little harm. In the last eighth the symbols no longer change. There the decoder and the densities fit them
exactly, with a learning rate of their own, which rises once more and then falls.
"""
FIT_PHASES = (
    Phase(0.0, straight_through=True, trains="densities"),
    Phase(0.06, straight_through=True, trains="decoder"),
    Phase(0.2, straight_through=True, trains="all"),
    Phase(0.88, straight_through=True, trains="decoder"),
)
"""The densities, then the decoder, then all of a network that is trained already.

The phases with the fastest gains come first, so that a fit that ends early is useful. The transforms have settled, so
there is no phase of noise.
"""
_FIT_PEAKS = (1.0, 0.5, 1.0, 0.3)
"""The learning rate of each phase of a fit, as a share of its peak."""
DENSITY_ONLY = Phase(0.0, straight_through=True, trains="densities")
"""The only phase of a run that trains nothing but the densities."""


def phase_at(fraction: float, phases: Sequence[Phase] = PHASES) -> Phase:
    """Return the phase at a share of the schedule, 0 to 1."""
    return max((phase for phase in phases if phase.begin <= fraction), key=lambda phase: phase.begin)


def learning_rate(fraction: float, step: int, schedule: Schedule = "train") -> float:
    """Return the learning rate as a share of its peak.

    In training it rises over 200 steps and falls along a cosine to the last phase, which has a smaller cosine of its
    own. In a fit each phase has a rise, of a tenth of its length, and a cosine; over the first 100 steps it
    rises besides, so that a fit of few steps does no harm.

    Parameters
    ----------
    fraction
        Share of the schedule that is done, 0 to 1.
    step
        Number of the optimiser step, from 0.
    schedule
        "train" or "fit".
    """
    if schedule == "fit":
        place = FIT_PHASES.index(phase_at(fraction, FIT_PHASES))
        ends = [*(phase.begin for phase in FIT_PHASES[1:]), 1.0]
        begin = FIT_PHASES[place].begin
        done = (fraction - begin) / (ends[place] - begin)
        warm_up = min(1.0, (step + 1) / _FIT_WARM_UP_STEPS, 0.05 + 10 * done)
        return _FIT_PEAKS[place] * warm_up * _cosine(done, 0.03)
    warm_up = min(1.0, (step + 1) / _WARM_UP_STEPS)
    last = PHASES[-1].begin
    if fraction < last:
        return warm_up * _cosine(fraction / last, 0.03)
    rest = (fraction - last) / (1 - last)
    return warm_up * (0.01 + 0.29 * 0.5 * (1 + math.cos(math.pi * min(1.0, rest))))


def _cosine(done: float, end: float) -> float:
    """Return half a period of a cosine, which falls from 1 to `end`."""
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done))
