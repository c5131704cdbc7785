"""`zarr-cae verify`: check every stored chunk of an archive."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr_cae.cli.arguments import ARRAY_HELP, Commands, command, progress
from zarr_cae.errors import CAEDataError

if TYPE_CHECKING:
    from zarr_cae.codec.verify import Verified


def add(commands: Commands) -> None:
    """Declare `verify` and its arguments."""
    parser = command(
        commands, "verify", verify,
        "Check every stored chunk of a Zarr array or group: checksums, structure and weights. Bad chunks are listed by "
        "their keys, and the exit status is then 1.",
    )  # fmt: skip
    parser.add_argument("array", type=Path, metavar="OUT.zarr[/ARRAY]", help=ARRAY_HELP)
    parser.add_argument(
        "--deep", action="store_true", help="also decode all chunks, and show the lowest and the highest value"
    )


def verify(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae verify`."""
    from zarr_cae.cli.images import arrays_at
    from zarr_cae.cli.writing import many_chunks_at_once
    from zarr_cae.codec.verify import verify as verify_array

    array, members = arrays_at(arguments.array)
    found = members if array is None else {"": array}
    bad = 0
    with many_chunks_at_once(), progress(0, "chunk", "verify") as bar:
        for name, member in found.items():
            result = verify_array(member, deep=arguments.deep, advance=bar.update)
            bad += len(result.bad)
            bar.clear()
            print(f"{name or arguments.array}: {_described(member, result)}")
            for chunk in result.bad:
                print(f"  {chunk.key}: {chunk.reason}")
    if bad:
        raise CAEDataError(f"cae: {bad} bad chunks in {arguments.array}")


def _described(array: Any, result: Verified) -> str:
    from zarr_cae.codec.selection import Grid

    what = "shards" if Grid.of(array).inner else "chunks"
    values = "" if result.lowest is None else f", values from {result.lowest} to {result.highest}"
    absent = f", {result.absent} not stored" if result.absent else ""
    return f"{result.chunks} {what}, {len(result.bad)} bad chunks{absent}{values}"
