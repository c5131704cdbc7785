"""The schedule of a training run: its phases and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

_WARM_UP_STEPS = 200


@dataclass(frozen=True)
class Phase:
    """A part of the schedule, and how the network is run in it."""

    begin: float
    """Share of the schedule, 0 to 1, at which the phase begins."""
    straight_through: bool
    """Whether the decoder sees rounded latents, with gradients that pass the rounding. Otherwise it sees latents with
    uniform noise."""
    decoder_only: bool
    """Whether the analysis stays as it is, and the rate is that of rounded latents instead of noisy ones."""


PHASES = (
    Phase(0.0, straight_through=False, decoder_only=False),
    Phase(0.6, straight_through=True, decoder_only=False),
    Phase(0.88, straight_through=True, decoder_only=True),
)
"""Noise, then rounding, then the decoder and the densities alone.

Uniform noise stands for rounding while gains still move: its gradients are unbiased, and steps may be coarse. From 0.6
on the decoder sees the rounded values that it will get, so that it learns what rounding really does; the rate keeps the
noise, whose derivative exists. At that point the transforms have nearly settled, so that the biased gradients of
rounding do little harm. In the last eighth the symbols no longer change. There the decoder and the densities fit them
exactly, with a learning rate of their own that rises once more and then falls.
"""
DENSITY_ONLY = Phase(0.0, straight_through=True, decoder_only=True)
"""The only phase of a run that trains nothing but the densities."""


def phase_at(fraction: float) -> Phase:
    """Return the phase at a share of the schedule, 0 to 1."""
    return max((phase for phase in PHASES if phase.begin <= fraction), key=lambda phase: phase.begin)


def learning_rate(fraction: float, step: int) -> float:
    """Return the learning rate as a share of its peak.

    It rises over 200 steps and falls along a cosine to the last phase, which has a smaller cosine of its own.

    Parameters
    ----------
    fraction
        Share of the schedule that is done, 0 to 1.
    step
        Number of the optimiser step, from 0.
    """
    warm_up = min(1.0, (step + 1) / _WARM_UP_STEPS)
    last = PHASES[-1].begin
    if fraction < last:
        return warm_up * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * fraction / last)))
    rest = (fraction - last) / (1 - last)
    return warm_up * (0.01 + 0.29 * 0.5 * (1 + math.cos(math.pi * min(1.0, rest))))
