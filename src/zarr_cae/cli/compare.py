"""`zarr-cae compare`: a page that shows an image at several qualities beside other codecs."""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zarr_cae.cli.arguments import Commands, add_weights, command, progress, quality, refuse, several
from zarr_cae.cli.evaluate import check_libraries, code, one_of
from zarr_cae.cli.images import read_image
from zarr_cae.cli.replacing import replacing
from zarr_cae.evaluation.classical import CLASSICAL, match
from zarr_cae.evaluation.curves import Coded, Point, measure
from zarr_cae.pixels.layout import Pixels
from zarr_cae.weights.file import METRICS

if TYPE_CHECKING:
    from zarr_cae.codec.cae import CAECodec

CHUNK = 256
_LARGEST = 1 << 24
"""Pixels that a page can hold: every version of the image is in it without loss."""
_OTHERS = ["jpegxl", "avif", "webp", "jpeg"]
_COLUMNS = [
    "version", "bytes", "bit/px", "PSNR dB", "SSIM", "MS-SSIM", "colour difference (CIE76)", "encode ms", "decode ms",
]  # fmt: skip


def add(commands: Commands) -> None:
    """Declare `compare`."""
    parser = command(
        commands, "compare", compare,
        "Write a page that compares qualities and codecs on an image. One self-contained HTML file: a slider between "
        "any two versions, synchronised zoom, differences, bytes, measures of quality and times.",
    )  # fmt: skip
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image of 8 bits, RGB or grey")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="REPORT.html")
    parser.add_argument("--qualities", type=several(quality), default=[1, 4, 8], metavar="1,4,8")
    parser.add_argument(
        "--against", type=several(one_of("codec", tuple(CLASSICAL))), default=_OTHERS, metavar=",".join(_OTHERS),
        help="other codecs, each matched to each quality",
    )  # fmt: skip
    parser.add_argument(
        "--match", choices=("bytes", "psnr"), default="bytes", help="match other codecs by bytes (default) or by PSNR"
    )
    parser.add_argument(
        "--region", type=_region, metavar="TOP,LEFT,HEIGHT,WIDTH", help="a part of the image, in pixels"
    )
    parser.add_argument(
        "--metric", choices=METRICS, default="mse", help="the measure that the networks were trained for"
    )
    add_weights(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")


def _region(text: str) -> tuple[int, int, int, int]:
    """Parse `TOP,LEFT,HEIGHT,WIDTH`."""
    top, left, height, width = (int(part) for part in text.split(","))
    if min(top, left) < 0 or min(height, width) < 1:
        raise ValueError
    return top, left, height, width


def compare(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae compare`."""
    from zarr_cae.codec.cae import CAECodec

    if arguments.output.exists() and not arguments.overwrite:
        refuse(f"{arguments.output} exists; give --overwrite to replace it")
    check_libraries(arguments.against)
    pixels = _cut(arguments.image, arguments.region)
    qualities, others = list(dict.fromkeys(arguments.qualities)), list(dict.fromkeys(arguments.against))
    versions = [_version("original", pixels, None)]
    with progress(len(qualities) * (1 + len(others)), "version", "compare") as bar:
        for level in qualities:
            codec = CAECodec(
                level, metric=arguments.metric, weights=arguments.weights or "",
                channel_axis=None if pixels.ndim == 2 else 2,
            )  # fmt: skip
            name = f"zarr-cae, quality {level}" + (" (ms-ssim)" if arguments.metric == "ms-ssim" else "")
            coded, point = _measured(codec, pixels)
            versions.append(_version(name, coded.pixels, point, coded.nbytes))
            bar.update()
            for other in others:
                target = coded.nbytes if arguments.match == "bytes" else point.psnr
                setting, result = match(CLASSICAL[other], pixels, arguments.match, target)
                title = f"{CLASSICAL[other].title} {setting:.3g}, as quality {level}"
                versions.append(_version(title, result.pixels, measure("", 0, "", pixels, result), result.nbytes))
                bar.update()
    page = _page(arguments, pixels, versions)
    with replacing(arguments.output) as partial:
        partial.write_text(page, "utf-8")
    print(f"Wrote {arguments.output}, {len(page) / 1e6:.1f} MB: open it in a browser.")


def _cut(path: Path, region: tuple[int, int, int, int] | None) -> Pixels:
    """Read an image of 8 bits, or a region of it."""
    pixels = read_image(path)
    if pixels.dtype != np.uint8:
        refuse(f"{path} is {pixels.dtype}; only 8-bit images can be compared")
    if region is not None:
        top, left, height, width = region
        if top + height > pixels.shape[0] or left + width > pixels.shape[1]:
            refuse(
                f"--region {top},{left},{height},{width} is not inside {path}, "
                f"which has {pixels.shape[0]} rows and {pixels.shape[1]} columns"
            )
        pixels = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    if pixels.shape[0] * pixels.shape[1] > _LARGEST:
        refuse(f"{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels, too many for a page; give --region")
    return pixels


def _measured(codec: CAECodec, pixels: Pixels) -> tuple[Coded, Point]:
    """Code an image through zarr and measure it; loading the networks is not part of the times."""
    code(pixels[:64, :64], codec, 64)
    coded = code(pixels, codec, CHUNK)
    return coded, measure(codec.model, codec.quality, "", pixels, coded)


def _version(name: str, pixels: Pixels, point: Point | None, nbytes: int = 0) -> dict[str, Any]:
    """Return a version of the image in the form that the page's script reads."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        image = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    if point is None:
        bits = 8 * pixels.nbytes / (pixels.shape[0] * pixels.shape[1])
        figures = [name, f"{pixels.nbytes:,}", f"{bits:g}", *[""] * (len(_COLUMNS) - 3)]
    else:
        figures = [
            name, f"{nbytes:,}", f"{point.bpp:.3f}", f"{point.psnr:.2f}", _decimals(point.ssim),
            _decimals(point.ms_ssim), f"{point.delta_e:.2f}", f"{1000 * point.encode_seconds:.1f}",
            f"{1000 * point.decode_seconds:.1f}",
        ]  # fmt: skip
    return {"name": name, "image": image, "figures": figures}


def _decimals(similarity: float) -> str:
    return "image too small" if math.isnan(similarity) else f"{similarity:.4f}"


def _page(arguments: argparse.Namespace, pixels: Pixels, versions: list[dict[str, Any]]) -> str:
    """Return the HTML page."""
    height, width = pixels.shape[:2]
    region = "" if arguments.region is None else f", region {','.join(map(str, arguments.region))}"
    how = "bytes" if arguments.match == "bytes" else "PSNR"
    report = {
        "title": f"{arguments.image.name}: {width} x {height}{region}",
        "width": width,
        "height": height,
        "columns": _COLUMNS,
        "versions": versions,
        "note": f"zarr-cae through zarr in chunks of {CHUNK}, other codecs as whole files of about the same {how}, on "
        "one thread. Times are of one run on this machine. The number after a codec's name is its own setting.",
    }
    template = (resources.files("zarr_cae.cli") / "compare.html").read_text("utf-8")
    # "<" can't end the script element this way, whatever the names of files hold.
    return template.replace("REPORT", json.dumps(report).replace("<", "\\u003c"), 1)
