"""Write OME-TIFF files, which keep the metadata of the pixels: axes, sizes, channel names and colour profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.slides.metadata import SlideMetadata
from zarr_cae.slides.tiff import EXTRA

__all__ = ["is_ome_tiff", "write_ome_tiff"]

_SYMBOLS = {
    "micrometer": "µm", "nanometer": "nm", "millimeter": "mm", "centimeter": "cm", "meter": "m", "picometer": "pm",
    "angstrom": "Å", "inch": "in", "second": "s", "millisecond": "ms", "microsecond": "µs", "minute": "min",
    "hour": "h",
}  # fmt: skip
"""Units of OME-Zarr, and their symbols in OME-XML."""
_TILE = (512, 512)


def is_ome_tiff(path: Path) -> bool:
    """Return whether a file name is that of an OME-TIFF."""
    return path.name.lower().endswith((".ome.tif", ".ome.tiff"))


def write_ome_tiff(path: Path, pixels: npt.NDArray[Any], axes: str, metadata: SlideMetadata, *, rgb: bool) -> None:
    """Write pixels to a tiled OME-TIFF without loss.

    Parameters
    ----------
    path
        The file, which is replaced if it exists.
    pixels
        The array.
    axes
        An axis of "tczyx" for each axis of `pixels`.
    metadata
        Sizes of a pixel, names of the channels, colour profile.
    rgb
        Whether axis "c" holds red, green and blue.

    Raises
    ------
    CAEConfigurationError
        If tifffile is not installed.
    """
    try:
        import tifffile
    except ImportError as error:
        raise CAEConfigurationError(f"cae: {path} is an OME-TIFF, which tifffile writes: {EXTRA}") from error
    order = "tczyx".replace("c", "") + "c" if rgb else "tczyx"
    kept = [axis for axis in order if axis in axes]
    pixels = np.ascontiguousarray(pixels.transpose([axes.index(axis) for axis in kept]))
    told: dict[str, Any] = {"axes": "".join(kept).upper()[:-1] + "S" if rgb else "".join(kept).upper()}
    for axis, (size, unit) in metadata.pixel_size.items():
        if unit in _SYMBOLS:
            name = "TimeIncrement" if axis == "t" else f"PhysicalSize{axis.upper()}"
            told |= {name: size, f"{name}Unit": _SYMBOLS[unit]}
    channels = pixels.shape[kept.index("c")] if "c" in kept else 1
    if len(metadata.channel_names) == channels and not rgb:
        told["Channel"] = {"Name": list(metadata.channel_names)}
    tifffile.imwrite(
        path, pixels, ome=True, bigtiff=pixels.nbytes > 2**31, tile=_TILE, compression="zlib", metadata=told,
        photometric="rgb" if rgb else "minisblack", iccprofile=metadata.icc_profile,
    )  # fmt: skip
