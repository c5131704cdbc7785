"""Decide how a slide is converted: levels, grid, codecs and metadata, from the slide and the user's choices."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr

from zarr_cae.config import process_settings
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.slides.background import WritingCodec
from zarr_cae.slides.journal import flush
from zarr_cae.slides.metadata import SlideMetadata
from zarr_cae.slides.ome import attributes, source_attributes
from zarr_cae.slides.pyramid import Block, Downsample, Pyramid, level_sizes
from zarr_cae.slides.sources import Slide, open_slide

__all__ = ["Choices", "Conversion", "array_options", "create", "prepare", "source_state"]

_BLOCK = 4096


@dataclass(frozen=True)
class Choices:
    """How a slide is to be converted.

    Attributes
    ----------
    qualities
        Quality of level 0, of level 1 and so on. The last one is that of all further levels.
    metric, model, weights
        As in `CAECodec`.
    chunks, shards
        Rows and columns of a chunk and of a shard; no shards if `shards` is None.
    levels
        Number of levels. None: as many as halve the image until it fits into a chunk.
    downsample
        "mean" or "nearest".
    value_range
        Lowest and highest value. None: 0 to 255 for uint8, and what the file says for other dtypes.
    series, level
        Which image of the file, and which of its levels becomes level 0.
    values
        Further parameters of `CAECodec`: nodata, min_psnr and value_transform.
    """

    qualities: tuple[int, ...] = (8,)
    metric: str = "mse"
    model: str | None = None
    weights: str | None = None
    chunks: tuple[int, int] = (512, 512)
    shards: tuple[int, int] | None = (4096, 4096)
    levels: int | None = None
    downsample: Downsample = "mean"
    value_range: tuple[float, float] | None = None
    series: int | None = None
    level: int = 0
    values: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def nodata(self) -> float | None:
        """The value of pixels without data; None if all have data."""
        value = self.values.get("nodata")
        return float(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Conversion:
    """All that a process needs to convert any block of a slide."""

    source: Path
    choices: Choices
    axes: str
    shape: tuple[int, ...]
    dtype: str
    rgb: bool
    by_rows: bool
    pyramid: Pyramid
    value_range: tuple[float, float]
    fill_value: float
    state: dict[str, int] = field(default_factory=dict, hash=False)
    """Size of the source and when it was last modified, as `source_state` returns them."""
    weights: tuple[str, ...] = ()
    """Digest of the weights of each quality of `choices`."""
    metadata: SlideMetadata = field(default_factory=SlideMetadata, hash=False)
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def settings(self) -> dict[str, Any]:
        """The source and the settings that must be the same for a conversion to go on, as JSON values."""
        effort = process_settings().effort  # workers of a cluster have settings of their own
        return {
            "source": str(self.source.absolute()),
            **self.state,
            **{name: value for name, value in asdict(self.choices).items() if name != "values" or value},
            "shape": self.shape,
            "dtype": self.dtype,
            "value_range": self.value_range,
            "weights": self.weights,
            "effort": effort,
        }

    @property
    def megapixels(self) -> float:
        """Pixels of all levels and planes, in millions. Red, green and blue together count as one pixel."""
        return math.prod(self.pyramid.planes) * sum(rows * columns for rows, columns in self.pyramid.sizes) / 1e6

    @property
    def channels(self) -> int:
        """How many samples of a pixel are coded together: 3 for RGB, else 1."""
        return self.shape[self.axes.index("c")] if self.rgb else 1

    def window(self, block: Block) -> tuple[slice, ...]:
        """Return the window of a block in its level's array: a slice for each axis."""
        rows, columns = self.pyramid.window(block)
        planes = iter(block.plane)
        leading = []
        for axis in self.axes[:-2]:
            if axis == "c" and self.rgb:
                leading.append(slice(0, self.channels))
            else:
                index = next(planes)
                leading.append(slice(index, index + 1))
        return (*leading, rows, columns)


def prepare(source: Path, choices: Choices) -> Conversion:
    """Open a slide and decide how it is converted. Of its pixels, only the corners are read.

    Raises
    ------
    CAEConfigurationError
        If the file can't be read (see `open_slide`), or the choices do not fit it.
    """
    slide = open_slide(source, series=choices.series, level=choices.level)
    try:
        if math.prod(slide.shape) == 0:
            raise CAEConfigurationError(f"cae: {source} has no pixels: its shape is {slide.shape}")
        rows, columns = slide.shape[-2:]
        sizes = tuple(level_sizes(rows, columns, max(choices.chunks), choices.levels))
        planes = tuple(
            length for axis, length in zip(slide.axes, slide.shape, strict=True)
            if axis not in "yx" and not (axis == "c" and slide.rgb)
        )  # fmt: skip
        value_range = _value_range(slide, choices.value_range)
        codecs = [_codec(choices, quality, slide, value_range) for quality in choices.qualities]
        return Conversion(
            source,
            choices,
            slide.axes,
            slide.shape,
            slide.dtype.str,
            slide.rgb,
            slide.by_rows,
            Pyramid(sizes, planes, _edge(choices)),
            value_range,
            _background(slide, value_range) if choices.nodata is None else choices.nodata,
            source_state(source),
            tuple(codec.weights for codec in codecs),
            slide.metadata,
            attributes(
                slide.name, slide.axes, slide.shape, len(sizes), slide.metadata, rgb=slide.rgb, dtype=slide.dtype,
                value_range=value_range, downsample=choices.downsample,
            ),
        )  # fmt: skip
    finally:
        slide.close()


