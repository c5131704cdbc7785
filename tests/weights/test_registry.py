"""Weights files: find them by digest, verify them, refuse bad ones."""

import hashlib
import json
import os

import pytest
from weights_files import contexts, tiny

from zarr_cae import CAECodec, CAEConfigurationError, WeightsNotFoundError
from zarr_cae.weights import registry
from zarr_cae.weights.families import FAMILIES
from zarr_cae.weights.file import FORMAT, METRICS


def test_contexts_are_read(cache):
    info = registry.store(tiny(**contexts()))
    for table in registry.load(info.path).tables:
        assert table.contexts is not None
        assert table.contexts.predicted.tolist() == [True, False, False]
        assert table.frame_version == 2


def test_a_damaged_file_does_not_hide_the_others(cache, caplog):
    info = registry.store(tiny())
    (cache / f"{'0' * 64}.safetensors").write_bytes(b"junk")
    assert info in list(registry.available())
    assert "0000" in caplog.text


def test_all_sixteen_configurations_are_bundled_once():
    found = [
        (info.metric, quality)
        for info in registry.available()
        if info.path.parent == registry.bundled_folder() and info.name is None
        for quality in info.qualities
    ]
    assert sorted(found) == sorted((metric, quality) for metric in METRICS for quality in range(1, 9))


def test_families_with_a_name_have_all_qualities_for_mse(cache):
    for name in {info.name for info in registry.available()} - {None}:
        digests = {registry.resolve(name, model="cae-v1", quality=quality, metric="mse") for quality in range(1, 9)}
        assert len(digests) == 2
        assert name in FAMILIES
    assert CAECodec(3, weights="histology").weights == registry.resolve(
        "histology", model="cae-v1", quality=3, metric="mse"
    )
    assert CAECodec(3, weights="histology").weights != CAECodec(3).weights


def test_bundled_files_have_the_digests_in_their_names_and_fit_the_wheel():
    files = sorted(registry.bundled_folder().glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 60e6
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem
        loaded = registry.load(file)
        assert len(loaded.tables) == len(loaded.info.qualities)
        assert all(table.channels == loaded.latent_channels for table in loaded.tables)
        assert loaded.info.provenance


def test_stored_by_digest_and_found_again(cache):
    content = tiny()
    info = registry.store(content)
    assert info.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert [path.name for path in cache.iterdir()] == [f"{info.digest[7:]}.safetensors"]
    assert registry.store(content) == info
    assert registry.find(info.digest, model="cae-v1", quality=2, metric="mse") == info
    loaded = registry.load(info.path)
    assert loaded.row(2) == 1
    assert loaded.latent_channels == 3


def test_the_bundled_weights_are_the_default_even_beside_imported_ones(cache):
    before = CAECodec(quality=1).weights
    registry.store(tiny())
    assert CAECodec(quality=1).weights == before


def test_the_same_content_gives_the_same_bytes():
    assert tiny() == tiny()
    size = int.from_bytes(tiny()[:8], "little")
    assert json.loads(tiny()[8 : 8 + size])["__metadata__"]["format"] == FORMAT


def test_missing_weights_are_named(cache):
    digest = "sha256:" + "ab" * 32
    with pytest.raises(WeightsNotFoundError, match=f"{digest}.*'cae-v1', quality 3, metric 'mse'.*weights import"):
        registry.find(digest, model="cae-v1", quality=3, metric="mse")
    with pytest.raises(WeightsNotFoundError, match="weights fetch --quality 3 --metric mse"):
        registry.default_digest("bmshj2018-factorized", 3, "mse")


@pytest.mark.parametrize("wrong", [{"quality": 3}, {"metric": "ms-ssim"}, {"model": "bmshj2018-factorized"}])
def test_weights_of_another_configuration_are_refused(cache, wrong):
    info = registry.store(tiny())
    with pytest.raises(CAEConfigurationError, match="are for model 'cae-v1', metric 'mse', qualities"):
        registry.find(info.digest, **{"model": "cae-v1", "quality": 1, "metric": "mse", **wrong})


def test_a_damaged_file_is_refused(cache):
    info = registry.store(tiny())
    content = bytearray(info.path.read_bytes())
    content[-1] ^= 1
    info.path.write_bytes(content)
    with pytest.raises(CAEConfigurationError, match="is damaged"):
        registry.load(info.path)


def test_odd_entries_of_the_folder_hide_nothing(cache):
    info = registry.store(tiny())
    folder, link, pipe = (cache / f"{digit * 64}.safetensors" for digit in "012")
    folder.mkdir()
    link.symlink_to("/nowhere/at/all")
    os.mkfifo(pipe)
    deep = b"[" * 100_000 + b"]" * 100_000
    (cache / f"{'3' * 64}.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    listed = list(registry.available())
    assert info in listed
    assert len([one for one in listed if one.path.parent == cache]) == 1
    assert CAECodec(quality=4).weights == registry.default_digest("cae-v1", 4, "mse")
    with pytest.raises(WeightsNotFoundError, match="weights fetch"):
        registry.default_digest("bmshj2018-factorized", 3, "mse")


def test_a_name_stands_for_the_digest(cache):
    info = registry.store(tiny(name="nebulae"))
    assert info.name == "nebulae"
    assert registry.resolve("nebulae", model="cae-v1", quality=2, metric="mse") == info.digest
    default = registry.default_digest("cae-v1", 2, "mse")
    for weights in (None, "photographs", default):
        assert registry.resolve(weights, model="cae-v1", quality=2, metric="mse") == default
    with pytest.raises(
        WeightsNotFoundError, match=r"nebulae.*quality 3.*known names are histology, microscopy, nebulae, photographs"
    ):
        registry.resolve("nebulae", model="cae-v1", quality=3, metric="mse")
    with pytest.raises(WeightsNotFoundError, match="'nebulae' are for metric mse, not 'ms-ssim'"):
        registry.resolve("nebulae", model="cae-v1", quality=2, metric="ms-ssim")
    for wrong in ("../nebulae", "sha256:0", 7):
        with pytest.raises(CAEConfigurationError, match="sha256"):
            registry.resolve(wrong, model="cae-v1", quality=2, metric="mse")


def test_files_of_added_folders_are_found(cache, tmp_path):
    info = registry.store(tiny(), tmp_path / "other")
    assert registry.find_digest(info.digest) is None
    registry.add_folder(tmp_path / "other")
    assert registry.find_digest(info.digest) == info
