"""Convert chunks to planes and back as tensors, on the device where the network runs.

A GPU gets and returns chunks in their own dtype, with a quarter of the bytes of float32 planes, and the host converts
no pixel. Arrays that are on the GPU already (cupy's, with zarr's `config.enable_gpu()`) stay there. The functions
follow the rules of `pixels.convert` and raise the same errors.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zarr_cae.coder.frame import STRIDE
from zarr_cae.errors import CAEDataError
from zarr_cae.pixels.convert import joined, outside_message, root_constants
from zarr_cae.pixels.layout import RGB, Layout, ValueRange, ValueTransform

_DTYPES = {
    np.dtype(name): getattr(torch, name)
    for name in ("uint8", "int8", "uint16", "int16", "float16", "float32", "float64")
}
"""The dtypes that torch can compute with, directly or after a cast to a wider integer."""


def supported(dtype: np.dtype[Any]) -> bool:
    """Return whether chunks of this dtype can be coded as tensors; `pixels.convert` codes all dtypes."""
    return dtype in _DTYPES


def to_tensor(array: Any, device: torch.device) -> Tensor:
    """Return a NumPy array, or an array on a GPU that supports DLPack (cupy's), as a tensor on the device.

    An array on the device is not copied. A host array is copied to a GPU from pinned memory, so that the copy overlaps
    with computation. On a CPU the tensor may share the array's memory: do not write to it.
    """
    if not isinstance(array, np.ndarray):
        return torch.utils.dlpack.from_dlpack(array).to(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_planes(chunk: Tensor, layout: Layout, value_range: ValueRange) -> Tensor:
    """Return a chunk as planes (N, 3 or 1, H', W') float32 in [0, 1]; see `convert.to_planes`.

    Raises
    ------
    CAEDataError
        If a value lies outside the range.
    """
    if layout.mixed:
        planes: Tensor = joined(to_planes(chunk, layout.separate, value_range), layout)
        return planes
    low, high = value_range
    ordered = chunk.permute(layout.channels_first)
    if not chunk.is_floating_point():
        ordered = ordered.to(torch.int32) if chunk.dtype != torch.uint8 or value_range != (0, 255) else ordered
    if ordered.dtype != torch.uint8:
        lowest, highest = (value.item() for value in torch.aminmax(ordered))
        if not (low <= lowest and highest <= high):  # true for NaN, too
            raise CAEDataError(outside_message(lowest, highest, value_range))
    if chunk.is_floating_point():
        values = ((ordered.to(torch.float64) - low) / (float(high) - float(low))).to(torch.float32)
    else:
        values = (ordered - int(low)).to(torch.float32) * float(np.float32(1 / (high - low)))
    shape = (layout.planes, 1 if layout.grey else RGB, layout.height, layout.width)
    below, right = (-side % STRIDE for side in shape[2:])
    values = values.reshape(shape)
    if below or right:
        values = nn.functional.pad(values, (0, right, 0, below), mode="replicate")
    return values


def to_root(planes: Tensor, value_range: ValueRange) -> Tensor:
    """Return planes under the value transform "sqrt"; see `convert.to_root`."""
    extent, least, factor = root_constants(value_range)
    return (((planes.to(torch.float64) * extent + 0.375).sqrt() - least) * factor).to(torch.float32).clamp(0, 1)


def from_root(planes: Tensor, value_range: ValueRange) -> Tensor:
    """Return planes without the value transform "sqrt"; see `convert.from_root`."""
    extent, least, factor = root_constants(value_range)
    values = planes.clamp(0, 1).to(torch.float64) / factor + least
    return ((values.square() - 0.375) / extent).to(torch.float32).clamp(0, 1)


def to_chunk(
    planes: Tensor,
    layout: Layout,
    dtype: np.dtype[Any],
    value_range: ValueRange,
    transform: ValueTransform = None,
) -> Tensor:
    """Return planes (N, 3 or 1, H', W') as a contiguous chunk; see `convert.to_chunk`."""
    if layout.mixed:
        planes, layout = _separated(planes, layout), layout.separate
    if transform == "sqrt":
        planes = from_root(planes, value_range)
    low, high = value_range
    inside = planes[:, :, : layout.height, : layout.width]
    if dtype.kind == "f":
        values = (inside.to(torch.float64) * (float(high) - float(low)) + low).clamp_(low, high)
    else:
        extent = int(high) - int(low)
        values = (inside * float(extent)).clamp_(0, extent).round_().to(torch.int32) + int(low)
    order = layout.channels_first
    ordered = values.reshape([layout.shape[axis] for axis in order])
    back = [order.index(axis) for axis in range(len(order))]
    return ordered.permute(back).to(_DTYPES[dtype]).contiguous()


def _separated(planes: Tensor, layout: Layout) -> Tensor:
    """Return planes of a layout with colours as sample planes; see `convert.separated`."""
    images = planes.reshape(layout.images, -1, RGB, *planes.shape[2:])
    samples = planes.new_empty(layout.images, layout.channels, *planes.shape[2:])
    samples[:, list(layout.colour or ())] = images[:, 0]
    samples[:, layout.greys] = images[:, 1:].mean(2)
    return samples.reshape(-1, 1, *planes.shape[2:])
