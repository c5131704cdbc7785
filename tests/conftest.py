"""What several test modules share: a photograph, and the pipelines of the zarr that is installed."""

from importlib import resources

import numpy as np
import pytest
import zarr
from PIL import Image

PIPELINES = ["zarr.core.codec_pipeline.BatchedCodecPipeline"]
if hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
    PIPELINES.append("zarr.core.codec_pipeline.FusedCodecPipeline")


@pytest.fixture(scope="session")
def photograph() -> np.ndarray:
    """(512, 512, 3) uint8, the one that the package holds."""
    with resources.as_file(resources.files("zarr_cae") / "data" / "astronaut.png") as path, Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    pixels.setflags(write=False)
    return pixels


@pytest.fixture(params=PIPELINES, ids=lambda path: path.rpartition(".")[2])
def pipeline(request):
    """Every codec pipeline of this zarr."""
    with zarr.config.set({"codec_pipeline.path": request.param}):
        yield request.param
