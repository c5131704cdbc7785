"""DICOM whole slide images through wsidicom, region by region."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_cae.errors import CAEConfigurationError, CAEError
from zarr_cae.slides.metadata import SlideMetadata
from zarr_cae.slides.sources import DAMAGE, Slide

__all__ = ["is_dicom", "open_dicom"]

_SUFFIXES = {".dcm", ".dicom"}
_PREAMBLE = 128
"""Bytes before the letters DICM."""


class _Regions:
    """A level of a slide as an array (rows, columns, 3), or (rows, columns) of a grey one."""

    def __init__(self, slide: Any, level: Any) -> None:
        samples = level.default_instance.image_data.samples_per_pixel
        bits = level.default_instance.image_data.bits
        self.shape: tuple[int, ...] = (level.size.height, level.size.width, *([3] if samples > 1 else []))
        self.dtype = np.dtype(np.uint8 if bits <= 8 else np.uint16)
        self._slide, self._level = slide, level.level

    def __getitem__(self, window: tuple[slice, ...]) -> npt.NDArray[Any]:
        rows, columns, *channels = window
        size = columns.stop - columns.start, rows.stop - rows.start
        try:
            region = np.asarray(self._slide.read_region((columns.start, rows.start), self._level, size))
        except _errors() as error:
            raise ValueError(str(error)) from error
        return region[..., channels[0]] if channels else region


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM, or a folder holds DICOM files, one for each level of a slide."""
    if path.is_dir():
        return any(file.suffix.lower() in _SUFFIXES for file in path.iterdir())
    with path.open("rb") as file:
        return file.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"


def open_dicom(path: Path, *, level: int = 0) -> Slide:
    """Open a slide of DICOM files. Errors are those of `open_slide`."""
    try:
        import wsidicom
    except ImportError as error:
        raise CAEConfigurationError(
            f"cae: {path} is DICOM, which wsidicom reads: pip install 'zarr-cae[dicom]'"
        ) from error
    slide = None
    try:
        slide = wsidicom.WsiDicom.open(path)
        return _opened(path, slide, level)
    except BaseException as error:
        if slide is not None:
            slide.close()
        if isinstance(error, (*_errors(), *DAMAGE)) and not isinstance(error, CAEError):
            raise CAEConfigurationError(f"cae: wsidicom can't read a slide from {path}: {error}") from error
        raise


def _opened(path: Path, slide: Any, level: int) -> Slide:
    levels: Sequence[Any] = sorted(slide.levels, key=lambda one: one.level)
    sizes = tuple((one.size.height, one.size.width) for one in levels)
    if not 0 <= level < len(levels):
        listed = ", ".join(f"{index}: {columns} x {rows}" for index, (rows, columns) in enumerate(sizes))
        raise CAEConfigurationError(f"cae: {path} has no level {level}; its levels are {listed}")
    chosen = levels[level]
    metadata = SlideMetadata(
        {"x": (chosen.mpp.width, "micrometer"), "y": (chosen.mpp.height, "micrometer")},
        icc_profile=_profile(slide),
    )
    array = _Regions(slide, chosen)
    rgb = len(array.shape) == 3
    return Slide(path.stem, array, "yxc" if rgb else "yx", rgb, metadata, sizes, close=slide.close)


def _errors() -> tuple[type[Exception], ...]:
    """Return wsidicom's own exceptions, which have no common base."""
    from wsidicom import errors

    return tuple(found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, Exception))


def _profile(slide: Any) -> bytes | None:
    """Return the colour profile of the first optical path that has one."""
    paths = slide.metadata.pyramid.optical_paths
    return next((bytes(one.icc_profile) for one in paths if one.icc_profile), None)
