"""The networks, read top to bottom: analysis, synthesis, `cae-v1` and `bmshj2018-factorized`.

Every transform maps float32 NCHW to float32 NCHW. Pixels are in [0, 1]; latents have 1/16 of the image's
height and width. Nothing here depends on the quality: the gains of each quality are applied outside the convolutions
(see `engine`). Parameters may have a lower precision (see `inference`): convolutions cast their input to their dtype.

Sources: Ballé et al. 2018, "Variational image compression with a scale hyperprior" (arXiv:1802.01436), the
factorized-prior model; Johnston et al. 2019 (arXiv:1912.08771) for GDN with exponents of one; Cui et al. 2021
(arXiv:2003.02012) for gains in place of one network per quality.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zarr_cae.coder.frame import STRIDE


class GDN(nn.Module):
    """Generalised divisive normalisation, `y = x / (beta + gamma |x|)`; the inverse multiplies (arXiv:1912.08771).

    beta: (C,), gamma: (C, C), both non-negative. Training projects them back after each step (`project`), so the
    stored parameters are used as they are, and nothing is folded when they are loaded.
    """

    def __init__(self, channels: int, *, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(0.1 * torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised (or, inverse, denormalised) features; shapes do not change."""
        norm = self.norm(x.abs())
        if torch.is_grad_enabled():
            return x * norm if self.inverse else x / norm
        return norm.mul_(x) if self.inverse else torch.div(x, norm, out=norm)

    def norm(self, x: Tensor) -> Tensor:
        """Return `beta + gamma x` at each position."""
        weight = self.gamma[:, :, None, None]
        plain = x.device.type == "cpu" and x.dtype == torch.float32
        plain = plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if plain and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            # On one thread torch runs 1 x 1 convolutions without oneDNN, although that is up to twice as fast.
            return torch.mkldnn_convolution(x, weight, self.beta, (0, 0), (1, 1), (1, 1), 1)
        return nn.functional.conv2d(x, weight, self.beta)

    @torch.no_grad()
    def project(self) -> None:
        """Put beta and gamma back into their ranges after an optimiser step."""
        self.beta.clamp_(min=1e-2)
        self.gamma.clamp_(min=0)


class SquareGDN(GDN):
    """GDN in CompressAI's form, `y = x / sqrt(beta + gamma x^2)`; the inverse multiplies (arXiv:1511.06281)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised features; shapes do not change."""
        norm = self.norm(x * x)
        return x * (norm.sqrt_() if self.inverse else norm.rsqrt_())


class Downsampling(nn.Conv2d):
    """Convolution of stride s, kernel 2 s, padded with s / 2 edge values: (N, I, s h, s w) to (N, O, h, w)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, 2 * stride, stride, stride // 2, padding_mode="replicate")


class Upsampling(nn.ConvTranspose2d):
    """Transposed convolution of stride s, padded with edge values: (N, I, h, w) to (N, O, s h, s w)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, 2 * stride, stride, stride + stride // 2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return (N, O, s h, s w) for (N, I, h, w)."""
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"))


class Residual(nn.Module):
    """`x + conv3x3(leaky_relu(conv3x3(x)))` with a narrower middle; the branch starts at zero."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 3, padding=1, padding_mode="replicate")
        self.expand = nn.Conv2d(hidden, channels, 3, padding=1, padding_mode="replicate")
        for parameter in self.expand.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` plus its branch; shapes do not change."""
        low = x.to(self.reduce.weight.dtype)
        branch: Tensor = self.expand(nn.functional.leaky_relu(self.reduce(low), inplace=True))
        return x + branch


@dataclass(frozen=True)
class Widths:
    """Channels of a `cae-v1` network at 1/4, 1/8 and 1/16 scale, and of the middles of its residual blocks."""

    quarter: int
    quarter_hidden: int
    eighth: int
    eighth_hidden: int
    latent: int
    latent_hidden: int


LOW_RATE = Widths(64, 32, 128, 96, 192, 96)
"""Qualities 1 to 5: 11.9 KMAC per pixel each way."""
HIGH_RATE = Widths(64, 32, 192, 96, 320, 160)
"""Qualities 6 to 8: 19.6 KMAC per pixel each way."""


