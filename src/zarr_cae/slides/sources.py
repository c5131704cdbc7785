"""Open any image as a `Slide`: its axes in the order of OME-Zarr, windows of it read as they are asked for.

| file | read by | extra |
|---|---|---|
| TIFF: OME-TIFF, SVS, NDPI, COG, BigTIFF ... | tifffile and imagecodecs, `zarr_cae.slides.tiff` | `slides` |
| MRXS, VSI, SCN and the other formats of OpenSlide | OpenSlide, `zarr_cae.slides.openslides` | `openslide` |
| DICOM whole slide images: a folder of `.dcm` files, or one | wsidicom, `zarr_cae.slides.dicoms` | `dicom` |
| zarr and OME-Zarr arrays, `.npy` | zarr, NumPy | |
| other images | Pillow; imagecodecs for 16-bit colour, `zarr_cae.slides.pictures` | |

All but the last are read window by window. Pillow decodes the whole picture.
"""

from __future__ import annotations

import asyncio
import math
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from tokenize import TokenError
from typing import Any, Protocol

import numpy as np

from zarr_cae.errors import CAEConfigurationError, CAEDataError, CAEError
from zarr_cae.pixels.layout import Pixels
from zarr_cae.slides.metadata import SlideMetadata, unit_name

__all__ = ["DAMAGE", "CachedRows", "Sliceable", "Slide", "open_slide"]

_ORDER = "tczyx"
_TIFF_MAGIC = {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}
_OPENSLIDE = {".mrxs", ".vms", ".vmu", ".vsi", ".czi", ".svslide", ".zvi"}
DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError,
    ValueError, struct.error, zlib.error,
)  # fmt: skip
"""Exceptions, besides OSError, that the readers of file formats raise for damaged files."""
_CACHED_BYTES = 512 << 20
_BLOCK_BYTES = 32 << 20


class Sliceable(Protocol):
    """An array of which windows are read: of NumPy, of zarr or of this package."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples."""

    def __getitem__(self, window: tuple[slice, ...]) -> Any: ...


