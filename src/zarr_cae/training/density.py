"""The trained density of the latents: one mixture of logistics per quality and channel.

A factorized prior (Ballé et al. 2018, arXiv:1802.01436, section 6.1): all positions of a channel share one density.
Ballé's is a small monotone network; a mixture of a few logistics can start from the statistics of the KLT latents,
has a closed-form distribution function, and trained faster here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

COMPONENTS = 4
_LIKELIHOOD_BOUND = 1e-9


class Density(nn.Module):
    """Probability of integer bins under a mixture of logistics, for Q qualities x M channels."""

    def __init__(self, qualities: int, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(qualities, channels, COMPONENTS))
        self.log_scale = nn.Parameter(torch.zeros(qualities, channels, COMPONENTS))
        self.logit = nn.Parameter(torch.zeros(qualities, channels, COMPONENTS))

    @torch.no_grad()
    def start_from(self, latents: Tensor) -> None:
        """Centre the mixture on sample latents of shape (Q, n, M, h, w), before any rounding."""
        flat = latents.transpose(1, 2).flatten(2)
        mean, std = flat.mean(-1, keepdim=True), flat.std(-1, keepdim=True)
        spread = torch.tensor([0.1, 0.25, 0.5, 1.0])
        self.mean.copy_(mean.expand_as(self.mean))
        self.log_scale.copy_((std * spread).clamp(min=0.05).log())

    def forward(self, latents: Tensor) -> Tensor:
        """Probability of the bin of width 1 around each latent; latents and result (Q, n, M, h, w)."""
        values = latents.transpose(1, 2).flatten(2)[..., None]  # (Q, M, positions, 1)
        mean, scale = self.mean[:, :, None], self.log_scale.clamp(-4, 6).exp()[:, :, None]
        centred = -(values - mean).abs()  # the lower tail, where sigmoids keep their digits
        mass = torch.sigmoid((centred + 0.5) / scale) - torch.sigmoid((centred - 0.5) / scale)
        likelihood = (mass * self.logit.softmax(-1)[:, :, None]).sum(-1).clamp(min=_LIKELIHOOD_BOUND)
        q, n, m, h, w = latents.shape
        return likelihood.reshape(q, m, n, h, w).transpose(1, 2)

    def bits(self, latents: Tensor) -> Tensor:
        """Ideal code length in bits of each crop: (Q, n)."""
        likelihood: Tensor = self(latents)
        return -likelihood.log2().sum((2, 3, 4))

    @torch.no_grad()
    def probabilities(self, limit: int) -> Tensor:
        """Bin probabilities of the integers -limit to limit in float64: (Q, M, 2 limit + 1)."""
        edges = torch.arange(-limit, limit + 2, dtype=torch.float64) - 0.5
        mean, scale = self.mean.double()[..., None], self.log_scale.double().clamp(-4, 6).exp()[..., None]
        lower = (edges - mean) / scale
        sign = torch.where(lower.mean(-1, keepdim=True) > 0, -1.0, 1.0)
        cdf = torch.sigmoid(lower * sign)
        mass = (cdf[..., 1:] - cdf[..., :-1]).abs()
        return (mass * self.logit.double().softmax(-1)[..., None]).sum(2)
