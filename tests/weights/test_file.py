"""The format of weights files: malformed files are refused, from the header if possible."""

import json

import numpy as np
import pytest
import safetensors.numpy
from weights_files import WIDTHS, contexts, networks, tiny

from zarr_cae import CAEConfigurationError
from zarr_cae.networks.transforms import Analysis, FactorizedAnalysis, FactorizedSynthesis, Synthesis, Widths
from zarr_cae.weights import registry
from zarr_cae.weights.architecture import parameter_shapes


def with_metadata(metadata):
    """Return a file whose header has a `__metadata__` of another type."""
    header = json.dumps({"__metadata__": metadata, "a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    return len(header).to_bytes(8, "little") + header


def deep():
    """Return a file with deeply nested JSON as its header."""
    header = b"[" * 100_000 + b"]" * 100_000
    return len(header).to_bytes(8, "little") + header


def bfloat16():
    """Return a file whose header gives the gains as bfloat16."""
    content = tiny()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["gain"] |= {"dtype": "BF16", "shape": [4, 3]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.mark.parametrize(
    ("model", "architecture", "parts"),
    [
        ("cae-v1", WIDTHS, (Analysis(Widths(**WIDTHS)), Synthesis(Widths(**WIDTHS)))),
        ("bmshj2018-factorized", {"hidden": 4, "latent": 6}, (FactorizedAnalysis(4, 6), FactorizedSynthesis(4, 6))),
    ],
)
def test_parameter_shapes_are_those_of_the_networks(model, architecture, parts):
    found = {
        f"{part}.{name}": tuple(value.shape)
        for part, network in zip(("analysis", "synthesis"), parts, strict=True)
        for name, value in network.state_dict().items()
    }
    assert parameter_shapes(model, architecture) == found


def test_a_file_with_networks_is_read(cache):
    content = tiny(**networks(), **contexts())
    loaded = registry.load(registry.store(content).path)
    assert loaded.info.architecture == WIDTHS
    assert loaded.tensors["synthesis.conv1.weight"].shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"), (b"\xff" * 64, "truncated"), (b"\x08" + bytes(7) + b"not json", "not a safetensors"),
        (deep(), "not a safetensors"),
        (tiny()[:200], "truncated"), (tiny()[:-1], "not a safetensors"),
        (safetensors.numpy.save({"a": np.zeros(1)}), "format is None"), (tiny(qualities=()), "does not know"),
        (tiny(qualities=(9,)), "does not know"), (tiny(metric="psnr"), "does not know"),
        (tiny(model="cae-v9"), "does not know"), (tiny(gain=None), "expected gain"),
        (tiny(shift=np.ones((2, 3), np.float64)), "expected shift"), (tiny(step=np.ones((1, 3), np.float32)), "step"),
        (tiny(tables__length=np.full((2, 3), 5, np.int32)), "expected 30"),
        (tiny(tables__length=np.full((2, 3), 1, np.int32)), "tables.frequency"),
        (tiny(tables__frequency=None), "expected tables.frequency"), (tiny(qualities=[[1], [2]]), "does not know"),
        (tiny(qualities=(1, 1)), "does not know"), (tiny(qualities=(1.0, 2.0)), "does not know"),
        (with_metadata([1]), "not a safetensors"), (with_metadata(None), "format is None"),
        (tiny(gain=np.full((2, 3), np.nan, np.float32)), "gain must be finite"),
        (tiny(step=np.zeros((2, 3), np.float32)), "step must not be 0"),
        (tiny(tables__frequency=np.tile(np.array([1, 4000, 50, 45]), 6)), "tables.frequency as uint16"),
        (tiny(contexts__source=np.zeros((2, 3, 1), np.int16)), "expected contexts.threshold"),
        (tiny(**contexts(weight=np.full((2, 3, 2), 200, np.uint8))), "channel 0 need earlier channels"),
        (tiny(**contexts(threshold=np.ones((2, 3, 2), np.uint16))), r"expected tables.minimum as int32 .*\(2, 9\)"),
        (tiny(**contexts(zero=np.ones((1, 3), np.uint16))), "expected contexts"),
        (tiny(tables__frequency=np.tile(np.array([0, 4000, 50, 46], np.uint16), 6)), "frequenc"),
        (tiny(tables__frequency=np.tile(np.array([1, 4000, 50, 46], np.uint16), 6)), "frequenc"),
        (tiny(architecture=[1]), "JSON objects"), (tiny(provenance="mine"), "JSON objects"),
        (tiny(**contexts(threshold=np.zeros((2, 3, 256), np.uint16))), "at most 256 classes a channel, got 257"),
        (tiny(compressai__length=np.ones(3, np.int32)), "expected compressai.cumulative"),
        (tiny(architecture=WIDTHS), "expected analysis.conv1.weight"),
        (tiny(**networks(architecture={**WIDTHS, "eighth": 12000})), "eighth must be an integer from 1 to 1024"),
        (tiny(**networks(architecture={**WIDTHS, "eighth": 6})), r"conv2.weight as .* of shape \(6, 4,"),
        (tiny(**networks(architecture={**WIDTHS, "latent": 4})), "expected gain of 4 channels, got 3"),
        (tiny(**networks(architecture={"latent": 3})), "expected the fields quarter, "),
        (tiny(**networks(architecture={**WIDTHS, "eighth": True})), "eighth must be an integer"),
        (tiny(**networks(synthesis__gdn9__beta=np.ones(4, np.float16))), "has no synthesis.gdn9.beta"),
        (tiny(**networks(synthesis__gdn1__beta=np.array([1, np.nan, 1, 1], np.float16))), "beta must be finite"),
        (tiny(synthesis__gdn1__beta=np.ones(4, np.float16)), "architecture: expected the fields"),
        (bfloat16(), "gain has numbers of kind BF16"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused_and_leave_nothing(cache, content, message):
    with pytest.raises(CAEConfigurationError, match=message):
        registry.store(content)
    assert not cache.exists() or not list(cache.iterdir())
