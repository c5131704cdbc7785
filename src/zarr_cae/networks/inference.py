"""Prepare trained networks for inference: the form and the precision in which they run fastest on this machine.

Rounding to bfloat16 does more harm in some layers than in others. A residual branch adds a small correction to values
that stay in float32, so its rounding hardly shows in the pixels. Rounding in the other convolutions and in GDN shows by
a few grey levels at most (`tests/networks/test_inference.py` tests both; `benchmarks/networks.py` measures the speeds).
In "float32" GPUs still multiply in TF32 in convolutions, which is torch's default. Its rounding is an eighth as coarse
as that of bfloat16, and shows in no pixel.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.networks.transforms import Analysis, FactorizedSynthesis, Residual, Synthesis, Upsampling

Precision = Literal["auto", "float32", "bfloat16"]


class SubpixelConv(nn.Module):
    """An `Upsampling` as a 2 x 2 convolution and a pixel shuffle: (N, I, h, w) to (N, O, s h, s w).

    Each s x s block of the output, shifted by s / 2, depends on 2 x 2 inputs. This form is faster if there are
    few outputs, as in the last layer: CPUs are slow at such transposed convolutions.
    """

    def __init__(self, transposed: Upsampling) -> None:
        super().__init__()
        inputs, outputs = transposed.weight.shape[:2]
        self.stride = transposed.stride[0]
        taps = transposed.weight.detach().reshape(inputs, outputs, 2, self.stride, 2, self.stride).flip(2, 4)
        self.conv = nn.Conv2d(inputs, outputs * self.stride**2, 2, padding=1, padding_mode="replicate")
        self.conv.weight = nn.Parameter(taps.permute(1, 3, 5, 0, 2, 4).reshape(self.conv.weight.shape))
        assert transposed.bias is not None
        self.conv.bias = nn.Parameter(transposed.bias.detach().repeat_interleave(self.stride**2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the upsampled plane."""
        edge = self.stride // 2
        return nn.functional.pixel_shuffle(self.conv(x), self.stride)[..., edge:-edge, edge:-edge]


class SubpixelConv5(nn.Module):
    """CompressAI's transposed convolution, kernel 5, stride 2, as a 3 x 3 convolution and a pixel shuffle.

    (N, I, h, w) to (N, O, 2 h, 2 w). Half of the taps of odd rows and columns are zero.
    """

    def __init__(self, transposed: nn.ConvTranspose2d) -> None:
        super().__init__()
        inputs, outputs = transposed.weight.shape[:2]
        # Row 2 i + r of the output takes tap r + 2 - 2 d from row i + d of the input, d = -1, 0, 1; columns likewise.
        taps = nn.functional.pad(transposed.weight.detach(), (0, 1, 0, 1)).reshape(inputs, outputs, 3, 2, 3, 2)
        taps = taps.flip(2, 4).permute(1, 3, 5, 0, 2, 4)
        self.conv = nn.Conv2d(inputs, 4 * outputs, 3, padding=1)
        self.conv.weight = nn.Parameter(taps.reshape(self.conv.weight.shape))
        assert transposed.bias is not None
        self.conv.bias = nn.Parameter(transposed.bias.detach().repeat_interleave(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, O, 2 h, 2 w) for (N, I, h, w)."""
        return nn.functional.pixel_shuffle(self.conv(x), 2)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware: CPUs with AMX or AVX-512 BF16, GPUs since Ampere."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known: dict[str, object] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # older versions of torch have no public way to tell
    return bool(known.get("amx_bf16", False) or known.get("avx512_bf16", False))


def choose_precision(name: str, device: torch.device) -> Precision:
    """Return `name`, but "float32" for "auto" if the device has no fast bfloat16.

    Raises
    ------
    CAEConfigurationError
        If `name` is not a precision.
    """
    if name not in get_args(Precision):
        raise CAEConfigurationError(f"cae: cae.precision must be one of {', '.join(get_args(Precision))}, got {name!r}")
    return "float32" if name == "auto" and not bfloat16_is_fast(device) else name  # type: ignore[return-value]


def prepare(network: nn.Module, precision: Precision, device: torch.device) -> nn.Module:
    """Prepare a network for inference on a device: change the form of its last layer, and lower its precision.

    Parameters
    ----------
    network
        An analysis or synthesis transform with its parameters. It is changed in place.
    precision
        "auto" lowers the residual branches to bfloat16. "bfloat16" lowers all but the layer next to the latents, whose
        values go into the hundreds. Networks other than those of `cae-v1` stay in float32: they have no residual
        branches, and they square large values.
    device
        The device to move it to.

    Returns
    -------
    nn.Module
        The same network, in evaluation mode and without gradients.
    """
    if isinstance(network, Synthesis):
        network.conv1 = SubpixelConv(network.conv1)  # type: ignore[assignment]
    if isinstance(network, FactorizedSynthesis):
        network[-1] = SubpixelConv5(network[-1])  # type: ignore[arg-type]
    if isinstance(network, Analysis | Synthesis) and precision != "float32":
        for name, module in network.named_children():
            if isinstance(module, Residual) or (precision == "bfloat16" and name != "conv3"):
                module.to(torch.bfloat16)
    prepared: nn.Module = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return prepared.requires_grad_(requires_grad=False).eval()
