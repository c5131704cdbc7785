"""`zarr-cae evaluate`: rate, distortion and time on images, beside other codecs and published curves."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zarr_cae.cli.arguments import Commands, command, note, progress, quality, refuse, several, table
from zarr_cae.cli.images import read_image
from zarr_cae.cli.replacing import replacing
from zarr_cae.cli.writing import stored_bytes
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.classical import CLASSICAL, evaluate_classical, spread
from zarr_cae.evaluation.curves import (
    Coded,
    Curve,
    Measure,
    Point,
    average,
    load_published,
    measure,
    read_csv,
    to_curves,
    write_csv,
)
from zarr_cae.evaluation.extra import import_extra
from zarr_cae.evaluation.measures import SMALLEST_MS_SSIM
from zarr_cae.evaluation.plot import plot
from zarr_cae.pixels.layout import Pixels
from zarr_cae.weights.file import DEFAULT_MODEL, METRICS, MODELS, QUALITIES
from zarr_cae.weights.registry import available, check_digest

if TYPE_CHECKING:
    from zarr_cae.codec.cae import CAECodec


def add(commands: Commands) -> None:
    """Declare `evaluate`."""
    parser = command(
        commands, "evaluate", evaluate,
        "Measure rate, distortion and time on images. Real bytes of real chunks, written and read through zarr in "
        "memory; means over the images, compared with other codecs and published curves by BD-rate.",
    )  # fmt: skip
    parser.add_argument("paths", nargs="+", metavar="IMAGE", help="images, or folders of images")
    parser.add_argument("--quality", type=several(quality), metavar="1,4,8", help="default: all of the weights")
    parser.add_argument(
        "--metric", type=several(one_of("metric", METRICS)), metavar="mse,ms-ssim",
        help="the measure that the networks were trained for, one or both; default mse, or that of --weights",
    )  # fmt: skip
    parser.add_argument("--model", choices=MODELS, default=DEFAULT_MODEL, help="family of networks")
    parser.add_argument("--weights", metavar="DIGEST", help="sha256:... of a weights file (see `weights list`)")
    parser.add_argument(
        "--chunks", type=_chunks, default=256, metavar="N|image", help="chunk edge, or one chunk an image"
    )
    parser.add_argument("--grey", action="store_true", help="convert the images to grey and code one plane")
    parser.add_argument(
        "--against", type=several(one_of("codec", tuple(CLASSICAL))), default=[], metavar=",".join(CLASSICAL),
        help="other codecs to measure on the same images",
    )  # fmt: skip
    parser.add_argument(
        "--points", type=int, metavar="N", help="measure other codecs at N settings only, spread over their range"
    )
    parser.add_argument(
        "--published", type=Path, metavar="JSON|CSV", help="published curves, or a file of --csv, to compare with"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every measurement")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves; .png, .pdf or .svg")


def one_of(name: str, choices: tuple[str, ...]) -> Any:
    """Return a parser of arguments that are one of the choices; errors call them `name`."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name}; choose from {', '.join(choices)}")
        return text

    parse.__name__ = name
    return parse


def _chunks(text: str) -> int | None:
    """Parse the edge of a chunk; None is the whole image."""
    if text == "image":
        return None
    if int(text) < 1:
        raise ValueError
    return int(text)


