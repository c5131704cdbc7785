"""`--fit` of `encode` and `convert`: weights for what is about to be encoded, stored in the output."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zarr_cae.cli.arguments import note, progress, refuse
from zarr_cae.weights.file import DEFAULT_MODEL

if TYPE_CHECKING:
    from zarr_cae.cli.writing import NewArray
    from zarr_cae.slides.conversion import Conversion
    from zarr_cae.training.fit import Fit, FitProgress
    from zarr_cae.training.sampling import Part, Picture

_SECONDS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}


def add_fit(parser: argparse.ArgumentParser) -> None:
    """Declare `--fit`."""
    parser.add_argument(
        "--fit", type=minutes, metavar="TIME",
        help="first fit the weights to the images for so long, such as 10min; they are stored in the output, which "
        "zarr_cae.open and these commands read",
    )  # fmt: skip


def minutes(text: str) -> float:
    """Parse a time such as `10min`, `90s` or `1h`; a number alone is minutes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h)?", text.strip())
    if match is None or not float(match[1]):
        raise ValueError
    return float(match[1]) * _SECONDS[match[2] or "min"] / 60


def fit_to_images(arguments: argparse.Namespace, images: Sequence[tuple[float, Callable[[], NewArray]]]) -> str | None:
    """Return the digest of the weights to encode images with: fitted ones, if `--fit` is given.

    Parameters
    ----------
    arguments
        Those of `encode`.
    images
        The megapixels of each image, and a function that opens it.
    """
    if arguments.fit is None:
        return _given(arguments)
    from zarr_cae.training.sampling import Part

    def part(size: float, opened: Callable[[], NewArray]) -> Part:
        return Part(size, lambda: _picture(opened()))

    return _fit(arguments, arguments.quality, [part(*image) for image in images])


def fit_to_slide(arguments: argparse.Namespace, conversion: Callable[[], Conversion], out: Path) -> str | None:
    """Return the digest of the weights to convert a slide with: fitted ones, if `--fit` is given.

    A conversion that goes on takes those that it began with.

    Parameters
    ----------
    arguments
        Those of `convert`.
    conversion
        Returns the conversion with the weights that it has without a fit.
    out
        The output.
    """
    if arguments.fit is None:
        return _given(arguments)
    from zarr_cae.slides.journal import known_settings
    from zarr_cae.training.sampling import Part

    known = None if arguments.restart else known_settings(out)
    if known is not None and known.get("weights"):
        digest = str(known["weights"][0])
        note(f"going on with the weights that this conversion began with, {digest[:19]}...")
        return digest
    from zarr_cae.training.model import RANGES

    qualities = set(arguments.quality)
    if not any(qualities <= set(one) for one in RANGES.values()):
        refuse("--fit fits one network, for qualities 1 to 5 or for 6 to 8; give --quality within one of these")
    plan = conversion()
    size = float(np.prod(plan.shape, dtype=float) / plan.channels)
    return _fit(arguments, arguments.quality[0], [Part(size, lambda: _slide_picture(plan))])


def store_weights(out: Path, arguments: argparse.Namespace) -> None:
    """Store the weights of an archive in it, if `--fit` is given."""
    if arguments.fit is None:
        return
    from zarr_cae.codec.embedded import embed_weights

    embed_weights(out)


def _given(arguments: argparse.Namespace) -> str | None:
    weights: str | None = arguments.weights
    return weights


def _fit(arguments: argparse.Namespace, quality: int, parts: list[Part]) -> str:
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
    if found.digest == found.start:
        return f"not fitted: {found.reason}; encoding with the weights {found.start[:19]}... as they are"
    return (
        f"fitted: held-out crops need {found.saved:.1%} fewer bytes at equal quality than with the weights "
        f"{found.start[:19]}...; the fitted ones take {found.file_bytes / 1e6:.1f} MB in the output"
    )


def _picture(item: NewArray) -> Picture:
    from zarr_cae.training.sampling import Picture

    return Picture(item.source.array, item.codec.channel_axis, item.codec.value_range, item.source.close)


class _SlideArray:
    """The image of a slide as an array that is read by windows."""

    def __init__(self, read: Callable[[Sequence[slice]], Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._read, self.shape, self.dtype = read, shape, dtype

    def __getitem__(self, window: tuple[slice, ...]) -> Any:
        return self._read(window)


def _slide_picture(conversion: Conversion) -> Picture:
    from zarr_cae.slides.sources import open_slide
    from zarr_cae.training.sampling import Picture

    choices = conversion.choices
    slide = open_slide(conversion.source, series=choices.series, level=choices.level)
    axis = conversion.axes.index("c") if conversion.rgb else None
    return Picture(_SlideArray(slide.read, slide.shape, slide.dtype), axis, conversion.value_range, slide.close)
