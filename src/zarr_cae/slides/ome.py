"""Metadata of OME-Zarr 0.5 (https://ngff.openmicroscopy.org/0.5/): axes, scales, channels."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from zarr_cae.slides.metadata import SlideMetadata

__all__ = ["SOURCE", "VERSION", "attributes", "multiscales", "source_attributes"]

VERSION = "0.5"
SOURCE = "source_image"
"""Attribute of an array that keeps the metadata of the file: ICC profile, resolution, description, pixel size ..."""
_TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
_RGB = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
_COLOURS = ("FFFFFF", "00FF00", "FF00FF", "00FFFF", "FFFF00", "FF0000", "0000FF")


def multiscales(name: str, axes: str, levels: int, metadata: SlideMetadata, downsample: str) -> dict[str, Any]:
    """Return the entry of `multiscales` for a pyramid whose levels are halved along rows and columns.

    The centre of pixel 0 of level 0 is the origin. A pixel of level k is the mean of 2^k x 2^k of them, so its centre
    lies (2^k - 1) / 2 of them further, which the `translation` of its level says.
    """
    entries = []
    for axis in axes:
        entry: dict[str, Any] = {"name": axis, "type": _TYPES[axis]}
        if axis in metadata.pixel_size and axis != "c":
            entry["unit"] = metadata.pixel_size[axis][1]
        entries.append(entry)
    sizes = [metadata.pixel_size[axis][0] if axis in metadata.pixel_size else 1.0 for axis in axes]
    datasets = []
    for level in range(levels):
        factors = [2**level if axis in "yx" else 1 for axis in axes]
        changes: list[dict[str, Any]] = [
            {"type": "scale", "scale": [float(size * factor) for size, factor in zip(sizes, factors, strict=True)]}
        ]
        if level and downsample == "mean":
            shift = [float(size * (factor - 1) / 2) for size, factor in zip(sizes, factors, strict=True)]
            changes.append({"type": "translation", "translation": shift})
        datasets.append({"path": str(level), "coordinateTransformations": changes})
    return {"name": name, "axes": entries, "datasets": datasets, "type": downsample}


def attributes(
    name: str,
    axes: str,
    shape: Sequence[int],
    levels: int,
    metadata: SlideMetadata,
    *,
    rgb: bool,
    dtype: np.dtype[Any],
    value_range: tuple[float, float],
    downsample: str,
) -> dict[str, Any]:
    """Return the attributes of the group of a pyramid: `ome` (multiscales, omero), and `source_image`."""
    ome: dict[str, Any] = {
        "version": VERSION,
        "multiscales": [multiscales(name, axes, levels, metadata, downsample)],
    }
    if "c" in axes:
        ome["omero"] = _omero(shape[axes.index("c")], metadata, rgb=rgb, dtype=dtype, value_range=value_range)
    return {"ome": ome, **source_attributes(metadata)}


def source_attributes(metadata: SlideMetadata, level: int = 0) -> dict[str, Any]:
    """Return the attribute `source_image` of a level, or nothing if there is nothing to keep.

    It repeats the pixel size and the channel names, so that an array alone is enough for `zarr-cae decode`.
    """
    kept: dict[str, Any] = dict(metadata.further)
    if metadata.pixel_size:
        factors = {axis: 2**level if axis in "yx" else 1 for axis in metadata.pixel_size}
        kept["pixel_size"] = {axis: [size * factors[axis], unit] for axis, (size, unit) in metadata.pixel_size.items()}
    if metadata.channel_names:
        kept["channel_names"] = list(metadata.channel_names)
    if metadata.icc_profile is not None:
        kept["icc_profile"] = base64.b64encode(metadata.icc_profile).decode("ascii")
    if metadata.dpi is not None:
        kept["dpi"] = [number / 2**level for number in metadata.dpi]
    return {SOURCE: kept} if kept else {}


def _omero(
    channels: int, metadata: SlideMetadata, *, rgb: bool, dtype: np.dtype[Any], value_range: tuple[float, float]
) -> dict[str, Any]:
    low, high = value_range
    bounds = np.iinfo(dtype) if dtype.kind in "ui" else None
    entries = []
    for index in range(channels):
        label, colour = _RGB[index] if rgb else (f"channel {index}", _COLOURS[index % len(_COLOURS)])
        if index < len(metadata.channel_names) and not rgb:
            label = metadata.channel_names[index]
        if index < len(metadata.channel_colours) and not rgb:
            colour = metadata.channel_colours[index] or colour
        window = {
            "min": float(low if bounds is None else bounds.min),
            "max": float(high if bounds is None else bounds.max),
            "start": float(low),
            "end": float(high),
        }
        entries.append({"label": label, "color": colour, "active": True, "window": window})
    return {"channels": entries, "rdefs": {"model": "color"}}
