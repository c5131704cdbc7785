"""TIFF files as slides, through tifffile: one tile or strip at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from zarr_cae.errors import CAEConfigurationError, CAEError
from zarr_cae.slides.metadata import MICROMETRES_PER_INCH, SlideMetadata
from zarr_cae.slides.sources import DAMAGE, CachedRows, Sliceable, Slide, with_unit

__all__ = ["EXTRA", "MissingLibraryError", "open_tiff"]

EXTRA = "pip install 'zarr-cae[slides]'"
_AXES = {"T": "t", "Z": "z", "C": "c", "Y": "y", "X": "x"}
_FREE = "tz"
_LARGEST_PIXEL = 50.0
"""Micrometres. A resolution tag with larger pixels is that of a print, not of a microscope."""
_MINIMUM_LEVEL = 2
_GREY, _RGB, _YCBCR = 1, 2, 6


class MissingLibraryError(CAEConfigurationError):
    """tifffile is not installed."""


def open_tiff(path: Path, *, series: int | None = None, level: int = 0) -> Slide:
    """Open a TIFF file. Parameters and errors are those of `open_slide`."""
    try:
        import tifffile
    except ImportError as error:
        raise MissingLibraryError(f"cae: {path} is a TIFF file, which tifffile reads: {EXTRA}") from error
    file = None
    try:
        file = tifffile.TiffFile(path)
        return _opened(path, file, series, level)
    except BaseException as error:
        if file is not None:
            file.close()
        if isinstance(error, (tifffile.TiffFileError, *DAMAGE)) and not isinstance(error, CAEError):
            raise CAEConfigurationError(f"cae: {path} is not a TIFF file, or damaged: {error}") from error
        raise


def _opened(path: Path, file: Any, series: int | None, level: int) -> Slide:
    import zarr

    found = file.series
    chosen, levels = _choose(path, found, series)
    one = _level(path, levels, level)
    page = one.keyframe
    stored, rgb = _axes(path, one.axes, one.shape, page)
    array: Sliceable
    by_rows = not page.is_tiled
    if page.is_memmappable and one.dataoffset is not None:
        array = np.memmap(path, file.byteorder + page.dtype.char, "r", one.dataoffset, one.shape)
        by_rows = False
    else:
        array = zarr.open_array(one.aszarr(level=0), mode="r")
        if by_rows:
            rows = stored.index("y")
            array = CachedRows(array, rows, stored.index("x"), array.chunks[rows])
    orientation = int(page.tags.valueof("Orientation", 1))
    return Slide(
        path.stem.removesuffix(".ome"),
        array,
        stored,
        rgb,
        _metadata(file, one, levels[0], found.index(chosen)),
        tuple(_size(item) for item in levels),
        by_rows,
        orientation if orientation in range(1, 9) else 1,
        page.photometric in {_GREY, _RGB, _YCBCR} and page.bitspersample in {8, 16, 32, 64},
        file.close,
    )


def _choose(path: Path, found: Sequence[Any], series: int | None) -> tuple[Any, list[Any]]:
    """Return the image to read and its levels, judged by the headers."""
    if not found:
        raise CAEConfigurationError(f"cae: {path} holds no image")
    if series is not None:
        if not 0 <= series < len(found):
            raise CAEConfigurationError(f"cae: {path} has no series {series}; it has {_listed(found)}")
        return found[series], list(found[series].levels)
    first = found[0]
    if len(first.levels) > 1 or len(found) == 1:
        return first, list(first.levels)
    # Pages of several sizes are smaller copies of the first, or other images.
    rest = [other for other in found[1:] if other.axes == first.axes and other.dtype == first.dtype]
    copies = [first, *(other for other in rest if _is_copy(first, other))]
    others = [other for other in found if other not in copies and not _is_extra(other, first)]
    if others:
        raise CAEConfigurationError(
            f"cae: {path} holds images of several sizes or kinds; choose one with --series: {_listed(found)}"
        )
    return first, sorted(copies, key=lambda item: -math.prod(item.shape))


def _level(path: Path, levels: Sequence[Any], level: int) -> Any:
    if 0 <= level < len(levels):
        return levels[level]
    sizes = ", ".join(f"{index}: {size[1]} x {size[0]}" for index, size in enumerate(map(_size, levels)))
    raise CAEConfigurationError(f"cae: {path} has no level {level}; its levels are {sizes}")


def _size(item: Any) -> tuple[int, int]:
    return int(item.shape[item.axes.index("Y")]), int(item.shape[item.axes.index("X")])


def _is_copy(first: Any, other: Any) -> bool:
    """Return whether a page is a smaller copy: at most half the size, and of equal proportions (within some pixels)."""
    (rows, columns), (few, less) = _size(first), _size(other)
    if few * _MINIMUM_LEVEL > rows + 1 or min(few, less) < 1:
        return False
    return abs(rows / few - columns / less) <= 1.5 * rows / few * (1 / few + 1 / less)


def _is_extra(other: Any, first: Any) -> bool:
    """Return whether a page is a label, an overview or a thumbnail: much smaller than the image, and without tiles."""
    return math.prod(_size(other)) * 16 <= math.prod(_size(first)) and not other.keyframe.is_tiled


def _listed(found: Sequence[Any]) -> str:
    return ", ".join(
        f"{index}: {' x '.join(map(str, item.shape))} ({item.axes}) {item.dtype}" for index, item in enumerate(found)
    )


def _axes(path: Path, axes: str, shape: Sequence[int], page: Any) -> tuple[str, bool]:
    """Return an axis of "tczyx-" for each axis of tifffile, and whether "c" holds RGB."""
    coloured = page.photometric in {_RGB, _YCBCR}
    lengths = dict(zip(axes, shape, strict=True))
    stored, free = [], [axis for axis in _FREE if axis.upper() not in axes]
    samples_are_channels = "S" in axes and lengths["S"] > 1
    for axis, length in zip(axes, shape, strict=True):
        if axis == "S":
            stored.append("c" if length > 1 else "-")
        elif axis in "YX":
            stored.append(axis.lower())
        elif length == 1:
            stored.append("-")
        elif axis in _AXES and not (axis == "C" and samples_are_channels):
            stored.append(_AXES[axis])
        elif free:
            stored.append(free.pop(0))  # a stack whose axis has no name is taken as t
        else:
            raise CAEConfigurationError(
                f"cae: {path} has axes {axes} of {tuple(shape)}; at most time, channel, z, rows and columns can be kept"
            )
    rgb = coloured and samples_are_channels and lengths["S"] == 3
    return "".join(stored), rgb


def _metadata(file: Any, item: Any, largest: Any, series: int) -> SlideMetadata:
    page = largest.keyframe
    dpi = _resolution(page)
    sizes: dict[str, tuple[float, str]] = {}
    _from_resolution(dpi, sizes)
    names: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    value_range = None
    further = _geographic(page)
    description = page.tags.valueof("ImageDescription", "")
    if file.is_ome and file.ome_metadata:
        names, colours, value_range = _from_ome(file.ome_metadata, series, sizes)
    elif file.is_imagej and file.imagej_metadata:
        _from_imagej(file.imagej_metadata, page, sizes)
    elif isinstance(description, str) and description and not file.is_shaped:
        further["description"] = description
        found = re.search(r"\bMPP\s*=\s*([0-9.]+)", description) if file.is_svs else None
        for axis in "xy" if found else "":
            with_unit(sizes, axis, found[1] if found else "", "um")
    for axis, factor in zip("yx", (a / b for a, b in zip(_size(largest), _size(item), strict=True)), strict=True):
        if axis in sizes:
            sizes[axis] = sizes[axis][0] * factor, sizes[axis][1]
    profile = page.tags.valueof("InterColorProfile", None)
    return SlideMetadata(sizes, names, colours, value_range, bytes(profile) if profile else None, dpi, further)


def _from_resolution(dpi: tuple[float, float] | None, sizes: dict[str, tuple[float, str]]) -> None:
    """Take pixel sizes from the resolution, if it is that of a microscope."""
    across = (0.0, 0.0) if dpi is None else (MICROMETRES_PER_INCH / dpi[0], MICROMETRES_PER_INCH / dpi[1])
    if 0 < max(across) <= _LARGEST_PIXEL:
        sizes["x"], sizes["y"] = (across[0], "micrometer"), (across[1], "micrometer")


def _resolution(page: Any) -> tuple[float, float] | None:
    """Return pixels per inch along columns and rows; None if the file does not say."""
    unit = int(page.tags.valueof("ResolutionUnit", 2))
    per_inch = {2: 1.0, 3: 2.54}.get(unit)
    values = []
    for name in ("XResolution", "YResolution"):
        value = page.tags.valueof(name, None)
        if per_inch is None or not isinstance(value, tuple) or len(value) != 2 or not value[0] or not value[1]:
            return None
        values.append(value[0] / value[1] * per_inch)
    return None if values == [1.0, 1.0] else (values[0], values[1])


def _geographic(page: Any) -> dict[str, Any]:
    """Return the tags of GeoTIFF that place the image on a map, as numbers."""
    tags = {"model_pixel_scale": "ModelPixelScaleTag", "model_tiepoint": "ModelTiepointTag"}
    found = {name: page.tags.valueof(tag, None) for name, tag in tags.items()}
    return {name: [float(number) for number in value] for name, value in found.items() if value}


def _from_imagej(values: Mapping[str, Any], page: Any, sizes: dict[str, tuple[float, str]]) -> None:
    unit = str(values.get("unit", "")).encode().decode("unicode_escape", "ignore")
    for axis, name in (("x", "XResolution"), ("y", "YResolution")):
        value = page.tags.valueof(name, None)
        if isinstance(value, tuple) and value[0]:
            with_unit(sizes, axis, value[1] / value[0], unit)
    with_unit(sizes, "z", values.get("spacing", ""), unit)
    with_unit(sizes, "t", values.get("finterval", ""), str(values.get("tunit", "s")))


def _from_ome(
    text: str, series: int, sizes: dict[str, tuple[float, str]]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[float, float] | None]:
    """Read OME-XML: add pixel sizes to `sizes`; return names and colours of the channels, and the range of values."""
    try:
        root = ET.fromstring(text)  # noqa: S314 - the expat of supported Pythons limits the expansion
    except ET.ParseError:
        return (), (), None
    images = [image for image in root if _tag(image) == "Image"]
    pixels = [child for image in images[series : series + 1] for child in image if _tag(child) == "Pixels"]
    if not pixels:
        return (), (), None
    one = pixels[0]
    for axis in "xyz":
        with_unit(
            sizes, axis, one.get(f"PhysicalSize{axis.upper()}", ""), one.get(f"PhysicalSize{axis.upper()}Unit", "µm")
        )
    with_unit(sizes, "t", one.get("TimeIncrement", ""), one.get("TimeIncrementUnit", "s"))
    channels = [child for child in one if _tag(child) == "Channel"]
    names = tuple(channel.get("Name", f"channel {index}") for index, channel in enumerate(channels))
    colours = tuple(_colour(channel.get("Color", "")) for channel in channels)
    bits = one.get("SignificantBits", "")
    whole = one.get("Type", "").startswith("uint")
    value_range = (0.0, float(2 ** int(bits) - 1)) if whole and bits.isdigit() and 1 <= int(bits) <= 32 else None
    return names, colours, value_range


def _tag(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


def _colour(text: str) -> str:
    """Return a colour of OME-XML, a signed 32-bit RGBA number, as RRGGBB."""
    try:
        number = int(text) & 0xFFFFFFFF
    except ValueError:
        return ""
    return f"{number >> 8:06X}"
