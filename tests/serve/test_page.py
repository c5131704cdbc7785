"""The page of `zarr-cae serve` in headless Chromium."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from browser import chromium
from PIL import Image
from serving import serving

from zarr_cae import CAECodec

Select = pytest.importorskip("selenium.webdriver.support.ui").Select
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # Chromium is slow to start on a busy machine
]


@pytest.fixture(scope="module")
def pictures(photograph, tmp_path_factory):
    """Return a pyramid of three levels (its finest is 1024 x 2048), a stack of grey images, and a mask."""
    folder = tmp_path_factory.mktemp("page") / "pictures.zarr"
    root = zarr.create_group(folder)
    finest = np.tile(photograph, (2, 4, 1))
    pyramid, levels = root.create_group("pyramid"), []
    for level in range(3):
        pixels = np.asarray(Image.fromarray(finest).reduce(2**level))
        array = pyramid.create_array(
            str(level), shape=pixels.shape, chunks=(256, 256, 3), dtype="uint8", serializer=CAECodec(quality=2),
            compressors=None, dimension_names=["y", "x", "c"],
        )  # fmt: skip
        array[...] = pixels
        scale = [{"type": "scale", "scale": [2.0**level, 2.0**level, 1.0]}]
        levels.append({"path": str(level), "coordinateTransformations": scale})
    axes = [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}, {"name": "c", "type": "channel"}]
    pyramid.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": levels}]}
    stack = root.create_array(
        "stack", shape=(2, 256, 256), chunks=(1, 256, 256), dtype="uint16", compressors=None, fill_value=0,
        serializer=CAECodec(quality=2, channel_axis=None, value_range=(0, 4095)), dimension_names=["z", "y", "x"],
    )  # fmt: skip
    stack[...] = np.stack([photograph[:256, :256, 0], photograph[256:, 256:, 1]]).astype(np.uint16) * 8
    root.create_array("mask", data=photograph[..., 1] > 100)
    return folder


@pytest.fixture
def browser(tmp_path):
    with chromium(tmp_path / "profile") as driver:
        driver.set_window_size(900, 800)
        yield Page(driver, Path(os.environ.get("ZARR_CAE_SCREENSHOTS", tmp_path)))


class Page:
    """Acts on the page as a person does, and reads the screen."""

    def __init__(self, driver, folder):
        self.driver, self.folder = driver, folder

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def tiles(self):
        """Return the paths of the tiles that were requested since the last call."""
        names = self.run("const all = performance.getEntriesByType('resource'); performance.clearResourceTimings();"
                         "return all.map(entry => entry.name)")  # fmt: skip
        return [name.partition("/tiles/")[2] for name in names if "/tiles/" in name]

    def wait(self, condition, seconds=200):
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "the page did not get there in time"
            time.sleep(0.1)
        return found

    def loaded(self):
        """Wait until all tiles on the screen are drawn."""
        script = "const world = viewer.world; return world.getItemCount() === 1 && world.getItemAt(0).getFullyLoaded()"
        self.wait(lambda: self.run(script))
        time.sleep(0.3)  # wait for the next frame of the screen

    def shot(self, name):
        """Return the screen as an array, and save it as a file."""
        path = self.folder / f"{name}.png"
        self.driver.save_screenshot(str(path))
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    def errors(self):
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


def middle(shot):
    """Return the part of the screen that shows the picture."""
    return shot[200:-100, 250:-250].astype(int)


def scales(tiles, kind):
    return {int(tile.split("/")[2]) for tile in tiles if tile.split("/")[1] == kind}


def test_the_page(pictures, photograph, browser):
    with serving(pictures) as address:
        browser.driver.get(address)
        browser.wait(lambda: browser.run("return typeof viewer !== 'undefined' && viewer.world.getItemCount() === 1"))
        browser.loaded()
        first, whole = browser.tiles(), browser.shot("1-whole")
        assert min(scales(first, "pixels")) >= 1  # the picture is twice as wide as the screen
        assert middle(whole).std() > 20  # the photograph, not the background
        assert "pyramid/1" in browser.find("#shown").text

        for _ in range(2):
            browser.find("#closer").click()
        browser.wait(lambda: "pyramid/0" in browser.find("#shown").text)
        browser.loaded()
        assert 0 in scales(browser.tiles(), "pixels")
        assert np.abs(middle(browser.shot("2-closer")) - middle(whole)).mean() > 10

        browser.find("#home").click()
        browser.find("input[value=latents]").click()
        browser.wait(lambda: "latents" in browser.find("#shown").text)
        browser.loaded()
        assert scales(browser.tiles(), "latents") == {0}
        heat = middle(browser.shot("3-latents"))
        assert np.abs(heat[..., 0] - heat[..., 2]).mean() > 10  # colours of a heat map

        number = browser.find("#axes input[type=number]")
        browser.run("arguments[0].value = 7; arguments[0].dispatchEvent(new Event('change'))", number)
        browser.wait(lambda: any("at=7" in tile for tile in browser.tiles()))
        browser.loaded()
        assert np.abs(middle(browser.shot("4-another-channel")) - heat).mean() > 5

        browser.find("input[value=pixels]").click()
        Select(browser.find("#picture")).select_by_visible_text("stack")
        browser.wait(lambda: "stack" in browser.find("#shown").text)
        browser.loaded()
        below = middle(browser.shot("5-stack"))
        number = browser.find("#axes input[type=number]")
        browser.run("arguments[0].value = 1; arguments[0].dispatchEvent(new Event('change'))", number)
        browser.wait(lambda: any("at=1" in tile for tile in browser.tiles()))
        browser.loaded()
        assert np.abs(middle(browser.shot("6-stack-next")) - below).mean() > 5
        assert browser.errors() == []


def test_a_page_without_latents_has_no_switch(photograph, tmp_path, browser):
    zarr.create_array(tmp_path / "plain.zarr", data=photograph)
    with serving(tmp_path / "plain.zarr") as address:
        browser.driver.get(address)
        browser.wait(lambda: browser.run("return typeof viewer !== 'undefined' && viewer.world.getItemCount() === 1"))
        browser.loaded()
        assert not browser.find("input[value=latents]").is_enabled()
        assert middle(browser.shot("7-plain")).std() > 20
        assert browser.errors() == []
