"""`zarr-cae evaluate`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import refused, save
from PIL import Image

from zarr_cae import CAECodec
from zarr_cae.cli import main
from zarr_cae.evaluation.curves import read_csv
from zarr_cae.evaluation.measures import psnr


def test_evaluate(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    save(photo[:192, 100:292], "photo.png")
    curve = {"bpp": [0.1, 0.5, 2.0], "psnr": [20.0, 30.0, 40.0], "ms_ssim": [0.8, 0.95, 0.99]}
    Path("curves.json").write_text(json.dumps({"curves": {"paper": curve}}))
    files = ["--csv", "e.csv", "--plot", "e.png", "--published", "curves.json"]
    assert (
        main(
            [
                "evaluate",
                "photo.png",
                "--quality",
                "1,4",
                "--chunks",
                "128",
                "--against",
                "jpeg",
                "--points",
                "5",
                *files,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    points = read_csv("e.csv")
    ours = [point for point in points if point.codec == "cae-v1-mse"]
    assert [point.setting for point in ours] == [1, 4]
    assert ours[0].bpp < ours[1].bpp
    assert ours[0].psnr < ours[1].psnr
    assert ours[0].ssim < ours[1].ssim < ours[1].ms_ssim < 1
    assert [point.setting for point in points if point.codec == "jpeg"] == [5, 20, 50, 80, 92]
    array = zarr.create_array(
        {}, data=photo[:192, 100:292], chunks=(128, 128, 3), serializer=CAECodec(4), compressors=None
    )
    assert ours[1].psnr == pytest.approx(psnr(array[...], photo[:192, 100:292]), abs=0.05)
    lines = re.findall(r"cae-v1-mse +(jpeg|paper \(published\)) +[+-][\d.]+ % +[+-][\d.]+ %", out)
    assert lines == ["jpeg", "paper (published)"]
    with Image.open("e.png") as picture:
        assert picture.width > 1000
    assert main(["evaluate", "photo.png", "--quality", "1,4", "--chunks", "128", "--published", "e.csv"]) == 0
    assert re.search(r"cae-v1-mse +cae-v1-mse \(e\.csv\) +[+-]0\.0 %", capsys.readouterr().out)  # equal curves


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


@pytest.mark.parametrize("library", ["skimage", "pytorch_msssim", "scipy"])
def test_evaluate_names_the_extra_before_it_works(
    library: str, here: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(photo[:64, :64], "a.png")
    monkeypatch.setitem(sys.modules, library, None)
    assert 'pip install "zarr-cae[compare]"' in refused(capsys, "evaluate", "a.png", "--csv", "a.csv")
    assert not Path("a.csv").exists()
