"""`zarr-cae convert`: a slide into an OME-Zarr pyramid."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from zarr_cae.cli.arguments import (
    Commands,
    add_effort,
    add_networks,
    add_values,
    command,
    note,
    pair,
    quality,
    refuse,
    several,
    values,
    with_effort,
)  # fmt: skip
from zarr_cae.cli.fitting import add_fit, fit_to_slides, store_weights
from zarr_cae.cli.interrupts import terminable
from zarr_cae.cli.replacing import check_parent, refuse_existing, refuse_inside, take_place
from zarr_cae.cli.writing import pixel_bar
from zarr_cae.errors import CAEError

if TYPE_CHECKING:
    from tqdm import tqdm

    from zarr_cae.slides.conversion import Choices, Conversion
    from zarr_cae.slides.journal import Journal


def add(commands: Commands) -> None:
    """Declare `convert` and its arguments."""
    parser = command(
        commands, "convert", convert,
        "Convert a slide or any other image into an OME-Zarr 0.5 pyramid, or several into a group with a pyramid for "
        "each, named after the files. An image is read piece by piece. A conversion that was interrupted goes on when "
        "the same command is given again.",
    )  # fmt: skip
    parser.add_argument(
        "paths", nargs="+", metavar="PATH",
        help="SLIDE... OUT.ome.zarr: the images, and last the output. Images are TIFF files (SVS, NDPI, OME-TIFF and "
        "others; extra 'slides'), MRXS and others of OpenSlide (extra 'openslide'), folders of DICOM files (extra "
        "'dicom'), Zarr arrays and OME-Zarr images, .npy files, and what Pillow reads",
    )  # fmt: skip
    parser.add_argument(
        "-q", "--quality", type=several(quality), default=[8], metavar="Q[,Q...]",
        help="1 (smallest) to 8 (best), default 8; several: of level 0, level 1 and so on, the last one for the rest",
    )  # fmt: skip
    add_networks(parser)
    add_fit(parser)
    parser.add_argument(
        "--chunks", type=pair, default=(512, 512), metavar="ROWS,COLS",
        help="size of a chunk, or one number for both; default 512",
    )  # fmt: skip
    parser.add_argument(
        "--shards", type=_shards, default=(4096, 4096), metavar="ROWS,COLS|none",
        help="size of a shard, a file of many chunks: an even number and a multiple of --chunks; none: a file for each "
        "chunk; default 4096",
    )  # fmt: skip
    parser.add_argument(
        "--levels", type=_levels, metavar="N|auto",
        help="number of levels; auto, the default: halve the image until it fits into a chunk",
    )  # fmt: skip
    parser.add_argument(
        "--downsample", choices=("mean", "nearest"), default="mean",
        help="a pixel of a smaller level is the mean of 2 x 2 pixels, or one of them; default mean",
    )  # fmt: skip
    add_values(parser)
    add_effort(parser)
    parser.add_argument("--series", type=int, metavar="N", help="which image of a file that holds several, from 0")
    parser.add_argument(
        "--level", type=int, default=0, metavar="N",
        help="begin at this level of the file's pyramid; default 0, the largest",
    )  # fmt: skip
    parser.add_argument(
        "--dask", metavar="ADDRESS",
        help="convert on the workers of a dask.distributed cluster; address of its scheduler, such as tcp://HOST:8786 "
        "(extra 'dask')",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.ome.zarr if it exists")
    parser.add_argument(
        "--restart", action="store_true", help="discard what an interrupted conversion has done, and begin anew"
    )


def convert(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae convert`."""
    from zarr_cae.slides.conversion import Choices

    *sources, out = [Path(path) for path in arguments.paths]
    if not sources or out.suffix != ".zarr":
        refuse(f"the last path is the output and ends in .ome.zarr or .zarr; got {out}")
    check_parent(out)
    refuse_existing(Path(out.absolute()), overwrite=arguments.overwrite)
    refuse_inside(out, sources)
    choices = Choices(
        tuple(arguments.quality), arguments.metric, arguments.model, arguments.weights, arguments.chunks,
        arguments.shards, arguments.levels, arguments.downsample, arguments.value_range, arguments.series,
        arguments.level, values(arguments),
    )  # fmt: skip
    if arguments.effort is not None and arguments.dask is not None:
        refuse("--effort is a setting of this process; with --dask, start the workers with ZARR_CAE__EFFORT=N")
    with terminable(), with_effort(arguments):
        try:
            choices = fit_to_slides(arguments, choices, sources, out)
            if len(sources) == 1:
                _convert_one(sources[0], out, choices, arguments)
            else:
                _convert_several(sources, out, choices, arguments)
        except KeyboardInterrupt as error:
            if not hasattr(error, "__notes__"):  # it came before the journal was open
                error.add_note(_kept(Path(out.absolute()), arguments))
            raise


@contextmanager
def _journal(out: Path, settings: Mapping[str, Any], arguments: argparse.Namespace) -> Iterator[Journal]:
    """Open the journal of an output. If the work ends early, the error says what is kept."""
    from zarr_cae.slides.journal import Journal, recorded_blocks

    path = Path(out.absolute())
    fitted = arguments.fit is not None
    with Journal(path, settings, restart=arguments.restart, keep_settings=fitted) as journal:
        try:
            yield journal
        except (KeyboardInterrupt, OSError) as error:
            if isinstance(error, KeyboardInterrupt) or recorded_blocks(journal.folder):
                error.add_note(_kept(path, arguments))
            raise
        except CAEError as error:  # the same command may fail again
            if recorded_blocks(journal.folder):
                error.add_note(_kept(path, arguments).partition(", and")[0])
            raise


