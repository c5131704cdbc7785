"""Image files that are read, and image files that are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import save
from PIL import Image

from zarr_cae import CAEConfigurationError
from zarr_cae.cli import main
from zarr_cae.cli.images import open_source, read_image
from zarr_cae.evaluation.measures import psnr


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "bmp"), ("RGB", "ppm"), ("RGB", "tga"), ("RGB", "webp"), ("RGB", "tif"), ("RGB", "jp2"), ("P", "gif"),
     ("P", "png"), ("CMYK", "tif"), ("LAB", "tif"), ("L", "jpg"), ("L", "pgm"), ("1", "tif"), ("RGBA", "png"),
     ("LA", "png"), ("I;16", "tif"), ("I;16B", "tif")],
)  # fmt: skip
def test_images_that_pillow_reads(mode: str, suffix: str, photo: np.ndarray, here: Path) -> None:
    name = f"a.{suffix}"
    if mode.startswith("I;16"):
        image = Image.fromarray(photo[:48, :64, 0].astype(">u2" if mode == "I;16B" else "<u2") * 256)
    else:
        image = Image.fromarray(photo[:48, :64]).convert(mode)
    image.save(name)
    with Image.open(name) as opened:
        grey = opened.mode in {"L", "LA", "1"} or opened.mode.startswith("I;16")
        expected = np.asarray(opened if mode.startswith("I;16") else opened.convert("L" if grey else "RGB"))
    assert main(["encode", name, "a.zarr"]) == 0
    array = zarr.open_array("a.zarr", mode="r")
    assert array.shape == expected.shape
    assert array.dtype == expected.dtype.newbyteorder("=")
    rough = 15 if mode in {"1", "P"} else 30  # dithering is hard to code
    assert psnr(array[...], expected, 255 if array.dtype == np.uint8 else 65535) > rough


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damage that it tolerates
def test_damaged_images_are_refused(here: Path, photo: np.ndarray) -> None:
    random, count = np.random.default_rng(0), 0
    for suffix in ("png", "jpg", "tif", "gif", "webp", "bmp", "jp2", "tga", "ppm", "ico"):
        image = Image.fromarray(photo[:32, :32])
        image.save(f"a.{suffix}")
        content = Path(f"a.{suffix}").read_bytes()
        for place in random.integers(1, len(content), 12):
            noise = bytearray(content)
            noise[max(150, place) : max(150, place) + 4] = random.bytes(4)  # not the image's size
            for damaged in (content[:place], noise):
                Path(f"a.{suffix}").write_bytes(damaged)
                try:
                    read_image(Path(f"a.{suffix}"))
                except (CAEConfigurationError, OSError):  # errors that `main` prints as one line
                    count += 1
    assert count > 100


def test_damaged_npy_files_are_refused(here: Path) -> None:
    descriptions = ["{'descr': '|u1', 'fortran_order': False, 'shape': " + shape for shape in ("(10**3, 4), }", "(")]
    descriptions += [f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({'9' * 30}, 4), }}", "(" * 300]
    contents = [
        b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(99) for text in descriptions
    ]
    for content in (*contents, b"", b"PK\x03\x04 no archive", b"\x93NUMPY", contents[0][:20]):
        Path("a.npy").write_bytes(content)
        with pytest.raises(CAEConfigurationError, match=r"a\.npy is not a \.npy file of numbers"):
            open_source(Path("a.npy"))


def test_images_over_the_limit_of_pillow(here: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    save(photo[:48, :48], "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert main(["encode", "a.png", "a.zarr"]) == 0
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("library", [True, False], ids=["tifffile", "Pillow alone"])
def test_levels_of_a_tiff(
    library: bool, here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setitem(sys.modules, "tifffile", None)
    pages = [Image.fromarray(np.ascontiguousarray(photo[:96:step, :128:step])) for step in (1, 2, 4)]
    pages[0].save("a.tif", save_all=True, append_images=pages[1:])
    source = open_source(Path("a.tif"))
    assert source.shape == (96, 128, 3)
    source.close()
    source = open_source(Path("a.tif"), level=1)
    np.testing.assert_array_equal(np.asarray(source.array[:48, :64, :3]), photo[:96:2, :128:2])
    assert source.dimension_names == ("y", "x", "c")
    source.close()
    capsys.readouterr()
    assert main(["encode", "a.tif", "a.zarr", "--level", "3"]) == 1
    assert "no level 3" in capsys.readouterr().err
    assert main(["encode", "a.tif", "a.zarr", "--level", "2", "-q", "1"]) == 0
    assert zarr.open_array("a.zarr", mode="r").shape == (24, 32, 3)


def test_sixteen_bit_colour_is_kept_or_refused(
    here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    deep = photo[:48, :64].astype(np.uint16) * 256
    Path("a.png").write_bytes(imagecodecs.png_encode(deep))
    source = open_source(Path("a.png"))
    assert source.dtype == np.uint16
    np.testing.assert_array_equal(source.array, deep)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert main(["encode", "a.png", "a.zarr"]) == 1
    assert "16 bits a colour" in capsys.readouterr().err
    assert not Path("a.zarr").exists()
