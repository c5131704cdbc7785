"""`zarr-cae migrate`: move an archive of zarr v2 to zarr v3."""

from __future__ import annotations

import argparse
from pathlib import Path

from zarr_cae.cli.arguments import Commands, command, progress, refuse
from zarr_cae.cli.replacing import refuse_inside


def add(commands: Commands) -> None:
    """Declare `migrate` and its arguments."""
    parser = command(
        commands, "migrate", migrate,
        "Move an archive of Zarr v2 to Zarr v3. Arrays of the predecessor caecodec keep their symbols, in frames of "
        "this package: no pixel is decoded, and no quality lost. Groups, attributes and other arrays are copied. An "
        "interrupted migration goes on where it ended when it is run again.",
    )  # fmt: skip
    parser.add_argument("old", type=Path, metavar="OLD.zarr[/NODE]")
    parser.add_argument("new", type=Path, metavar="NEW.zarr")
    parser.add_argument("--verify", action="store_true", help="read every symbol of both archives again at the end")


def migrate(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae migrate`."""
    old, new = arguments.old, arguments.new
    if not old.exists():
        refuse(f"{old} does not exist")
    if new.suffix != ".zarr":
        refuse(f"the new archive ends in .zarr; got {new}")
    refuse_inside(new, [old])
    from zarr_cae.legacy.migrate import migrate as move

    bar = progress(0, "chunk", "migrate")
    with bar:

        def start(steps: int) -> object:
            bar.reset(total=steps)
            return bar.update

        done = move(old, new, verify=arguments.verify, start=start)  # type: ignore[arg-type]
    ratio = f" ({done.bytes_after / done.bytes_before:.1%})" if done.bytes_before else ""
    how = "every symbol compared" if arguments.verify else "checksums good"
    print(
        f"{new}: {done.arrays} arrays, {done.chunks} chunks, {done.bytes_before:,} bytes before, "
        f"{done.bytes_after:,} after{ratio}; {how}"
    )
