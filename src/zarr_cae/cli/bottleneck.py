"""`bottleneck`: copy the latents of an array out of its archive."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from zarr_cae.cli.arguments import Commands, command, progress, refuse
from zarr_cae.cli.images import arrays_at, refusing_damage, replacing
from zarr_cae.cli.writing import replacing_zarr, slabs

if TYPE_CHECKING:
    import zarr


def add(commands: Commands) -> None:
    """Declare `bottleneck`."""
    parser = command(
        commands, "bottleneck", bottleneck,
        "Copy the latents of a Zarr array into an array of their own, float32, as the decoder's network receives "
        "them. To train on them no copy is needed: see `zarr_cae.open_bottleneck`.",
    )  # fmt: skip
    parser.add_argument("array", type=Path, metavar="OUT.zarr[/ARRAY]")
    parser.add_argument("latents", type=Path, metavar="LATENTS.zarr|LATENTS.npy")
    parser.add_argument("--overwrite", action="store_true", help="replace LATENTS.zarr if it exists")


def bottleneck(arguments: argparse.Namespace) -> None:
    """`zarr-cae bottleneck`."""
    out: Path = arguments.latents
    if out.suffix.lower() not in {".zarr", ".npy"}:
        refuse(f"latents go into a .zarr or .npy file; got {out}")
    array = _open(arguments.array)
    if out.suffix.lower() == ".npy":
        with replacing(out) as partial:
            target = np.lib.format.open_memmap(partial, mode="w+", dtype=array.dtype, shape=array.shape)
            for window, values in _pieces(array):
                target[window] = values
            target.flush()
    else:
        with replacing_zarr(out, overwrite=arguments.overwrite) as partial:
            asyncio.run(_write(array, partial))  # a loop of its own, so that Ctrl-C stops all work before it returns
    shape = " x ".join(map(str, array.shape))
    print(f"{out}: {shape} {array.dtype}, {array.nbytes:,} bytes in memory")


def _open(path: Path) -> zarr.Array[Any]:
    """The latents of the array at a path, or of the only one with latents in the group there."""
    from zarr_cae.latents.store import has_latents, open_bottleneck

    array, members = arrays_at(path, open_bottleneck)
    if array is not None:
        return array
    found = {name: member for name, member in members.items() if has_latents(member)}
    if len(found) != 1:
        examples = ", ".join(f"{path}/{name}" for name in sorted(found)[:4])
        refuse(f"{path} is a group of {len(found)} arrays with latents" + (f"; name one: {examples}" if found else ""))
    return next(iter(found.values()))


async def _write(array: zarr.Array[Any], path: Path) -> None:
    import zarr.api.asynchronous
    from zarr.core.buffer import cpu

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
    for window, values in _pieces(array):
        await target.setitem(window, values, prototype=cpu.buffer_prototype)


def _pieces(array: zarr.Array[Any]) -> Iterator[tuple[tuple[slice, ...], npt.NDArray[np.float32]]]:
    """All windows of an array with their values, on the host, under a progress bar."""
    from zarr.core.buffer import cpu

    with progress(array.nbytes, "B", "bottleneck", unit_scale=True) as bar:
        for window in slabs(array.shape, array.shards or array.chunks):
            with refusing_damage(str(array.store_path)):
                values = np.asarray(array.get_basic_selection(window, prototype=cpu.buffer_prototype))
            yield window, values
            bar.update(values.nbytes)
