"""Pictures that fit into memory: those that Pillow reads, and 16-bit colour through imagecodecs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.pixels.pillow import opened_picture
from zarr_cae.slides.metadata import SlideMetadata
from zarr_cae.slides.sources import Slide

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["deep_pixels", "metadata_of", "open_picture"]

_DECODERS = {"PNG": "png_decode", "JPEG2000": "jpeg2k_decode", "AVIF": "avif_decode"}
_ORIENTATION = 0x0112


def open_picture(path: Path) -> Slide:
    """Open a picture of one frame. Errors are those of `open_slide`."""
    with opened_picture(path) as image:
        pixels = deep_pixels(path, image)
        if pixels is None:
            pixels = _shallow_pixels(image)
        metadata = metadata_of(image)
        orientation = image.getexif().get(_ORIENTATION, 1)
    stored = "yx" if pixels.ndim == 2 else "yxc"
    rgb = pixels.shape[2:] == (3,)
    return Slide(path.stem, pixels, stored, rgb, metadata, orientation=orientation if orientation in range(1, 9) else 1)


def _shallow_pixels(image: Image.Image) -> npt.NDArray[Any]:
    if image.mode in {"I;16", "I;16B", "I;16L", "I", "F", "L", "RGB"}:
        return np.asarray(image)
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        return np.asarray(image.convert("RGBA"))
    return np.asarray(image.convert("L" if image.mode in {"1", "LA", "La"} else "RGB"))


def metadata_of(image: Image.Image) -> SlideMetadata:
    """Return the colour profile and the resolution of an open picture."""
    dpi = image.info.get("dpi")
    try:
        pair = None if dpi is None else (float(dpi[0]), float(dpi[1]))
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        pair = None
    profile = image.info.get("icc_profile")
    return SlideMetadata(icc_profile=profile if isinstance(profile, bytes) and profile else None, dpi=pair)


def deep_pixels(path: Path, image: Image.Image) -> npt.NDArray[Any] | None:
    """Return the pixels of a colour picture of more than 8 bits a sample, which Pillow reads as 8 bits.

    Returns None for all other pictures.

    Raises
    ------
    CAEConfigurationError
        If the picture has more than 8 bits, and nothing here reads them.
    """
    bits = _bits(path, image)
    if bits <= 8 or len(image.getbands()) < 3:
        return None
    name = _DECODERS.get(image.format or "")
    try:
        import imagecodecs
    except ImportError:
        name = None
    if name is None:
        raise CAEConfigurationError(
            f"cae: {path} has {bits} bits a colour, of which Pillow keeps 8; imagecodecs reads PNG, JPEG 2000 and AVIF "
            "files whole, and tifffile TIFF files: pip install 'zarr-cae[slides]'"
        )
    return np.asarray(getattr(imagecodecs, name)(path.read_bytes()))


def _bits(path: Path, image: Image.Image) -> int:
    """Return how many bits a sample has, by the header of the file."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if image.format == "PNG":
        return head[24]
    if image.format == "JPEG2000":
        place = head.find(b"\xff\x51")  # marker SIZ of the code stream; the depth of the first component follows
        return (head[place + 40] & 0x7F) + 1 if 0 <= place < len(head) - 40 else 8
    if image.format == "AVIF":
        place = head.find(b"pixi")
        return head[place + 9] if 0 <= place < len(head) - 9 else 8
    if image.format == "PPM":
        fields = re.sub(rb"#[^\n]*", b"", head[:4096]).split(maxsplit=4)
        return int(fields[3]).bit_length() if len(fields) > 3 and fields[0] in {b"P3", b"P6"} else 8
    if image.format == "TIFF":
        depth = getattr(image, "tag_v2", {}).get(258, (8,))
        return max(depth) if isinstance(depth, tuple) else int(depth)
    return 16 if any("16" in str(tile) for tile in getattr(image, "tile", [])) else 8
