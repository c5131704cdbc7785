"""Slides in the formats of OpenSlide (MRXS, VSI, SVSlide, ...), region by region."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.slides.metadata import SlideMetadata
from zarr_cae.slides.sources import Slide, with_unit

__all__ = ["open_with_openslide"]


class _Regions:
    """A level of a slide as an array (rows, columns, 3) of uint8. Transparent pixels are laid on white."""

    def __init__(self, slide: Any, level: int) -> None:
        columns, rows = slide.level_dimensions[level]
        self.shape, self.dtype = (rows, columns, 3), np.dtype(np.uint8)
        self._slide, self._level = slide, level
        self._factor = slide.level_downsamples[level]

    def __getitem__(self, window: tuple[slice, ...]) -> npt.NDArray[np.uint8]:
        rows, columns, channels = window
        corner = round(columns.start * self._factor), round(rows.start * self._factor)
        size = columns.stop - columns.start, rows.stop - rows.start
        region = np.asarray(self._slide.read_region(corner, self._level, size))
        alpha = region[..., 3:]
        if alpha.min() < 255:
            weight = alpha.astype(np.uint16)
            mixed = (region[..., :3] * weight + 255 * (255 - weight) + 127) // 255
            region = mixed.astype(np.uint8)
        return region[..., :3][..., channels]


def open_with_openslide(path: Path, *, level: int = 0) -> Slide:
    """Open a slide with OpenSlide. Errors are those of `open_slide`."""
    try:
        import openslide
    except ImportError as error:
        raise CAEConfigurationError(
            f"cae: {path} is in a format that OpenSlide reads: pip install 'zarr-cae[openslide]'"
        ) from error
    try:
        slide = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise CAEConfigurationError(f"cae: OpenSlide can't read {path}: {error}") from error
    if not 0 <= level < slide.level_count:
        sizes = ", ".join(f"{index}: {w} x {h}" for index, (w, h) in enumerate(slide.level_dimensions))
        slide.close()
        raise CAEConfigurationError(f"cae: {path} has no level {level}; its levels are {sizes}")
    sizes_found: dict[str, tuple[float, str]] = {}
    factor = slide.level_downsamples[level]
    for axis, name in (("x", openslide.PROPERTY_NAME_MPP_X), ("y", openslide.PROPERTY_NAME_MPP_Y)):
        with_unit(sizes_found, axis, slide.properties.get(name, ""), "um")
        if axis in sizes_found:
            sizes_found[axis] = sizes_found[axis][0] * factor, "micrometer"
    power = slide.properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    colours = slide.color_profile
    profile = None if colours is None else colours.tobytes()
    metadata = SlideMetadata(
        sizes_found,
        icc_profile=profile,
        further={"vendor": slide.properties.get(openslide.PROPERTY_NAME_VENDOR, "")}
        | ({} if power is None else {"objective_power": power}),
    )
    levels = tuple((rows, columns) for columns, rows in slide.level_dimensions)
    return Slide(path.stem, _Regions(slide, level), "yxc", True, metadata, levels, close=slide.close)