class Analysis(nn.Module):
    """`cae-v1` analysis transform: pixels (N, 3, H, W) in [0, 1] to latents (N, M, H/16, W/16)."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        w = widths
        self.conv1 = Downsampling(3, w.quarter, 4)
        self.gdn1 = GDN(w.quarter)
        self.residual1 = Residual(w.quarter, w.quarter_hidden)
        self.conv2 = Downsampling(w.quarter, w.eighth, 2)
        self.gdn2 = GDN(w.eighth)
        self.residual2 = Residual(w.eighth, w.eighth_hidden)
        self.conv3 = Downsampling(w.eighth, w.latent, 2)
        self.residual3 = Residual(w.latent, w.latent_hidden)

    def fine(self, x: Tensor) -> Tensor:
        """Map pixels to features (N, C, H/8, W/8): most of the arithmetic, and little harmed by half precision."""
        x = (x - 0.5).to(self.conv1.weight.dtype)
        x = self.residual1(self.gdn1(self.conv1(x)))
        features: Tensor = self.residual2(self.gdn2(self.conv2(x)))
        return features

    def coarse(self, features: Tensor) -> Tensor:
        """Map features to latents, some of which are in the hundreds. They are rounded to integers later."""
        latents: Tensor = self.residual3(self.conv3(features.to(self.conv3.weight.dtype)))
        return latents

    def forward(self, x: Tensor) -> Tensor:
        """Return the latents of pixels."""
        return self.coarse(self.fine(x))


class Synthesis(nn.Module):
    """`cae-v1` synthesis transform: latents (N, M, h, w) to pixels (N, 3, 16 h, 16 w), nominally in [0, 1]."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        w = widths
        self.residual3 = Residual(w.latent, w.latent_hidden)
        self.conv3 = Upsampling(w.latent, w.eighth, 2)
        self.residual2 = Residual(w.eighth, w.eighth_hidden)
        self.gdn2 = GDN(w.eighth, inverse=True)
        self.conv2 = Upsampling(w.eighth, w.quarter, 2)
        self.residual1 = Residual(w.quarter, w.quarter_hidden)
        self.gdn1 = GDN(w.quarter, inverse=True)
        self.conv1 = Upsampling(w.quarter, 3, 4)

    def coarse(self, y: Tensor) -> Tensor:
        """Map latents to features (N, C, 2 h, 2 w)."""
        features: Tensor = self.conv3(self.residual3(y))
        return features

    def fine(self, features: Tensor) -> Tensor:
        """Map features to pixels: most of the arithmetic, and little harmed by half precision."""
        y = self.residual2(features.to(self.conv2.weight.dtype))
        y = self.conv2(self.gdn2(y))
        centred: Tensor = self.conv1(self.gdn1(self.residual1(y)))
        return centred.float() + 0.5

    def forward(self, y: Tensor) -> Tensor:
        """Return the pixels of latents."""
        return self.fine(self.coarse(y))


def _with_margin(x: Tensor, margin: int) -> Tensor:
    """Pad (N, C, H, W) by reflection with `margin` rows and columns on each side, which may exceed H or W."""
    for axis in (2, 3):
        length = x.shape[axis]
        place = torch.arange(-margin, length + margin, device=x.device) % max(2 * length - 2, 1)
        x = x.index_select(axis, torch.minimum(place, 2 * length - 2 - place))
    return x


class FactorizedAnalysis(nn.Sequential):
    """`bmshj2018-factorized` analysis transform: (N, 3, H, W) in [0, 1] to (N, M, H/16, W/16).

    With a `margin` the input is first padded by reflection, by so many latent positions on each side, and the latents
    there are cut off. caecodec does so with a margin of 1.
    """

    def __init__(self, hidden: int, latent: int, margin: int = 0) -> None:
        def conv(inputs: int, outputs: int) -> nn.Module:
            return nn.Conv2d(inputs, outputs, 5, stride=2, padding=2)

        super().__init__(
            conv(3, hidden), SquareGDN(hidden), conv(hidden, hidden), SquareGDN(hidden),
            conv(hidden, hidden), SquareGDN(hidden), conv(hidden, latent),
        )  # fmt: skip
        self.margin = _checked_margin(margin)

    def forward(self, x: Tensor) -> Tensor:
        """Return the latents of pixels."""
        m = self.margin
        latents: Tensor = nn.Sequential.forward(self, _with_margin(x, STRIDE * m) if m else x)  # type: ignore[no-untyped-call]
        return latents[..., m:-m, m:-m] if m else latents


class FactorizedSynthesis(nn.Sequential):
    """`bmshj2018-factorized` synthesis transform: (N, M, h, w) to (N, 3, 16 h, 16 w), nominally in [0, 1].

    With a `margin` the latents are first padded by reflection, and the pixels there are cut off.
    """

    def __init__(self, hidden: int, latent: int, margin: int = 0) -> None:
        def deconv(inputs: int, outputs: int) -> nn.Module:
            return nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=1)

        def igdn() -> nn.Module:
            return SquareGDN(hidden, inverse=True)

        super().__init__(
            deconv(latent, hidden), igdn(), deconv(hidden, hidden), igdn(),
            deconv(hidden, hidden), igdn(), deconv(hidden, 3),
        )  # fmt: skip
        self.margin = _checked_margin(margin)

    def forward(self, y: Tensor) -> Tensor:
        """Return the pixels of latents."""
        m = STRIDE * self.margin
        planes: Tensor = nn.Sequential.forward(self, _with_margin(y, self.margin) if m else y)  # type: ignore[no-untyped-call]
        return planes[..., m:-m, m:-m] if m else planes


def _checked_margin(margin: int) -> int:
    if type(margin) is not int or not 0 <= margin <= 2:  # the halo of a piece must be wider
        raise ValueError(f"margin must be 0, 1 or 2, got {margin!r}")
    return margin
