"""caecodec's archive of `tests/fixtures/legacy`, with its weights imported."""

from pathlib import Path

import numcodecs
import numpy as np
import pytest

from zarr_cae.legacy.codec import ConvolutionalAutoencoder
from zarr_cae.legacy.latents import LegacyLatents
from zarr_cae.weights import registry
from zarr_cae.weights.compressai import convert

FIXTURES = Path(__file__).parent.parent / "fixtures" / "legacy"


@pytest.fixture(scope="session")
def converted():
    """Return the bytes of the weights file."""
    return convert(FIXTURES / "checkpoint.safetensors", quality=1, metric="mse")


@pytest.fixture
def cache(cache):
    """Use an empty folder for imported weights, and caecodec's names for its codecs."""
    numcodecs.register_codec(ConvolutionalAutoencoder)
    numcodecs.register_codec(LegacyLatents)
    return cache


@pytest.fixture
def imported(cache, converted):
    """Import the weights of the archive."""
    return registry.store(converted)


@pytest.fixture(scope="session")
def old():
    """Return the archive."""
    return FIXTURES / "photo.zarr"


@pytest.fixture(scope="session")
def decoded():
    """Return the pixels that caecodec decodes from it."""
    return np.load(FIXTURES / "decoded.npz")["pixels"]


@pytest.fixture(scope="session")
def latents():
    """Return the latents that caecodec decodes from each chunk, by key."""
    return dict(np.load(FIXTURES / "latents.npz"))
