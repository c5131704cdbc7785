"""The KLT start: strided convolutions from the principal components of their input blocks.

Each analysis convolution begins as the Karhunen-Loève transform of the blocks that it sees (4 x 4 x 3 pixels, then
2 x 2 features twice) in the middle of its larger kernel, and the synthesis begins as the transposes. The residual
branches start at zero, so the whole begins as a cascaded block transform at 32 to 34 dB rather than at 15.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zarr_cae.networks.transforms import GDN
from zarr_cae.training.model import GainedAutoencoder

FEATURE_SCALE = 4.0
"""Features over pixels: puts most features near one, where GDN and the learning rates work best."""
GDN_START = 0.01
"""gamma |x| of the mean feature at the start: mild enough for the multiplicative inverse to undo it."""


def principal_components(features: Tensor, block: int, count: int) -> Tensor:
    """Return the first `count` principal directions of block x block patches of features (N, C, H, W).

    They have the shape (count', C, block, block), are orthonormal, and stand in order of falling energy; count' is at
    most C block^2.
    """
    patches = nn.functional.unfold(features, block, stride=block).transpose(1, 2).flatten(0, 1).double()
    _, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    chosen: Tensor = vectors.flip(1)[:, :count].T.float()
    return chosen.reshape(-1, features.shape[1], block, block)


@torch.no_grad()
def start_from_klt(model: GainedAutoencoder, pixels: Tensor) -> None:
    """Initialise `model` from sample pixels (N, 3, H, W) in [0, 1]."""
    analysis, synthesis = model.analysis, model.synthesis
    features = pixels - 0.5
    stages = (
        (analysis.conv1, synthesis.conv1, analysis.gdn1, synthesis.gdn1, 4),
        (analysis.conv2, synthesis.conv2, analysis.gdn2, synthesis.gdn2, 2),
        (analysis.conv3, synthesis.conv3, nn.Identity(), nn.Identity(), 2),
    )
    for convolve, backward, normalise, inverse, block in stages:
        basis = principal_components(features, block, convolve.out_channels)
        middle = slice(block // 2, block // 2 + block)
        for convolution in (convolve, backward):
            nn.init.normal_(convolution.weight, std=1e-4)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
            convolution.weight[: len(basis), :, middle, middle] = basis
        if block == 4:
            convolve.weight.mul_(FEATURE_SCALE)
            backward.weight.div_(FEATURE_SCALE)
        features = convolve.forward(features)
        if isinstance(normalise, GDN):
            strength = GDN_START / features.square().mean((0, 2, 3)).sqrt()
            for gdn in (normalise, inverse):
                assert isinstance(gdn, GDN)
                gdn.gamma.copy_(torch.diag(strength))
        features = normalise.forward(features)
    model.start_gains(FEATURE_SCALE)
    model.density.start_from(features[None] * model.log_gain.exp()[:, None, :, None, None])
