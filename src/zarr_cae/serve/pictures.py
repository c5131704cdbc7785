"""The pictures of an archive: which arrays can be looked at, their pyramid levels, and tiles of them as PNG."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr
from PIL import Image
from zarr.buffer import cpu

from zarr_cae.errors import CAEConfigurationError, CAEError
from zarr_cae.latents.metadata import ATTRIBUTE
from zarr_cae.latents.store import BottleneckStore, has_latents
from zarr_cae.pixels.layout import RGB
from zarr_cae.serve.cache import ByteLimit

TILE = 256
"""Edge of a tile in pixels of the screen."""
_MOST_REDUCTION = 16
"""For each of its pixels, a tile reads at most 16 x 16 pixels of a stored level."""
_SAMPLE = 256
"""Edge of the window in the middle of an array by which contrast is chosen."""
_BYTES_AT_WORK = 1 << 28
_HEAT = np.array([(49, 54, 149), (116, 173, 209), (247, 247, 247), (244, 109, 67), (165, 0, 38)], np.float64)
"""Colours of low, middle and high latents: ColorBrewer's diverging scheme RdYlBu, with a grey middle."""
_UNWRITTEN = (128, 128, 128)


@dataclass
class Level:
    """An array as a stack of planes."""

    path: str
    array: zarr.Array[Any]
    rows: int
    columns: int
    """The axes of rows and columns."""
    channels: int | None = None
    """The axis along which all of a pixel's values are shown as its colour."""
    contrast: dict[tuple[int, ...], tuple[float, float]] = field(default_factory=dict)
    """Lowest and highest value to show, by the positions along the other axes."""

    @property
    def height(self) -> int:
        """Length of the axis of rows."""
        return self.array.shape[self.rows]

    @property
    def width(self) -> int:
        """Length of the axis of columns."""
        return self.array.shape[self.columns]

    @property
    def other_axes(self) -> list[int]:
        """Axes along which one position is shown at a time."""
        return [axis for axis in range(self.array.ndim) if axis not in (self.rows, self.columns, self.channels)]

    async def read(self, rows: slice, columns: slice, positions: Sequence[int]) -> npt.NDArray[Any]:
        """Read a window (rows, columns) or (rows, columns, 3) at positions along the other axes."""
        window: list[Any] = [slice(None)] * self.array.ndim
        window[self.rows], window[self.columns] = rows, columns
        for axis, position in zip(self.other_axes, positions, strict=True):
            window[axis] = position
        values = np.asarray(await self.array.async_array.getitem(tuple(window), prototype=cpu.buffer_prototype))
        left = [axis for axis in range(self.array.ndim) if axis not in self.other_axes]
        order = [self.rows, self.columns] + ([] if self.channels is None else [self.channels])
        return values.transpose([left.index(axis) for axis in order])

    async def range_of_values(self, positions: Sequence[int]) -> tuple[float, float]:
        """Return the lowest and highest value to show, from the middle of the array."""
        key = tuple(positions)
        if key not in self.contrast:
            middle = [
                slice(max(0, (length - _SAMPLE) // 2), (length + _SAMPLE) // 2) for length in (self.height, self.width)
            ]
            values = (await self.read(middle[0], middle[1], positions)).astype(np.float64)
            values = values[np.isfinite(values)]
            low, high = np.percentile(values, (0.5, 99.5)) if values.size else (0.0, 1.0)
            if len(self.contrast) > 10_000:
                self.contrast.clear()
            self.contrast[key] = float(low), float(high if high > low else low + 1)
        return self.contrast[key]


@dataclass
class Picture:
    """Levels of one image, the finest first, and its latents if it has any."""

    name: str
    levels: list[Level]
    latents: Level | None

    def stored_level(self, scale: int) -> int:
        """Return the level to read for tiles in which a pixel stands for 2^scale pixels of the finest level."""
        finest = self.levels[0]
        fits = [
            i for i, level in enumerate(self.levels)
            if max(finest.height / level.height, finest.width / level.width) <= 2**scale * 1.02
        ]  # fmt: skip
        return max(fits, default=0)

    @property
    def most_scale(self) -> int:
        """The scale of the coarsest tiles: where the picture fits into one tile, or as far as levels allow."""
        finest, coarsest = self.levels[0], self.levels[-1]
        reduction = min(finest.height / coarsest.height, finest.width / coarsest.width)
        one_tile = math.ceil(math.log2(max(1, max(finest.height, finest.width) / TILE)))
        return min(one_tile, int(math.log2(reduction * _MOST_REDUCTION)))

    def describe(self) -> dict[str, Any]:
        """Return the description of this picture for the page."""
        finest, scales = self.levels[0], range(self.most_scale + 1)
        latents = self.latents
        return {
            "name": self.name,
            "width": finest.width,
            "height": finest.height,
            "levels": [{"path": level.path, "width": level.width, "height": level.height} for level in self.levels],
            "level_of_scale": [self.stored_level(scale) for scale in scales],
            "axes": _described_axes(finest),
            "latents": None if latents is None else {
                "width": latents.width,
                "height": latents.height,
                "scales": len(_latent_scales(latents)),
                "axes": _described_axes(latents),
            },
        }  # fmt: skip


def _described_axes(level: Level) -> list[dict[str, Any]]:
    names = getattr(level.array.metadata, "dimension_names", None) or [None] * level.array.ndim
    return [
        {"name": names[axis] or f"axis {axis}", "length": level.array.shape[axis]} for axis in level.other_axes
    ]  # fmt: skip


def _latent_scales(level: Level) -> range:
    return range(math.ceil(math.log2(max(1, max(level.height, level.width) / TILE))) + 1)


class Pictures:
    """The pictures in a folder with a Zarr hierarchy, and their tiles.

    Parameters
    ----------
    folder
        The hierarchy. Its metadata are read when an instance is made.

    Raises
    ------
    CAEConfigurationError
        If no array in the hierarchy has rows and columns of pixels.
    """

    def __init__(self, folder: Path) -> None:
        arrays = _arrays(zarr.open(folder, mode="r"))
        view = BottleneckStore(folder)
        self.pictures: list[Picture] = []
        for name, paths, axes in _multiscales(folder, arrays):
            levels = [level for path in paths if (level := _level(path, arrays[path], view, axes)) is not None]
            if levels:
                levels.sort(key=lambda level: -level.width * level.height)
                self.pictures.append(Picture(name, levels, _latents(levels[0].path, view)))
        if not self.pictures:
            raise CAEConfigurationError(f"cae: {folder} has no array with rows and columns of pixels")
        self._limit = ByteLimit(_BYTES_AT_WORK)

    def describe(self) -> list[dict[str, Any]]:
        """Return the descriptions of all pictures for the page."""
        return [picture.describe() for picture in self.pictures]

    async def tile(
        self, picture: int, kind: str, scale: int, column: int, row: int, positions: Sequence[int]
    ) -> bytes | None:
        """Return a tile as PNG; None if there is none at this place.

        Parameters
        ----------
        picture
            Index of the picture.
        kind
            "pixels", or "latents" for a heat map of one latent channel.
        scale
            A pixel of the tile stands for 2^scale pixels (or latent positions) along rows and columns.
        column, row
            The place of the tile, counted from the upper left.
        positions
            One position along each of the axes that `describe` names.
        """
        if not 0 <= picture < len(self.pictures) or kind not in {"pixels", "latents"}:
            return None
        own = self.pictures[picture]
        if kind == "pixels":
            scales = range(own.most_scale + 1)
            level, finest = own.levels[own.stored_level(scale) if scale in scales else 0], own.levels[0]
        elif own.latents is not None:
            scales, level, finest = _latent_scales(own.latents), own.latents, own.latents
        else:
            return None
        lengths = [level.array.shape[axis] for axis in level.other_axes]
        if (
            scale not in scales or len(positions) != len(lengths)
            or any(not 0 <= position < length for position, length in zip(positions, lengths, strict=True))
        ):  # fmt: skip
            return None
        across, down = _span(column, scale, finest.width, level.width), _span(row, scale, finest.height, level.height)
        if across is None or down is None:
            return None
        size = (down.pixels.stop - down.pixels.start) * (across.pixels.stop - across.pixels.start) * RGB * 8
        async with self._limit.holding(size):
            values = await level.read(down.pixels, across.pixels, positions)
            heat = kind == "latents"
            contrast = None
            if heat or values.dtype != np.uint8:
                contrast = await level.range_of_values(positions)
            return await asyncio.to_thread(_png, values, contrast, across, down, heat)


@dataclass(frozen=True)
class _Span:
    """The part of a stored level along one axis that a tile shows."""

    pixels: slice
    box: tuple[float, float]
    """First and last border within `pixels`, in pixels and parts of pixels."""
    size: int
    """Of the tile."""


def _span(tile: int, scale: int, length: int, stored: int) -> _Span | None:
    start, end = tile * TILE << scale, min((tile + 1) * TILE << scale, length)
    if tile < 0 or start >= length:
        return None
    first, last = start * stored / length, end * stored / length
    pixels = slice(int(first), min(stored, math.ceil(last)))
    return _Span(pixels, (first - pixels.start, min(last, pixels.stop) - pixels.start), -(-(end - start) >> scale))


def _png(
    values: npt.NDArray[Any], contrast: tuple[float, float] | None, across: _Span, down: _Span, heat: bool
) -> bytes:
    pixels = values if contrast is None else _bytes_of(values, *contrast)
    if heat:
        scheme = np.linspace(0, 255, len(_HEAT))
        colours = np.stack([np.interp(np.arange(256), scheme, _HEAT[:, i]) for i in range(3)], -1)
        pixels = np.where(np.isnan(values)[..., None], _UNWRITTEN, np.rint(colours)[pixels]).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    box = (across.box[0], down.box[0], across.box[1], down.box[1])
    if (across.size, down.size) != image.size or box != (0, 0, *image.size):
        smaller = across.size <= image.size[0]
        method = Image.Resampling.BOX if smaller else Image.Resampling.NEAREST
        image = image.resize((across.size, down.size), method, box)
    target = io.BytesIO()
    image.save(target, "PNG", compress_level=1)
    return target.getvalue()


def _bytes_of(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint8]:
    scaled = np.nan_to_num((values.astype(np.float32) - low) * (255 / (high - low)))
    result: npt.NDArray[np.uint8] = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    return result


def _arrays(node: zarr.Array[Any] | zarr.Group) -> dict[str, zarr.Array[Any]]:
    if isinstance(node, zarr.Array):
        return {"": node}
    members = sorted(node.members(max_depth=None), key=lambda member: member[0])
    return {path: member for path, member in members if isinstance(member, zarr.Array)}


def _multiscales(folder: Path, arrays: Mapping[str, zarr.Array[Any]]) -> list[tuple[str, list[str], list[str] | None]]:
    """Return name, paths of levels and names of axes of each picture: OME-Zarr multiscales first, then other arrays."""
    result: list[tuple[str, list[str], list[str] | None]] = []
    used: set[str] = set()
    groups = {"/".join(path.split("/")[:end]) for path in arrays if path for end in range(path.count("/") + 1)}
    for group in sorted(groups):
        attributes = zarr.open_group(folder, path=group, mode="r").attrs.asdict()
        for paths, axes in _levels_of(attributes):
            found = [f"{group}/{path}".lstrip("/") for path in paths]
            found = [path for path in found if path in arrays and path not in used]
            used |= set(found)
            if found:
                result.append((group or folder.stem, found, axes))
    result += [(path or folder.stem, [path], None) for path in arrays if path not in used]
    return result


def _levels_of(attributes: Mapping[str, Any]) -> list[tuple[list[str], list[str] | None]]:
    """Return paths of levels and names of axes for each of a group's OME-Zarr multiscales; none if malformed."""
    try:
        scales = attributes.get("ome", attributes).get("multiscales", [])
        return [
            (
                [str(level["path"]) for level in scale["datasets"]],
                [str(axis["name"]) for axis in scale["axes"]] if "axes" in scale else None,
            )
            for scale in scales
        ]
    except (AttributeError, KeyError, TypeError):
        return []  # then the arrays are shown one by one


def _level(path: str, array: zarr.Array[Any], view: BottleneckStore, names: list[str] | None) -> Level | None:
    """Return an array as a level; None if it has no rows and columns of numbers."""
    if array.ndim < 2 or array.dtype.kind not in "uifb" or 0 in array.shape:
        return None
    latents = _opened(path, view)
    if latents is not None:
        described = cast("dict[str, Any]", latents.attrs[ATTRIBUTE])
        roles = described["axes"]
        channels = roles.index("latents") if described["planes"] == "rgb" else None
        return Level(path, array, roles.index("rows"), roles.index("columns"), channels)
    if names is not None and len(names) == array.ndim and {"y", "x"} <= set(names):
        rows, columns = names.index("y"), names.index("x")
        channels = names.index("c") if "c" in names and array.shape[names.index("c")] == RGB else None
        return Level(path, array, rows, columns, channels)
    if array.ndim > 2 and array.shape[-1] == RGB:
        return Level(path, array, array.ndim - 3, array.ndim - 2, array.ndim - 1)
    return Level(path, array, array.ndim - 2, array.ndim - 1)


def _latents(path: str, view: BottleneckStore) -> Level | None:
    array = _opened(path, view)
    if array is None:
        return None
    roles = cast("dict[str, Any]", array.attrs[ATTRIBUTE])["axes"]
    return Level(path, array, roles.index("rows"), roles.index("columns"))


def _opened(path: str, view: BottleneckStore) -> zarr.Array[Any] | None:
    """Return the latents of an array; None if it has none, or they can't be served."""
    try:
        array = zarr.open_array(view, path=path, mode="r")
    except CAEError:
        return None
    return array if has_latents(array) else None
