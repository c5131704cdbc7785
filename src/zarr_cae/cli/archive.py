"""`encode`, `decode` and `info`: convert images to Zarr and back, and show the size of an array."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from zarr_cae.cli.arguments import (
    ARRAY_HELP,
    Commands,
    add_effort,
    add_networks,
    add_values,
    channel_axis,
    colour,
    command,
    pair,
    quality,
    refuse,
    values,
    with_effort,
)  # fmt: skip
from zarr_cae.cli.fitting import add_fit, fit_to_images, store_weights
from zarr_cae.cli.images import (
    PAGES,
    RGBA,
    arrays_at,
    megapixels,
    open_array,
    open_source,
    picture,
    picture_format,
    refusing_damage,
    save_picture,
)
from zarr_cae.cli.replacing import create_npy, refuse_inside, replacing, replacing_zarr
from zarr_cae.cli.writing import Options, many_chunks_at_once, new_array, pixel_bar, slabs, stored_bytes, write
from zarr_cae.coder.frame import NO_ERROR
from zarr_cae.errors import CAEConfigurationError, WeightsNotFoundError
from zarr_cae.pixels.layout import Layout, Pixels, resolve_channel_axis
from zarr_cae.weights.registry import family_name, find

if TYPE_CHECKING:
    import zarr

    from zarr_cae.codec.cae import CAECodec

_WINDOW_SAMPLES = 1 << 20
_READ_SAMPLES = 1 << 23
"""Most samples in one window of `decode`, and in all windows that run at once; larger chunks are read whole."""


def add(commands: Commands) -> None:
    """Declare `encode`, `decode` and `info`."""
    parser = command(
        commands, "encode", encode,
        "Encode images into a Zarr array (one image) or a group of arrays named after the files (several). Images are "
        "TIFF files (OME-TIFF, SVS, NDPI and others; extra 'slides'), .npy files, Zarr arrays and OME-Zarr images, and "
        "all that Pillow reads: PNG, JPEG and others. Colour images become RGB, or RGBA if there are transparent "
        "pixels. 16-bit images stay uint16. Further frames, planes and channels become further axes.",
    )  # fmt: skip
    parser.add_argument("paths", nargs="+", metavar="PATH", help="IMAGE... OUT.zarr: the images, and last the output")
    parser.add_argument("-q", "--quality", type=quality, default=8, help="1 (smallest) to 8 (best); default 8")
    add_networks(parser)
    add_fit(parser)
    parser.add_argument(
        "--chunks", type=pair, default=(256, 256), metavar="ROWS,COLS",
        help="size of a chunk, or one number for both; default 256",
    )  # fmt: skip
    parser.add_argument(
        "--shards", type=pair, metavar="ROWS,COLS",
        help="size of a shard, a file of many chunks; a multiple of --chunks; default: no shards",
    )  # fmt: skip
    parser.add_argument(
        "--channel-axis", type=channel_axis, default="auto", metavar="N|none|auto",
        help="axis of the colour channels in .npy and .zarr arrays; auto, the default: the last axis if its length is "
        "3",
    )  # fmt: skip
    add_values(parser)
    add_effort(parser)
    parser.add_argument(
        "--colour", type=colour, metavar="R,G,B",
        help="which channels of more than three are coded together as RGB, such as 0,1,2; the default for RGBA",
    )  # fmt: skip
    parser.add_argument("--series", type=int, metavar="N", help="which image of a TIFF file that holds several, from 0")
    parser.add_argument(
        "--level", type=int, default=0, metavar="N", help="which level of a pyramid; default 0, the largest"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.zarr if it exists")
    parser = command(
        commands, "decode", decode,
        "Decode a Zarr array into an image file. The suffix of the file chooses the format: any that Pillow writes; "
        ".tif, which also holds stacks; .ome.tif, which keeps axes, pixel sizes and channel names; or .npy, which "
        "holds arrays of every shape and dtype. An existing file is replaced.",
    )  # fmt: skip
    parser.add_argument("array", type=Path, metavar="OUT.zarr[/ARRAY]", help=ARRAY_HELP)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the file to write")
    parser = command(
        commands, "info", info,
        "Show shape, codec, weights, stored bytes, bits per pixel and compression ratio of a Zarr array, or of all "
        "arrays of a group.",
    )  # fmt: skip
    parser.add_argument("array", type=Path, metavar="OUT.zarr[/ARRAY]", help=ARRAY_HELP)


def encode(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae encode`."""
    *images, out = [Path(path) for path in arguments.paths]
    if not images or out.suffix != ".zarr":
        refuse(f"the last path is the output and ends in .zarr; got {out}")
    options = Options(
        arguments.quality, arguments.metric, arguments.model, arguments.weights, arguments.chunks, arguments.shards,
        arguments.channel_axis, arguments.value_range, arguments.colour, values(arguments),
    )  # fmt: skip
    names = [path.stem for path in images]
    for name, path in zip(names, images, strict=True):
        if name in {".", ".."}:
            refuse(f"{path}: no array can have the name {name!r}; rename the file")
        if names.count(name) > 1:
            others = ", ".join(str(other) for other in images if other.stem == name and other != path) or "itself again"
            refuse(f"{path} and {others} would both become array {name!r}; rename one")
    refuse_inside(out, images)
    chosen = {"series": arguments.series, "level": arguments.level}
    with with_effort(arguments), replacing_zarr(out, overwrite=arguments.overwrite) as partial:
        options = fit_to_images(arguments, options, images)
        arrays = (new_array(open_source(path, **chosen), options) for path in images)
        write(arrays, partial, sum(megapixels(path, **chosen) for path in images), group=len(images) > 1)
        store_weights(partial, arguments)
    print("\n".join(_summary(array) for array in _arrays(out)))


