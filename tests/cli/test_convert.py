"""`zarr-cae convert` as a newcomer uses it: interruptions, other settings, damaged files, read-only folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import load, refused, run, save

from zarr_cae import CAECodec
from zarr_cae.cli import main
from zarr_cae.cli.interrupts import TerminatedError, terminable
from zarr_cae.slides.conversion import Choices
from zarr_cae.slides.journal import Journal, journal_folder

SMALL = ("-q", "2", "--chunks", "32", "--shards", "64")


@pytest.fixture
def picture(here: Path, photo: np.ndarray) -> Path:
    save(photo[:150, :200], "a.png")
    return here


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Return a function: the command ends by this error after so many shards; without one, it goes on."""
    original = Journal.record
    left: list[object] = []

    def record(self: Journal, block: object) -> None:
        if left and left[0] == 0:
            raise left[1]
        if left:
            left[0] -= 1
        original(self, block)

    monkeypatch.setattr(Journal, "record", record)

    def after(*shards_and_error: object) -> None:
        left[:] = shards_and_error

    return after


def convert(*options: str) -> int:
    return main(["convert", "a.png", "o.ome.zarr", *SMALL, *options])


def files(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_before_the_first_shard_nothing_is_kept(picture, stop_after, capsys) -> None:
    for error, code, message in (
        (KeyboardInterrupt(), 130, "interrupted; nothing is kept yet; the same command begins anew"),
        (OSError(28, "No space left on device", "disk"), 1, "disk: No space left on device"),
    ):
        stop_after(0, error)
        assert convert() == code
        assert capsys.readouterr().err == f"zarr-cae: {message}\n"
        assert [path.name for path in picture.iterdir()] == ["a.png"]
    stop_after()
    assert convert("-q", "3") == 0  # nothing is there that had another quality


def test_complete_shards_are_kept(picture, stop_after, capsys) -> None:
    assert main(["convert", "a.png", "whole.ome.zarr", *SMALL]) == 0
    stop_after(1, KeyboardInterrupt())
    assert convert() == 130
    kept = "1 complete shard is kept in .o.ome.zarr.converting, and the same command goes on after it"
    assert capsys.readouterr().err == f"zarr-cae: interrupted; {kept}\n"
    stop_after(2, OSError(28, "No space left on device", "disk"))
    assert convert() == 1
    kept = "3 complete shards are kept in .o.ome.zarr.converting, and the same command goes on after them"
    note = "zarr-cae: note: a.png: going on after 1 complete shard\n"
    assert capsys.readouterr().err == f"{note}zarr-cae: disk: No space left on device; {kept}\n"
    stop_after(2, KeyboardInterrupt())
    assert convert("--restart") == 130
    assert "2 complete shards are kept" in (error := capsys.readouterr().err)
    assert "the same command without --restart goes on" in error
    stop_after()
    assert convert() == 0
    assert files("o.ome.zarr") == files("whole.ome.zarr")
    assert not journal_folder(Path("o.ome.zarr")).exists()


def test_an_interruption_at_the_end_leaves_the_complete_output(picture, monkeypatch, capsys) -> None:
    def remove(self: Journal) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.chdir(picture)
    monkeypatch.setattr(Journal, "remove", remove)
    assert convert() == 130
    os.chdir(picture)
    assert "o.ome.zarr is complete" in capsys.readouterr().err
    assert zarr.open_group("o.ome.zarr", mode="r")["0"].shape == (3, 150, 200)
    assert not journal_folder(Path("o.ome.zarr")).exists()


def test_fitted_weights_are_kept_before_the_first_shard(picture, stop_after, monkeypatch, capsys) -> None:
    def fit(arguments: object, choices: Choices, *rest: object) -> Choices:
        return replace(choices, weights="histology")

    monkeypatch.setattr("zarr_cae.cli.convert.fit_to_slides", fit)
    stop_after(0, KeyboardInterrupt())
    assert convert("--fit", "1s") == 130
    kept = "the fitted weights are kept, but nothing else yet; the same command goes on with them"
    assert capsys.readouterr().err == f"zarr-cae: interrupted; {kept}\n"
    monkeypatch.undo()
    monkeypatch.chdir(picture)
    stop_after()
    assert convert("--fit", "1s") == 0  # takes the weights of the journal
    assert "going on with the weights that this conversion began with" in capsys.readouterr().err


def test_an_interruption_before_the_journal_is_open(picture, monkeypatch, capsys) -> None:
    def prepare(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zarr_cae.slides.conversion.prepare", prepare)
    assert convert() == 130
    assert "interrupted; nothing is kept yet; the same command begins anew" in capsys.readouterr().err
    assert [path.name for path in picture.iterdir()] == ["a.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_say_what_is_kept(here: Path, photo: np.ndarray, number: int, code: int, word: str) -> None:
    save(np.tile(photo, (2, 3, 1)), "a.png")
    command = [sys.executable, "-m", "zarr_cae", "convert", "a.png", "o.ome.zarr", "-q", "2", "--shards", "1024"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (here / ".o.ome.zarr.converting" / "out" / "1" / "zarr.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (
        code, f"zarr-cae: {word}; nothing is kept yet; the same command begins anew\n",
    )  # fmt: skip
    assert [path.name for path in here.iterdir()] == ["a.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_is_heard_where_ctrl_c_is_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(TerminatedError), terminable():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_unfinished_conversions_are_no_missing_files(picture, stop_after, capsys) -> None:
    stop_after(1, KeyboardInterrupt())
    assert convert() == 130
    for command in (
        ["info", "o.ome.zarr"], ["info", "o.ome.zarr/0"], ["verify", "o.ome.zarr"],
        ["decode", "o.ome.zarr/0", "back.png"], ["bottleneck", "o.ome.zarr", "o.npy"], ["serve", "o.ome.zarr"],
        ["encode", "o.ome.zarr/0", "e.zarr"], ["convert", "o.ome.zarr", "c.zarr"], ["weights", "embed", "o.ome.zarr"],
    ):  # fmt: skip
        message = refused(capsys, *command)
        assert "o.ome.zarr is unfinished: its conversion of " in message, command
        assert "a.png was interrupted, or still runs; the same `zarr-cae convert` command goes on" in message
    stop_after()
    assert convert() == 0
    assert main(["info", "o.ome.zarr"]) == 0


def test_a_missing_file_has_one_message(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["info", "no.x"], ["verify", "no.x"], ["decode", "no.x", "a.png"], ["bottleneck", "no.x", "a.npy"],
        ["serve", "no.x"], ["encode", "no.x", "a.zarr"], ["convert", "no.x", "a.zarr"], ["weights", "embed", "no.x"],
        ["compare", "no.x", "-o", "a.html"], ["migrate", "no.x", "a.zarr"], ["weights", "import", "no.x", "--quality",
        "3", "--metric", "mse"],
    ):  # fmt: skip
        assert refused(capsys, *command) == "zarr-cae: no.x does not exist\n"
    for name in ("no.npy", "no.zarr", "no.tif", "no.mrxs"):
        for command in ("encode", "convert"):
            assert refused(capsys, command, name, "a.zarr") == f"zarr-cae: {name} does not exist\n"
    assert not list(here.iterdir())


def test_a_missing_folder_of_the_output_has_one_message(picture, capsys) -> None:
    assert main(["encode", "a.png", "a.zarr"]) == 0
    for command in (
        ["convert", "a.png", "no/o.zarr"], ["encode", "a.png", "no/o.zarr"], ["decode", "a.zarr", "no/o.png"],
        ["decode", "a.zarr", "no/o.npy"], ["bottleneck", "a.zarr", "no/o.zarr"],
    ):  # fmt: skip
        assert refused(capsys, *command) == "zarr-cae: folder no does not exist\n"


def test_a_folder_that_is_read_only(picture, monkeypatch, capsys) -> None:
    assert main(["encode", "a.png", "a.zarr"]) == 0
    before = sorted(picture.rglob("*"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    for command in (
        ["convert", "a.png", "o.zarr"], ["encode", "a.png", "o.zarr"], ["decode", "a.zarr", "o.png"],
        ["decode", "a.zarr", "o.npy"], ["encode", "a.png", "a.zarr", "--overwrite"],
    ):  # fmt: skip
        assert refused(capsys, *command) == "zarr-cae: folder . can't be written to\n"
    assert sorted(picture.rglob("*")) == before
    monkeypatch.undo()
    monkeypatch.chdir(picture)
    monkeypatch.setattr(Path, "mkdir", denied)  # on a network file system, only the attempt shows it
    assert f"folder {picture} can't be written to: Permission denied" in refused(capsys, "convert", "a.png", "o.zarr")


def denied(self: Path, **options: object) -> None:
    raise PermissionError(13, "Permission denied", str(self))


def test_settings_that_differ_are_options(picture, stop_after, capsys) -> None:
    stop_after(1, KeyboardInterrupt())
    assert convert("--weights", "histology") == 130
    for options, message in (
        (["-q", "4", "--weights", "histology"], ": --quality 4, was 2. Give"),
        ([], ": --weights photographs, was histology. Give"),
        (["--chunks", "64", "--downsample", "nearest", "--weights", "histology"],
         ": --chunks 64,64, was 32,32; --downsample nearest, was mean. Give"),
        (["--shards", "none", "--levels", "2", "--min-psnr", "38", "--weights", "histology", "--effort", "3"],
         ": --shards none, was 64,64; --levels 2, was auto; --min-psnr 38.0, was not given; --effort 3, was 1. Give"),
    ):  # fmt: skip
        capsys.readouterr()
        assert convert(*options) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "sha256" not in error
    save(load("a.png")[:100], "b.png")
    message = refused(capsys, "convert", "b.png", "o.ome.zarr", *SMALL, "--weights", "histology")
    assert f": source {picture / 'b.png'}, was {picture / 'a.png'}. Give" in message
    message = refused(capsys, "convert", "a.png", "b.png", "o.ome.zarr", *SMALL)
    assert f": source several files, was {picture / 'a.png'}. Give" in message


def test_damaged_sources_are_one_line_and_leave_nothing(here: Path, photo: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    save(photo[:100, :100], "a.png")
    tifffile.imwrite("tiles.tif", photo, photometric="rgb", tile=(64, 64))
    tifffile.imwrite("strips.tif", photo, photometric="rgb", rowsperstrip=16, compression="jpeg")
    np.save("a.npy", photo)
    for name in ("a.png", "tiles.tif", "strips.tif", "a.npy"):
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[: len(content) // 2])
        Path(f"empty{Path(name).suffix}").touch()
    before = sorted(here.iterdir())
    for path in before:
        for command in ("convert", "encode"):
            done = run(command, path.name, "o.zarr", *SMALL)
            assert done.returncode == 1
            assert done.stderr.count("\n") == 1, done.stderr
            assert done.stderr.startswith(f"zarr-cae: {path.name} "), done.stderr
            assert sorted(here.iterdir()) == before


def test_damage_in_the_middle_keeps_what_is_complete(here: Path, photo: np.ndarray, capsys) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite("a.tif", photo[:256, :256], photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile("a.tif") as file:
        start = file.pages[0].dataoffsets[9]
    content = bytearray(Path("a.tif").read_bytes())
    content[start : start + 20] = bytes(20)
    Path("a.tif").write_bytes(content)
    message = refused(capsys, "convert", "a.tif", "o.ome.zarr", "-q", "2", "--chunks", "64", "--shards", "128")
    assert "a.tif can't be read at c 0:3, y 128:256, x 0:128; is it damaged?" in message
    assert message.endswith("; 2 complete shards are kept in .o.ome.zarr.converting\n")


@pytest.mark.parametrize("command", ["encode", "convert"])
def test_an_output_is_no_source(command: str, picture, capsys) -> None:
    zarr.create_array("a.zarr", data=np.zeros((32, 32, 3), np.uint8), chunks=(32, 32, 3))
    before = files(".")
    for source, out in (("a.zarr", "a.zarr"), ("a.zarr", "./a.zarr"), ("a.zarr", "a.zarr/o.zarr")):
        assert "lie in each other" in refused(capsys, command, source, out, "--overwrite")
    assert files(".") == before


@pytest.mark.parametrize("arguments", [["encode", "a", "b.zarr"], ["info", "a"], ["weights", "list"]])
def test_unknown_arguments_show_the_usage_of_the_command(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--foo"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    name = " ".join(arguments[: 2 if arguments[0] == "weights" else 1])
    assert error.startswith(f"usage: zarr-cae {name} [-h]")
    assert "unrecognized arguments: --foo" in error


def test_info_names_the_weights(picture, capsys) -> None:
    for name in ("photographs", "histology"):
        assert main(["encode", "a.png", f"{name}.zarr", "-q", "3", "--weights", name]) == 0
        assert main(["info", f"{name}.zarr"]) == 0
        digest = zarr.open_array(f"{name}.zarr", mode="r").metadata.codecs[0].weights
        assert f"  weights  {name}, {digest[:19]}..., on this machine\n" in capsys.readouterr().out


def test_channels_and_sizes_of_an_image_that_others_wrote(here: Path, photo: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx")]
    scale = {"type": "scale", "scale": [1, 0.25, 0.5]}
    image = {"axes": axes, "datasets": [{"path": "s0", "coordinateTransformations": [scale]}]}
    channels = [{"label": "DAPI", "color": "0000FF"}, {"label": "GFP", "color": "00FF00"}]
    ome = {"version": "0.5", "multiscales": [image], "omero": {"channels": channels}}
    group = zarr.create_group("a.ome.zarr", attributes={"ome": ome})
    codec = CAECodec(4, channel_axis=None)
    array = group.create_array(
        "s0", shape=(2, 64, 96), chunks=(1, 64, 64), dtype="uint8", serializer=codec, compressors=None
    )  # without names of its axes
    array[...] = np.moveaxis(photo[:64, :96, :2], -1, 0)
    assert main(["decode", "a.ome.zarr/s0", "a.ome.tif"]) == 0
    with tifffile.TiffFile("a.ome.tif") as file:
        (found,) = (tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"],)
        assert file.series[0].axes == "CYX"
    assert [channel["Name"] for channel in found["Channel"]] == ["DAPI", "GFP"]
    assert (found["PhysicalSizeY"], found["PhysicalSizeX"], found["PhysicalSizeXUnit"]) == (0.25, 0.5, "µm")
