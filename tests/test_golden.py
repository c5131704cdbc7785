"""Arrays of earlier releases must open for ever.

`python tests/test_golden.py NAME` writes tests/fixtures/arrays/NAME with the present code and bundled weights; with the
argument `exact`, `colour`, `corrected` or `padded` after NAME it writes the arrays whose frames are of version 3, whose
metadata have `colour`, whose tiles have corrections, or whose chunks are padded. These folders are never written again:
a new format or family adds a folder.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from zarr_cae import CAECodec, open_bottleneck

ARRAYS = Path(__file__).parent / "fixtures" / "arrays"
CASES = [
    ("rgb-mse-1", {"quality": 1}, "rgb"), ("rgb-mse-4", {"quality": 4}, "rgb"), ("rgb-mse-8", {"quality": 8}, "rgb"),
    ("rgb-ms-ssim-2", {"quality": 2, "metric": "ms-ssim"}, "rgb"),
    ("rgb-ms-ssim-7", {"quality": 7, "metric": "ms-ssim"}, "rgb"),
    ("channels-first-mse-6", {"quality": 6, "channel_axis": 0}, "first"), ("grey-mse-5", {"quality": 5}, "grey"),
    ("uint16-mse-7", {"quality": 7, "value_range": (0, 4095)}, "uint16"),
]  # fmt: skip
EXACT = [
    ("nan-mse-3", {"quality": 3, "value_range": (0, 1), "nodata": np.nan}, "nan"),
    ("nodata-ms-ssim-6", {"quality": 6, "metric": "ms-ssim", "nodata": 0}, "masked"),
    ("sqrt-mse-4", {"quality": 4, "value_range": (0, 4095), "value_transform": "sqrt"}, "uint16"),
    ("pattern-mse-8", {"quality": 8}, "pattern"), ("least-psnr-mse-1", {"quality": 1, "min_psnr": 30}, "rgb"),
    ("least-psnr-mse-6", {"quality": 6, "min_psnr": 60}, "grey"),
]  # fmt: skip
COLOUR = [
    ("rgba-mse-4", {"quality": 4, "channel_axis": -1, "colour": (0, 1, 2)}, "rgba"),
    (
        "channels-first-mse-6", {"quality": 6, "channel_axis": 0, "colour": (3, 2, 1), "nodata": 0, "min_psnr": 36},
        "five",
    ),
    ("pattern-mse-8", {"quality": 8, "channel_axis": -1, "colour": (0, 1, 2)}, "pattern in alpha"),
]  # fmt: skip
CORRECTED = [
    ("rgb-mse-6", {"quality": 6}, "corner"),
    ("tiles-mse-6", {"quality": 6}, "dark strip"),
    ("colour-mse-6", {"quality": 6, "channel_axis": -1, "colour": (0, 1, 2)}, "colours and dark"),
]
PADDED = [
    ("rgb-mse-4", {"quality": 4}, "corner"),
    ("five-mse-3", {"quality": 3, "channel_axis": 0, "colour": (3, 2, 1)}, "five"),
]  # fmt: skip
PART = np.s_[8:20, 470:500]
"""This part of the strip is written again, with grey 90, after the whole."""


def pictures(photograph: np.ndarray) -> dict[str, np.ndarray]:
    crop = photograph[40:130, 180:280]
    y, x = np.indices(crop.shape[:2])
    other = photograph[300:370, 100:190]
    strip = np.concatenate([photograph[100:132], photograph[300:332, :230]], axis=1)[..., 0]  # of two tiles
    dark_strip, dark = ((one.astype(float) ** 2 / 255).astype("uint8") for one in (strip, other[..., 0]))
    holes = (x - 30) ** 2 + (y - 40) ** 2 < 500
    return {
        "nan": np.where(holes, np.nan, crop[..., 1] / 255).astype("float32"),
        "masked": np.where(holes[..., None], 0, np.maximum(crop, 1)),
        "pattern": ((x + y) % 2 * 255).astype("uint8"),
        "rgba": np.dstack([crop, np.where(holes, 255, 9 * (x // 9))]).astype("uint8"),
        "five": np.where(
            holes, 0, np.stack([crop[..., 1] // 2 + 60, *np.maximum(crop, 1).transpose(2, 0, 1), 255 - y])
        ).astype("u1"),
        "pattern in alpha": np.dstack([crop, (x + y) % 2 * 255]).astype("uint8"),
        "dark strip": dark_strip,
        "colours and dark": np.dstack([other[..., ::-1], dark]),
        "corner": photograph[:90, :100],
        "rgb": crop,
        "first": np.ascontiguousarray(crop.transpose(2, 0, 1)),
        "grey": np.ascontiguousarray(crop[..., 1]),
        "uint16": crop[..., 1].astype("uint16") * 16,
    }


def make_golden_arrays(folder: Path, photograph: np.ndarray, cases: list) -> None:
    """Write one array per case, and its decoded pixels."""
    folder.mkdir(parents=True)  # fails if the folder exists already
    expected, latents = {}, {}
    for name, keywords, kind in cases:
        data = pictures(photograph)[kind]
        largest = 1024 if cases is CORRECTED else 64
        chunks = tuple(min(length, largest) for length in data.shape)
        array = zarr.create_array(
            folder / f"{name}.zarr", shape=data.shape, chunks=chunks, dtype=data.dtype,
            serializer=CAECodec(**keywords), compressors=None,
        )  # fmt: skip
        array[...] = data
        if kind == "dark strip":
            array[PART] = 90
        expected[name] = array[...]
        latents[name] = fingerprint(folder / f"{name}.zarr")
    np.savez_compressed(folder / "pixels.npz", **expected)
    (folder / "latents.json").write_text(json.dumps(latents, indent=1) + "\n")


def fingerprint(path: Path) -> str:
    values = np.asarray(open_bottleneck(path)[...])
    assert values.dtype == np.float32
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


def golden() -> list[tuple[Path, str]]:
    return [(folder, path.stem) for folder in sorted(ARRAYS.glob("*")) for path in sorted(folder.glob("*.zarr"))]


def test_there_is_something_to_keep():
    assert len(golden()) >= len(CASES)


@pytest.mark.parametrize(("folder", "name"), golden(), ids=lambda value: getattr(value, "name", value))
def test_golden_arrays_open(folder, name, pipeline):
    array = zarr.open_array(folder / f"{name}.zarr", mode="r")
    expected = np.load(folder / "pixels.npz")[name]
    level = {"uint8": 1, "uint16": 16, "float32": 1 / 255}[expected.dtype.name]
    assert array.dtype == expected.dtype
    found = array[...]
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.nanmax(np.abs(found.astype(float) - expected.astype(float))) <= level


@pytest.mark.parametrize(("folder", "name"), golden(), ids=lambda value: getattr(value, "name", value))
def test_golden_latents_are_bit_identical(folder, name):
    assert fingerprint(folder / f"{name}.zarr") == json.loads((folder / "latents.json").read_text())[name]


if __name__ == "__main__":
    from importlib import resources

    from PIL import Image

    with resources.as_file(resources.files("zarr_cae") / "data" / "astronaut.png") as source:
        make_golden_arrays(
            ARRAYS / sys.argv[1],
            np.asarray(Image.open(source).convert("RGB")),
            {"exact": EXACT, "colour": COLOUR, "corrected": CORRECTED, "padded": PADDED}.get(sys.argv[-1], CASES),
        )
