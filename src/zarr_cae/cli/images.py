"""Read image files, `.npy` and `.zarr` as arrays, and write arrays to image files."""

from __future__ import annotations

import itertools
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

import numpy as np

from zarr_cae.cli.arguments import refuse
from zarr_cae.cli.replacing import is_zarr, replacing
from zarr_cae.errors import CAEError
from zarr_cae.pixels.layout import Pixels
from zarr_cae.pixels.pillow import opened_picture
from zarr_cae.slides.metadata import SlideMetadata
from zarr_cae.slides.ome import source_attributes
from zarr_cae.slides.pictures import deep_pixels, metadata_of
from zarr_cae.slides.sources import Sliceable, Slide, is_tiff
from zarr_cae.slides.tiff import MissingLibraryError, open_tiff

if TYPE_CHECKING:
    import zarr
    from PIL import Image

_FRAMES_MATTER = {"TIFF", "GIF", "WEBP", "PNG", "AVIF"}
"""Formats whose further frames are images of their own; those of a JPEG are previews and depth maps."""
_TRANSPARENT = {"PNG", "TIFF", "WEBP", "AVIF", "JPEG2000", "TGA"}
"""Formats that keep an alpha channel with its 256 levels."""
PAGES = {"TIFF"}
"""Formats that a stack of pictures is decoded to: the only one with several pages that keeps pixels exact."""
RGBA = "rgba"
"""Name of the axis of a picture's colours and alpha. Four channels of another name are not a picture."""
_RGB_MODES = {"RGB", "RGBX", "P", "CMYK", "YCbCr", "LAB", "HSV"}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "TIFF": {"compression": "tiff_lzw"},
}
"""Options of the formats that keep as much of a decoded image as possible."""
_METADATA_DAMAGE = (AttributeError, KeyError, TypeError, ValueError)
_CHUNK_DAMAGE = (EOFError, RuntimeError, ValueError, zlib.error)
"""The errors that zarr raises for malformed metadata, and its codecs for malformed chunks."""
_CODEC_PACKAGES = {
    "cae": "zarr-cae again: Python can't find its codecs",
    "imagecodecs_": "imagecodecs, and call imagecodecs.numcodecs.register_codecs() before the array is read",
    "numcodecs.": "a newer numcodecs and zarr",
    "zfpy": "numcodecs[zfpy]",
    "pcodec": "numcodecs[pcodec]",
    "wavpack": "wavpack-numcodecs",
    "flac": "flac-numcodecs",
}
"""The package that registers a codec, by the beginning of its name."""


@dataclass(frozen=True)
class Source:
    """An image or array to encode; only slices of `array` are read."""

    name: str
    array: Sliceable
    channel_axis: int | str | None
    """"auto" where the file does not say."""
    dimension_names: tuple[str | None, ...] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Colour profile and resolution of the file, as `zarr_cae.slides.ome.source_attributes` keeps them."""
    value_range: tuple[float, float] | None = None
    """Lowest and highest value, if the file says them (SignificantBits of OME-XML)."""
    close: Callable[[], None] = lambda: None
    path: Path | None = None
    """The file or folder, as `open_source` got it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array's dtype."""
        return self.array.dtype


def open_source(path: Path, *, series: int | None = None, level: int = 0) -> Source:
    """Open an image file, a `.npy` file or a zarr array. Raise CAEConfigurationError, OSError or zarr's errors.

    `series` and `level` are those of `zarr_cae.slides.sources.open_slide`.
    """
    return replace(_opened_source(path, series, level), path=path)


