"""`zarr-cae compare`: the report, and its page in headless Chromium."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium
from commands import left_over, refused, save
from PIL import Image

from zarr_cae.cli import main
from zarr_cae.evaluation.measures import psnr


def report_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def pixels_of(version: dict[str, Any]) -> np.ndarray:
    head, _, data = version["image"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image)


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize("match", ["bytes", "psnr"])
def test_versions_are_matched_and_their_figures_are_those_of_their_pixels(
    match: str, here: Path, photo: np.ndarray
) -> None:
    save(photo[:200, 100:292], "photo.png")
    options = ["--qualities", "2,5", "--against", "jpeg", "--match", match, "--region", "10,20,176,164"]
    assert main(["compare", "photo.png", *options, "-o", "report.html"]) == 0
    report = report_of(Path("report.html"))
    original = photo[10:186, 120:284]
    assert (report["height"], report["width"]) == original.shape[:2]
    first, *others = report["versions"]
    np.testing.assert_array_equal(pixels_of(first), original)
    assert [version["name"].split()[0] for version in others] == ["zarr-cae,", "JPEG", "zarr-cae,", "JPEG"]
    columns = report["columns"]
    figures = [dict(zip(columns, version["figures"], strict=True)) for version in others]
    for version, row in zip(others, figures, strict=True):
        assert number(row["PSNR dB"]) == pytest.approx(psnr(original, pixels_of(version)), abs=0.006)
        assert number(row["bit/px"]) == pytest.approx(8 * number(row["bytes"]) / (176 * 164), abs=6e-4)
        assert 0 < number(row["SSIM"]) < 1
        assert 0 < number(row["MS-SSIM"]) < 1
        assert number(row["encode ms"]) >= 0 <= number(row["decode ms"])
    for ours, jpeg in (figures[:2], figures[2:]):
        if match == "bytes":
            assert number(jpeg["bytes"]) == pytest.approx(number(ours["bytes"]), rel=0.1)
        else:
            assert number(jpeg["PSNR dB"]) == pytest.approx(number(ours["PSNR dB"]), abs=0.5)
    assert not left_over(here)


def test_grey_small_images_and_names_that_look_like_html(here: Path, photo: np.ndarray) -> None:
    save(photo[:48, :64, 0], "a<b>&'.png")
    assert main(["compare", "a<b>&'.png", "--qualities", "3", "--against", "jpeg", "-o", "report.html"]) == 0
    text = Path("report.html").read_text("utf-8")
    assert "<b>" not in text
    report = report_of(Path("report.html"))
    assert "a<b>&'.png" in report["title"]
    assert pixels_of(report["versions"][1]).shape == (48, 64)
    assert "image too small" in report["versions"][1]["figures"]
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", text)  # nothing from elsewhere


def test_mistakes(here: Path, photo: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    save(photo[:48, :64], "a.png")
    save(photo[:48, :64, 0].astype(np.uint16) * 257, "deep.png")
    Path("there.html").write_text("mine")
    assert "uint16" in refused(capsys, "compare", "deep.png", "-o", "r.html")
    assert "48 rows and 64 columns" in refused(capsys, "compare", "a.png", "--region", "0,0,49,10", "-o", "r.html")
    assert "--overwrite" in refused(capsys, "compare", "a.png", "-o", "there.html")
    assert Path("there.html").read_text() == "mine"
    for wrong in (["--region", "1,2,3"], ["--qualities", "9"], ["--against", "gif"]):
        with pytest.raises(SystemExit) as stop:
            main(["compare", "a.png", "-o", "r.html", *wrong])
        assert stop.value.code == 2
    assert not Path("r.html").exists()


@pytest.mark.slow
def test_page_in_a_browser(here: Path, photo: np.ndarray, tmp_path: Path) -> None:
    """If ZARR_CAE_SCREENSHOTS names a folder, the test saves screenshots there."""
    save(photo[100:400, 100:400], "photo.png")
    assert main(["compare", "photo.png", "--qualities", "1,6", "--against", "jpeg", "-o", "report.html"]) == 0
    folder = Path(os.environ.get("ZARR_CAE_SCREENSHOTS", tmp_path))
    with chromium(tmp_path / "profile") as driver:
        driver.get(Path("report.html").absolute().as_uri())

        def js(code: str) -> Any:
            return driver.execute_script(code)

        def change(element: str, value: object, event: str = "change") -> None:
            js(f"const e = $('{element}'); e.value = '{value}'; e.dispatchEvent(new Event('{event}'))")

        loaded = "return ['left', 'right'].every((s) => document.getElementById(`image-${s}`).naturalWidth === 300)"
        assert js("return document.querySelectorAll('tbody tr').length") == 5
        for index in range(5):
            change("right", index)
            js("return document.getElementById('image-right').decode()")
            assert js(loaded)
        change("right", 1)
        clip = "return document.getElementById('pane-left').style.clipPath"
        width = js("return document.getElementById('view').clientWidth")
        assert js(clip).startswith(f"inset(0px {width / 2:g}px")
        change("split", 250, "input")
        assert js(clip).startswith(f"inset(0px {0.75 * width:g}px")
        driver.save_screenshot(str(folder / "compare-slider.png"))

        action_chains = pytest.importorskip("selenium.webdriver").ActionChains
        divider = driver.find_element("id", "divider")
        action_chains(driver).drag_and_drop_by_offset(divider, width // 4, 0).perform()
        assert js("return state.split") == pytest.approx(0.5, abs=0.01)

        before = js("return state.scale")
        view = "const v = document.getElementById('view'); const b = v.getBoundingClientRect();"
        js(view + "v.dispatchEvent(new WheelEvent('wheel', {deltaY: -600, clientX: b.left + 90, clientY: b.top + 90}))")
        assert js("return state.scale") > 2 * before
        moves = [js(f"return document.getElementById('image-{side}').style.transform") for side in ("left", "right")]
        assert moves[0] == moves[1] != ""
        change("mode", "beside")
        driver.save_screenshot(str(folder / "compare-beside.png"))

        change("left", 0)
        change("mode", "difference")
        shown = (
            "const c = document.getElementById('difference'); if (c.width !== 300) return -1;"
            "const data = c.getContext('2d').getImageData(0, 0, 300, 300).data;"
            "return data.reduce((most, value, i) => (i % 4 < 3 ? Math.max(most, value) : most), 0)"
        )
        for _ in range(50):
            if js(shown) > 0:
                break
            js("return new Promise((done) => setTimeout(done, 100))")
        assert js(shown) > 40
        driver.save_screenshot(str(folder / "compare-difference.png"))
        assert driver.get_log("browser") == []
