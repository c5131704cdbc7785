"""The codecs that people would otherwise keep images in: JPEG, WebP, AVIF, JPEG XL, JPEG 2000.

All code 8-bit RGB on one thread, at 4:4:4 where the format can, so that times and rates compare with one another.
AVIF and JPEG XL come from imagecodecs (extra `compare`), the others from Pillow. What the parameters do was measured
on Kodak with imagecodecs 2026.1.14 and Pillow 13.0; each function says what matters.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.measures import Point, measure

__all__ = ["RIVALS", "Rival", "evaluate_rival"]

Pixels: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Rival:
    """A lossy image codec: `encode(pixels, setting)` takes (H, W, 3) uint8 RGB, `decode(data)` returns it.

    `settings` are in order of rising rate and cover about 0.1 to 2 bits per pixel of a photograph, or what the
    format reaches of that; `limits` are the least and the greatest setting with a meaning of its own. Both functions
    raise CAEConfigurationError if the library behind them is missing.
    """

    name: str
    limits: tuple[float, float]
    settings: tuple[float, ...]
    encode: Callable[[Pixels, float], bytes]
    decode: Callable[[bytes], Pixels]


def _encode_pillow(pixels: Pixels, file_format: str, **options: object) -> bytes:
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, file_format, **options)
        return file.getvalue()


def _decode_pillow(data: bytes) -> Pixels:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _imagecodecs() -> ModuleType:
    try:
        import imagecodecs
    except ImportError as error:
        raise CAEConfigurationError(
            "cae: AVIF and JPEG XL need imagecodecs: pip install 'zarr-cae[compare]'"
        ) from error
    module: ModuleType = imagecodecs
    return module


def _encode_jpeg(pixels: Pixels, setting: float) -> bytes:
    """Baseline JPEG by libjpeg-turbo: 4:4:4, optimised Huffman tables; the setting is its quality."""
    return _encode_pillow(pixels, "JPEG", quality=round(setting), subsampling=0, optimize=True)


def _encode_webp(pixels: Pixels, setting: float) -> bytes:
    """Lossy WebP by libwebp, its slowest search (method 6); the setting is its quality.

    Lossy WebP is always 4:2:0, the format knows nothing else; and it does not reach the lowest rates.
    """
    return _encode_pillow(pixels, "WEBP", quality=round(setting), method=6)


def _encode_avif(pixels: Pixels, setting: float) -> bytes:
    """AVIF by libaom: 4:4:4 YCbCr (BT.601), speed 6; the setting is libavif's quality (100 would be lossless)."""
    data = _imagecodecs().avif_encode(
        pixels, level=round(setting), speed=6, pixelformat="yuv444", codec="aom", numthreads=1
    )
    return bytes(data)


def _decode_avif(data: bytes) -> Pixels:
    return np.asarray(_imagecodecs().avif_decode(data, numthreads=1), np.uint8)


def _encode_jpegxl(pixels: Pixels, setting: float, effort: int = 7) -> bytes:
    """JPEG XL by libjxl: XYB, 4:4:4; the setting is the Butteraugli distance, 25 (coarse) to 0.1.

    Effort 7 is libjxl's default and must be named: imagecodecs' own default is 5.
    """
    return bytes(_imagecodecs().jpegxl_encode(pixels, distance=float(setting), effort=effort, numthreads=1))


def _decode_jpegxl(data: bytes) -> Pixels:
    return np.asarray(_imagecodecs().jpegxl_decode(data, numthreads=1), np.uint8)


def _encode_jpeg2000(pixels: Pixels, setting: float) -> bytes:
    """JPEG 2000 by OpenJPEG: irreversible 9/7 wavelet and colour transform, one tile, bare codestream (no JP2 boxes).

    The setting is the target in bits per pixel, as published JPEG 2000 curves have it, hence Pillow: imagecodecs
    aims at a PSNR instead, which gives the same files image by image, but a mean curve more than 1 dB lower (Kodak at
    0.6 bit/px), because hard images then take most of the mean rate.
    """
    return _encode_pillow(
        pixels, "JPEG2000", irreversible=True, mct=1, no_jp2=True, quality_mode="rates", quality_layers=[24 / setting]
    )


_DISTANCES = (25, 15, 10, 7, 5, 3.5, 2.5, 1.8, 1.2, 0.8)

RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival("jpeg", (1, 95), (5, 10, 20, 30, 40, 50, 60, 70, 80, 87, 92), _encode_jpeg, _decode_pillow),
        Rival("webp", (0, 100), (0, 5, 20, 40, 60, 75, 85, 92, 96), _encode_webp, _decode_pillow),
        Rival("avif", (0, 99), (5, 10, 20, 30, 40, 50, 60, 70, 80), _encode_avif, _decode_avif),
        Rival("jpegxl", (0.1, 25), _DISTANCES, _encode_jpegxl, _decode_jpegxl),
        Rival("jpegxl3", (0.1, 25), _DISTANCES, partial(_encode_jpegxl, effort=3), _decode_jpegxl),
        Rival(
            "jpeg2000", (0.01, 24), (0.1, 0.15, 0.22, 0.33, 0.5, 0.75, 1.1, 1.6, 2.3), _encode_jpeg2000, _decode_pillow
        ),
    )
}
"""By name: jpeg, webp, avif, jpegxl, jpegxl3 (its effort 3 instead of 7: many times faster), jpeg2000."""


def evaluate_rival(
    name: str, images: Iterable[tuple[str, Pixels]], settings: Sequence[float] | None = None
) -> list[Point]:
    """Code every (name, pixels) image at every setting (by default the rival's own), pixels (H, W, 3) uint8 RGB.

    One `Point` for each image and setting, `codec` the rival's name; bytes are those of the whole file. Raises
    CAEConfigurationError for an unknown rival, other images, settings out of range, or a missing library.
    """
    if name not in RIVALS:
        raise CAEConfigurationError(f"cae: no rival codec is called {name!r}; there are {', '.join(RIVALS)}")
    rival = RIVALS[name]
    settings = rival.settings if settings is None else settings
    least, greatest = rival.limits
    if not all(least <= setting <= greatest for setting in settings):
        raise CAEConfigurationError(f"cae: settings of {name} are from {least:g} to {greatest:g}, not {list(settings)}")
    points = []
    for image, pixels in images:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise CAEConfigurationError(
                f"cae: {name} is measured on (H, W, 3) uint8 images, {image} is {pixels.dtype} {pixels.shape}"
            )
        contiguous = np.ascontiguousarray(pixels)
        for setting in settings:
            start = time.perf_counter()
            data = rival.encode(contiguous, setting)
            encoded = time.perf_counter()
            decoded = rival.decode(data)
            end = time.perf_counter()
            points.append(
                measure(
                    name,
                    setting,
                    image,
                    contiguous,
                    decoded,
                    nbytes=len(data),
                    encode_seconds=encoded - start,
                    decode_seconds=end - encoded,
                )
            )
    return points
