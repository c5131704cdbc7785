"""Images in files: what Pillow reads, `.npy` and `.zarr` to arrays, and arrays back to files."""

from __future__ import annotations

import math
import secrets
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zarr_cae.cli.arguments import refuse
from zarr_cae.errors import CAEError
from zarr_cae.pillow import IMAGE_DAMAGE, no_size_limit

if TYPE_CHECKING:
    import zarr
    from PIL import Image

Pixels = npt.NDArray[Any]
_FRAMES_MATTER = {"TIFF", "GIF", "WEBP", "PNG", "AVIF"}
"""Formats whose further frames are images of their own; those of a JPEG are previews and depth maps."""
_RGB_MODES = {"RGB", "RGBX", "P", "CMYK", "YCbCr", "LAB", "HSV"}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "TIFF": {"compression": "tiff_lzw"},
}
"""So that a decoded image is not spoilt by the format it is put into."""
_METADATA = ("zarr.json", ".zarray", ".zgroup")
_METADATA_DAMAGE = (AttributeError, KeyError, TypeError, ValueError)
_CHUNK_DAMAGE = (EOFError, RuntimeError, ValueError, zlib.error)
"""What zarr raises for metadata and zarr's codecs for chunks that make no sense."""


@dataclass(frozen=True)
class Source:
    """An image or array to encode; only slices of `array` are read."""

    name: str
    array: Pixels | zarr.Array[Any]
    channel_axis: int | str | None
    """"auto" where the file does not say."""
    dimension_names: tuple[str | None, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array's dtype."""
        return self.array.dtype


def is_zarr(path: Path) -> bool:
    """Whether a folder is the root of a zarr hierarchy."""
    return any((path / name).is_file() for name in _METADATA)


def open_source(path: Path) -> Source:
    """Open an image file, a `.npy` file or a zarr array. Raises CAEConfigurationError, OSError or zarr's errors."""
    if _is_array(path) and path.suffix.lower() != ".npy":
        if path.is_dir() and path.suffix != ".zarr" and not is_zarr(path):
            refuse(f"{path} is a folder and no zarr array; name the images in it, as {path / '*.png'} does")
        array = open_array(path)
        names = getattr(array.metadata, "dimension_names", None)
        return Source(path.stem, array, "auto", None if names is None else tuple(names))
    if path.suffix.lower() == ".npy":
        try:
            return Source(path.stem, np.lib.format.open_memmap(path, mode="r"), "auto")  # which takes no .npz
        except (ValueError, OverflowError, TypeError, TokenError) as error:
            refuse(f"{path} is not a .npy file of numbers: {error}")
    pixels = read_image(path)
    grey = pixels.ndim == 2
    return Source(path.stem, pixels, None if grey else 2, ("y", "x") if grey else ("y", "x", "c"))


def megapixels(path: Path) -> float:
    """The size of a source, from its header alone."""
    from PIL import Image

    if _is_array(path):
        source = open_source(path)
        return math.prod(source.shape) / (3e6 if 3 in source.shape else 1e6)
    with no_size_limit(), refusing_damage(str(path), IMAGE_DAMAGE), Image.open(path) as image:
        return image.width * image.height / 1e6


def _is_array(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() == ".npy" or any(part.endswith(".zarr") for part in path.parts)


@contextmanager
def refusing_damage(what: str, errors: tuple[type[Exception], ...] = _CHUNK_DAMAGE) -> Iterator[None]:
    """Refuse `what` for the errors by which other libraries say that stored bytes make no sense."""
    try:
        yield
    except (CAEError, OSError):
        raise
    except errors as error:
        refuse(f"{what} can't be read; is it damaged? {type(error).__name__}: {error}")


def arrays_at(
    path: Path, open_node: Callable[[Path], zarr.Array[Any] | zarr.Group] | None = None
) -> tuple[zarr.Array[Any] | None, dict[str, zarr.Array[Any]]]:
    """The array at a path, or else the arrays in the group there, by name; opened by `open_node` or by zarr, read only.

    Raises CAEConfigurationError if there is nothing, or if its metadata are damaged.
    """
    import zarr

    if not path.exists():
        refuse(f"{path} does not exist")
    with refusing_damage(f"the metadata of {path}", _METADATA_DAMAGE):
        try:
            node = zarr.open(path, mode="r") if open_node is None else open_node(path)
        except FileNotFoundError:
            refuse(f"{path} holds no zarr array or group")
        if isinstance(node, zarr.Array):
            return node, {}
        members = sorted(node.members(max_depth=None), key=lambda member: member[0])
    return None, {name: member for name, member in members if isinstance(member, zarr.Array)}


def open_array(path: Path) -> zarr.Array[Any]:
    """The zarr array at a path, or the only one in the group there; read only."""
    array, members = arrays_at(path)
    if array is not None:
        return array
    if len(members) != 1:
        examples = ", ".join(f"{path}/{name}" for name in list(members)[:4])
        refuse(f"{path} is a group of {len(members)} arrays; name one of them" + (f": {examples}" if members else ""))
    return next(iter(members.values()))


def read_image(path: Path) -> Pixels:
    """A file's pixels upright: (H, W, 3) uint8, (H, W) uint8, or (H, W) of the file's own deeper dtype.

    Raises CAEConfigurationError for transparent images and for those of several frames.
    """
    from PIL import Image, ImageOps

    with no_size_limit(), refusing_damage(str(path), IMAGE_DAMAGE), Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format in _FRAMES_MATTER:
            refuse(f"{path} has {frames} frames; give them as separate images, or stacked in one .npy file")
        return _pixels(ImageOps.exif_transpose(image), path)


def _pixels(image: Image.Image, path: Path) -> Pixels:
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in {"I", "F"}:
        pixels = np.asarray(image)
        sixteen = image.mode == "I" and pixels.min() >= 0 and pixels.max() <= 65535
        return pixels.astype(np.uint16) if sixteen else pixels
    if image.mode in {"RGBA", "RGBa", "LA", "La", "PA"} or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        if with_alpha.getchannel("A").getextrema() != (255, 255):
            refuse(
                f"{path} has transparent pixels, which would be lost; flatten it first, or save its RGBA pixels as "
                ".npy and encode that with --channel-axis 2"
            )
        image = with_alpha.convert("L" if image.mode in {"L", "LA", "La"} else "RGB")
    return np.asarray(image.convert("RGB" if image.mode in _RGB_MODES else "L"))


def picture_format(path: Path) -> str:
    """Pillow's name of the format that a file name's suffix asks for."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    name = suffixes.get(path.suffix.lower(), "")
    if name not in Image.SAVE:
        refuse(f"{path}: no image format that can be written has the suffix {path.suffix!r}; try .png, .tif or .npy")
    return name


def picture(pixels: Pixels, path: Path) -> Image.Image:
    """(H, W) or (H, W, 3) pixels as an image that the format of `path` can hold; refused if it cannot."""
    from PIL import Image

    name = picture_format(path)
    shape, dtype = pixels.shape, pixels.dtype
    grey, colour = pixels.ndim == 2, pixels.ndim == 3 and shape[-1] == 3
    if dtype == np.uint8 and (grey or colour):
        return Image.fromarray(pixels)
    if dtype == np.uint16 and grey and name in {"PNG", "TIFF"}:
        return Image.fromarray(pixels)
    if dtype == np.float32 and grey and name == "TIFF":
        return Image.fromarray(pixels)
    holds = [".npy"]
    if grey and dtype in (np.uint16, np.float32):
        holds += [".tif"] if dtype == np.float32 else [".tif", ".png"]
    return refuse(f"an array of {dtype} {shape} does not fit into {path.suffix}; write it to {' or '.join(holds)}")


def save_picture(image: Image.Image, path: Path, name: str | None = None) -> None:
    """Write an image file, whole or not at all."""
    name = picture_format(path) if name is None else name
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        image.save(partial, name, **_SAVE_OPTIONS.get(name, {}))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end, and vanishes on any failure."""
    if path.is_dir():
        refuse(f"{path} is a folder")
    if not path.parent.is_dir():
        refuse(f"folder {path.parent} does not exist")
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