def source_state(source: Path) -> dict[str, int]:
    """Return the size of a source in bytes, and when it was last modified, in nanoseconds.

    Either differs if the source was changed. The files in a folder count together. So do an MRXS file and the files in
    the folder beside it.
    """
    folder = source.with_suffix("") if source.suffix.lower() == ".mrxs" else source
    files = [source] if source.is_file() else []
    files += [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    states = [path.stat() for path in files]
    return {
        "size": sum(state.st_size for state in states),
        "modified": max((state.st_mtime_ns for state in states), default=0),
    }


def _edge(choices: Choices) -> tuple[int, int]:
    """Return rows and columns of a block: a shard, or as many chunks as fit into 4096 pixels."""
    if choices.shards is not None:
        for shard, chunk in zip(choices.shards, choices.chunks, strict=True):
            if shard % chunk or shard % 2:
                raise CAEConfigurationError(
                    f"cae: shards {choices.shards} must be even numbers and multiples of the chunks {choices.chunks}"
                )
        return choices.shards
    rows, columns = (chunk * max(1, _BLOCK // chunk) for chunk in choices.chunks)
    return rows * (1 + rows % 2), columns * (1 + columns % 2)


def _value_range(slide: Slide, chosen: tuple[float, float] | None) -> tuple[float, float]:
    if chosen is not None:
        return chosen
    if slide.dtype == np.uint8:
        return 0, 255
    if slide.metadata.value_range is not None:
        return slide.metadata.value_range
    if slide.dtype == np.uint16:
        return 0, 65535
    raise CAEConfigurationError(
        f"cae: {slide.name} has dtype {slide.dtype}; give the lowest and highest value that it holds, as "
        "--value-range LO,HI"
    )


def _background(slide: Slide, value_range: tuple[float, float]) -> float:
    """Return the fill value: the highest value if the four corners of an RGB image are bright, else the lowest.

    Chunks that are all fill value are not stored, and incomplete chunks at the edges are filled up with it.
    """
    low, high = value_range
    dark = min(max(0, low), high)
    if not slide.rgb:
        return dark
    rows, columns = slide.shape[-2:]
    leading = [slice(0, n if axis == "c" else 1) for axis, n in zip(slide.axes[:-2], slide.shape[:-2], strict=True)]
    ends = [(slice(0, min(32, n)), slice(max(0, n - 32), n)) for n in (rows, columns)]
    corners = [slide.read((*leading, row, column)) for row in ends[0] for column in ends[1]]
    middle = np.median([float(np.mean(corner)) for corner in corners])
    return high if middle > (low + high) / 2 else dark


def _codec(choices: Choices, quality: int, slide: Slide, value_range: tuple[float, float]) -> WritingCodec:
    given: dict[str, Any] = choices.values | ({} if choices.model is None else {"model": choices.model})
    codec: WritingCodec = WritingCodec(
        quality,
        metric=cast("Any", choices.metric),
        weights=choices.weights,
        channel_axis=slide.axes.index("c") - len(slide.axes) if slide.rgb else None,
        value_range=None if slide.dtype == np.uint8 and value_range == (0, 255) else value_range,
        **given,
    )
    return codec


def array_options(conversion: Conversion, level: int) -> dict[str, Any]:
    """Return the arguments of `zarr.create_array` for a level, without those that say where it is stored."""
    choices, sizes = conversion.choices, conversion.pyramid.sizes[level]
    place = min(level, len(choices.qualities) - 1)
    slide = Slide("", np.empty((0,) * len(conversion.axes), conversion.dtype), conversion.axes, conversion.rgb)
    codec = _codec(
        replace(choices, weights=conversion.weights[place]), choices.qualities[place], slide, conversion.value_range
    )
    leading = [conversion.channels if axis == "c" else 1 for axis in conversion.axes[:-2]]
    chunks = choices.chunks
    shards = None
    if choices.shards is not None:
        pairs = zip(sizes, chunks, choices.shards, strict=True)
        shards = (*leading, *(min(shard, -(-length // chunk) * chunk) for length, chunk, shard in pairs))
    return {
        "shape": (*conversion.shape[:-2], *sizes),
        "dtype": conversion.dtype,
        "chunks": (*leading, *chunks),
        "shards": shards,
        "serializer": codec,
        "filters": None,
        "compressors": None,
        "fill_value": conversion.fill_value,
        "dimension_names": tuple(conversion.axes),
    }


def create(conversion: Conversion, out: Path) -> None:
    """Write the metadata of a pyramid: the group and the array of every level.

    Another thread writes them. After Ctrl-C it ends its work before this function returns, so that the files can be
    removed.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="cae-create") as thread:
        thread.submit(_create, conversion, out).result()


def _create(conversion: Conversion, out: Path) -> None:
    group = zarr.create_group(out, attributes=conversion.attributes, overwrite=True)
    for level in range(len(conversion.pyramid.sizes)):
        kept = source_attributes(conversion.metadata, level)
        group.create_array(str(level), attributes=kept, **array_options(conversion, level))
    flush(out.rglob("zarr.json"), out)
