"""Weights inside archives."""

import numpy as np
import pytest
import zarr
from weights_files import contexts, networks, tiny
from zarr.storage import LocalStore, MemoryStore

import zarr_cae
from zarr_cae import CAECodec, CAEConfigurationError, WeightsNotFoundError
from zarr_cae.codec.embedded import FOLDER, embed_weights, import_weights
from zarr_cae.weights import registry


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Act as another machine, without the weights that were stored before."""

    def move(name):
        monkeypatch.setenv("ZARR_CAE_WEIGHTS", str(tmp_path / name))
        registry._added_folders.clear()

    move("first")
    yield move
    registry._added_folders.clear()


def archive(store):
    """Return a group with one array inside a group, and its pixels."""
    digest = registry.store(tiny(**networks(), **contexts())).digest
    root = zarr.create_group(store)
    array = root.create_array(
        "a/b", shape=(32, 32, 3), chunks=(32, 32, 3), dtype="uint8", compressors=None,
        serializer=CAECodec(quality=2, weights=digest),
    )  # fmt: skip
    array[...] = np.arange(32 * 32 * 3).reshape(32, 32, 3) % 251
    return digest, array[...]


@pytest.mark.parametrize("kind", [MemoryStore, LocalStore])
def test_an_archive_brings_its_weights(tmp_path, elsewhere, kind):
    store = MemoryStore() if kind is MemoryStore else LocalStore(tmp_path / "x.zarr")
    digest, pixels = archive(store)
    assert embed_weights(store) == [digest]
    assert embed_weights(store) == [digest]
    assert [name for name, _ in zarr.open_group(store, mode="r").members()] == ["a"]

    elsewhere("second")
    with pytest.raises(WeightsNotFoundError, match=r"zarr_cae.open.*weights import"):
        zarr.open(store, mode="r")["a/b"][...]
    np.testing.assert_array_equal(zarr_cae.open(store)["a/b"][...], pixels)
    np.testing.assert_array_equal(zarr_cae.open(store, path="a/b")[...], pixels)

    if kind is LocalStore:
        elsewhere("another")
        np.testing.assert_array_equal(zarr_cae.open(tmp_path / "x.zarr/a/b")[...], pixels)

    elsewhere("third")
    assert [info.digest for info in import_weights(store)] == [digest]
    np.testing.assert_array_equal(zarr.open(store, mode="r")["a/b"][...], pixels)


def test_damaged_and_missing_weights_are_named(tmp_path, elsewhere):
    store = LocalStore(tmp_path / "x.zarr")
    digest, _ = archive(store)
    with pytest.raises(CAEConfigurationError, match="holds no weights"):
        import_weights(store)
    embed_weights(store)
    (file,) = (tmp_path / "x.zarr/a/b" / FOLDER).iterdir()
    elsewhere("second")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CAEConfigurationError, match="damaged"):
        zarr_cae.open(store)
    file.unlink()
    with pytest.raises(WeightsNotFoundError, match=digest):
        embed_weights(store)
