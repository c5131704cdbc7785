"""Conversion to OME-Zarr: pixels, metadata, background, resumption, dask."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from zarr_cae import configure
from zarr_cae.cli import main
from zarr_cae.errors import CAEConfigurationError, CAEDataError
from zarr_cae.evaluation.measures import psnr
from zarr_cae.slides import background
from zarr_cae.slides.conversion import Choices, create, prepare
from zarr_cae.slides.convert import convert_here
from zarr_cae.slides.journal import Journal, journal_folder
from zarr_cae.slides.pyramid import Block, reduced
from zarr_cae.slides.sources import open_slide

tifffile = pytest.importorskip("tifffile")
Write = Callable[..., Path]
SMALL = ("-q", "2", "--chunks", "64", "--shards", "128")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_levels_are_means_of_pixels(write: Write, tissue: np.ndarray, tmp_path: Path) -> None:
    slide = write("a.tif", tissue, resolution=(40000, 40000), resolutionunit="CENTIMETER")
    out = tmp_path / "a.ome.zarr"
    assert main(["convert", str(slide), str(out), "-q", "2,5", "--chunks", "64", "--shards", "128"]) == 0
    group = zarr.open_group(out, mode="r")
    pixels = np.ascontiguousarray(tissue.transpose(2, 0, 1))
    for level in range(4):
        array = group[str(level)]
        assert array.metadata.dimension_names == ("c", "y", "x")
        assert array.chunks == (3, 64, 64)
        assert array.shards == (3, *(min(128, -(-n // 64) * 64) for n in pixels.shape[1:]))
        assert array.metadata.codecs[0].codecs[0].quality == (2 if level == 0 else 5)
        assert array.shape == pixels.shape
        assert psnr(array[...].transpose(1, 2, 0), pixels.transpose(1, 2, 0)) > (27 if level < 3 else 22)
        pixels = reduced(pixels)
    assert sorted(group.array_keys()) == ["0", "1", "2", "3"]
    ome = group.attrs["ome"]
    transforms = [one["coordinateTransformations"] for one in ome["multiscales"][0]["datasets"]]
    assert transforms[0] == [{"type": "scale", "scale": [1, 0.25, 0.25]}]
    assert transforms[2] == [
        {"type": "scale", "scale": [1, 1, 1]}, {"type": "translation", "translation": [0, 0.375, 0.375]},
    ]  # fmt: skip
    assert not journal_folder(out).exists()


def test_stacks_with_channels(write: Write, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (2, 3, 70, 90)).astype(np.uint16)
    metadata = {"axes": "ZCYX", "SignificantBits": 12, "Channel": {"Name": ["DAPI", "GFP", "RFP"]}}
    slide = write("a.ome.tif", pixels, photometric="minisblack", metadata=metadata)
    out = tmp_path / "a.ome.zarr"
    assert main(["convert", str(slide), str(out), "-q", "5", "--chunks", "32", "--shards", "none"]) == 0
    group = zarr.open_group(out, mode="r")
    assert group["0"].shape == (3, 2, 70, 90)
    assert group["0"].chunks == (1, 1, 32, 32)
    assert group["1"].shape == (3, 2, 35, 45)
    channels = group.attrs["ome"]["omero"]["channels"]
    assert [channel["label"] for channel in channels] == ["DAPI", "GFP", "RFP"]
    assert channels[0]["window"] == {"min": 0, "max": 65535, "start": 0, "end": 4095}
    assert group["0"].metadata.codecs[0].channel_axis is None  # three stains are not RGB


def test_floats_need_a_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64))
    arguments = ["convert", str(tmp_path / "a.npy"), str(tmp_path / "a.ome.zarr")]
    assert main(arguments) == 1
    assert "--value-range" in capsys.readouterr().err
    assert main([*arguments, "--value-range", "0,1", "--chunks", "32"]) == 0
    assert zarr.open_group(tmp_path / "a.ome.zarr")["1"].shape == (32, 32)


def test_background_is_not_stored_and_one_colour_is_coded_once(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.full((256, 384, 3), 255, np.uint8)
    pixels[64:192, 128:320] = (200, 150, 180)
    coded = []
    original = background.CAECodec._encode_single

    async def counted(self, chunk_array, chunk_spec):
        coded.append(chunk_spec.shape)
        return await original(self, chunk_array, chunk_spec)

    monkeypatch.setattr(background.CAECodec, "_encode_single", counted)
    background._colours.clear()
    slide, out = write("a.tif", pixels), tmp_path / "a.ome.zarr"
    assert main(["convert", str(slide), str(out), *SMALL[:4], "--shards", "none", "--levels", "1"]) == 0
    array = zarr.open_array(out / "0", mode="r")
    assert array.fill_value == 255
    assert array.nchunks_initialized == 6  # of 24
    assert len(coded) == 1
    np.testing.assert_array_equal(array[:, :64], 255)
    assert np.abs(array[:, 64:192, 128:320].astype(int) - np.array([200, 150, 180])[:, None, None]).max() <= 3


def test_interruptions_leave_the_bytes_as_they_would_be(write: Write, tissue: np.ndarray, tmp_path: Path) -> None:
    slide = write("a.tif", tissue)
    conversion = prepare(slide, Choices((2,), chunks=(64, 64), shards=(128, 128)))
    with Journal(tmp_path / "whole", conversion.settings) as journal:
        create(conversion, journal.out)
        convert_here(conversion, journal, lambda megapixels: None)
        expected = digests(journal.out)
        assert not list((journal.folder / "reduced").iterdir())
    chosen = random.Random(1)
    runs = 0
    while True:
        runs += 1
        left = chosen.uniform(0.01, 0.1)

        def interrupt(megapixels: float) -> None:
            nonlocal left
            left -= megapixels
            if left < 0:
                raise KeyboardInterrupt

        with Journal(tmp_path / "parts", conversion.settings) as journal:
            assert journal.resumed == (runs > 1)
            if not journal.resumed:
                create(conversion, journal.out)
            try:
                convert_here(conversion, journal, interrupt)
            except KeyboardInterrupt:
                continue
            break
    assert runs > 2
    assert digests(tmp_path / ".parts.converting" / "out") == expected


def test_other_source_or_settings_are_refused(write: Write, tissue: np.ndarray, tmp_path: Path) -> None:
    slide = write("a.tif", tissue)
    settings = prepare(slide, Choices((2,), chunks=(64, 64))).settings
    out = tmp_path / "out.zarr"
    with Journal(out, settings) as journal:
        journal.out.mkdir()
        (journal.out / "zarr.json").touch()
        with pytest.raises(CAEConfigurationError, match="another process"):
            Journal(out, settings)
    other = prepare(slide, Choices((3,), chunks=(64, 64))).settings
    with pytest.raises(CAEConfigurationError, match=r": --quality 3, was 2\. .*--restart"):
        Journal(out, other)
    with configure(effort=3), pytest.raises(CAEConfigurationError, match=": --effort 3, was 1"):
        Journal(out, prepare(slide, Choices((2,), chunks=(64, 64))).settings)
    os.utime(slide, (1, 1))
    with pytest.raises(CAEConfigurationError, match="was changed meanwhile"):
        Journal(out, prepare(slide, Choices((2,), chunks=(64, 64))).settings)
    with Journal(out, other, restart=True) as journal:
        assert not journal.resumed


def test_a_line_that_was_cut_off_is_done_again(write: Write, tissue: np.ndarray, tmp_path: Path) -> None:
    conversion = prepare(write("a.tif", tissue), Choices((2,), chunks=(64, 64), shards=(128, 128)))
    blocks = list(conversion.pyramid.blocks())
    with Journal(tmp_path / "out.zarr", conversion.settings) as journal:
        create(conversion, journal.out)
        for block in blocks[:3]:
            journal.record(block)
    done = journal.folder / "done"
    done.write_bytes(done.read_bytes()[:-2])
    with Journal(tmp_path / "out.zarr", conversion.settings) as journal:
        assert [block in journal for block in blocks[:4]] == [True, True, False, False]
        journal.record(blocks[2])
        assert done.read_bytes().count(b"\n") == 3


def test_mistakes_are_named(write: Write, tissue: np.ndarray, tmp_path: Path, capsys) -> None:
    slide = str(write("a.tif", tissue))
    out = str(tmp_path / "a.ome.zarr")
    for arguments, message in (
        ([slide, str(tmp_path / "a.tiff")], "ends in .ome.zarr"),
        ([str(tmp_path / "none.tif"), out], "none.tif"),
        ([slide, out, "--chunks", "100", "--shards", "256"], "multiples of the chunks"),
        ([slide, out, "--level", "1"], "no level 1"),
        ([slide, str(tmp_path / "none" / "a.zarr")], "does not exist"),
    ):
        assert main(["convert", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]
    zarr.create_group(out)
    assert main(["convert", slide, out]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert", slide, out, "--overwrite", "--levels", "1", *SMALL]) == 0
    assert zarr.open_group(out)["0"].shape == (3, 300, 420)


def test_profile_and_resolution_come_back(tissue: np.ndarray, tmp_path: Path) -> None:
    from PIL import Image, ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = tmp_path / "a.png"
    Image.fromarray(tissue[:96, :128]).save(picture, icc_profile=profile, dpi=(300, 300))
    assert main(["convert", str(picture), str(tmp_path / "a.ome.zarr"), "-q", "5"]) == 0
    assert main(["decode", str(tmp_path / "a.ome.zarr" / "0"), str(tmp_path / "b.png")]) == 0
    assert main(["encode", str(picture), str(tmp_path / "a.zarr"), "-q", "5"]) == 0
    assert main(["decode", str(tmp_path / "a.zarr"), str(tmp_path / "c.tif")]) == 0
    for name in ("b.png", "c.tif"):
        with Image.open(tmp_path / name) as image:
            assert image.info["icc_profile"] == profile, name
            assert image.info["dpi"] == pytest.approx((300, 300), rel=1e-3)
            assert psnr(np.asarray(image), tissue[:96, :128]) > 30


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_at_random_moments(write: Write, tissue: np.ndarray, tmp_path: Path) -> None:
    slide = write("a.tif", tissue[60:260, 50:250])
    whole, parts = tmp_path / "whole.ome.zarr", tmp_path / "parts.ome.zarr"

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "zarr_cae", "convert", str(slide), str(out), *SMALL]

    started = time.monotonic()
    subprocess.run(command(whole), check=True, capture_output=True)
    seconds, chosen, kills = time.monotonic() - started, random.Random(3), 0
    while True:
        process = subprocess.Popen(command(parts), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, error = process.communicate(timeout=seconds * chosen.uniform(0.3, 0.9) if kills < 3 else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            if parts.exists():
                break
        else:
            assert process.returncode == 0, error
            break
    assert kills
    assert digests(parts) == digests(whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_dask_cluster_of_which_one_worker_is_killed(write: Write, tissue: np.ndarray, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    slide = write("a.tif", tissue)
    assert main(["convert", str(slide), str(tmp_path / "here.ome.zarr"), *SMALL]) == 0
    out = tmp_path / "cluster.ome.zarr"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        process = subprocess.Popen(
            [sys.executable, "-m", "zarr_cae", "convert", str(slide), str(out), *SMALL, "--dask",
             cluster.scheduler_address],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        done = journal_folder(out) / "done"
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (done.exists() and done.stat().st_size):
            time.sleep(0.05)
        victim = next(iter(cluster.workers.values()))
        os.kill(victim.process.pid, signal.SIGKILL)
        _, error = process.communicate(timeout=250)
        assert process.returncode == 0, error
    assert digests(out) == digests(tmp_path / "here.ome.zarr")


def test_attributes_are_json(write: Write, tissue: np.ndarray, tmp_path: Path) -> None:
    conversion = prepare(write("a.tif", tissue), Choices())
    assert json.loads(json.dumps(conversion.attributes)) == conversion.attributes


def test_several_files_become_the_images_of_a_group(write: Write, tissue: np.ndarray, tmp_path: Path) -> None:
    first, second = write("a.tif", tissue), write("b.ome.tif", tissue[:140, :200])
    out = tmp_path / "all.ome.zarr"
    assert main(["convert", str(first), str(second), str(out), *SMALL]) == 0
    group = zarr.open_group(out, mode="r")
    assert group["OME"].attrs["ome"]["series"] == ["a", "b"]
    assert group["a/0"].shape == (3, 300, 420)
    for name, slide in (("a", first), ("b", second)):
        assert main(["convert", str(slide), str(tmp_path / f"{name}.zarr"), *SMALL]) == 0
        assert digests(out / name) == digests(tmp_path / f"{name}.zarr")
    assert not journal_folder(out).exists()
    yaozarrs = pytest.importorskip("yaozarrs")
    yaozarrs.validate_zarr_store(str(out))


def test_several_files_with_one_name_are_refused(
    write: Write, tissue: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more").mkdir()
    slide = write("a.tif", tissue[:64, :64])
    other = slide.rename(tmp_path / "more" / "a.ome.tif")
    for second, reason in ((slide, "is given twice"), (other, "have the same name")):
        assert main(["convert", str(slide), str(second), str(tmp_path / "out.ome.zarr")]) == 1
        assert f"{reason}: each would become image 'a'" in capsys.readouterr().err
    named = write("ome.tif", tissue[:64, :64])
    assert main(["convert", str(named), str(other), str(tmp_path / "out.ome.zarr")]) == 1
    assert "'ome'" in capsys.readouterr().err


def test_several_files_go_on_after_an_interruption(
    write: Write,
    tissue: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slides = [str(write(f"{name}.tif", tissue[:, : 200 + place])) for place, name in enumerate("abc")]
    out, whole = tmp_path / "out.ome.zarr", tmp_path / "whole.ome.zarr"
    assert main(["convert", *slides, str(whole), *SMALL]) == 0
    original, limit = Journal.record, 8

    def interrupted(self: Journal, block: Block) -> None:
        nonlocal limit
        limit -= 1
        if limit < 0:
            raise KeyboardInterrupt
        original(self, block)

    command = ["convert", *slides, str(out), *SMALL]
    monkeypatch.setattr(Journal, "record", interrupted)
    assert main(command) == 130
    assert not out.exists()
    assert main([*command, "-q", "3"]) == 1
    assert "--quality 3, was 2" in capsys.readouterr().err
    assert main(["convert", slides[0], str(out), *SMALL]) == 1
    assert "source" in capsys.readouterr().err
    monkeypatch.setattr(Journal, "record", original)
    os.utime(slides[0], (1, 1))  # the first image is complete; it must not be taken for one of the changed file
    assert main(command) == 1
    assert "was changed meanwhile" in capsys.readouterr().err
    assert main([*command, "--restart"]) == 0
    assert digests(out) == digests(whole)


def test_images_that_were_moved_to_the_group_are_not_converted_again(
    write: Write, tissue: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = [str(write(f"{name}.tif", tissue[:, :200])) for name in "abc"]
    out, moved = tmp_path / "out.ome.zarr", []

    def take_place(image: Path, target: Path) -> None:
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(target.name)
        image.rename(target)

    monkeypatch.setattr("zarr_cae.cli.convert.take_place", take_place)
    assert main(["convert", *slides, str(out), *SMALL]) == 130
    assert moved == ["a", "b"]
    monkeypatch.undo()
    monkeypatch.setattr("zarr_cae.slides.convert.convert_block", None)  # all blocks are done
    assert main(["convert", *slides[1:], str(out), *SMALL]) == 0
    assert sorted(zarr.open_group(out).group_keys()) == ["OME", "b", "c"]
    assert not journal_folder(out).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the names of open files")
def test_data_are_on_the_disk_before_the_journal_says_so(
    write: Write, tissue: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps only what was flushed, so a block may be recorded only after all its files were."""
    conversion = prepare(write("a.tif", tissue), Choices((2,), chunks=(64, 64), shards=(128, 128)))
    flushed: list[Path] = []
    fsync, record = os.fsync, Journal.record
    recorded = []

    def observed(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    def checked(self: Journal, block: Block) -> None:
        output = [path for path in self.out.rglob("*") if path.is_file()]
        reduced_copies = list((self.folder / "reduced").iterdir())
        assert any(path.parent.parent.parent.parent.name == str(block.level) for path in output)
        assert {*output, *(path.parent for path in output)} <= set(flushed)
        assert {path.name for path in reduced_copies} <= {path.name for path in flushed}  # under a temporary name
        assert not reduced_copies or self.folder / "reduced" in flushed
        flushed[:] = [path for path in flushed if path.name != "done"]
        record(self, block)
        assert flushed[-1] == self.folder / "done"
        recorded.append(block)

    monkeypatch.setattr(os, "fsync", observed)
    monkeypatch.setattr(Journal, "record", checked)
    with Journal(tmp_path / "out", conversion.settings) as journal:
        create(conversion, journal.out)
        convert_here(conversion, journal, lambda megapixels: None)
    assert recorded == list(conversion.pyramid.blocks())


def test_a_source_that_changes_meanwhile_is_refused(write: Write, tissue: np.ndarray, tmp_path: Path) -> None:
    slide = write("a.tif", tissue)
    conversion = prepare(slide, Choices((2,), chunks=(64, 64), shards=(128, 128)))

    def change(megapixels: float) -> None:
        write("a.tif", 255 - tissue)

    with Journal(tmp_path / "out", conversion.settings) as journal:
        create(conversion, journal.out)
        with pytest.raises(CAEDataError, match="was changed while it was converted"):
            convert_here(conversion, journal, change)
    with pytest.raises(CAEConfigurationError, match="was changed meanwhile"):
        Journal(tmp_path / "out", prepare(slide, Choices((2,), chunks=(64, 64), shards=(128, 128))).settings)


def test_a_folder_that_was_changed_is_another_source(tissue: np.ndarray, tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a.zarr", data=tissue, chunks=(100, 100, 3))
    settings = prepare(tmp_path / "a.zarr", Choices((2,), chunks=(64, 64))).settings
    with Journal(tmp_path / "out", settings) as journal:
        journal.out.mkdir()
        (journal.out / "zarr.json").touch()
    array[:100, :100] = 7
    with pytest.raises(CAEConfigurationError, match="was changed meanwhile"):
        Journal(tmp_path / "out", prepare(tmp_path / "a.zarr", Choices((2,), chunks=(64, 64))).settings)


def test_axes_sizes_and_names_come_back_in_an_ome_tiff(write: Write, tissue: np.ndarray, tmp_path: Path) -> None:
    grey = np.stack([tissue[rows : rows + 70, 100:190].transpose(2, 0, 1) for rows in (80, 90)]).astype(np.uint16) * 16
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}
    metadata = {"axes": "ZCYX", "SignificantBits": 12, "Channel": {"Name": ["DAPI", "GFP", "RFP"]}, **sizes}
    stack = write("a.ome.tif", grey, photometric="minisblack", metadata=metadata)
    slide = write("b.ome.tif", tissue, metadata={"axes": "YXS", **sizes}, iccprofile=b"a profile")
    for source, axes in ((stack, "czyx"), (slide, "cyx")):
        original = open_slide(source)
        for command, name, level in (("encode", "", 0), ("convert", "0", 0), ("convert", "1", 1)):
            out, back = tmp_path / f"{command}.zarr", tmp_path / "back.ome.tif"
            if not level:
                options = ["-q", "8", "--chunks", "32", "--overwrite"]
                assert main([command, str(source), str(out), *options]) == 0
            assert main(["decode", str(out / name), str(back)]) == 0
            found = open_slide(back)
            assert (found.axes, found.rgb, found.dtype) == (axes, original.rgb, original.dtype)
            assert found.shape == (*original.shape[:-2], *(-(-n // 2**level) for n in original.shape[-2:]))
            assert found.metadata.pixel_size == {
                "x": (0.5 * 2**level, "micrometer"), "y": (0.25 * 2**level, "micrometer"),
            }  # fmt: skip
            assert found.metadata.channel_names == original.metadata.channel_names
            assert found.metadata.icc_profile == original.metadata.icc_profile
            if not level:
                if command == "encode" and axes == "czyx":
                    assert zarr.open_array(out).metadata.codecs[0].value_range == (0, 4095)  # by SignificantBits
                window = [slice(0, length) for length in original.shape]
                peak = 4095 if axes == "czyx" else 255
                assert psnr(found.read(window), original.read(window), peak) > 30
            found.close()
        original.close()
