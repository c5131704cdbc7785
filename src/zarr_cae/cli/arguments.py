"""Arguments that several commands share, and the parsers of their values."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.weights.file import DEFAULT_MODEL, METRICS, MODELS, QUALITIES

if TYPE_CHECKING:
    from tqdm import tqdm

Commands = Any
"""The type that `add_subparsers` returns; argparse does not export it."""
ARRAY_HELP = "the archive, or an array in it, such as slide.ome.zarr/0"
_Value = TypeVar("_Value")


def command(commands: Commands, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
    """Add a command. Its help is `text`; the list of commands shows the first sentence."""
    parser = commands.add_parser(name, help=text.partition(". ")[0].rstrip("."), description=text)
    parser.set_defaults(run=run, parser=parser)
    return parser


def several(item: Callable[[str], _Value]) -> Callable[[str], list[_Value]]:
    """Return a parser of arguments of the form `A,B,C`."""

    def parse(text: str) -> list[_Value]:
        return [item(part.strip()) for part in text.split(",")]

    parse.__name__ = f"list of {item.__name__}"
    return parse


def pair(text: str) -> tuple[int, int]:
    """Parse `ROWS,COLS`, or one number for both."""
    rows, columns, *rest = text.split(",") if "," in text else (text, text)
    numbers = int(rows), int(columns)
    if rest or min(numbers) < 1:
        raise ValueError
    return numbers


def value_range(text: str) -> tuple[float, float]:
    """Parse `LO,HI`."""
    low, high = (float(part) for part in text.split(","))
    return low, high


def colour(text: str) -> tuple[int, ...]:
    """Parse `R,G,B`, the positions of three channels."""
    channels = tuple(int(part) for part in text.split(","))
    if len(set(channels)) != len(channels) or len(channels) != 3 or min(channels) < 0:
        raise ValueError
    return channels


def nodata(text: str) -> float | str:
    """Parse a number or `nan`, in the form of metadata."""
    try:
        return int(text)  # a float can't tell large integers apart
    except ValueError:
        number = float(text)
    return number if math.isfinite(number) else "NaN" if math.isnan(number) else f"{'-' * (number < 0)}Infinity"


def add_values(parser: argparse.ArgumentParser) -> None:
    """Declare the options about values of pixels and their loss, which `encode` and `convert` share."""
    parser.add_argument(
        "--value-range", type=value_range, metavar="LO,HI",
        help="lowest and highest value of the pixels, for dtypes other than uint8 (write --value-range=-1,1 for a "
        "negative one)",
    )  # fmt: skip
    parser.add_argument(
        "--nodata", type=nodata, metavar="VALUE", help="value of pixels without data, or nan; it comes back exactly"
    )
    parser.add_argument("--min-psnr", type=float, metavar="DB", help="PSNR that each chunk must reach, such as 38")
    parser.add_argument("--value-transform", choices=("sqrt",), help="sqrt: for photon counts, dark and sparse data")


def values(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of `CAECodec` that the options of `add_values` give."""
    given = {name: getattr(arguments, name) for name in ("nodata", "min_psnr", "value_transform")}
    return {name: value for name, value in given.items() if value is not None}


def add_networks(parser: argparse.ArgumentParser) -> None:
    """Declare the options that choose the networks, which `encode` and `convert` share."""
    parser.add_argument(
        "--metric", choices=METRICS, default="mse", help="the measure that the networks were trained for; default mse"
    )
    parser.add_argument(
        "--model", choices=MODELS, default=DEFAULT_MODEL, help=f"form of the networks; default {DEFAULT_MODEL}"
    )
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Declare `--weights`, which all commands that encode share."""
    parser.add_argument(
        "--weights", metavar="NAME|DIGEST",
        help="trained weights: a name, such as photographs (the default) or histology, or a digest; `zarr-cae weights "
        "list` shows them",
    )  # fmt: skip


def add_effort(parser: argparse.ArgumentParser) -> None:
    """Declare `--effort`, which `encode` and `convert` share."""
    parser.add_argument(
        "--effort", type=effort, metavar="N",
        help="0 is fastest; 1 decodes each chunk as well and stores corrections, for fewer bytes at equal PSNR; from 2 "
        "on, such as 10, also refine the latents in N steps, which takes many times as long; reading stays as fast; "
        "default: the setting cae.effort, which is 1",
    )  # fmt: skip


def effort(text: str) -> int:
    """Parse an effort, 0 to `MOST_STEPS`."""
    from zarr_cae.config import MOST_STEPS

    if not text.isascii() or not text.isdigit() or int(text) > MOST_STEPS:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {MOST_STEPS}, got {text!r}")
    return int(text)


def with_effort(arguments: argparse.Namespace) -> AbstractContextManager[object]:
    """Return a context in which chunks are written with the effort of `--effort`, if that is given."""
    from zarr_cae.config import configure

    return nullcontext() if arguments.effort is None else configure(effort=arguments.effort)


def channel_axis(text: str) -> int | str | None:
    """Parse `auto`, `none` or the number of an axis."""
    return {"auto": "auto", "none": None}[text] if text in {"auto", "none"} else int(text)


def quality(text: str) -> int:
    """Parse a quality, 1 to 8."""
    if text not in map(str, QUALITIES):
        raise argparse.ArgumentTypeError(f"expected a quality from 1 to 8, got {text!r}")
    return int(text)


def refuse(message: str) -> NoReturn:
    """Stop the command with one line on stderr."""
    raise CAEConfigurationError(message)


def note(message: str) -> None:
    """Print a message that is not an error on stderr."""
    print(f"zarr-cae: note: {message}", file=sys.stderr)


def progress(total: float, unit: str, text: str, **options: Any) -> tqdm[NoReturn]:
    """Return a progress bar on stderr, silent unless that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, desc=text, disable=None, leave=False, file=sys.stderr, **options)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a text table: the first column aligned left, the others right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