def _opened_source(path: Path, series: int | None, level: int) -> Source:
    if _is_array(path) and path.suffix.lower() != ".npy":
        return _open_zarr_source(path, level)
    if path.suffix.lower() == ".npy":
        try:
            return Source(path.stem, np.lib.format.open_memmap(path, mode="r"), "auto")  # refuses .npz
        except (ValueError, OverflowError, TypeError, TokenError) as error:
            refuse(f"{path} is not a .npy file of numbers, or damaged: {error}")
    slide = _open_tiff_source(path, series, level)
    if slide is not None:
        names = tuple({"-": None}.get(axis, axis) for axis in slide.stored)
        axis = names.index("c") if slide.rgb else None
        metadata = slide.metadata
        return Source(
            path.stem, slide.array, axis, names, source_attributes(metadata), metadata.value_range, slide.close
        )
    pixels, names = read_pixels(path, level=level)
    with opened_picture(path) as image:
        attributes = source_attributes(metadata_of(image))
    return Source(path.stem, pixels, None if names[-1] == "x" else len(names) - 1, names, attributes)


def _open_zarr_source(path: Path, level: int) -> Source:
    if path.is_dir() and path.suffix != ".zarr" and not is_zarr(path):
        refuse(f"{path} is a folder and no zarr array; name the images in it, as {path / '*.png'} does")
    array, members = arrays_at(path)
    if array is None and len(members) > 1:
        from zarr_cae.slides.arrays import open_zarr

        slide = open_zarr(path, level=level)  # an OME-Zarr image
        axis = slide.stored.index("c") if slide.rgb else None
        return Source(path.stem, slide.array, axis, tuple(slide.stored), source_attributes(slide.metadata))
    array = open_array(path)
    names = getattr(array.metadata, "dimension_names", None)
    return Source(path.stem, array, "auto", None if names is None else tuple(names))


def _open_tiff_source(path: Path, series: int | None, level: int) -> Slide | None:
    """Open a TIFF file through tifffile, window by window. Return None if Pillow must convert it first."""
    if not is_tiff(path):
        return None
    try:
        slide = open_tiff(path, series=series, level=level)
    except MissingLibraryError:
        return None
    samples = slide.array.shape[slide.stored.index("c")] if "c" in slide.stored else 1
    plain = slide.array.dtype.kind in "uif" and (slide.rgb or samples != 4 or slide.array.dtype != np.uint8)
    if slide.orientation == 1 and slide.plain and plain:
        return slide
    slide.close()
    return None


def megapixels(path: Path, *, series: int | None = None, level: int = 0) -> float:
    """Return the size of a source, from its header alone."""
    slide = None if _is_array(path) else _open_tiff_source(path, series, level)
    if slide is not None:
        slide.close()
        return math.prod(slide.array.shape) / (3e6 if slide.rgb else 1e6)
    if _is_array(path):
        source = open_source(path, level=level)
        return math.prod(source.shape) / (3e6 if 3 in source.shape else 1e6)
    with opened_picture(path) as image:
        return len(_frame_numbers(path, image, level)) * image.width * image.height / 1e6