@dataclass(frozen=True)
class Slide:
    """An image whose axes are some of "tczyx", in this order, with "y" and "x" last.

    Attributes
    ----------
    name
        Name of the image, from its file.
    array
        The pixels, with axes in the order of `stored`.
    stored
        An axis of "tczyx" for each axis of `array`; "-" for an axis of length 1 that is dropped.
    rgb
        Whether axis "c" holds red, green and blue.
    metadata
        Metadata of the pixels, from the file.
    levels
        Rows and columns of the image and of the smaller copies that the file holds.
    by_rows
        Whether the file stores whole rows together, so that a window costs as much to read as all of its rows.
    orientation
        The orientation tag of TIFF and EXIF, 1 to 8. Windows are those of the upright image.
    plain
        Whether samples are grey or RGB values; not indices of a palette, CMYK, single bits or inverted grey values.
    close
        Closes the file.
    path
        The file or folder, as `open_slide` got it.
    """

    name: str
    array: Sliceable
    stored: str
    rgb: bool = False
    metadata: SlideMetadata = field(default_factory=SlideMetadata)
    levels: tuple[tuple[int, int], ...] = ()
    by_rows: bool = False
    orientation: int = 1
    plain: bool = True
    close: Callable[[], None] = lambda: None
    path: Path | None = None

    @property
    def axes(self) -> str:
        """The axes, some of "tczyx" in this order."""
        return "".join(axis for axis in _ORDER if axis in self.stored)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples, in the byte order of this machine."""
        return self.array.dtype.newbyteorder("=")

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each of `axes`, of the upright image."""
        lengths = dict(zip(self.stored, self.array.shape, strict=True))
        if self.orientation >= 5:
            lengths["y"], lengths["x"] = lengths["x"], lengths["y"]
        return tuple(lengths[axis] for axis in self.axes)

    def read(self, window: Sequence[slice]) -> Pixels:
        """Return the pixels of a window: a slice with start and stop for each of `axes`."""
        wanted = dict(zip(self.axes, window, strict=True))
        lengths = dict(zip(self.axes, self.shape, strict=True))
        flip_rows, flip_columns = self.orientation in {3, 4, 7, 8}, self.orientation in {2, 3, 6, 7}
        if flip_rows:
            wanted["y"] = _mirrored(wanted["y"], lengths["y"])
        if flip_columns:
            wanted["x"] = _mirrored(wanted["x"], lengths["x"])
        if self.orientation >= 5:
            wanted["y"], wanted["x"] = wanted["x"], wanted["y"]
        selection = tuple(wanted.get(axis, slice(0, 1)) for axis in self.stored)
        try:
            pixels = read_window(self.array, selection)
        except (CAEError, OSError):
            raise
        except DAMAGE as error:
            place = ", ".join(f"{axis} {part.start}:{part.stop}" for axis, part in zip(self.axes, window, strict=True))
            raise CAEDataError(
                f"cae: {self.path or self.name} can't be read at {place}; is it damaged? {type(error).__name__}: "
                f"{error}"
            ) from error
        kept = [axis for axis in self.stored if axis != "-"]
        pixels = pixels.reshape([n for n, axis in zip(pixels.shape, self.stored, strict=True) if axis != "-"])
        pixels = pixels.transpose([kept.index(axis) for axis in self.axes])
        if self.orientation >= 5:
            pixels = pixels.swapaxes(-1, -2)
        pixels = pixels[..., :: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return np.ascontiguousarray(pixels, self.dtype)


def _mirrored(window: slice, length: int) -> slice:
    return slice(length - window.stop, length - window.start)


class CachedRows:
    """An array that reads whole rows, many at a time, and keeps them for the next windows.

    It is for files that store whole rows together, such as TIFF files of strips. Without it, each window would decode
    its rows again.
    """

    def __init__(self, array: Sliceable, rows: int, columns: int, chunk_rows: int) -> None:
        self.shape, self.dtype = array.shape, array.dtype
        self._array, self._rows, self._columns = array, rows, columns
        per_row = array.dtype.itemsize * math.prod(array.shape) // array.shape[rows]
        self._step = max(1, _BLOCK_BYTES // max(1, per_row * chunk_rows)) * chunk_rows
        self._kept: OrderedDict[tuple[Any, ...], Pixels] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, window: tuple[slice, ...]) -> Pixels:
        rows = window[self._rows]
        parts = []
        for start in range(rows.start // self._step * self._step, rows.stop, self._step):
            stop = min(start + self._step, self.shape[self._rows])
            inside = [slice(0, n) for n in window_lengths(window)]
            inside[self._rows] = slice(max(rows.start, start) - start, min(rows.stop, stop) - start)
            inside[self._columns] = window[self._columns]
            parts.append(self._block(window, start, stop)[tuple(inside)])
        return np.concatenate(parts, axis=self._rows)

    def _block(self, window: tuple[slice, ...], start: int, stop: int) -> Pixels:
        whole = list(window)
        whole[self._rows], whole[self._columns] = slice(start, stop), slice(0, self.shape[self._columns])
        key = tuple((part.start, part.stop) for part in whole)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            block = read_window(self._array, tuple(whole))
            self._kept[key] = block
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _CACHED_BYTES:
                self._kept.popitem(last=False)
            return block


def read_window(array: Sliceable, window: tuple[slice, ...]) -> Pixels:
    """Return a window of an array.

    A zarr array is read in an event loop of its own. In zarr's loop, the other chunks of a window would still be read
    after an error of one, and asyncio would report them when the process ends.
    """
    import zarr

    if not isinstance(array, zarr.Array):
        return np.asarray(array[window])
    with ThreadPoolExecutor(1, thread_name_prefix="cae-read") as thread:  # this one may have a running loop
        return np.asarray(thread.submit(asyncio.run, array.async_array.getitem(window)).result())


def window_lengths(window: Sequence[slice]) -> list[int]:
    """Return the length of each slice of a window."""
    return [part.stop - part.start for part in window]


def open_slide(path: Path, *, series: int | None = None, level: int = 0) -> Slide:
    """Open an image file or a zarr array.

    Parameters
    ----------
    path
        The file, the folder of a zarr hierarchy (also of an array inside one: `OUT.zarr/0`), or a folder of DICOM
        files.
    series
        Number of the image in a file that holds several. By default the only image, or the one of which all others are
        smaller copies, labels or thumbnails. A file with further images is refused.
    level
        Number of the level in a pyramid; 0 is the largest.

    Raises
    ------
    CAEConfigurationError
        If no reader knows the file, a library that reads it is not installed (the error names the extra), or there is
        no such series or level. OSError if the file can't be read.
    """
    return replace(_opened(path, series, level), path=path)


def _opened(path: Path, series: int | None, level: int) -> Slide:
    from zarr_cae.slides.dicoms import is_dicom, open_dicom

    suffix = path.suffix.lower()
    if path.exists() and is_dicom(path):
        return open_dicom(path, level=level)
    if (path.is_dir() and suffix != ".mrxs") or any(part.endswith(".zarr") for part in path.parts):
        from zarr_cae.slides.arrays import open_zarr

        return open_zarr(path, level=level)
    if not path.is_file():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if not path.stat().st_size:
        raise CAEConfigurationError(f"cae: {path} is empty: it has no bytes")
    if suffix == ".npy":
        return _open_npy(path)
    if suffix in _OPENSLIDE:
        from zarr_cae.slides.openslides import open_with_openslide

        return open_with_openslide(path, level=level)
    if is_tiff(path):
        from zarr_cae.slides.tiff import open_tiff

        return open_tiff(path, series=series, level=level)
    if level:
        raise CAEConfigurationError(f"cae: {path} is not a pyramid, so it has no level {level}")
    from zarr_cae.slides.pictures import open_picture

    return open_picture(path)


def is_tiff(path: Path) -> bool:
    """Return whether a file is a TIFF, by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) in _TIFF_MAGIC


def _open_npy(path: Path) -> Slide:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OverflowError, TypeError, TokenError) as error:
        raise CAEConfigurationError(f"cae: {path} is not a .npy file of numbers, or damaged: {error}") from error
    stored, rgb = guessed_axes(array.shape, path)
    return Slide(path.stem, array, stored, rgb)


def guessed_axes(shape: Sequence[int], path: Path) -> tuple[str, bool]:
    """Return the axes of an array that does not name them, and whether "c" is RGB: (..., y, x) or (..., y, x, 3)."""
    rgb = len(shape) >= 3 and shape[-1] == 3
    spatial = "yxc" if rgb else "yx"
    before = len(shape) - len(spatial)
    others = ["", "z", "tz"] if rgb else ["", "z", "cz", "tcz"]
    if len(shape) < 2 or before >= len(others):
        raise CAEConfigurationError(
            f"cae: {path} has an array of shape {tuple(shape)}; expected (y, x), (z, y, x), (c, z, y, x), "
            "(t, c, z, y, x), or (y, x, 3), (z, y, x, 3), (t, z, y, x, 3)"
        )
    return others[before] + spatial, rgb


def with_unit(sizes: dict[str, tuple[float, str]], axis: str, size: object, unit: str) -> None:
    """Add the size of a pixel along an axis, if it is a positive number of a known unit."""
    name = unit_name(unit)
    try:
        number = float(str(size))
    except ValueError:
        return
    if name is not None and math.isfinite(number) and number > 0:
        sizes[axis] = number, name
