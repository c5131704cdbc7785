"""Write arrays into a Zarr hierarchy: choose chunk grids, bound memory, leave nothing half-written."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import numpy as np

from zarr_cae.cli.arguments import note, progress, refuse
from zarr_cae.cli.images import RGBA, Source, refusing_damage
from zarr_cae.pixels.layout import Layout, resolve_channel_axis
from zarr_cae.slides.sources import read_window

if TYPE_CHECKING:
    import zarr
    from tqdm import tqdm

    from zarr_cae.codec.cae import CAECodec

DEFAULT_CHUNK = 256
_SLAB_SAMPLES = 1 << 23
"""Samples read from the source and handed to zarr at a time, if chunks and shards are not larger."""
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} MP [{elapsed}<{remaining}, {rate_noinv_fmt}]"
_CONCURRENCY = 64
"""Chunks that zarr codes at a time: as many as fill a batch of the network."""


@dataclass(frozen=True)
class Options:
    """The options by which an array is encoded."""

    quality: int = 8
    metric: Literal["mse", "ms-ssim"] = "mse"
    model: str = "cae-v1"
    weights: str | None = None
    chunks: tuple[int, int] = (DEFAULT_CHUNK, DEFAULT_CHUNK)
    shards: tuple[int, int] | None = None
    channel_axis: int | str | None = "auto"
    value_range: tuple[float, float] | None = None
    colour: tuple[int, ...] | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    """Further parameters of `CAECodec`: nodata, min_psnr, value_transform."""


@dataclass(frozen=True)
class NewArray:
    """One array to write: its source, codec and grid."""

    source: Source
    codec: CAECodec
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    fill_value: float
    dimension_names: tuple[str | None, ...]
    megapixels: float


def new_array(source: Source, options: Options) -> NewArray:
    """Choose codec, grid and fill value. Raise CAEConfigurationError if the array can't be encoded."""
    from zarr_cae.slides.background import WritingCodec

    wanted = source.channel_axis if options.channel_axis == "auto" else options.channel_axis
    names, colour = source.dimension_names, options.colour
    axis = resolve_channel_axis(source.shape, wanted, colour=colour is not None)
    if colour is None and axis is not None and names is not None and names[axis] == RGBA:
        colour = (0, 1, 2)
    layout = Layout(source.shape, axis, colour)
    if math.prod(source.shape) == 0:
        refuse(f"{source.name} has no pixels: its shape is {source.shape}")
    value_range = _value_range(source, options.value_range)
    codec: CAECodec = WritingCodec(
        options.quality,
        metric=options.metric,
        model=options.model,
        weights=options.weights or "",
        channel_axis=axis,
        value_range=value_range,
        colour=cast("Any", colour),
        **options.values,
    )
    chunks, shards = _grid(layout, options.chunks, options.shards)
    low, high = value_range if value_range is not None else (0, 255)
    if names is None:
        own = dict(zip(layout.spatial_axes, "yx", strict=True))
        names = tuple("c" if i == axis else own.get(i) for i in range(len(source.shape)))
    megapixels = math.prod(source.shape) / layout.channels / 1e6
    nodata = options.values.get("nodata")
    fill_value = min(max(0, low), high) if nodata is None else float(nodata) if isinstance(nodata, str) else nodata
    return NewArray(source, codec, chunks, shards, fill_value, names, megapixels)


def _value_range(source: Source, chosen: tuple[float, float] | None) -> tuple[float, float] | None:
    if chosen is not None or source.dtype == np.uint8:
        return chosen
    if source.value_range is not None:
        return source.value_range
    if source.dtype == np.uint16:
        note(f"{source.name} is uint16, coded as values from 0 to 65535; give --value-range 0,4095 if it has 12 bits")
        return 0, 65535
    if source.dtype.kind not in "uif":
        refuse(f"{source.name} has dtype {source.dtype}, which can't be coded; expected integers or floats")
    return refuse(f"{source.name} has dtype {source.dtype}; give --value-range LO,HI, the lowest and highest it holds")


