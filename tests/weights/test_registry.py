"""Weights files: found by digest, verified, refused when anything is off."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy

from zarr_cae import CAECodec, CAEConfigurationError, WeightsNotFoundError
from zarr_cae.weights import registry as weights


def tiny(**changes) -> bytes:
    """A weights file for two qualities and three channels, without networks."""
    row = np.array([1, 4000, 50, 45], np.uint16)
    tensors = {name: np.ones((2, 3), np.float32) for name in ("gain", "shift", "step", "offset")}
    tensors |= {
        "tables.minimum": np.full((2, 3), -1, np.int32), "tables.length": np.full((2, 3), 4, np.int32),
        "tables.frequency": np.tile(row, 6),
    }  # fmt: skip
    keywords = {"model": "cae-v1", "metric": "mse", "qualities": (1, 2), "architecture": {}, "provenance": {}}
    for name, value in changes.items():
        if name in keywords:
            keywords[name] = value
        elif value is None:
            del tensors[name.replace("__", ".")]
        else:
            tensors[name.replace("__", ".")] = value
    return weights.pack(tensors, **keywords)


def contexts(**changes):
    """The tensors of contexts with two sources and one class, for `tiny`."""
    arrays = {
        "source": np.array([[[-1, -1], [0, -1], [0, 1]]] * 2, np.int16), "weight": np.full((2, 3, 2), 100, np.uint8),
        "threshold": np.empty((2, 3, 0), np.uint16), "predicted": np.array([[1, 0, 0]] * 2, np.uint8),
        "zero": np.full((2, 3), 4000, np.uint16),
    }  # fmt: skip
    return {f"contexts__{name}": value for name, value in {**arrays, **changes}.items()}


def with_metadata(metadata):
    """A file whose header's `__metadata__` is of another kind."""
    header = json.dumps({"__metadata__": metadata, "a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    return len(header).to_bytes(8, "little") + header


def test_contexts_are_read(cache):
    info = weights.store(tiny(**contexts()))
    for table in weights.load(info.path).tables:
        assert table.contexts is not None
        assert table.contexts.predicted.tolist() == [True, False, False]
        assert table.frame_version == 2


def test_a_damaged_file_does_not_hide_the_others(cache, caplog):
    info = weights.store(tiny())
    (cache / f"{'0' * 64}.safetensors").write_bytes(b"junk")
    assert info in list(weights.available())
    assert "0000" in caplog.text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZARR_CAE_WEIGHTS", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_all_sixteen_configurations_are_bundled_once():
    found = [
        (info.metric, quality)
        for info in weights.available()
        if info.path.parent == weights.bundled_folder()
        for quality in info.qualities
    ]
    assert sorted(found) == sorted((metric, quality) for metric in weights.METRICS for quality in range(1, 9))


def test_bundled_files_are_what_their_names_say_and_fit_the_wheel():
    files = sorted(weights.bundled_folder().glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 40e6
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem
        loaded = weights.load(file)
        assert len(loaded.tables) == len(loaded.info.qualities)
        assert all(table.channels == loaded.latent_channels for table in loaded.tables)
        assert loaded.info.provenance


def test_stored_by_digest_and_found_again(cache):
    content = tiny()
    info = weights.store(content)
    assert info.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert [path.name for path in cache.iterdir()] == [f"{info.digest[7:]}.safetensors"]
    assert weights.store(content) == info
    assert weights.find(info.digest, model="cae-v1", quality=2, metric="mse") == info
    loaded = weights.load(info.path)
    assert loaded.row(2) == 1
    assert loaded.latent_channels == 3


def test_the_bundled_weights_are_the_default_even_beside_imported_ones(cache):
    before = CAECodec(quality=1).weights
    weights.store(tiny())
    assert CAECodec(quality=1).weights == before


def test_the_same_content_gives_the_same_bytes():
    assert tiny() == tiny()
    size = int.from_bytes(tiny()[:8], "little")
    assert json.loads(tiny()[8 : 8 + size])["__metadata__"]["format"] == weights.FORMAT


def test_missing_weights_are_named(cache):
    digest = "sha256:" + "ab" * 32
    with pytest.raises(WeightsNotFoundError, match=f"{digest}.*'cae-v1', quality 3, metric 'mse'.*weights import"):
        weights.find(digest, model="cae-v1", quality=3, metric="mse")
    with pytest.raises(WeightsNotFoundError, match="weights fetch --quality 3 --metric mse"):
        weights.default_digest("bmshj2018-factorized", 3, "mse")


@pytest.mark.parametrize("wrong", [{"quality": 3}, {"metric": "ms-ssim"}, {"model": "bmshj2018-factorized"}])
def test_weights_of_another_configuration_are_refused(cache, wrong):
    info = weights.store(tiny())
    with pytest.raises(CAEConfigurationError, match="are for model 'cae-v1', metric 'mse', qualities"):
        weights.find(info.digest, **{"model": "cae-v1", "quality": 1, "metric": "mse", **wrong})


def test_a_damaged_file_is_refused(cache):
    info = weights.store(tiny())
    content = bytearray(info.path.read_bytes())
    content[-1] ^= 1
    info.path.write_bytes(content)
    with pytest.raises(CAEConfigurationError, match="is damaged"):
        weights.load(info.path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"), (b"\xff" * 64, "truncated"), (b"\x08" + bytes(7) + b"not json", "not a safetensors"),
        (tiny()[:200], "truncated"), (tiny()[:-1], "not a safetensors"),
        (safetensors.numpy.save({"a": np.zeros(1)}), "format None"), (tiny(qualities=()), "does not know"),
        (tiny(qualities=(9,)), "does not know"), (tiny(metric="psnr"), "does not know"),
        (tiny(model="cae-v9"), "does not know"), (tiny(gain=None), "expected gain"),
        (tiny(shift=np.ones((2, 3), np.float64)), "expected shift"), (tiny(step=np.ones((1, 3), np.float32)), "step"),
        (tiny(tables__length=np.full((2, 3), 5, np.int32)), "expected 30"),
        (tiny(tables__length=np.full((2, 3), 1, np.int32)), "tables.frequency"),
        (tiny(tables__frequency=None), "has 0 entries"), (tiny(qualities=[[1], [2]]), "does not know"),
        (tiny(qualities=(1, 1)), "does not know"), (tiny(qualities=(1.0, 2.0)), "does not know"),
        (with_metadata([1]), "format None"), (with_metadata(None), "format None"),
        (tiny(gain=np.full((2, 3), np.nan, np.float32)), "gain must be finite"),
        (tiny(step=np.zeros((2, 3), np.float32)), "step not 0"),
        (tiny(tables__frequency=np.tile(np.array([1, 4000, 50, 45]), 6)), "tables.frequency as uint16"),
        (tiny(contexts__source=np.zeros((2, 3, 1), np.int16)), "expected contexts"),
        (tiny(**contexts(weight=np.full((2, 3, 2), 200, np.uint8))), "channel 0 need earlier channels"),
        (tiny(**contexts(threshold=np.ones((2, 3, 2), np.uint16))), "3 channels in 3 classes"),
        (tiny(**contexts(zero=np.ones((1, 3), np.uint16))), "expected contexts"),
        (tiny(tables__frequency=np.tile(np.array([0, 4000, 50, 46], np.uint16), 6)), "frequenc"),
        (tiny(tables__frequency=np.tile(np.array([1, 4000, 50, 46], np.uint16), 6)), "frequenc"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused_and_leave_nothing(cache, content, message):
    with pytest.raises(CAEConfigurationError, match=message):
        weights.store(content)
    assert not cache.exists() or not list(cache.iterdir())
