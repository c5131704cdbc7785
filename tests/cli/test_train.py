"""`zarr-cae train`."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import on_a_terminal, refused, save

from zarr_cae import CAECodec
from zarr_cae.cli import main
from zarr_cae.evaluation.measures import psnr
from zarr_cae.weights import registry


def test_training_shows_loss_rate_and_distortion_on_a_terminal(here: Path, photo: np.ndarray) -> None:
    for number in range(2):
        save(photo[64 * number : 64 * number + 64, :96], f"{number}.png")
    small = ["--crop", "32", "--crops-per-quality", "1", "--threads", "1"]
    screen = on_a_terminal(["train", "0.png", "1.png", "--out", "run", "--steps", "2", *small])
    shown = r"step {}, {}q1 \d+\.\d+ bpp \d+\.\d+ dB, q3 .*, q5 \d+\.\d+ bpp \d+\.\d+ dB"
    assert re.search(shown.format(1, r"loss \d+\.\d+, "), screen)
    assert re.search(shown.format(2, "held-out images: "), screen)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on two quiet cores, but it trains: five and more beside other work
def test_train_resume_export_import_use(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    from zarr_cae.training.trainer import read_checkpoint

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
    assert re.search(rf"imported .*{digest}", capsys.readouterr().out)
    info = registry.find(digest, model="cae-v1", quality=3, metric="mse")
    assert info.provenance["steps"] == 6
    assert info.provenance["images"] == 3  # the fourth is held out
    assert info.provenance["recipe"]["seed"] == 7
    array = zarr.create_array({}, data=photo[:64, :64], serializer=CAECodec(3, weights=digest), compressors=None)
    assert psnr(array[...], photo[:64, :64]) > 20
    save(photo[:64, :64], "a.png")
    assert main(["encode", "a.png", "a.zarr", "-q", "2", "--weights", digest]) == 0

    assert main(["train", "images", "--out", "tuned", "--from", digest, "--steps", "1", *small]) == 0
    (third,) = Path("tuned").glob("*.safetensors")
    tuned, old = (registry.load(registry.store(path.read_bytes()).path) for path in (third, second))
    assert tuned.info.provenance["from"] == digest
    assert np.allclose(tuned.tensors["step"], old.tensors["step"], rtol=0.01)
    assert "range" in refused(capsys, "train", "images", "--out", "x", "--from", digest, "--range", "high", *small)

    own = (0.001, 0.002, 0.004, 0.008, 0.016)
    options = ["--steps", "1", "--density-only", *small]
    lambdas = ["--lambdas", ",".join(map(str, own))]
    assert main(["train", "images", "--out", "density", "--from", "tuned/checkpoint.pt", *lambdas, *options]) == 0
    (fourth,) = Path("density").glob("*.safetensors")
    density = registry.load(registry.store(fourth.read_bytes()).path)
    assert density.info.provenance["recipe"]["lambdas"] == list(own)
    np.testing.assert_array_equal(density.tensors["synthesis.conv2.weight"], tuned.tensors["synthesis.conv2.weight"])
    assert (density.tensors["gain"] != tuned.tensors["gain"]).any()
    # training that starts there keeps its lambdas, unless the metric differs
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
    from zarr_cae.training.trainer import Trainer, read_checkpoint

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
