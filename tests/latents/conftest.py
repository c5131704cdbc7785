"""Fixtures for tests of latents."""

import pytest
import zarr
from archives import fill

from zarr_cae import CAECodec


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    """Run the networks on the CPU, where the same pixels become the same bytes in any batch."""
    with zarr.config.set({"cae.device": "cpu"}):
        yield


@pytest.fixture(scope="session")
def small(photograph):
    """Return pixels (64, 96, 3)."""
    return photograph[150:214, 200:296]


@pytest.fixture(scope="module")
def archive(tmp_path_factory, small):
    """Return the folder of a group of CAE arrays, and the latents of these arrays."""
    folder = tmp_path_factory.mktemp("archive") / "g.zarr"
    expected = fill(folder, small, consolidated=True)
    root = zarr.open_group(folder, mode="r+", use_consolidated=False)
    sharded = root.create_array(
        "sharded", shape=small.shape, chunks=(32, 32, 3), shards=(64, 96, 3), dtype="uint8",
        serializer=CAECodec(quality=2), compressors=None,
    )  # fmt: skip
    sharded[...] = small
    return folder, expected