def _is_array(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() == ".npy" or any(part.endswith(".zarr") for part in path.parts)


@contextmanager
def refusing_damage(subject: str, errors: tuple[type[Exception], ...] = _CHUNK_DAMAGE) -> Iterator[None]:
    """Turn the errors that other libraries raise for malformed bytes into CAEConfigurationError about `subject`."""
    try:
        yield
    except (CAEError, OSError):
        raise
    except errors as error:
        if type(error).__name__ == "UnknownCodecError":  # of zarr, or of numcodecs for zarr v2
            told = re.search("codec '([^']*)' is not available", str(error))  # newer zarr
            name = told[1] if told else str(error).partition(":")[2].strip(" '") or str(error)
            refuse(f"{subject} name the codec {name!r}, which is not installed; {_reader(name)}")
        refuse(f"{subject} can't be read; is it damaged? {type(error).__name__}: {error}")


def _reader(codec: str) -> str:
    """Return advice on how to read a codec that is not installed."""
    for beginning, package in _CODEC_PACKAGES.items():
        if codec.startswith(beginning):
            return f"install {package}"
    return "install the package that wrote the array, or one that registers this codec with zarr or numcodecs"


def arrays_at(
    path: Path, open_node: Callable[[Path], zarr.Array[Any] | zarr.Group] | None = None
) -> tuple[zarr.Array[Any] | None, dict[str, zarr.Array[Any]]]:
    """Return the array at a path, or else the arrays in the group there, by name; open them by `open_node` or by zarr.

    Raise CAEConfigurationError if there is nothing, or if its metadata are damaged.
    """
    import zarr

    from zarr_cae.codec import embedded

    if not path.exists():
        refuse(absent(path))
    with refusing_damage(f"the metadata of {path}", _METADATA_DAMAGE):
        try:
            node = (open_node or embedded.open)(path)
        except FileNotFoundError:
            refuse(f"{path} holds no zarr array or group")
        if isinstance(node, zarr.Array):
            return node, {}
        members = sorted(node.members(max_depth=None), key=lambda member: member[0])
    return None, {name: member for name, member in members if isinstance(member, zarr.Array)}


def absent(path: Path) -> str:
    """Return the message about a path that does not exist, or is the name of an unfinished conversion."""
    from zarr_cae.slides.journal import unfinished

    return unfinished(path) or f"{path} does not exist"


def open_array(path: Path) -> zarr.Array[Any]:
    """Open the zarr array at a path, or the only one in the group there, read only."""
    array, members = arrays_at(path)
    if array is not None:
        return array
    if len(members) != 1:
        examples = ", ".join(f"{path}/{name}" for name in list(members)[:4])
        refuse(f"{path} is a group of {len(members)} arrays; name one of them" + (f": {examples}" if members else ""))
    return next(iter(members.values()))


def read_image(path: Path) -> Pixels:
    """Return one opaque picture, upright: (H, W, 3) uint8, (H, W) uint8, or (H, W) of a deeper dtype, as in the file.

    Raise CAEConfigurationError for transparent images and for those of several frames.
    """
    pixels, names = read_pixels(path)
    if names not in (("y", "x"), ("y", "x", "c")):
        reason = "transparent pixels; flatten it" if names[-1] == RGBA else "several frames; save them as images"
        refuse(f"{path} has {reason} first")
    return pixels


def read_pixels(path: Path, *, level: int = 0) -> tuple[Pixels, tuple[str, ...]]:
    """Return all pixels of an image file, upright, and the names of its axes: some of "t", "y", "x", "c".

    Several frames have the shape (T, H, W[, C]). If there are transparent pixels, the last axis is named `RGBA`. If
    the frames are the levels of a pyramid, `level` chooses one.

    Raise CAEConfigurationError if frames are of different forms, or have more bits than can be read.
    """
    from PIL import ImageOps

    pages = []
    with opened_picture(path) as image:
        for frame in _frame_numbers(path, image, level):
            image.seek(frame)
            deep = deep_pixels(path, image)
            pages.append(_pixels(ImageOps.exif_transpose(image)) if deep is None else deep)
    transparent = any(page.shape[2:] == (4,) for page in pages)
    if transparent:  # in a film only some frames may be transparent
        pages = [_with_alpha(page) if page.shape[2:] == (3,) else page for page in pages]
    forms = {(page.shape, page.dtype) for page in pages}
    if len(forms) > 1:
        refuse(f"{path} has frames of several sizes or modes ({len(forms)}); save them as separate images")
    names = ("y", "x", RGBA if transparent else "c")[: pages[0].ndim]
    return (pages[0], names) if len(pages) == 1 else (np.stack(pages), ("t", *names))


def _frame_numbers(path: Path, image: Image.Image, level: int) -> Sequence[int]:
    """Return the numbers of the frames to read, from their sizes in the header: all, or one level of a pyramid."""
    frames = getattr(image, "n_frames", 1) if image.format in _FRAMES_MATTER else 1
    sizes = []
    for frame in range(frames if image.format == "TIFF" else 1):
        image.seek(frame)
        sizes.append(image.size)
    image.seek(0)
    if len(set(sizes)) <= 1:
        if level:
            refuse(f"{path} is not a pyramid, so it has no level {level}")
        return range(frames)
    copies = all(
        2 * small[0] <= large[0] + 1 and abs(large[0] / small[0] - large[1] / small[1]) < large[0] / small[0] / 4
        for large, small in itertools.pairwise(sizes)
    )
    if not copies:
        refuse(f"{path} has frames of several sizes ({len(set(sizes))}); save them as separate images")
    if not 0 <= level < len(sizes):
        refuse(f"{path} has no level {level}; its levels are {', '.join(f'{w} x {h}' for w, h in sizes)}")
    return [level]


def _with_alpha(page: Pixels) -> Pixels:
    return np.dstack([page, np.full(page.shape[:2], np.iinfo(page.dtype).max, page.dtype)])


def _pixels(image: Image.Image) -> Pixels:
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in {"I", "F"}:
        pixels = np.asarray(image)
        sixteen = image.mode == "I" and pixels.min() >= 0 and pixels.max() <= 65535
        return pixels.astype(np.uint16) if sixteen else pixels
    if image.mode in {"RGBA", "RGBa", "LA", "La", "PA"} or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        if with_alpha.getchannel("A").getextrema() != (255, 255):
            return np.asarray(with_alpha)
        image = with_alpha.convert("L" if image.mode in {"L", "LA", "La"} else "RGB")
    return np.asarray(image.convert("RGB" if image.mode in _RGB_MODES else "L"))


def picture_format(path: Path) -> str:
    """Return Pillow's name of the format for a file name's suffix."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    name = suffixes.get(path.suffix.lower(), "")
    if name not in Image.SAVE:
        refuse(f"{path}: no image format that can be written has the suffix {path.suffix!r}; try .png, .tif or .npy")
    return name


def picture(pixels: Pixels, path: Path) -> Image.Image:
    """Return (H, W), RGB or RGBA pixels as an image that the format of `path` can hold, or refuse them."""
    from PIL import Image

    name = picture_format(path)
    shape, dtype = pixels.shape, pixels.dtype
    grey, colour = pixels.ndim == 2, pixels.ndim == 3 and shape[-1] == 3
    alpha = pixels.ndim == 3 and shape[-1] == 4
    if dtype == np.uint8 and (grey or colour or (alpha and name in _TRANSPARENT)):
        return Image.fromarray(pixels)
    if dtype == np.uint16 and grey and name in {"PNG", "TIFF"}:
        return Image.fromarray(pixels)
    if dtype == np.float32 and grey and name == "TIFF":
        return Image.fromarray(pixels)
    holds = [".npy"]
    if grey and dtype in (np.uint16, np.float32):
        holds += [".tif"] if dtype == np.float32 else [".tif", ".png"]
    if alpha and dtype == np.uint8:
        holds += [".png", ".tif"]
    return refuse(f"an array of {dtype} {shape} does not fit into {path.suffix}; write it to {' or '.join(holds)}")


def save_picture(
    image: Image.Image,
    path: Path,
    name: str | None = None,
    *,
    further: Sequence[Image.Image] = (),
    metadata: SlideMetadata | None = None,
) -> None:
    """Write an image file, whole or not at all.

    `further` are the other pages of a TIFF; the colour profile and the resolution of `metadata` are stored with it.
    """
    name = picture_format(path) if name is None else name
    pages: dict[str, Any] = {"save_all": True, "append_images": further} if further else {}
    if metadata is not None and metadata.icc_profile is not None:
        pages["icc_profile"] = metadata.icc_profile
    if metadata is not None and metadata.dpi is not None:
        pages["dpi"] = metadata.dpi
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        image.save(partial, name, **_SAVE_OPTIONS.get(name, {}), **pages)