def _grid(
    layout: Layout, chunks: tuple[int, int], shards: tuple[int, int] | None
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the shapes of chunks and shards: no larger than the image, with all channels, and 1 along other axes."""
    sides = [1] * len(layout.shape)
    if layout.channel_axis is not None:
        sides[layout.channel_axis] = layout.channels
    outer = list(sides)
    for place, axis in enumerate(layout.spatial_axes):
        length = layout.shape[axis]
        sides[axis] = min(chunks[place], length)
        if shards is not None:
            if shards[place] % chunks[place]:
                refuse(f"--shards {shards[0]},{shards[1]} is not a multiple of --chunks {chunks[0]},{chunks[1]}")
            outer[axis] = min(shards[place], -(-length // sides[axis]) * sides[axis])
    return tuple(sides), None if shards is None else tuple(outer)


def slabs(shape: tuple[int, ...], block: tuple[int, ...], samples: int = _SLAB_SAMPLES) -> Iterator[tuple[slice, ...]]:
    """Yield windows that cover an array: whole blocks, as many along the last axes as fit `samples`, at least one."""
    steps = list(block)
    for axis in reversed(range(len(shape))):
        others = math.prod(steps) // steps[axis]
        steps[axis] = min(max(1, samples // (others * block[axis])) * block[axis], shape[axis])
        if steps[axis] < shape[axis]:
            break
    starts = [range(0, length, step) for length, step in zip(shape, steps, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(a, min(a + s, n)) for a, s, n in zip(corner, steps, shape, strict=True))


def write(arrays: Iterable[NewArray], path: Path, megapixels: float, *, group: bool) -> None:
    """Encode one array at the root of `path`, or several as members of a group; `megapixels` is for the progress bar.

    It has an event loop of its own, so that Ctrl-C stops all work before it returns.
    """
    with many_chunks_at_once(), pixel_bar(megapixels, "encode") as bar:
        asyncio.run(_write(arrays, path, bar.update, group=group))


def many_chunks_at_once() -> AbstractContextManager[object]:
    """Let zarr code enough chunks at a time to fill the network's batches; its own default is ten."""
    import zarr

    concurrency = max(_CONCURRENCY, zarr.config.get("async.concurrency"))
    return cast("AbstractContextManager[object]", zarr.config.set({"async.concurrency": concurrency}))


@contextmanager
def pixel_bar(megapixels: float, text: str) -> Iterator[tqdm[NoReturn]]:
    """Yield a progress bar of megapixels with speed and time left. Its clock runs also while nothing is complete."""
    with progress(megapixels, "MP", text, bar_format=_BAR) as bar:
        end = Event()

        def tick() -> None:
            while not end.wait(1):
                bar.refresh()

        clock = Thread(target=tick, name="cae-progress", daemon=True)
        if not bar.disable:
            clock.start()
        try:
            yield bar
        finally:
            end.set()
            if not bar.disable:
                clock.join()


async def _write(arrays: Iterable[NewArray], path: Path, advance: Callable[[float], object], *, group: bool) -> None:
    import zarr.api.asynchronous

    if group:
        await zarr.api.asynchronous.create_group(store=path)
    for item in arrays:
        try:
            await _write_one(item, path, advance, group=group)
        finally:
            item.source.close()


async def _write_one(item: NewArray, path: Path, advance: Callable[[float], object], *, group: bool) -> None:
    import zarr.api.asynchronous

    from zarr_cae.slides.background import begin

    source = item.source
    array = await zarr.api.asynchronous.create_array(
        store=path,
        name=source.name if group else None,
        shape=source.shape,
        dtype=source.dtype,
        chunks=item.chunks,
        shards=item.shards,
        serializer=item.codec,
        filters=None,
        compressors=None,
        fill_value=item.fill_value,
        dimension_names=item.dimension_names,
        attributes=dict(item.source.attributes),
    )
    for window in slabs(source.shape, item.shards or item.chunks):
        with refusing_damage(str(source.path or source.name)):
            pixels = read_window(source.array, window)
        count_rest = begin(pixels.size, lambda samples: advance(item.megapixels * samples / math.prod(source.shape)))
        await array.setitem(window, pixels)
        count_rest()


def stored_bytes(array: zarr.Array[Any]) -> int:
    """Return the bytes of an array's chunks in its store, without its metadata and embedded weights."""
    store, folder = array.store_path.store, array.store_path.path

    async def total() -> int:
        size = await store.getsize_prefix(folder)
        for name in ("zarr.json", ".zarray", ".zattrs"):
            key = f"{folder}/{name}" if folder else name
            if await store.exists(key):
                size -= await store.getsize(key)
        embedded = f"{folder}/.cae" if folder else ".cae"
        return size - await store.getsize_prefix(embedded)

    return asyncio.run(total())
