"""`zarr-cae encode`, `decode` and `info`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import left_over, load, refused, save
from PIL import Image
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import Crc32cCodec, GzipCodec, ZstdCodec

from zarr_cae import CAECodec
from zarr_cae.cli import main
from zarr_cae.evaluation.measures import psnr


def test_several_images_become_a_group(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    save(photo[:64, :80], "a.png")
    save(photo[:64, :80, 0], "b.png")
    assert main(["encode", "a.png", "b.png", "-q", "4", "both.zarr"]) == 0  # options before the last path, too
    group = zarr.open_group("both.zarr", mode="r")
    assert sorted(group.array_keys()) == ["a", "b"]
    assert group["a"].metadata.dimension_names == ("y", "x", "c")
    assert group["b"].metadata.dimension_names == ("y", "x")
    assert group["a"].chunks == (64, 80, 3)  # no larger than the image
    assert "2 arrays" in refused(capsys, "decode", "both.zarr", "x.png")
    assert main(["decode", "both.zarr/b", "b.jpg"]) == 0
    assert load("b.jpg").shape == (64, 80)
    capsys.readouterr()
    assert main(["info", "both.zarr"]) == 0
    out = capsys.readouterr().out
    assert out.count("on this machine") == 2
    assert out.count("cae: cae-v1, quality 4, metric mse") == 2


def test_info_counts_the_bytes_of_chunks(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    save(photo, "photo.png")
    assert main(["encode", "photo.png", "photo.zarr", "-q", "1", "--chunks", "128,256", "--shards", "256,512"]) == 0
    array = zarr.open_array("photo.zarr", mode="r")
    assert (array.chunks, array.shards) == ((128, 256, 3), (256, 512, 3))
    capsys.readouterr()
    main(["info", "photo.zarr"])
    out = capsys.readouterr().out
    size = sum(path.stat().st_size for path in Path("photo.zarr/c").rglob("*") if path.is_file())
    assert f"{size:,} bytes of {array.nbytes:,}, 1 : {array.nbytes / size:.1f}" in out
    assert f"{8 * size / 512**2:.4f} bits per pixel" in out


def test_options_about_values(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    values = photo[:96, :128, 1].astype("f4")
    values[values < 20] = np.nan
    np.save("a.npy", values)
    assert main(["encode", "a.npy", "a.zarr", "-q", "3", "--chunks", "64", "--value-range", "0,255", "--nodata", "nan",
                 "--min-psnr", "34", "--value-transform", "sqrt"]) == 0  # fmt: skip
    array = zarr.open_array("a.zarr", mode="r")
    assert np.isnan(array.fill_value)
    np.testing.assert_array_equal(np.isnan(array[...]), np.isnan(values))
    capsys.readouterr()
    assert main(["info", "a.zarr"]) == 0
    out = capsys.readouterr().out
    assert "0 to 255, no data: NaN, transform: sqrt" in out
    assert "coded    4 chunks: " in out
    assert "with masks" in out
    assert "dB in the worst chunk, 34 dB asked for" in out
    assert "min_psnr" in refused(capsys, "encode", "a.npy", "b.zarr", "--value-range", "0,255", "--min-psnr", "-1")


def test_transparent_pictures_have_colour(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.dstack([photo[:64, :80], photo[:64, :80, 0]])
    save(pixels, "a.png")
    np.save("a.npy", np.dstack([pixels, pixels[..., 0]]))
    assert main(["encode", "a.png", "a.zarr", "-q", "5"]) == 0
    codec = zarr.open_array("a.zarr", mode="r").metadata.codecs[-1]
    assert codec.colour == (0, 1, 2)
    assert main(["decode", "a.zarr", "b.png"]) == 0
    assert psnr(load("b.png"), pixels) > 30
    assert main(["encode", "a.npy", "c.zarr", "-q", "5", "--colour", "2,1,0", "--channel-axis", "-1"]) == 0
    assert zarr.open_array("c.zarr", mode="r").metadata.codecs[-1].colour == (2, 1, 0)
    capsys.readouterr()
    assert main(["info", "c.zarr"]) == 0
    assert "channel axis -1, colour 2, 1, 0" in capsys.readouterr().out
    assert "colour" in refused(capsys, "encode", "a.npy", "d.zarr", "--colour", "0,1,9", "--channel-axis", "-1")


def test_npy_and_zarr_are_read_piece_by_piece(here: Path, photo: np.ndarray) -> None:
    stack = np.stack([photo[:96, :128], photo[100:196, :128]])
    np.save("stack.npy", stack)
    assert main(["encode", "stack.npy", "stack.zarr", "--chunks", "64"]) == 0
    array = zarr.open_array("stack.zarr", mode="r")
    assert array.chunks == (1, 64, 64, 3)
    assert array.metadata.dimension_names == (None, "y", "x", "c")
    assert psnr(array[...], stack) > 33
    assert main(["encode", "stack.zarr", "again.zarr", "-q", "4"]) == 0
    assert main(["decode", "again.zarr", "again.npy"]) == 0
    assert np.load("again.npy").shape == stack.shape
    assert psnr(np.load("again.npy"), stack) > 28


def test_sixteen_bit_grey_stays_so(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    deep = photo[:96, :96, 1].astype(np.uint16) * 257
    save(deep, "deep.png")
    assert main(["encode", "deep.png", "deep.zarr"]) == 0
    assert "note" in capsys.readouterr().err
    array = zarr.open_array("deep.zarr", mode="r")
    assert array.dtype == np.uint16
    assert main(["decode", "deep.zarr", "back.png"]) == 0
    assert psnr(load("back.png"), deep, 65535) > 33
    assert ".tif or .png" in refused(capsys, "decode", "deep.zarr", "back.jpg")
    assert not Path("back.jpg").exists()


def test_floats_need_a_range(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("f.npy", (photo[:64, :64, 0] / 255 - 0.5).astype(np.float32))
    assert "--value-range" in refused(capsys, "encode", "f.npy", "f.zarr")
    assert main(["encode", "f.npy", "f.zarr", "--value-range=-0.5,0.5"]) == 0
    assert main(["decode", "f.zarr", "f.tif"]) == 0
    assert psnr(load("f.tif"), np.load("f.npy"), 1) > 33
    assert ".npy or .tif" in refused(capsys, "decode", "f.zarr", "f.png")


def test_channel_axis(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("first.npy", photo[:64, :64].transpose(2, 0, 1))
    assert "channel" in refused(capsys, "encode", "first.npy", "first.zarr")  # three planes, or colours
    assert main(["encode", "first.npy", "first.zarr", "--channel-axis", "0"]) == 0
    assert main(["decode", "first.zarr", "first.png"]) == 0
    assert psnr(load("first.png"), photo[:64, :64]) > 33
    four = np.concatenate([photo[:64, :64], photo[:64, :64, :1]], axis=2)
    np.save("four.npy", four)
    assert "ambiguous" in refused(capsys, "encode", "four.npy", "four.zarr")
    assert main(["encode", "four.npy", "four.zarr", "--channel-axis", "2"]) == 0
    assert zarr.open_array("four.zarr", mode="r").chunks == (64, 64, 4)
    assert ".npy" in refused(capsys, "decode", "four.zarr", "four.png")


def test_alpha(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    opaque = np.dstack([photo[:48, :48], np.full((48, 48), 255, np.uint8)])
    save(opaque, "opaque.png")
    assert main(["encode", "opaque.png", "opaque.zarr"]) == 0
    assert zarr.open_array("opaque.zarr", mode="r").shape == (48, 48, 3)
    opaque[:, :24, 3] = 0
    save(opaque, "clear.png")
    assert main(["encode", "clear.png", "clear.zarr"]) == 0
    array = zarr.open_array("clear.zarr", mode="r")
    assert array.shape == array.chunks == (48, 48, 4)
    assert array.metadata.dimension_names == ("y", "x", "rgba")
    assert main(["decode", "clear.zarr", "back.png"]) == 0
    with Image.open("back.png") as back:
        assert back.mode == "RGBA"
        assert psnr(np.asarray(back), opaque) > 30
    assert main(["decode", "clear.zarr", "back.npy"]) == 0
    assert ".png" in refused(capsys, "decode", "clear.zarr", "back.jpg")
    # Some frames of a film may be transparent.
    first, second = Image.fromarray(opaque[..., :3]), Image.fromarray(opaque)
    first.save("film.png", save_all=True, append_images=[second])
    assert main(["encode", "film.png", "film.zarr"]) == 0
    film = zarr.open_array("film.zarr", mode="r")
    assert film.shape == (2, 48, 48, 4)
    assert film.chunks == (1, 48, 48, 4)
    assert film[0, ..., 3].min() > 240
    assert film[1, :, :20, 3].max() < 16
    assert "transparent" in refused(capsys, "evaluate", "clear.png", "--quality", "1")


def test_upright_and_palette(here: Path, photo: np.ndarray) -> None:
    image = Image.fromarray(photo[:48, :64])
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save("turned.jpg", exif=exif)
    image.quantize(16).save("palette.png")
    assert main(["encode", "turned.jpg", "palette.png", "both.zarr"]) == 0
    group = zarr.open_group("both.zarr", mode="r")
    assert group["turned"].shape == (64, 48, 3)
    assert group["palette"].shape == (48, 64, 3)


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_frames_become_a_first_axis(
    mode: str, here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = np.stack([photo[n : n + 48, :64] for n in (0, 100, 200)])
    stack = stack if mode == "RGB" else stack[..., 0].astype(np.uint16) * 257
    pages = [Image.fromarray(page) for page in stack]
    pages[0].save("stack.tif", save_all=True, append_images=pages[1:])
    assert main(["encode", "stack.tif", "stack.zarr", "--chunks", "32,32"]) == 0
    array = zarr.open_array("stack.zarr", mode="r")
    assert array.shape == stack.shape
    assert array.chunks == (1, 32, 32, 3)[: stack.ndim]
    assert array.metadata.dimension_names == ("t", "y", "x", "c")[: stack.ndim]
    assert main(["decode", "stack.zarr", "back.tif"]) == 0
    with Image.open("back.tif") as back:
        assert back.n_frames == 3
        for index, page in enumerate(array[...]):
            back.seek(index)
            apart = np.abs(np.asarray(back).astype(int) - page).max()  # batches differ: not the same bits
            assert apart <= (1 if mode == "RGB" else 257)
    assert psnr(array[...], stack, 255 if mode == "RGB" else 65535) > 28
    assert ".npy" in refused(capsys, "decode", "stack.zarr", "back.png")
    assert "frames" in refused(capsys, "evaluate", "stack.tif", "--quality", "1")
    pages[0].save("odd.tif", save_all=True, append_images=[pages[1].crop((0, 0, 40, 40))])
    assert "several sizes" in refused(capsys, "encode", "odd.tif", "odd.zarr")
    assert not Path("odd.zarr").exists()


def test_overwriting(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    save(photo[:48, :48], "a.png")
    assert main(["encode", "a.png", "a.zarr"]) == 0
    before = Path("a.zarr/zarr.json").read_bytes()
    assert "--overwrite" in refused(capsys, "encode", "a.png", "a.zarr", "-q", "1")
    assert Path("a.zarr/zarr.json").read_bytes() == before
    Path("broken.png").write_bytes(Path("a.png").read_bytes()[:2000])
    refused(capsys, "encode", "broken.png", "a.zarr", "--overwrite")
    assert Path("a.zarr/zarr.json").read_bytes() == before
    assert main(["encode", "a.png", "a.zarr", "-q", "1", "--overwrite"]) == 0
    assert json.loads(Path("a.zarr/zarr.json").read_bytes())["codecs"][0]["configuration"]["quality"] == 1
    Path("mine.zarr").mkdir()
    Path("mine.zarr/thesis.txt").write_text("text")
    assert "not a zarr" in refused(capsys, "encode", "a.png", "mine.zarr", "--overwrite")
    assert Path("mine.zarr/thesis.txt").exists()
    assert not left_over(here)


def test_mistakes_are_one_line_and_leave_nothing(
    here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    save(photo[:48, :48], "a.png")
    Path("text.png").write_text("no image")
    Path("bad.npy").write_text("no array")
    np.save("empty.npy", np.empty((0, 5), np.uint8))
    np.savez("named.npz", np.zeros((5, 5), np.uint8))
    Path("named.npz").rename("named.npy")
    for name in ("..png", "...png"):
        Path(name).write_bytes(Path("a.png").read_bytes())
    Path("other").mkdir()
    save(photo[:48, :48], "other/a.png")
    before = sorted(here.iterdir())
    assert "text.png" in refused(capsys, "encode", "text.png", "o.zarr")
    assert "bad.npy" in refused(capsys, "encode", "bad.npy", "o.zarr")
    assert "named.npy is not a .npy file" in refused(capsys, "encode", "named.npy", "o.zarr")
    assert "name '.'" in refused(capsys, "encode", "a.png", "..png", "o.zarr")
    assert "name '..'" in refused(capsys, "encode", "...png", "o.zarr")
    assert "no pixels" in refused(capsys, "encode", "empty.npy", "o.zarr")
    assert "name the images in it" in refused(capsys, "encode", "other", "o.zarr")
    assert "both become" in refused(capsys, "encode", "a.png", "other/a.png", "o.zarr")
    assert "ends in .zarr" in refused(capsys, "encode", "a.png", "a.png")
    assert "ends in .zarr" in refused(capsys, "encode", "a.png")
    assert "does not exist" in refused(capsys, "encode", "a.png", "nowhere/o.zarr")
    assert "multiple" in refused(capsys, "encode", "a.png", "o.zarr", "--chunks", "100", "--shards", "256")
    assert "weights" in refused(capsys, "encode", "a.png", "o.zarr", "--weights", "sha256:" + "0" * 64)
    assert "weights" in refused(capsys, "encode", "a.png", "o.zarr", "--weights", "../../etc/passwd")
    for name in ("other", "a.png"):
        for command in (["info", name], ["decode", name, "b.png"], ["bottleneck", name, "b.npy"]):
            assert f"{name} holds no zarr array or group" in refused(capsys, *command)
    assert "suffix" in refused(capsys, "decode", "a.png", "a.xyz")
    assert sorted(here.iterdir()) == before


def test_bad_bytes_are_one_line(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    save(photo[:48, :48], "a.png")
    assert main(["encode", "a.png", "a.zarr"]) == 0
    chunk = next(path for path in Path("a.zarr/c").rglob("*") if path.is_file())
    damaged = bytearray(chunk.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    chunk.write_bytes(damaged)
    refused(capsys, "decode", "a.zarr", "b.png")
    assert not Path("b.png").exists()
    assert not left_over(here)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b'{"zarr_format": 9}', b'{"zarr_format": 3, "node_type": "array"}']
)
def test_bad_metadata_are_one_line(content: bytes, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.zarr").mkdir()
    Path("a.zarr/zarr.json").write_bytes(content)
    for command in (["info", "a.zarr"], ["decode", "a.zarr", "b.png"], ["encode", "a.zarr", "b.zarr"],
                    ["bottleneck", "a.zarr", "b.npy"]):  # fmt: skip
        assert "a.zarr" in refused(capsys, *command) or b"9" in content
    assert sorted(path.name for path in here.iterdir()) == ["a.zarr"]


@pytest.mark.parametrize("codec", [Crc32cCodec(), ZstdCodec(), GzipCodec()], ids=lambda codec: type(codec).__name__)
@pytest.mark.parametrize("how", ["cut", "flip"])
def test_chunks_that_other_codecs_cannot_read_are_one_line(
    codec: BytesBytesCodec, how: str, here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    array = zarr.create_array(
        "a.zarr", shape=(48, 48, 3), chunks=(48, 48, 3), dtype="uint8", serializer=CAECodec(1), compressors=codec
    )
    array[...] = photo[:48, :48]
    content = bytearray(Path("a.zarr/c/0/0/0").read_bytes())
    content[len(content) // 2] ^= 0x55
    Path("a.zarr/c/0/0/0").write_bytes(content if how == "flip" else content[: len(content) // 2])
    for command in (["decode", "a.zarr", "b.png"], ["encode", "a.zarr", "b.zarr"], ["bottleneck", "a.zarr", "b.npy"]):
        refused(capsys, *command)
    assert sorted(path.name for path in here.iterdir()) == ["a.zarr"]


def test_archives_whose_weights_are_elsewhere(
    here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    save(photo[:48, :48], "a.png")
    assert main(["encode", "a.png", "a.zarr"]) == 0
    text = Path("a.zarr/zarr.json").read_text().replace(CAECodec().weights, "sha256:" + "0" * 64)
    Path("a.zarr/zarr.json").write_text(text)
    capsys.readouterr()
    assert main(["info", "a.zarr"]) == 0
    assert "sha256:000000000000..., NOT on this machine: see `zarr-cae weights import`" in capsys.readouterr().out
    for command in (["decode", "a.zarr", "b.png"], ["bottleneck", "a.zarr", "b.npy"], ["encode", "a.zarr", "b.zarr"]):
        assert "weights import" in refused(capsys, *command)
    assert sorted(path.name for path in here.iterdir()) == ["a.png", "a.zarr"]


@pytest.mark.parametrize("dtype", ["bool", "complex64", "datetime64[s]", [("a", "u1")]], ids=str)
def test_dtypes_that_cannot_be_coded_are_named(dtype, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("a.npy", np.zeros((48, 48), dtype))
    assert "can't be coded" in refused(capsys, "encode", "a.npy", "a.zarr")
