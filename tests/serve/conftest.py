"""Fixtures for tests of decoded views."""

import pytest
import zarr


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    with zarr.config.set({"cae.device": "cpu"}):
        yield


@pytest.fixture(scope="session")
def small(photograph):
    """Return pixels (72, 104, 3): 16 and 32 do not divide the edges."""
    return photograph[150:222, 200:304]
