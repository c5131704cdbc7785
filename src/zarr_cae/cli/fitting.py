"""`--fit` of `encode` and `convert`: weights for the images to be encoded, stored in the output."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from zarr_cae.cli.arguments import note, progress, refuse
from zarr_cae.cli.images import megapixels, open_source
from zarr_cae.cli.writing import Options, new_array
from zarr_cae.weights.file import DEFAULT_MODEL

if TYPE_CHECKING:
    from zarr_cae.slides.conversion import Choices, Conversion
    from zarr_cae.training.fit import Fit, FitProgress
    from zarr_cae.training.sampling import ImageSource, ImageStack

_SECONDS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}


def add_fit(parser: argparse.ArgumentParser) -> None:
    """Declare `--fit`."""
    parser.add_argument(
        "--fit", type=minutes, metavar="TIME",
        help="first fit the weights to the images for this time, such as 10min, 90s or 1h; they are stored in the "
        "output, where zarr_cae.open and these commands find them",
    )  # fmt: skip


def minutes(text: str) -> float:
    """Parse a time such as `10min`, `90s` or `1h`; a number alone is minutes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h)?", text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is not a time such as 10min")
    return float(match[1]) * _SECONDS[match[2] or "min"] / 60


def fit_to_images(arguments: argparse.Namespace, options: Options, images: Sequence[Path]) -> Options:
    """Return the options with fitted weights, if `--fit` is given.

    Parameters
    ----------
    arguments
        Those of `encode`.
    options
        The options of all arrays without a fit.
    images
        The files.
    """
    if arguments.fit is None:
        return options
    from zarr_cae.codec.parameters import resolve_nodata
    from zarr_cae.training.sampling import ImageSource, ImageStack

    chosen = {"series": arguments.series, "level": arguments.level}

    def opened(path: Path) -> ImageStack:
        item = new_array(open_source(path, **chosen), options)
        source, codec = item.source, item.codec
        return ImageStack(
            source.array, cast("int | None", codec.channel_axis), codec.value_range, source.close,
            resolve_nodata(source.dtype, codec.nodata), _same_place(item.dimension_names), codec.value_transform,
        )  # fmt: skip

    parts = [ImageSource(megapixels(path, **chosen), partial(opened, path)) for path in images]
    return replace(options, weights=_fit(arguments, options.quality, parts))


def fit_to_slides(arguments: argparse.Namespace, choices: Choices, sources: Sequence[Path], out: Path) -> Choices:
    """Return the choices with fitted weights, if `--fit` is given.

    A conversion that goes on takes the weights that it began with.

    Parameters
    ----------
    arguments
        Those of `convert`.
    choices
        The choices of the conversion without a fit.
    sources
        The slides.
    out
        The output.
    """
    if arguments.fit is None:
        return choices
    from zarr_cae.slides.conversion import prepare
    from zarr_cae.training.model import RANGES
    from zarr_cae.training.sampling import ImageSource

    if arguments.dask is not None:
        refuse("--fit keeps its weights on this machine; with --dask, fit first (zarr_cae.fit), import the weights on "
               "the workers, and give --weights")  # fmt: skip
    if not any(set(choices.qualities) <= set(one) for one in RANGES.values()):
        refuse("--fit fits one network, for qualities 1 to 5 or for 6 to 8; give --quality within one of these")
    settings = None if arguments.restart else _settings_of_journal(out)
    if settings is not None:
        weights = settings.get("weights")
        known = str(weights[0]) if isinstance(weights, list) and weights else cast("str | None", weights)
        note(f"going on with the weights that this conversion began with: {known or 'the bundled ones'}")
        return replace(choices, weights=known)

    def part(conversion: Conversion) -> ImageSource:
        return ImageSource(math.prod(conversion.shape) / conversion.channels, partial(_slide_picture, conversion))

    parts = [part(prepare(source, choices)) for source in sources]
    return replace(choices, weights=_fit(arguments, choices.qualities[0], parts))


def _settings_of_journal(out: Path) -> dict[str, Any] | None:
    """Return the settings of an interrupted conversion to an output, if there is one."""
    from zarr_cae.slides.journal import journal_folder

    try:
        found = json.loads((journal_folder(Path(out.absolute())) / "journal.json").read_bytes())
    except (FileNotFoundError, ValueError):  # there is none, or the process was killed while it wrote it
        return None
    return found if isinstance(found, dict) else None


def store_weights(out: Path, arguments: argparse.Namespace) -> None:
    """Store the weights of an archive in it, if `--fit` is given."""
    if arguments.fit is None:
        return
    from zarr_cae.codec.embedded import embed_weights

    embed_weights(out)


def _fit(arguments: argparse.Namespace, quality: int, parts: list[ImageSource]) -> str:
    if arguments.weights is not None:
        refuse("--fit chooses the weights; leave --weights out")
    if arguments.model != DEFAULT_MODEL:
        refuse(f"--fit is for the model {DEFAULT_MODEL}, not {arguments.model}")
    from zarr_cae.training.fit import fit_weights

    bar = progress(1, "", "fit", bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]{postfix}")
    with bar:

        def show(state: FitProgress) -> None:
            bar.n = state.fraction
            bar.set_postfix_str(f"{state.saved:.1%} of the bytes saved so far")

        found = fit_weights(parts, arguments.fit, quality=quality, metric=arguments.metric, report=show)
    note(_told(found))
    return found.digest


def _told(found: Fit) -> str:
    held_out = f"; held out: {found.held_out}"
    if found.digest == found.start:
        return f"not fitted: {found.reason}; encoding with the weights {found.start[:19]}... as they are{held_out}"
    return (
        f"fitted: held-out crops need {found.saved:.1%} fewer bytes at equal quality than with the weights "
        f"{found.start[:19]}...; the fitted ones take {found.file_bytes / 1e6:.1f} MB in the output{held_out}"
    )


def _same_place(axes: Sequence[str | None]) -> tuple[int, ...]:
    """Return the axes along which pictures show the same place: channels and depth."""
    return tuple(number for number, name in enumerate(axes) if name in {"c", "z"})


class _SlideArray:
    """The image of a slide as an array that is read by windows."""

    def __init__(self, read: Callable[[Sequence[slice]], Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._read, self.shape, self.dtype = read, shape, dtype

    def __getitem__(self, window: tuple[slice, ...]) -> Any:
        return self._read(window)


def _slide_picture(conversion: Conversion) -> ImageStack:
    from zarr_cae.codec.parameters import resolve_nodata
    from zarr_cae.slides.sources import open_slide
    from zarr_cae.training.sampling import ImageStack

    choices = conversion.choices
    slide = open_slide(conversion.source, series=choices.series, level=choices.level)
    axis = conversion.axes.index("c") if conversion.rgb else None
    return ImageStack(
        _SlideArray(slide.read, slide.shape, slide.dtype), axis, conversion.value_range, slide.close,
        resolve_nodata(np.dtype(slide.dtype), choices.values.get("nodata")), _same_place(conversion.axes),
        choices.values.get("value_transform"),
    )  # fmt: skip
