"""The trained density of the latents: one mixture of logistics per quality and channel, widened by its context.

A factorized prior (Ballé et al. 2018, arXiv:1802.01436, section 6.1) has one density for all positions of a channel.
Ballé's is a small monotone network; a mixture of a few logistics can start from the statistics of the KLT latents,
has a closed-form distribution function, and trained faster here. Its scale at a position follows the activity of the
channels before it around that position, and the slowly varying channels are coded as differences from their
neighbours: the smooth counterpart of the integer contexts that `export` fits (see `zarr_cae.coder.contexts`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

COMPONENTS = 4
_LIKELIHOOD_BOUND = 1e-9
_LARGEST_ACTIVITY = 15.0
_LEAST_SCORE = 0.05
_RESPONSE = 0.4
_NEAREST = 24
"""Channels before a channel that its score starts from; training finds better weights."""
_PREDICTABLE = 0.8
"""Channels whose differences from their neighbours have less than this share of their variance are predicted."""


class Density(nn.Module):
    """Probability of integer bins under a mixture of logistics, for Q qualities x M channels."""

    earlier: Tensor
    predicted: Tensor

    def __init__(self, qualities: int, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(qualities, channels, COMPONENTS))
        self.log_scale = nn.Parameter(torch.zeros(qualities, channels, COMPONENTS))
        self.logit = nn.Parameter(torch.zeros(qualities, channels, COMPONENTS))
        band = torch.ones(channels, channels).tril(-1).triu(-_NEAREST)
        self.mix = nn.Parameter((band / band.sum(1, keepdim=True).clamp(min=1)).repeat(qualities, 1, 1))
        """Weights, kept non-negative, of the activities of the channels before (second axis) in each score."""
        self.response = nn.Parameter(torch.zeros(qualities, channels))
        """How much the logarithm of the scale follows the logarithm of the score."""
        self.register_buffer("earlier", torch.ones(channels, channels).tril(-1), persistent=False)
        self.register_buffer("predicted", torch.zeros(channels))

    @torch.no_grad()
    def start_from(self, latents: Tensor) -> None:
        """Choose the predicted channels and centre the mixtures on sample latents (Q, n, M, h, w), before rounding."""
        best = latents[-1:]
        differences = (best - neighbours(best))[..., 1:, 1:].var((0, 1, 3, 4))
        self.predicted.copy_(differences < _PREDICTABLE * best[..., 1:, 1:].var((0, 1, 3, 4)))
        flat = self._differences(latents, latents).transpose(1, 2).flatten(2)
        mean, std = flat.mean(-1, keepdim=True), flat.std(-1, keepdim=True)
        spread = torch.tensor([0.1, 0.25, 0.5, 1.0])
        self.mean.copy_(mean.expand_as(self.mean))
        self.log_scale.copy_((std * spread).clamp(min=0.05).log())
        self.start_contexts(latents)

    @torch.no_grad()
    def start_contexts(self, latents: Tensor) -> None:
        """Let the scales follow the scores a little, and shift them so that they stay the same on the average."""
        self.response.fill_(_RESPONSE)
        self.log_scale.sub_(self._widening(latents.round()).mean(2)[..., None])

    def _differences(self, values: Tensor, known: Tensor) -> Tensor:
        return values - neighbours(known) * self.predicted[:, None, None]

    def _widening(self, rounded: Tensor) -> Tensor:
        """Return what each position's context adds to the log of the scale: (Q, n, M, h, w) to (Q, M, positions)."""
        activity = self._differences(rounded, rounded).detach().abs().clamp(max=_LARGEST_ACTIVITY)
        weights = (self.mix.clamp(min=0) * self.earlier).transpose(1, 2)
        score = blur(activity).permute(0, 1, 3, 4, 2).flatten(1, 3) @ weights
        return self.response[:, :, None] * (score.transpose(1, 2) + _LEAST_SCORE).log()

    def forward(self, latents: Tensor, rounded: Tensor) -> Tensor:
        """Return the probability of the bin of width 1 around each latent.

        `rounded` is what a decoder knows of them, for contexts and predictions; all are (Q, n, M, h, w).
        """
        q, n, m, h, w = latents.shape
        coded = self._differences(latents, rounded)
        widening = self._widening(rounded)
        values = coded.transpose(1, 2).flatten(2)[..., None]  # (Q, M, positions, 1)
        scale = (self.log_scale[:, :, None] + widening[..., None]).clamp(-4, 6).exp()
        centred = -(values - self.mean[:, :, None]).abs()  # the lower tail, where sigmoids keep their digits
        mass = torch.sigmoid((centred + 0.5) / scale) - torch.sigmoid((centred - 0.5) / scale)
        likelihood = (mass * self.logit.softmax(-1)[:, :, None]).sum(-1).clamp(min=_LIKELIHOOD_BOUND)
        return likelihood.reshape(q, m, n, h, w).transpose(1, 2)

    def bits(self, latents: Tensor, rounded: Tensor) -> Tensor:
        """Return the ideal code length of each crop in bits: (Q, n)."""
        likelihood: Tensor = self(latents, rounded)
        return -likelihood.log2().sum((2, 3, 4))


def neighbours(latents: Tensor) -> Tensor:
    """Predict each value of (..., h, w): the mean of its left and upper neighbours, rounded as `coder.contexts` does.

    A value at an edge has one of these neighbours, and is predicted by it alone; the corner is predicted by 0.
    Gradients pass through the rounding unchanged.
    """
    left = nn.functional.pad(latents[..., :-1], (1, 0))
    upper = nn.functional.pad(latents[..., :-1, :], (0, 0, 1, 0))
    mean = 0.5 * (left + upper)
    mean[..., 0, :] = left[..., 0, :]
    mean[..., 0] = upper[..., 0]
    rounded: Tensor = mean + ((mean + 0.5).floor() - mean).detach()
    return rounded


def blur(activity: Tensor) -> Tensor:
    """Return the 3 x 3 binomial mean of (..., h, w), with zeros outside the plane."""
    padded = nn.functional.pad(activity, (1, 1, 1, 1))
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    blurred: Tensor = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16
    return blurred
