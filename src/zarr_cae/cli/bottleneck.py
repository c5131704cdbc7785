"""`zarr-cae bottleneck`: copy the latents of an array into an array of their own."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from zarr_cae.cli.arguments import Commands, command, progress, refuse
from zarr_cae.cli.images import arrays_at, refusing_damage
from zarr_cae.cli.replacing import create_npy, replacing, replacing_zarr
from zarr_cae.cli.writing import slabs

if TYPE_CHECKING:
    import zarr


def add(commands: Commands) -> None:
    """Declare `bottleneck` and its arguments."""
    parser = command(
        commands, "bottleneck", bottleneck,
        "Copy the latents of a Zarr array into an array of their own. They are float32, the input of the synthesis "
        "transform. Training on latents needs no copy: see `zarr_cae.open_bottleneck`.",
    )  # fmt: skip
    parser.add_argument("array", type=Path, metavar="OUT.zarr[/ARRAY]")
    parser.add_argument("latents", type=Path, metavar="LATENTS.zarr|LATENTS.npy")
    parser.add_argument("--overwrite", action="store_true", help="replace LATENTS.zarr if it exists")


def bottleneck(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae bottleneck`."""
    out: Path = arguments.latents
    if out.suffix.lower() not in {".zarr", ".npy"}:
        refuse(f"latents are written to a .zarr or .npy file; got {out}")
    array = _open(arguments.array)
    # It has an event loop of its own, so that Ctrl-C stops all work before it returns.
    if out.suffix.lower() == ".npy":
        with replacing(out) as partial:
            asyncio.run(_write_npy(array, partial))
    else:
        with replacing_zarr(out, overwrite=arguments.overwrite) as partial:
            asyncio.run(_write_zarr(array, partial))
    shape = " x ".join(map(str, array.shape))
    print(f"{out}: {shape} {array.dtype}, {array.nbytes:,} bytes in memory")


def _open(path: Path) -> zarr.Array[Any]:
    """Open the latents of the array at a path, or of the only array with latents in the group there."""
    from zarr_cae.latents.store import has_latents, open_bottleneck

    array, members = arrays_at(path, open_bottleneck)
    if array is not None:
        return array
    found = {name: member for name, member in members.items() if has_latents(member)}
    if len(found) != 1:
        examples = ", ".join(f"{path}/{name}" for name in sorted(found)[:4])
        refuse(f"{path} is a group of {len(found)} arrays with latents" + (f"; name one: {examples}" if found else ""))
    return next(iter(found.values()))


async def _write_npy(array: zarr.Array[Any], path: Path) -> None:
    target = create_npy(path, array.dtype, array.shape)
    async for window, values in _pieces(array):
        target[window] = values
    cast("np.memmap[Any, Any]", target).flush()


async def _write_zarr(array: zarr.Array[Any], path: Path) -> None:
    import zarr.api.asynchronous
    from zarr.buffer import cpu

    target = await zarr.api.asynchronous.create_array(
        path,
        shape=array.shape,
        chunks=array.chunks,
        shards=array.shards,
        dtype=array.dtype,
        fill_value=np.nan,
        attributes=array.attrs.asdict(),
        dimension_names=cast("Any", array.metadata).dimension_names,
    )
    async for window, values in _pieces(array):
        await target.setitem(window, values, prototype=cpu.buffer_prototype)


async def _pieces(array: zarr.Array[Any]) -> AsyncIterator[tuple[tuple[slice, ...], npt.NDArray[np.float32]]]:
    """Yield windows that cover the array, with their values in host memory, and show progress."""
    from zarr.buffer import cpu

    with progress(array.nbytes, "B", "bottleneck", unit_scale=True) as bar:
        for window in slabs(array.shape, array.shards or array.chunks):
            with refusing_damage(str(array.store_path)):
                values = np.asarray(await array.async_array.getitem(window, prototype=cpu.buffer_prototype))
            yield window, values
            bar.update(values.nbytes)
