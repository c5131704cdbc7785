"""The command line as a user types it: subprocesses for what only they show, `main(argv)` for the rest."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import Crc32cCodec, GzipCodec, ZstdCodec

from zarr_cae import CAECodec, CAEConfigurationError
from zarr_cae.cli import main
from zarr_cae.cli.demo import photograph
from zarr_cae.cli.images import open_source, read_image
from zarr_cae.cli.writing import slabs
from zarr_cae.evaluation.measures import psnr, read_csv
from zarr_cae.weights import registry as weights


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return photograph()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "weights"))
    return tmp_path


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zarr_cae", *arguments], capture_output=True, text=True, check=False, **options
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that fails with exit code 1."""
    capsys.readouterr()
    assert main(arguments) == 1
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("zarr-cae: ")
    assert error.count("\n") == 1
    return error


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if "partial" in path.name or "old" in path.name]


def load(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def save(pixels: np.ndarray, path: str) -> None:
    Image.fromarray(pixels).save(path)


# Whole ways, in processes of their own


def test_png_there_and_back_in_fresh_processes(here: Path, photo: np.ndarray) -> None:
    save(photo[:200, :300], "photo.png")
    encoded = run("encode", "photo.png", "photo.zarr", "-q", "6")
    assert (encoded.returncode, encoded.stderr) == (0, "")  # no progress bar when piped
    assert "bpp" in encoded.stdout
    decoded = run("decode", "photo.zarr", "back.png")
    assert (decoded.returncode, decoded.stderr, decoded.stdout) == (0, "", "")
    back = load("back.png")
    assert back.shape == (200, 300, 3)
    assert psnr(photo[:200, :300], back) > 30
    assert not left_over(here)


def test_progress_on_a_terminal(here: Path, photo: np.ndarray) -> None:
    save(photo, "photo.png")
    commands = {
        "encode": ["encode", "photo.png", "photo.zarr", "-q", "1", "--chunks", "128"],
        "decode": ["decode", "photo.zarr", "back.png"],
        "bottleneck": ["bottleneck", "photo.zarr", "latents.npy"],
    }
    for name, arguments in commands.items():
        assert f"{name}:   0%|" in on_a_terminal(arguments)


def test_training_shows_loss_rate_and_distortion_on_a_terminal(here: Path, photo: np.ndarray) -> None:
    for number in range(2):
        save(photo[64 * number : 64 * number + 64, :96], f"{number}.png")
    small = ["--crop", "32", "--crops-per-quality", "1", "--threads", "1"]
    screen = on_a_terminal(["train", "0.png", "1.png", "--out", "run", "--steps", "2", *small])
    shown = r"step {}, {}q1 \d+\.\d+ bpp \d+\.\d+ dB, q3 .*, q5 \d+\.\d+ bpp \d+\.\d+ dB"
    assert re.search(shown.format(1, r"loss \d+\.\d+, "), screen)
    assert re.search(shown.format(2, "held-out images: "), screen)


def on_a_terminal(arguments: list[str]) -> str:
    """What a command shows on a terminal of 200 columns."""
    termios = pytest.importorskip("termios", reason="this platform has no pseudo-terminals")
    seeing, shown = os.openpty()
    termios.tcsetwinsize(shown, (24, 200))
    done = subprocess.run([sys.executable, "-m", "zarr_cae", *arguments], stderr=shown, check=False)
    os.close(shown)
    screen = b""
    with contextlib.suppress(OSError):  # which is how a terminal without a writer ends
        while piece := os.read(seeing, 1 << 16):
            screen += piece
    os.close(seeing)
    assert done.returncode == 0, screen
    assert b"Traceback" not in screen
    return screen.decode()


def test_help_and_info_import_nothing_heavy(here: Path, photo: np.ndarray) -> None:
    save(photo[:32, :32], "photo.png")
    assert main(["encode", "photo.png", "photo.zarr"]) == 0
    code = """
import sys
from zarr_cae.cli import main
for line in ("--help", "train --help", "weights list", "info photo.zarr"):
    try:
        assert main(line.split()) == 0
    except SystemExit as stop:
        assert stop.code == 0
    heavy = {"torch", "numba", "compressai", "matplotlib", "imagecodecs", "scipy"} & set(sys.modules)
    assert not heavy, (line, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == 2


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C works here and in processes started here, even if a shell runs the tests in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, photo: np.ndarray) -> Path:
    """An archive that takes some seconds to decode."""
    path = tmp_path_factory.mktemp("large") / "large.zarr"
    array = zarr.create_array(
        path, shape=(8192, 8192, 3), chunks=(512, 512, 3), dtype="uint8", serializer=CAECodec(4), compressors=None
    )
    array[:512, :512] = photo
    frame = (path / "c/0/0/0").read_bytes()
    for row in range(16):
        for column in range(16):
            chunk = path / f"c/{row}/{column}/0"
            chunk.parent.mkdir(parents=True, exist_ok=True)
            chunk.write_bytes(frame)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("arguments", "started"),
    [(["encode", "LARGE", "out.zarr"], ".out.zarr.partial-*/c/*/*/*"),
     (["encode", "LARGE", "out.zarr", "--overwrite"], ".out.zarr.partial-*/c/*/*/*"),
     (["decode", "LARGE", "out.npy"], ".out.npy.partial-*"),
     (["bottleneck", "LARGE", "out.npy"], ".out.npy.partial-*"),
     (["bottleneck", "LARGE", "out.zarr"], ".out.zarr.partial-*/c/*/*/*")],
    ids=["encode", "overwrite", "decode", "latents to npy", "latents to zarr"],
)  # fmt: skip
def test_interrupted_work_leaves_nothing(here: Path, large: Path, arguments: list[str], started: str) -> None:
    before = {}
    if "--overwrite" in arguments:
        zarr.create_group("out.zarr")
        before = {path.name: path.read_bytes() for path in Path("out.zarr").iterdir()}
    command = [str(large) if word == "LARGE" else word for word in arguments]
    process = subprocess.Popen(
        [sys.executable, "-m", "zarr_cae", *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(here.glob(started)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "zarr-cae: interrupted\n")
    assert [path.name for path in here.iterdir()] == (["out.zarr"] if before else [])
    assert {path.name: path.read_bytes() for path in here.glob("out.zarr/*")} == before


def test_what_zarr_still_does_is_stopped(here: Path) -> None:
    from zarr.core.sync import loop, sync

    from zarr_cae import cli

    ended = []

    async def endless() -> None:
        try:
            await asyncio.gather(*(asyncio.sleep(3600) for _ in range(3)))
        finally:
            ended.append(True)

    def wait() -> None:
        with contextlib.suppress(concurrent.futures.CancelledError):
            sync(endless())

    thread = threading.Thread(target=wait)
    thread.start()
    while loop[0] is None or len(asyncio.all_tasks(loop[0])) < 4:
        time.sleep(0.01)
    cli._stop_zarr()
    assert ended
    thread.join(60)
    assert not thread.is_alive()
    cli._stop_zarr()  # there is nothing any more
    assert zarr.create_array({}, data=np.arange(4))[2] == 2  # zarr makes a loop anew


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_closed_pipe_is_no_traceback(here: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "zarr_cae", "weights", "list"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


# encode and decode


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


@pytest.mark.parametrize("samples", [1, 1000, 10**6])
def test_slabs_cover_an_array_once_in_whole_blocks(samples: int) -> None:
    shape, block = (3, 70, 50, 3), (1, 16, 20, 3)
    seen = np.zeros(shape, int)
    for window in slabs(shape, block, samples):
        seen[window] += 1
        assert all(s.start % b == 0 for s, b in zip(window, block, strict=True))
        assert seen[window].size <= max(samples, np.prod(block))
    assert (seen == 1).all()


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
    assert main(["encode", "first.npy", "first.zarr"]) == 0
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
    # Films may turn transparent.
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
            np.testing.assert_array_equal(np.asarray(back), page)
    assert psnr(array[...], stack, 255 if mode == "RGB" else 65535) > 28
    assert ".npy" in refused(capsys, "decode", "stack.zarr", "back.png")
    assert "frames" in refused(capsys, "evaluate", "stack.tif", "--quality", "1")
    pages[0].save("odd.tif", save_all=True, append_images=[pages[1].crop((0, 0, 40, 40))])
    assert "2 sizes" in refused(capsys, "encode", "odd.tif", "odd.zarr")
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
    assert "No such file" in refused(capsys, "encode", "nowhere.png", "o.zarr")
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
    assert "nowhere.zarr" in refused(capsys, "decode", "nowhere.zarr", "a.png")
    assert "nowhere.zarr" in refused(capsys, "info", "nowhere.zarr")
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
        assert "weights import FILE" in refused(capsys, *command)
    assert sorted(path.name for path in here.iterdir()) == ["a.png", "a.zarr"]


@pytest.mark.parametrize("dtype", ["bool", "complex64", "datetime64[s]", [("a", "u1")]], ids=str)
def test_dtypes_that_cannot_be_coded_are_named(dtype, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("a.npy", np.zeros((48, 48), dtype))
    assert "can't be coded" in refused(capsys, "encode", "a.npy", "a.zarr")


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "bmp"), ("RGB", "ppm"), ("RGB", "tga"), ("RGB", "webp"), ("RGB", "tif"), ("RGB", "jp2"), ("P", "gif"),
     ("P", "png"), ("CMYK", "tif"), ("LAB", "tif"), ("L", "jpg"), ("L", "pgm"), ("1", "tif"), ("RGBA", "png"),
     ("LA", "png"), ("I;16", "tif"), ("I;16B", "tif")],
)  # fmt: skip
def test_what_pillow_reads(mode: str, suffix: str, photo: np.ndarray, here: Path) -> None:
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


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what it can do without
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
                except (CAEConfigurationError, OSError):  # what `main` prints as one line
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


@pytest.mark.parametrize("arguments", [[], ["shrink"], ["encode"], ["encode", "a", "b.zarr", "-q", "9"], ["demo", "x"]])
def test_wrong_usage_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: zarr-cae" in capsys.readouterr().err


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("zarr_cae.weights.registry.cache_folder", lambda: bug(None))
    with pytest.raises(ZeroDivisionError):
        main(["weights", "path"])


# demo


def test_demo(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    Path("demo.zarr").mkdir()
    Path("demo.zarr/thesis.txt").write_text("text")
    assert "not a zarr" in refused(capsys, "demo")
    Path("demo.zarr/thesis.txt").unlink()
    Path("demo.zarr").rmdir()
    zarr.create_group("demo.zarr")  # of an earlier demo
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "public domain" in out
    rows = [line.split() for line in out.splitlines() if re.match(r"[148] ", line)]
    assert [row[0] for row in rows] == ["1", "4", "8"]
    rates, decibels, similarities = ([float(row[column]) for row in rows] for column in (1, 5, 6))  # ratio: 1 : N
    assert rates == sorted(rates)
    assert decibels == sorted(decibels)
    assert similarities == sorted(similarities)
    assert 0.05 < rates[0] < 0.5 < rates[2] < 8
    group = zarr.open_group("demo.zarr", mode="r")
    quality = [psnr(group[f"q{level}"][...], photo) for level in (1, 4, 8)]
    assert quality == sorted(quality)
    assert quality[0] > 22
    with Image.open("demo.png") as picture:
        assert picture.width > 4 * 512
    assert not left_over(here)


# weights


def test_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "path"]) == 0
    assert capsys.readouterr().out == f"{here / 'weights'}\n"
    assert main(["weights", "list"]) == 0
    out = capsys.readouterr().out
    for info in weights.available():
        assert info.digest in out
    assert "bundled" in out
    assert "imported" not in out
    Path("junk.safetensors").write_bytes(b"junk")
    refused(capsys, "weights", "import", "junk.safetensors")
    assert "--quality" in refused(capsys, "weights", "import", "checkpoint.pth.tar")
    refused(capsys, "weights", "import", "checkpoint.pth.tar", "--quality", "1", "--metric", "mse")
    assert not list(here.glob("weights/*"))


# train


def test_train_resume_export_import_use(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    from zarr_cae.training.loop import read_checkpoint

    Path("images").mkdir()
    for index in range(4):
        save(photo[64 * index : 64 * index + 160, 100:260], f"images/{index}.png")
    small = ["--crop", "64", "--crops-per-quality", "1", "--threads", "1", "--device", "cpu"]
    assert main(["train", "images", "--out", "run", "--steps", "4", "--seed", "7", *small]) == 0
    (first,) = Path("run").glob("*.safetensors")
    out, error = capsys.readouterr()
    assert first.stem in out
    assert "images" in error
    with Path("run/log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["quality"]) for row in rows] == [("4", str(level)) for level in range(1, 6)]
    assert all(float(row["psnr"]) > 15 for row in rows)

    assert "--resume" in refused(capsys, "train", "images", "--out", "run", "--steps", "6")
    assert "seed" in refused(capsys, "train", "images", "--out", "run", "--resume", "--seed", "5")
    assert main(["train", "images", "--out", "run", "--resume", "--steps", "6", "--threads", "1"]) == 0
    (second,) = set(Path("run").glob("*.safetensors")) - {first}
    assert main(["train", "images", "--out", "run", "--export-only"]) == 0
    assert set(Path("run").glob("*.safetensors")) == {first, second}  # the same bytes

    capsys.readouterr()
    assert main(["weights", "import", str(second)]) == 0
    digest = f"sha256:{second.stem}"
    assert digest in capsys.readouterr().out
    assert main(["weights", "list"]) == 0
    assert re.search(rf"imported +{digest}", capsys.readouterr().out)
    info = weights.find(digest, model="cae-v1", quality=3, metric="mse")
    assert info.provenance["steps"] == 6
    assert info.provenance["images"] == 3  # the fourth is held out
    assert info.provenance["recipe"]["seed"] == 7
    array = zarr.create_array({}, data=photo[:64, :64], serializer=CAECodec(3, weights=digest), compressors=None)
    assert psnr(array[...], photo[:64, :64]) > 20
    save(photo[:64, :64], "a.png")
    assert main(["encode", "a.png", "a.zarr", "-q", "2", "--weights", digest]) == 0

    assert main(["train", "images", "--out", "tuned", "--from", digest, "--steps", "1", *small]) == 0
    (third,) = Path("tuned").glob("*.safetensors")
    tuned, old = (weights.load(weights.store(path.read_bytes()).path) for path in (third, second))
    assert tuned.info.provenance["from"] == digest
    assert np.allclose(tuned.tensors["step"], old.tensors["step"], rtol=0.01)
    assert "range" in refused(capsys, "train", "images", "--out", "x", "--from", digest, "--range", "high", *small)

    own = (0.001, 0.002, 0.004, 0.008, 0.016)
    options = ["--steps", "1", "--density-only", *small]
    lambdas = ["--lambdas", ",".join(map(str, own))]
    assert main(["train", "images", "--out", "density", "--from", "tuned/checkpoint.pt", *lambdas, *options]) == 0
    (fourth,) = Path("density").glob("*.safetensors")
    density = weights.load(weights.store(fourth.read_bytes()).path)
    assert density.info.provenance["recipe"]["lambdas"] == list(own)
    np.testing.assert_array_equal(density.tensors["synthesis.conv2.weight"], tuned.tensors["synthesis.conv2.weight"])
    assert (density.tensors["gain"] != tuned.tensors["gain"]).any()
    # who goes on from there keeps its lambdas, unless they are of another metric
    again = ["train", "images", "--out", "again", "--from", f"sha256:{fourth.stem}", *options]
    assert main(["weights", "import", str(fourth)]) == 0
    assert main(again) == 0
    assert read_checkpoint(Path("again/checkpoint.pt"))["recipe"]["lambdas"] == own
    half = ["--holdout", "0.5", "--steps", "1", *small]
    assert main(["train", "images", "--out", "half", "--from", digest, *half]) == 0
    assert json.loads(Path("half/run.json").read_text())["images"] == 2
    assert "--from" in refused(capsys, "train", "images", "--out", "x", *options)
    assert "lambdas" in refused(capsys, "train", "images", "--out", "x", "--lambdas", "1,2", *small)


@pytest.mark.usefixtures("ctrl_c")
def test_interrupted_training_saves_a_checkpoint(
    here: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zarr_cae.training.loop import Trainer, read_checkpoint

    steps = Trainer.train_step

    def interrupted(self: Trainer):
        report = steps(self)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return report

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    for index in range(2):
        save(photo[100 * index : 100 * index + 96, 100:196], f"{index}.png")
    arguments = ["--crop", "32", "--crops-per-quality", "1", "--threads", "1"]
    assert main(["train", "0.png", "1.png", "--out", "run", "--steps", "9", *arguments]) == 130
    assert read_checkpoint(Path("run/checkpoint.pt"))["step"] == 2
    assert "--resume" in capsys.readouterr().err


def test_train_mistakes(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    assert "images" in refused(capsys, "train", "--out", "run")
    assert "nowhere" in refused(capsys, "train", "nowhere", "--out", "run")
    assert "checkpoint.pt" in refused(capsys, "train", "x", "--out", "run", "--resume")
    assert "not on this machine" in refused(capsys, "train", "x", "--out", "run", "--from", "sha256:" + "0" * 64)
    assert "96" in refused(capsys, "train", "x", "--out", "run", "--metric", "ms-ssim", "--crop", "64")
    Path("junk.pt").write_bytes(b"junk")
    assert "junk.pt" in refused(capsys, "train", "x", "--out", "run", "--from", "junk.pt")
    for name in ("bad.tar", "bad.png"):
        Path(name).write_bytes(b"neither an archive nor an image")
        assert name in refused(capsys, "train", name, "--out", "run")
    assert not Path("run").exists()


# evaluate


def test_evaluate(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    save(photo[:192, 100:292], "photo.png")
    curve = {"bpp": [0.1, 0.5, 2.0], "psnr": [20.0, 30.0, 40.0], "ms_ssim": [0.8, 0.95, 0.99]}
    Path("curves.json").write_text(json.dumps({"curves": {"paper": curve}}))
    files = ["--csv", "e.csv", "--plot", "e.png", "--published", "curves.json"]
    assert main(["evaluate", "photo.png", "--quality", "1,4", "--chunks", "128", "--against", "jpeg", *files]) == 0
    out = capsys.readouterr().out
    points = read_csv("e.csv")
    ours = [point for point in points if point.codec == "cae-v1-mse"]
    assert [point.setting for point in ours] == [1, 4]
    assert ours[0].bpp < ours[1].bpp
    assert ours[0].psnr < ours[1].psnr
    assert sum(point.codec == "jpeg" for point in points) > 4
    array = zarr.create_array(
        {}, data=photo[:192, 100:292], chunks=(128, 128, 3), serializer=CAECodec(4), compressors=None
    )
    assert ours[1].psnr == pytest.approx(psnr(array[...], photo[:192, 100:292]), abs=0.05)
    lines = re.findall(r"cae-v1-mse +(jpeg|paper \(published\)) +[+-][\d.]+ % +[+-][\d.]+ %", out)
    assert lines == ["jpeg", "paper (published)"]
    with Image.open("e.png") as picture:
        assert picture.width > 1000
    assert main(["evaluate", "photo.png", "--quality", "1,4", "--chunks", "128", "--published", "e.csv"]) == 0
    assert re.search(r"cae-v1-mse +cae-v1-mse \(e\.csv\) +[+-]0\.0 %", capsys.readouterr().out)  # the same again


def test_evaluate_grey_whole_image_and_mistakes(
    here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("images").mkdir()
    save(photo[:170, 100:292], "images/a.png")
    save(photo[:64, :64], "images/small.png")
    assert main(["evaluate", "images", "--quality", "2", "--grey", "--chunks", "image"]) == 0
    out, error = capsys.readouterr()
    assert "2 grey images" in out
    assert "one chunk an image" in out
    assert "MS-SSIM" in error
    assert "e.txt" in refused(capsys, "evaluate", "images", "--plot", "e.txt")
    assert "nowhere" in refused(capsys, "evaluate", "nowhere.png")
    with pytest.raises(SystemExit):
        main(["evaluate", "images", "--against", "gif"])


def test_bottleneck_copies_what_info_announces(
    here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    save(photo, "photo.png")
    assert main(["encode", "photo.png", "photo.zarr", "-q", "2"]) == 0
    assert main(["info", "photo.zarr"]) == 0
    rows, columns = (-(-side // 16) for side in photo.shape[:2])
    assert f"latents  {rows} x {columns} x 192 float32" in capsys.readouterr().out
    assert main(["bottleneck", "photo.zarr", "latents.npy"]) == 0
    assert main(["bottleneck", "photo.zarr", "latents.zarr"]) == 0
    copied = np.load("latents.npy")
    assert copied.shape == (rows, columns, 192)
    np.testing.assert_array_equal(zarr.open_array("latents.zarr", mode="r")[:], copied)
    assert "exists; give --overwrite" in refused(capsys, "bottleneck", "photo.zarr", "latents.zarr")
