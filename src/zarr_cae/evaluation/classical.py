"""Classical codecs to compare with: JPEG, WebP, AVIF, JPEG XL, JPEG 2000.

All work on one thread, at 4:4:4 where the format can, so that times and rates compare with one another. They take RGB
or grey images of 8 bits. AVIF and JPEG XL come from imagecodecs (extra `compare`), the others from Pillow. The choice
of parameters was measured on Kodak with imagecodecs 2026.1.14 and Pillow 13.0; each function names the important ones.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.curves import Coded, Point, measure
from zarr_cae.evaluation.extra import import_extra
from zarr_cae.evaluation.measures import psnr

Uint8Pixels: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class ClassicalCodec:
    """A lossy image codec.

    `encode` and `decode` raise CAEConfigurationError if the library behind them is missing.

    Attributes
    ----------
    name
        Its name on the command line.
    title
        Its name in texts and plots.
    limits
        The least and the greatest distinct setting.
    settings
        Settings in order of rising rate, about 0.1 to 2 bits per pixel of a photograph, as far as the format reaches.
    encode
        `encode(pixels, setting)` returns the bytes of a file; pixels are (H, W, 3) RGB or (H, W) grey, uint8.
    decode
        `decode(data, grey)` returns the pixels.
    """

    name: str
    title: str
    limits: tuple[float, float]
    settings: tuple[float, ...]
    encode: Callable[[Uint8Pixels, float], bytes]
    decode: Callable[[bytes, bool], Uint8Pixels]

    @property
    def integers(self) -> bool:
        """Whether settings are whole numbers."""
        return all(setting == int(setting) for setting in self.settings)


def _encode_pillow(pixels: Uint8Pixels, file_format: str, **options: object) -> bytes:
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, file_format, **options)
        return file.getvalue()


def _decode_pillow(data: bytes, grey: bool = False) -> Uint8Pixels:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("L" if grey else "RGB"))


def _imagecodecs() -> Any:
    return import_extra("imagecodecs", "AVIF and JPEG XL")


def _encode_jpeg(pixels: Uint8Pixels, setting: float) -> bytes:
    """Encode as baseline JPEG by libjpeg-turbo: 4:4:4, optimised Huffman tables; the setting is its quality."""
    return _encode_pillow(pixels, "JPEG", quality=round(setting), subsampling=0, optimize=True)


def _encode_webp(pixels: Uint8Pixels, setting: float) -> bytes:
    """Encode as lossy WebP by libwebp with its slowest search (method 6); the setting is its quality.

    The format is always 4:2:0, stores grey images as colours, and does not reach the lowest rates.
    """
    return _encode_pillow(pixels, "WEBP", quality=round(setting), method=6)


def _encode_avif(pixels: Uint8Pixels, setting: float) -> bytes:
    """Encode as AVIF by libaom: 4:4:4 YCbCr (BT.601), speed 6; the setting is libavif's quality (100 is lossless).

    Grey images become equal colours: imagecodecs codes two-dimensional arrays without loss at every level, and
    flat chroma planes cost some 20 bytes.
    """
    colours = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels
    data = _imagecodecs().avif_encode(
        colours, level=round(setting), speed=6, pixelformat="yuv444", codec="aom", numthreads=1
    )
    return bytes(data)


def _decode_avif(data: bytes, grey: bool = False) -> Uint8Pixels:
    pixels = np.asarray(_imagecodecs().avif_decode(data, numthreads=1), np.uint8)
    return pixels[..., 1] if grey else pixels


def _encode_jpegxl(pixels: Uint8Pixels, setting: float, effort: int = 7) -> bytes:
    """Encode as JPEG XL by libjxl: XYB, 4:4:4; the setting is the Butteraugli distance, 25 (coarse) to 0.1.

    Effort 7 is libjxl's default and must be named: imagecodecs' own default is 5.
    """
    return bytes(_imagecodecs().jpegxl_encode(pixels, distance=float(setting), effort=effort, numthreads=1))


def _decode_jpegxl(data: bytes, grey: bool = False) -> Uint8Pixels:
    pixels = np.asarray(_imagecodecs().jpegxl_decode(data, numthreads=1), np.uint8)
    return pixels[..., 0] if grey and pixels.ndim == 3 else pixels


def _encode_jpeg2000(pixels: Uint8Pixels, setting: float) -> bytes:
    """Encode as JPEG 2000 by OpenJPEG: irreversible 9/7 wavelet and colour transform, one tile, bare codestream.

    The setting is the target in bits per pixel, as in published JPEG 2000 curves. Hence Pillow: imagecodecs aims at a
    PSNR instead. That gives the same files image by image, but a mean curve more than 1 dB lower (Kodak at
    0.6 bit/px), because hard images then take most of the mean rate.
    """
    colour = pixels.ndim == 3
    rate = [(24 if colour else 8) / setting]
    return _encode_pillow(
        pixels, "JPEG2000", irreversible=True, mct=int(colour), no_jp2=True, quality_mode="rates", quality_layers=rate
    )


_DISTANCES = (25, 15, 10, 7, 5, 3.5, 2.5, 1.8, 1.2, 0.8)
_JPEG_SETTINGS = (5, 10, 20, 30, 40, 50, 60, 70, 80, 87, 92)
_WEBP_SETTINGS = (0, 5, 20, 40, 60, 75, 85, 92, 96)
_AVIF_SETTINGS = (5, 10, 20, 30, 40, 50, 60, 70, 80)
_JPEG2000_SETTINGS = (0.1, 0.15, 0.22, 0.33, 0.5, 0.75, 1.1, 1.6, 2.3)

CLASSICAL: dict[str, ClassicalCodec] = {
    codec.name: codec
    for codec in (
        ClassicalCodec("jpeg", "JPEG", (1, 95), _JPEG_SETTINGS, _encode_jpeg, _decode_pillow),
        ClassicalCodec("webp", "WebP", (0, 100), _WEBP_SETTINGS, _encode_webp, _decode_pillow),
        ClassicalCodec("avif", "AVIF", (0, 99), _AVIF_SETTINGS, _encode_avif, _decode_avif),
        ClassicalCodec("jpegxl", "JPEG XL", (0.1, 25), _DISTANCES, _encode_jpegxl, _decode_jpegxl),
        ClassicalCodec(
            "jpegxl3", "JPEG XL, effort 3", (0.1, 25), _DISTANCES, partial(_encode_jpegxl, effort=3), _decode_jpegxl
        ),
        ClassicalCodec("jpeg2000", "JPEG 2000", (0.01, 24), _JPEG2000_SETTINGS, _encode_jpeg2000, _decode_pillow),
    )
}
"""By name. `jpegxl3` is JPEG XL with effort 3 instead of 7: many times faster."""


def spread(settings: Sequence[float], count: int | None) -> tuple[float, ...]:
    """Return at most `count` of the settings, the first and the last among them; all of them for None."""
    if count is None or count >= len(settings):
        return tuple(settings)
    return tuple(settings[i] for i in np.rint(np.linspace(0, len(settings) - 1, count)).astype(int))


def code_classical(codec: ClassicalCodec, pixels: Uint8Pixels, setting: float) -> Coded:
    """Encode and decode an image, (H, W, 3) RGB or (H, W) grey, uint8. Raise CAEConfigurationError for others."""
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise CAEConfigurationError(
            f"cae: {codec.title} is measured on (H, W, 3) or (H, W) uint8 images, this one is "
            f"{pixels.dtype} {pixels.shape}"
        )
    contiguous = np.ascontiguousarray(pixels)
    start = time.perf_counter()
    data = codec.encode(contiguous, setting)
    encoded = time.perf_counter()
    decoded = codec.decode(data, grey)
    return Coded(decoded, len(data), encoded - start, time.perf_counter() - encoded)


def match(
    codec: ClassicalCodec, pixels: Uint8Pixels, by: Literal["bytes", "psnr"], target: float
) -> tuple[float, Coded]:
    """Find the setting at which a codec comes nearest to a number of bytes or to a PSNR.

    Parameters
    ----------
    codec
        Its rate and PSNR are assumed to rise from each setting to the next.
    pixels
        (H, W, 3) RGB or (H, W) grey, uint8.
    by
        The quantity to match: "bytes" or "psnr".
    target
        In bytes, or in dB.

    Returns
    -------
    tuple
        The setting, a float, and the image coded with it.
    """
    first, last = codec.settings[0], codec.settings[-1]
    if codec.integers:
        grid = np.arange(codec.limits[0], codec.limits[1] + 1)
    else:  # distances fall and rates rise along the grid
        least, greatest = codec.limits
        grid = np.geomspace(*((greatest, least) if first > last else (least, greatest)), 128)
    tried: dict[int, tuple[float, Coded]] = {}

    def value(index: int) -> float:
        coded = code_classical(codec, pixels, float(grid[index]))
        tried[index] = (float(coded.nbytes) if by == "bytes" else psnr(pixels, coded.pixels)), coded
        return tried[index][0]

    low, high = -1, len(grid)  # the target lies between them
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(middle) <= target else (low, middle)
    nearest = min(tried, key=lambda index: abs(tried[index][0] - target))
    return float(grid[nearest]), tried[nearest][1]


def evaluate_classical(
    name: str, images: Iterable[tuple[str, Uint8Pixels]], settings: Sequence[float] | None = None
) -> list[Point]:
    """Code every image at every setting and measure the results.

    Parameters
    ----------
    name
        A key of `CLASSICAL`.
    images
        Names and pixels: (H, W, 3) RGB or (H, W) grey, uint8.
    settings
        By default the codec's own.

    Returns
    -------
    list of Point
        One for each image and setting; `codec` is the name; bytes are those of the whole file.

    Raises
    ------
    CAEConfigurationError
        For an unknown codec, other images, or settings out of range; if a library is missing.
    """
    if name not in CLASSICAL:
        raise CAEConfigurationError(f"cae: no classical codec is called {name!r}; there are {', '.join(CLASSICAL)}")
    codec = CLASSICAL[name]
    settings = codec.settings if settings is None else settings
    least, greatest = codec.limits
    if not all(least <= setting <= greatest for setting in settings):
        raise CAEConfigurationError(f"cae: settings of {name} are from {least:g} to {greatest:g}, not {list(settings)}")
    return [
        measure(name, setting, image, pixels, code_classical(codec, pixels, setting))
        for image, pixels in images
        for setting in settings
    ]