def evaluate(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae evaluate`."""
    from zarr_cae.codec.cae import CAECodec

    check_libraries(arguments.against, plots=arguments.plot is not None)
    files = image_files([Path(path) for path in arguments.paths])
    published = [] if arguments.published is None else _curves(arguments.published)
    for path in (arguments.csv, arguments.plot):
        if path is not None and not path.parent.is_dir():
            refuse(f"folder {path.parent} does not exist")
    if arguments.plot is not None and arguments.plot.suffix.lower() not in {".png", ".pdf", ".svg"}:
        refuse(f"{arguments.plot}: plots are .png, .pdf or .svg")
    model, configurations = _configurations(arguments)
    others = list(dict.fromkeys(arguments.against))
    points: list[Point] = []
    with progress(len(files) * (len(configurations) + len(others)), "coding", "evaluate") as bar:
        for index, path in enumerate(files):
            pixels = _eight_bits(path, grey=arguments.grey)
            for metric, level in configurations:
                axis = None if pixels.ndim == 2 else 2
                codec = CAECodec(level, metric=metric, model=model, weights=arguments.weights or "", channel_axis=axis)
                if not index:
                    code(pixels[:64, :64], codec, 64)  # load the networks and the coder before times are measured
                coded = code(pixels, codec, arguments.chunks)
                points.append(measure(f"{codec.model}-{codec.metric}", codec.quality, str(path), pixels, coded))
                bar.update()
            for name in others:
                settings = spread(CLASSICAL[name].settings, arguments.points)
                points += evaluate_classical(name, [(str(path), pixels)], settings)
                bar.update()
    _report(points, published, files, arguments)
    if arguments.csv is not None:
        with replacing(arguments.csv) as partial:
            write_csv(points, partial)
    if arguments.plot is not None:
        measured = [replace(curve, name=_title(curve.name)) for curve in to_curves(points).values()]
        _plot([*measured, *published], arguments.plot, _images(len(files), arguments))


def check_libraries(codecs: Iterable[str], *, plots: bool = False) -> None:
    """Raise CAEConfigurationError if a library is missing, before any work."""
    for library in ("skimage", "pytorch_msssim", "scipy"):
        import_extra(library, "measures of quality")
    if any(name in {"avif", "jpegxl", "jpegxl3"} for name in codecs):
        import_extra("imagecodecs", "AVIF and JPEG XL")
    if plots:
        import_extra("matplotlib", "plots")


def _curves(path: Path) -> list[Curve]:
    """Read published curves, or those of an earlier run."""
    if path.suffix.lower() == ".csv":
        found, origin = to_curves(read_csv(path)), path.name
    else:
        found, origin = load_published(path), "published"
    return [replace(curve, name=f"{curve.name} ({origin})") for curve in found.values()]


def _configurations(arguments: argparse.Namespace) -> tuple[str, list[tuple[Any, int]]]:
    """Return the model, and each metric with each quality. The weights give those that the arguments leave out."""
    model, metrics, qualities = arguments.model, ["mse"], list(QUALITIES)
    if arguments.weights is not None:
        check_digest(arguments.weights)
        info = next((info for info in available() if info.digest == arguments.weights), None)
        if info is not None:
            model, metrics, qualities = info.model, [info.metric], list(info.qualities)
    chosen = arguments.metric or metrics, arguments.quality or qualities
    return model, list(itertools.product(*map(dict.fromkeys, chosen)))


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files among the paths, and the images in the folders among them, each once."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
            if not found:
                refuse(f"folder {path} holds no images")
        elif not path.exists():
            refuse(f"{path} does not exist")
        files += found
    return list(dict.fromkeys(files))


def _eight_bits(path: Path, *, grey: bool) -> Pixels:
    from PIL import Image

    pixels = read_image(path)
    if pixels.dtype != np.uint8:
        refuse(f"{path} is {pixels.dtype}; only 8-bit images can be evaluated")
    if min(pixels.shape[:2]) < SMALLEST_MS_SSIM:
        note(
            f"{path} is {pixels.shape[1]} x {pixels.shape[0]}: MS-SSIM needs {SMALLEST_MS_SSIM} px a side, "
            "so its mean is nan"
        )
    return np.asarray(Image.fromarray(pixels).convert("L")) if grey else pixels


def code(pixels: Pixels, codec: CAECodec, edge: int | None) -> Coded:
    """Write and read an image through zarr, in memory, in chunks of `edge` pixels or (None) as one chunk."""
    import zarr
    from zarr.storage import MemoryStore

    chunks = tuple(min(edge or side, side) for side in pixels.shape[:2]) + pixels.shape[2:]
    array: zarr.Array[Any] = zarr.create_array(
        MemoryStore(), shape=pixels.shape, dtype=pixels.dtype, chunks=chunks, serializer=codec, compressors=None
    )
    start = time.perf_counter()
    array[...] = pixels
    written = time.perf_counter()
    decoded = np.asarray(array[...])
    return Coded(decoded, stored_bytes(array), written - start, time.perf_counter() - written)


def _images(count: int, arguments: argparse.Namespace) -> str:
    """Describe the images, for instance "24 images, chunks of 256 px"."""
    chunks = "one chunk an image" if arguments.chunks is None else f"chunks of {arguments.chunks} px"
    return f"{count} {'grey ' if arguments.grey else ''}image{'s' if count > 1 else ''}, {chunks}"


def _title(name: str) -> str:
    return CLASSICAL[name].title if name in CLASSICAL else name


def _report(points: list[Point], published: list[Curve], files: list[Path], arguments: argparse.Namespace) -> None:
    print(f"Means over {_images(len(files), arguments)}; seconds an image\n")
    rows = [
        [
            point.codec, f"{point.setting:g}", f"{point.bpp:.4f}", f"{point.psnr:.3f}", f"{point.ssim:.5f}",
            f"{point.ms_ssim:.5f}", f"{point.delta_e:.3f}", f"{point.encode_seconds:.3f}",
            f"{point.decode_seconds:.3f}",
        ]
        for point in average(points)
    ]  # fmt: skip
    print(table(["codec", "setting", "bpp", "PSNR dB", "SSIM", "MS-SSIM", "CIE76", "encode s", "decode s"], rows))
    measured = to_curves(points)
    ours = [curve for name, curve in measured.items() if name not in CLASSICAL]
    others = [*(curve for name, curve in measured.items() if name in CLASSICAL), *published]
    if others:
        rows = [
            [curve.name, other.name, _bd_rate(curve, other, "psnr"), _bd_rate(curve, other, "ms_ssim")]
            for curve in ours
            for other in others
        ]
        print("\nBD-rate: bytes more (+) or less (-) than the other codec needs for equal quality\n")
        print(table(["codec", "against", "PSNR", "MS-SSIM"], rows))


def _bd_rate(curve: Curve, other: Curve, by: Measure) -> str:
    try:
        return f"{curve.bd_rate(other, by):+.1f} %"
    except CAEConfigurationError:  # too few points, no common range of quality, or not monotone
        return "-"


def _plot(curves: list[Curve], path: Path, title: str) -> None:
    with replacing(path) as partial:
        named = partial.with_name(partial.name + path.suffix)  # matplotlib takes the format from the suffix
        try:
            plot(curves, named, title)
            named.replace(partial)
        finally:
            named.unlink(missing_ok=True)