def _kept(out: Path, arguments: argparse.Namespace) -> str:
    """Return what an interrupted conversion has kept, and what the same command will do."""
    from zarr_cae.slides.journal import journal_folder, recorded_blocks

    folder = journal_folder(out)
    count = recorded_blocks(folder)
    command = "the same command without --restart" if arguments.restart else "the same command"
    if count and not (folder / "out" / "zarr.json").exists():
        return f"{out.name} is complete"
    if count:
        verb, pronoun = ("are", "them") if count > 1 else ("is", "it")
        what = f"{_counted(count, arguments.shards)} {verb} kept in {folder.name}"
        return f"{what}, and {command} goes on after {pronoun}"
    if arguments.fit is not None and (folder / "journal.json").exists():
        return f"the fitted weights are kept, but nothing else yet; {command} goes on with them"
    return "nothing is kept yet; the same command begins anew"


def _counted(blocks: int, shards: tuple[int, int] | None) -> str:
    return f"{blocks} complete {'block' if shards is None else 'shard'}{'s' * (blocks > 1)}"


def _convert_one(source: Path, out: Path, choices: Choices, arguments: argparse.Namespace) -> None:
    """Convert one file to an image at the root of the output."""
    conversion = _prepare(source, choices)
    with _journal(out, conversion.settings, arguments) as journal:
        with pixel_bar(conversion.megapixels, "convert") as bar:
            _run(conversion, journal, bar, arguments.dask)
        store_weights(journal.out, arguments)
        take_place(journal.out, Path(out.absolute()))
        journal.remove()
    _report(conversion, out)


def _convert_several(sources: list[Path], out: Path, choices: Choices, arguments: argparse.Namespace) -> None:
    """Convert several files to the images of a group; see `zarr_cae.slides.collection`."""
    from zarr_cae.slides.collection import create_collection, image_names, image_target, is_placed, list_images
    from zarr_cae.slides.journal import Journal

    names = image_names(sources)
    images = {name: _prepare(source, choices) for name, source in zip(names, sources, strict=True)}
    with _journal(out, {"several images": True, **asdict(choices)}, arguments) as whole:
        if not whole.resumed:
            create_collection(whole.out)
        total = sum(conversion.megapixels for conversion in images.values())
        complete: dict[str, Path] = {}
        with pixel_bar(total, "convert") as bar:
            for name, conversion in images.items():
                if is_placed(whole, name, conversion):
                    _skip(bar, conversion.megapixels)
                    continue
                with Journal(image_target(whole, name), conversion.settings) as journal:
                    _run(conversion, journal, bar, arguments.dask)
                    complete[name] = journal.out
        for name, image in complete.items():
            take_place(image, whole.out / name)
        list_images(whole.out, names)
        store_weights(whole.out, arguments)
        take_place(whole.out, Path(out.absolute()))
        whole.remove()
    for name, conversion in images.items():
        _report(conversion, out / name)


def _prepare(source: Path, choices: Choices) -> Conversion:
    """Open a slide and decide how it is converted; say so where the file does not tell the range of its values."""
    from zarr_cae.slides.conversion import prepare

    conversion = prepare(source, choices)
    if conversion.dtype[1:] == "u2" and conversion.value_range == (0, 65535) and choices.value_range is None:
        note(f"{source} is uint16, coded as values from 0 to 65535; give --value-range 0,4095 if it has 12 bits")
    return conversion


def _run(conversion: Conversion, journal: Journal, bar: tqdm[NoReturn], dask: str | None) -> None:
    """Convert what is not done yet of an image, here or on a cluster."""
    from zarr_cae.slides.cluster import convert_on_dask
    from zarr_cae.slides.conversion import create
    from zarr_cae.slides.convert import convert_here

    if not journal.resumed or not (journal.out / "zarr.json").exists():
        create(conversion, journal.out)
    done = [block for block in conversion.pyramid.blocks() if block in journal]
    if done:
        note(f"{conversion.source}: going on after {_counted(len(done), conversion.choices.shards)}")
        _skip(bar, sum(conversion.pyramid.pixels(block) for block in done) / 1e6)
    if dask is None:
        convert_here(conversion, journal, bar.update)
    else:
        convert_on_dask(conversion, journal, bar.update, dask)


def _skip(bar: tqdm[NoReturn], megapixels: float) -> None:
    """Count what an earlier run did as done, but not in the speed of this run."""
    if bar.disable:
        return
    bar.initial += megapixels
    bar.n += megapixels
    bar.last_print_n = bar.n
    bar.refresh()


def _report(conversion: Conversion, image: Path) -> None:
    sizes = ", ".join(f"{columns} x {rows}" for rows, columns in conversion.pyramid.sizes)
    stored = sum(path.stat().st_size for path in image.rglob("*") if path.is_file())
    pixels = math.prod(conversion.pyramid.planes) * math.prod(conversion.pyramid.sizes[0])
    print(f"{image}: {sizes}; {stored:,} bytes, {8 * stored / pixels:.3f} bits per pixel of level 0")


def _shards(text: str) -> tuple[int, int] | None:
    return None if text == "none" else pair(text)


def _levels(text: str) -> int | None:
    if text == "auto":
        return None
    number = int(text)
    if number < 1:
        raise ValueError
    return number
