"""`SlideMetadata`: pixel sizes, channel names, colour profile and resolution, in one form for all file formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MICROMETRES_PER_INCH", "SlideMetadata", "unit_name"]

MICROMETRES_PER_INCH = 25400.0
_UNITS = {
    "µm": "micrometer", "um": "micrometer", "\u03bcm": "micrometer", "micron": "micrometer", "microns": "micrometer",
    "nm": "nanometer", "mm": "millimeter", "cm": "centimeter", "m": "meter", "pm": "picometer", "Å": "angstrom",
    "inch": "inch", "in": "inch", "s": "second", "ms": "millisecond", "µs": "microsecond", "min": "minute", "h": "hour",
}  # fmt: skip
"""Names of units in OME-XML and ImageJ, and those of OME-Zarr."""


@dataclass(frozen=True)
class SlideMetadata:
    """Metadata of the pixels, from the file.

    Attributes
    ----------
    pixel_size
        For axes of "tzyx": the length of a pixel and its unit by the name of OME-Zarr, for example "micrometer".
    channel_names, channel_colours
        One for each channel, or none. Colours are RRGGBB, "" where the file has none.
    value_range
        Lowest and highest value, where the file says how many bits are used.
    icc_profile
        The colour profile, as it is in the file.
    dpi
        Pixels per inch along columns and rows.
    further
        Other values of the file that are kept in attributes, as JSON.
    """

    pixel_size: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    channel_names: tuple[str, ...] = ()
    channel_colours: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None
    further: Mapping[str, Any] = field(default_factory=dict)


def unit_name(symbol: str) -> str | None:
    """Return the name that OME-Zarr has for a unit's symbol; None for one that is not known."""
    return symbol if symbol in _UNITS.values() else _UNITS.get(symbol)