def _summary(array: zarr.Array[Any]) -> str:
    size, pixels = stored_bytes(array), _positions(array)
    name = Path(str(array.store_path).removeprefix("file://"))
    shape = " x ".join(map(str, array.shape))
    ratio = f", 1 : {array.nbytes / size:.1f}" if size else ""
    return f"{name}: {shape} {array.dtype}, {size:,} bytes, {8 * size / pixels:.3f} bpp{ratio}"


def decode(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae decode`."""
    path: Path = arguments.image
    numpy_file = path.suffix.lower() == ".npy"
    name = None if numpy_file else picture_format(path)
    array = open_array(arguments.array)
    if numpy_file:
        with replacing(path) as partial:
            target = create_npy(partial, array.dtype, array.shape)
            _read(array, target)
            cast("np.memmap[Any, Any]", target).flush()
        return
    from zarr_cae.slides.arrays import kept_metadata
    from zarr_cae.slides.ome_tiff import is_ome_tiff

    if is_ome_tiff(path):
        _decode_ome_tiff(array, path)
        return
    stack, page = _picture_axes(array, pages=name in PAGES)
    shape = [array.shape[axis] for axis in page]
    picture(np.empty(shape, array.dtype), path)  # refuse before the work
    pixels = np.empty(array.shape, array.dtype)
    _read(array, pixels)
    first, *further = (
        picture(np.ascontiguousarray(one), path) for one in pixels.transpose(*stack, *page).reshape(-1, *shape)
    )
    save_picture(first, path, name, further=further, metadata=kept_metadata(array.attrs.asdict()))


def _decode_ome_tiff(array: zarr.Array[Any], path: Path) -> None:
    from zarr_cae.slides.arrays import described_array
    from zarr_cae.slides.ome_tiff import write_ome_tiff

    names, metadata = described_array(array)
    axes = "".join(map(str, names))
    if not {"y", "x"} <= set(names) <= set("tczyx"):
        refuse(f"{array.store_path} does not name its axes t, c, z, y and x; write it to .tif or .npy")
    channels = _channel_axis(array)
    rgb = channels is not None and names[channels] == "c" and array.shape[channels] == 3
    pixels = np.empty(array.shape, array.dtype)
    _read(array, pixels)
    with replacing(path) as partial:
        write_ome_tiff(partial, pixels, axes, metadata, rgb=rgb)


def _read(array: zarr.Array[Any], target: Pixels) -> None:
    """Decode an array into another in host memory, piece by piece.

    It has an event loop of its own, so that Ctrl-C stops all work before it returns.
    """
    size = _positions(array) / 1e6
    with many_chunks_at_once(), pixel_bar(size, "decode") as bar:
        asyncio.run(_read_slabs(array, target, lambda samples: bar.update(size * samples / array.size)))


async def _read_slabs(array: zarr.Array[Any], target: Pixels, advance: Callable[[int], object]) -> None:
    """Read small windows, several at a time, so that progress shows each of them and batches are full."""
    from zarr.buffer import cpu

    windows = list(slabs(array.shape, array.chunks, _WINDOW_SAMPLES))
    at_a_time = asyncio.Semaphore(max(1, _READ_SAMPLES // max(1, target[windows[0]].size if windows else 1)))

    async def read(window: tuple[slice, ...]) -> None:
        async with at_a_time:
            with refusing_damage(str(array.store_path)):
                target[window] = await array.async_array.getitem(window, prototype=cpu.buffer_prototype)
            advance(target[window].size)

    await asyncio.gather(*map(read, windows))


def _picture_axes(array: zarr.Array[Any], *, pages: bool) -> tuple[list[int], list[int]]:
    """Return the axes that count pictures (without `pages` of length 1), and those of rows, columns and colours."""
    channels = _channel_axis(array)
    others = [axis for axis in range(array.ndim) if axis != channels]
    colours = [] if channels is None or array.shape[channels] == 1 else [channels]
    names = getattr(array.metadata, "dimension_names", None)
    alpha = bool(colours) and names is not None and names[colours[0]] == RGBA
    pictures = len(others) >= 2 and (pages or all(array.shape[axis] == 1 for axis in others[:-2]))
    if not pictures or (colours and array.shape[colours[0]] != (4 if alpha else 3)):
        refuse(f"an array of shape {array.shape} is not a single grey or RGB picture; write it to .npy")
    page = [*others[-2:], *colours]
    return [axis for axis in range(array.ndim) if axis not in page], page


def info(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae info`."""
    found = _arrays(arguments.array)
    if not found:
        refuse(f"{arguments.array} holds no arrays")
    print("\n\n".join(_describe(array) for array in found))


def _arrays(path: Path) -> list[zarr.Array[Any]]:
    """Return the array at a path, or all arrays of the group there, by name."""
    array, members = arrays_at(path)
    return list(members.values()) if array is None else [array]


def _codec(array: zarr.Array[Any]) -> CAECodec | None:
    from zarr_cae.codec.embedded import codecs_of

    return next(codecs_of(array), None)


def _channel_axis(array: zarr.Array[Any]) -> int | None:
    """Return the channel axis of the codec `cae`, or, for other codecs, the axis by the rule of `auto`."""
    codec = _codec(array)
    wanted = "auto" if codec is None or _transposed(array) else codec.channel_axis
    try:
        return resolve_channel_axis(array.shape, wanted)
    except CAEConfigurationError:
        return None


def _transposed(array: zarr.Array[Any]) -> bool:
    from zarr.codecs import TransposeCodec

    return any(isinstance(codec, TransposeCodec) for codec in getattr(array.metadata, "codecs", ()))


def _positions(array: zarr.Array[Any]) -> int:
    """Return the number of pixels of an array: all channels of a pixel count as one."""
    axis = _channel_axis(array)
    try:
        return max(1, array.size // Layout(array.shape, axis).channels)
    except CAEConfigurationError:
        return max(1, array.size)


def _describe(array: zarr.Array[Any]) -> str:
    codec, size = _codec(array), stored_bytes(array)
    metadata = cast("Any", array.metadata)
    rows = [
        ("shape", " x ".join(map(str, array.shape)) + f" {array.dtype}"),
        ("chunks", " x ".join(map(str, array.chunks))),
        ("shards", "none" if array.shards is None else " x ".join(map(str, array.shards))),
    ]
    if codec is None:
        chain = getattr(metadata, "codecs", None) or [*(metadata.filters or ()), metadata.compressor]
        rows.append(("codecs", ", ".join(type(item).__name__ for item in chain if item is not None)))
    else:
        axis = "none" if codec.channel_axis is None else str(codec.channel_axis)
        axis += "" if codec.colour is None else f", colour {', '.join(map(str, codec.colour))}"
        rows += [
            ("codec", f"cae: {codec.model}, quality {codec.quality}, metric {codec.metric}, channel axis {axis}"),
            ("weights", _weights(codec)),
            ("latents", _latents(array)),
        ]
        values = [] if codec.value_range is None else [f"{codec.value_range[0]} to {codec.value_range[1]}"]
        values += [] if codec.nodata is None else [f"no data: {codec.nodata}"]
        values += [] if codec.value_transform is None else [f"transform: {codec.value_transform}"]
        rows += [("values", ", ".join(values))] if values else []
        rows += _coded(array, codec)
    ratio = f", 1 : {array.nbytes / size:.1f}" if size else ""
    rows.append(("stored", f"{size:,} bytes of {array.nbytes:,}{ratio}"))
    rows.append(("rate", f"{8 * size / _positions(array):.4f} bits per pixel"))
    title = str(array.store_path).removeprefix("file://")
    return "\n".join([title, *(f"  {name:<8} {value}" for name, value in rows)])


def _coded(array: zarr.Array[Any], codec: CAECodec) -> list[tuple[str, str]]:
    """Return how the stored chunks were coded, as far as their headers say."""
    from zarr_cae.codec.census import take_census

    census = take_census(array)
    if census is None or not census.chunks + census.damaged:
        return []
    spread = ", ".join(f"{count:,} at quality {quality}" for quality, count in sorted(census.qualities.items()))
    notes = [f"{census.masked:,} {'padded' if codec.nodata is None else 'with masks'}"] if census.masked else []
    notes += [f"{census.corrected:,} with corrections"] if census.corrected else []
    notes += [] if census.complete else ["the others were not counted"]
    notes += [f"{census.damaged:,} damaged (see `zarr-cae verify`)"] if census.damaged else []
    rows = [("coded", f"{census.chunks:,} chunk{'s' * (census.chunks != 1)}: " + "; ".join([spread, *notes]))]
    if census.exact_tiles:
        rows.append(("exact", f"{census.exact_tiles:,} of {census.tiles:,} tiles, in {census.exact_chunks:,} chunks"))
    if codec.min_psnr is not None:
        lowest = census.lowest_psnr
        found = (
            "not measured" if lowest is None
            else "no loss" if lowest == NO_ERROR else f"{lowest / 100:.2f} dB in the worst chunk"
        )  # fmt: skip
        parts = f"; {census.unmeasured:,} chunks were written in parts" if census.unmeasured else ""
        rows.append(("PSNR", f"{found}, {codec.min_psnr} dB asked for{parts}"))
    return rows


def _latents(array: zarr.Array[Any]) -> str:
    """Return the shape of the latents, or the reason why `open_bottleneck` refuses them."""
    from zarr_cae.latents.store import open_bottleneck

    try:
        latents = cast("zarr.Array[Any]", open_bottleneck(array.store_path))
    except CAEConfigurationError as error:
        return f"none ({str(error).removeprefix('cae: ').partition(';')[0]})"
    return " x ".join(map(str, latents.shape)) + f" {latents.dtype}"


def _weights(codec: CAECodec) -> str:
    from zarr_cae.codec.embedded import is_from_archive

    short = f"{codec.weights[: len('sha256:') + 12]}..."
    try:
        info = find(codec.weights, model=codec.model, quality=codec.quality, metric=codec.metric)
    except WeightsNotFoundError:
        return f"{short}, NOT on this machine: see `zarr-cae weights import`"
    name = family_name(codec.weights)
    place = "in the archive" if is_from_archive(info) else "on this machine"
    return f"{short}, {place}" if name is None else f"{name}, {short}, {place}"
