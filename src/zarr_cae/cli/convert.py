"""`zarr-cae convert`: a slide into an OME-Zarr pyramid."""

from __future__ import annotations

import argparse
from pathlib import Path

from zarr_cae.cli.arguments import (
    Commands,
    add_values,
    command,
    note,
    pair,
    progress,
    quality,
    refuse,
    several,
    value_range,
    values,
)  # fmt: skip
from zarr_cae.cli.fitting import add_fit, fit_to_slides, store_weights
from zarr_cae.cli.replacing import refuse_existing, take_place
from zarr_cae.cli.writing import BAR
from zarr_cae.weights.file import DEFAULT_MODEL, METRICS, MODELS


def add(commands: Commands) -> None:
    """Declare `convert` and its arguments."""
    parser = command(
        commands, "convert", convert,
        "Convert a slide or any other image into an OME-Zarr 0.5 pyramid. The image is read piece by piece. A "
        "conversion that was interrupted goes on when the same command is given again.",
    )  # fmt: skip
    parser.add_argument("slide", type=Path, metavar="SLIDE", help="TIFF, SVS, NDPI, MRXS, .zarr, .npy, PNG ...")
    parser.add_argument("out", type=Path, metavar="OUT.ome.zarr")
    parser.add_argument(
        "-q", "--quality", type=several(quality), default=[8], metavar="Q[,Q...]",
        help="1 (smallest) to 8 (best), default 8; several: of level 0, level 1 and so on, the last one for the rest",
    )  # fmt: skip
    parser.add_argument("--metric", choices=METRICS, default="mse", help="what the network was trained for")
    parser.add_argument("--model", choices=MODELS, default=DEFAULT_MODEL, help="family of networks")
    parser.add_argument("--weights", metavar="DIGEST", help="sha256:... of a weights file (see `weights list`)")
    add_fit(parser)
    parser.add_argument("--chunks", type=pair, default=(512, 512), metavar="ROWS,COLS", help="default 512")
    parser.add_argument(
        "--shards", type=_shards, default=(4096, 4096), metavar="ROWS,COLS|none", help="files of many chunks; 4096"
    )
    parser.add_argument(
        "--levels", type=_levels, metavar="N|auto", help="default auto: halve the image until it fits into a chunk"
    )
    parser.add_argument("--downsample", choices=("mean", "nearest"), default="mean", help="default mean")
    parser.add_argument("--value-range", type=value_range, metavar="LO,HI", help="values of the data, if not uint8")
    add_values(parser)
    parser.add_argument("--series", type=int, metavar="N", help="which image of a file that holds several")
    parser.add_argument("--level", type=int, default=0, metavar="N", help="begin at this level of the file's pyramid")
    parser.add_argument("--dask", metavar="ADDRESS", help="scheduler of a dask.distributed cluster that does the work")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.ome.zarr if it exists")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of going on")


def convert(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae convert`."""
    from zarr_cae.slides.cluster import convert_on_dask
    from zarr_cae.slides.conversion import Choices, create, prepare
    from zarr_cae.slides.convert import convert_here
    from zarr_cae.slides.journal import Journal

    out = Path(arguments.out.absolute())
    if out.suffix != ".zarr":
        refuse(f"the output ends in .ome.zarr or .zarr; got {arguments.out}")
    refuse_existing(out, overwrite=arguments.overwrite)
    if not out.parent.is_dir():
        refuse(f"folder {out.parent} does not exist")
    choices = Choices(
        tuple(arguments.quality), arguments.metric, arguments.model, arguments.weights, arguments.chunks,
        arguments.shards, arguments.levels, arguments.downsample, arguments.value_range, arguments.series,
        arguments.level, values(arguments),
    )  # fmt: skip
    choices = fit_to_slides(arguments, choices, [arguments.slide], out)
    conversion = prepare(arguments.slide, choices)
    with Journal(out, conversion.settings, restart=arguments.restart) as journal:
        if not journal.resumed or not (journal.out / "zarr.json").exists():
            create(conversion, journal.out)
        done = [block for block in conversion.pyramid.blocks() if block in journal]
        if done:
            note(f"going on after {len(done)} blocks")
        with progress(conversion.megapixels, "MP", "convert", bar_format=BAR) as bar:
            for block in done:
                rows, columns = conversion.pyramid.window(block)
                bar.update((rows.stop - rows.start) * (columns.stop - columns.start) / 1e6)
            if arguments.dask is None:
                convert_here(conversion, journal, bar.update)
            else:
                convert_on_dask(conversion, journal, bar.update, arguments.dask)
        store_weights(journal.out, arguments)
        take_place(journal.out, out)
        journal.remove()
    sizes = ", ".join(f"{columns} x {rows}" for rows, columns in conversion.pyramid.sizes)
    stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    pixels = conversion.pyramid.sizes[0][0] * conversion.pyramid.sizes[0][1]
    for length in conversion.pyramid.planes:
        pixels *= length
    print(f"{arguments.out}: {sizes}; {stored:,} bytes, {8 * stored / pixels:.3f} bits per pixel of level 0")


def _shards(text: str) -> tuple[int, int] | None:
    return None if text == "none" else pair(text)


def _levels(text: str) -> int | None:
    if text == "auto":
        return None
    number = int(text)
    if number < 1:
        raise ValueError
    return number
