"""Fixtures for tests of several commands."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from zarr_cae import CAECodec
from zarr_cae.cli.demo import photograph
from zarr_cae.weights import registry


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    return photograph()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(registry.CACHE_VARIABLE, str(tmp_path / "weights"))
    return tmp_path


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Enable Ctrl-C here and in child processes, even if a shell runs the tests in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory, photo: np.ndarray) -> Path:
    """Return an archive that takes some seconds to decode."""
    path = tmp_path_factory.mktemp("large") / "large.zarr"
    array = zarr.create_array(
        path, shape=(8192, 8192, 3), chunks=(512, 512, 3), dtype="uint8", serializer=CAECodec(4), compressors=None
    )
    array[:512, :512] = photo
    frame = (path / "c/0/0/0").read_bytes()
    for row in range(16):
        for column in range(16):
            chunk = path / f"c/{row}/{column}/0"
            chunk.parent.mkdir(parents=True, exist_ok=True)
            chunk.write_bytes(frame)
    return path
