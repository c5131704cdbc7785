"""Settings of the machine: `configure`, `zarr.config` and environment variables."""

import doctest
import os
import subprocess
import sys

import numpy as np
import pytest
import zarr

import zarr_cae
from zarr_cae import CAECodec, CAEConfigurationError, config


@pytest.fixture(autouse=True)
def untouched():
    """Restore the settings after each test."""
    before = zarr.config.get("cae", None), zarr.config.get("async.concurrency")
    yield
    assert (zarr.config.get("cae", None), zarr.config.get("async.concurrency")) == before


def test_a_context_restores_earlier_settings():
    with zarr.config.set({"cae.threads": 3}):
        with zarr_cae.configure(device="cpu", threads=1, tile=512, precision="float32", concurrency=33):
            assert zarr.config.get("cae") == {"device": "cpu", "threads": 1, "tile": 512, "precision": "float32"}
            assert zarr.config.get("async.concurrency") == 33
            with zarr_cae.configure(threads=None):
                assert zarr.config.get("cae.threads") is None
                assert zarr.config.get("cae.tile") == 512  # other settings stay
            assert zarr.config.get("cae.threads") == 1
        assert zarr.config.get("cae") == {"threads": 3}


def test_errors_inside_a_context_restore_too():
    with pytest.raises(ZeroDivisionError), zarr_cae.configure(tile=256):
        raise ZeroDivisionError


def test_a_plain_call_stays_set():
    code = """
import sys, zarr, zarr_cae
zarr_cae.configure(threads=2, concurrency=7)
zarr_cae.configure(tile=128)
assert zarr.config.get("cae") == {"threads": 2, "tile": 128}
assert zarr.config.get("async.concurrency") == 7
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_codec_runs_with_the_configured_settings(photograph):
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    array = zarr.create_array(
        {}, shape=(64, 64, 3), chunks=(32, 32, 3), dtype="uint8", serializer=CAECodec(1), compressors=None
    )
    threads = set()
    from zarr_cae.networks import engine

    class Seen(engine.Engine):
        def _run(self, key, requests, lanes):
            assert (key.settings.threads, key.settings.tile) == (2, 128)
            threads.add(len(requests))
            return super()._run(key, requests, lanes)

    with pytest.MonkeyPatch.context() as patch, zarr_cae.configure(threads=2, tile=128, concurrency=1, device="cpu"):
        patch.setattr(engine, "Engine", Seen)
        patch.setattr(engine, "_engines", {})
        array[...] = photograph[:64, :64]
        assert np.abs(array[...].astype(int) - photograph[:64, :64]).mean() < 30
    assert threads == {1}  # one chunk at a time is requested
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"device": "abacus"}, "cae.device"), ({"device": None}, "cae.device"), ({"device": "cuda:x"}, "cae.device"),
        ({"device": "mps"}, "cae.device"), ({"threads": 0}, "cae.threads"), ({"threads": 1.5}, "cae.threads"),
        ({"threads": True}, "cae.threads"), ({"threads": 1025}, "cae.threads"),
        ({"threads": 10**9}, "cae.threads"), ({"tile": 15}, "cae.tile"), ({"tile": "512"}, "cae.tile"),
        ({"tile": None}, "cae.tile"), ({"precision": "float16"}, "cae.precision"), ({"precision": None}, "precision"),
        ({"compile": 1}, "cae.compile"), ({"compile": "yes"}, "cae.compile"),
        ({"effort": -1}, "cae.effort"), ({"effort": 1001}, "cae.effort"), ({"effort": 2.0}, "cae.effort"),
        ({"effort": True}, "cae.effort"), ({"effort": None}, "cae.effort"),
        ({"concurrency": 0}, "concurrency"), ({"concurrency": None}, "concurrency"), ({"concurrency": 2.0}, "con"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused_at_once_and_nothing_is_set(keywords, message):
    with pytest.raises(CAEConfigurationError, match=f"cae: .*{message}.*got"):
        zarr_cae.configure(**{"threads": 1, "concurrency": 3, **keywords})


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="batch"):
        zarr_cae.configure(batch=4)


@pytest.mark.skipif("max_workers" not in zarr.config.get("codec_pipeline"), reason="of zarr with FusedCodecPipeline")
def test_concurrency_is_also_that_of_threads_of_the_fused_pipeline():
    with zarr_cae.configure(concurrency=24):
        assert zarr.config.get("codec_pipeline.max_workers") == 24


def test_environment_variables_are_the_same_settings():
    code = """
import sys, zarr, zarr_cae
from zarr_cae.config import Settings
assert Settings(**zarr.config.get("cae")) == Settings("cpu", 1, 256, "float32", True, 5)
with zarr_cae.configure(threads=2):
    assert Settings(**zarr.config.get("cae")) == Settings("cpu", 2, 256, "float32", True, 5)
assert zarr.config.get("cae.threads") == 1
assert "torch" not in sys.modules
"""
    names = {"DEVICE": "cpu", "THREADS": "1", "TILE": "256", "PRECISION": "float32", "COMPILE": "True", "EFFORT": "5"}
    environment = {**os.environ, **{f"ZARR_CAE__{name}": value for name, value in names.items()}}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)


def test_the_example_runs():
    assert doctest.testmod(config).failed == 0
