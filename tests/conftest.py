"""Fixtures of several test modules: a photograph, and the pipelines of the installed zarr."""

from importlib import resources

import numpy as np
import pytest
import zarr
from PIL import Image

import zarr_cae

PIPELINES = ["zarr.core.codec_pipeline.BatchedCodecPipeline"]
if hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
    PIPELINES.append("zarr.core.codec_pipeline.FusedCodecPipeline")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests that run on a GPU, so that `pytest -m cuda` runs them alone."""
    for item in items:
        chosen = getattr(getattr(item, "callspec", None), "params", {}).values()
        if any(isinstance(value, str) and value == "cuda" for value in chosen):
            item.add_marker("cuda")


@pytest.fixture(scope="session")
def photograph() -> np.ndarray:
    """Return the package's photograph, (512, 512, 3) uint8."""
    with resources.as_file(resources.files("zarr_cae") / "data" / "astronaut.png") as path, Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    pixels.setflags(write=False)
    return pixels


@pytest.fixture
def move_weights(tmp_path, monkeypatch):
    """Return a function that takes a folder of `tmp_path` for imported weights, and forgets all other added folders."""
    from zarr_cae.weights import registry

    def move(name):
        monkeypatch.setenv(registry.CACHE_VARIABLE, str(tmp_path / name))
        monkeypatch.setattr(registry, "_added_folders", [])

    return move


@pytest.fixture
def cache(tmp_path, move_weights):
    """Return the folder of imported weights, which does not exist yet."""
    move_weights("cache")
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def warn_again():
    """Warn of wear in each test by itself, whatever other tests of this process have written."""
    from zarr_cae.codec import wear

    wear.forget()


@pytest.fixture
def fastest():
    """Write chunks as fast as possible: without decoding and correcting them."""
    with zarr_cae.configure(effort=0):
        yield


@pytest.fixture(params=PIPELINES, ids=lambda path: path.rpartition(".")[2])
def pipeline(request):
    """Run the test on every codec pipeline of this zarr; return its path."""
    with zarr.config.set({"codec_pipeline.path": request.param}):
        yield request.param
