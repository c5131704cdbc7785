"""Latents of caecodec's archives as arrays."""

import json
import shutil
import warnings

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

from zarr_cae import (
    BottleneckStore,
    CAEConfigurationError,
    WeightsNotFoundError,
    as_torch_dataset,
    open_bottleneck,
)
from zarr_cae.legacy.codec import ConvolutionalAutoencoder


@pytest.fixture
def stitched(latents):
    rows = [np.concatenate([latents[f"{i}.{j}.0"] for j in range(2)], axis=1) for i in range(2)]
    return np.concatenate(rows)[:6, :5]


def test_latents_of_an_archive(imported, old, stitched):
    array = open_bottleneck(old)
    assert array.shape == (6, 5, 12)
    assert array.chunks == (4, 3, 12)
    assert array.dtype == np.float32
    assert (array[...] == stitched).all()
    assert (array[1:5, 2:4] == stitched[1:5, 2:4]).all()
    assert array.attrs["camera"] == "Nikon"
    mapping = array.attrs["cae_bottleneck"]
    assert mapping["axes"] == ["rows", "columns", "latents"]
    assert mapping["pixel_shape"] == [96, 80, 3]
    assert mapping["weights"] == imported.digest
    assert len(as_torch_dataset(array, patch=2)) == 6


def copy(old, folder, **changes):
    shutil.copytree(old, folder)
    metadata = json.loads((folder / ".zarray").read_text())
    metadata["compressor"] |= changes.pop("compressor", {})
    (folder / ".zarray").write_text(json.dumps(metadata | changes))
    return folder


def test_in_groups(imported, old, stitched, tmp_path):
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=2, attributes={"site": "x"})
    group.create_array("mask", data=np.arange(12).reshape(3, 4))
    copy(old, tmp_path / "g.zarr" / "photo")
    for consolidated in (False, True):
        if consolidated:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                zarr.consolidate_metadata(tmp_path / "g.zarr")
        found = open_bottleneck(tmp_path / "g.zarr")
        assert found.attrs["site"] == "x"
        assert sorted(found.array_keys()) == ["mask", "photo"]
        assert (found["photo"][...] == stitched).all()
        assert (found["mask"][...] == np.arange(12).reshape(3, 4)).all()


def test_names_of_axes(imported, old, tmp_path):
    folder = copy(old, tmp_path / "a.zarr")
    attributes = {"_ARRAY_DIMENSIONS": ["y", "x", "c"], "scale_factor": 2}
    (folder / ".zattrs").write_text(json.dumps(attributes))
    array = open_bottleneck(folder)
    assert array.attrs["_ARRAY_DIMENSIONS"] == ["y_latent", "x_latent", "c_latent"]
    assert "scale_factor" not in array.attrs
    (folder / ".zattrs").unlink()
    assert "cae_bottleneck" in open_bottleneck(folder).attrs


def test_new_chunks_too(imported, tmp_path, decoded):
    codec = ConvolutionalAutoencoder(quality=1)
    array = zarr.create_array(
        tmp_path / "new.zarr", shape=(64, 96, 3), chunks=(40, 48, 3), dtype="uint8", compressors=codec, zarr_format=2
    )
    array[...] = np.pad(decoded[:64], ((0, 0), (0, 16), (0, 0)))
    found = open_bottleneck(tmp_path / "new.zarr")
    assert found.shape == (3 + 2, 6, 12)
    assert np.isfinite(found[...]).all()
    assert (found[:3, 3:] == ConvolutionalAutoencoder(1, partial_decompress=True).decode(
        (tmp_path / "new.zarr" / "0.1.0").read_bytes()
    )).all()  # fmt: skip


def test_missing_chunks_are_nan(imported, old, tmp_path):
    folder = copy(old, tmp_path / "a.zarr")
    (folder / "0.0.0").unlink()
    assert np.isnan(open_bottleneck(folder)[:4, :3]).all()


def test_missing_weights(cache, old):
    with pytest.raises(WeightsNotFoundError):
        open_bottleneck(old)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [96, 80, 4]}, {"dtype": "<u2"}, {"filters": [{"id": "delta", "dtype": "|u1"}]}, {"chunks": "large"},
        {"compressor": {"quality": 99}}, {"compressor": {"metric": None}}, {"chunks": [64, 48, 1]},
    ],
)  # fmt: skip
def test_arrays_whose_latents_cannot_be_served(imported, old, tmp_path, changes):
    with pytest.raises(CAEConfigurationError):
        open_bottleneck(copy(old, tmp_path / "a.zarr", **changes))


def test_read_only_and_other_arrays_as_they_are(imported, old, tmp_path):
    array = open_bottleneck(old)
    with pytest.raises((CAEConfigurationError, ValueError)):
        array[0, 0] = 1
    zarr.create_array(tmp_path / "plain.zarr", data=np.eye(3), zarr_format=2)
    with pytest.raises(CAEConfigurationError, match="not stored with the codec"):
        open_bottleneck(tmp_path / "plain.zarr")
    store = BottleneckStore(LocalStore(tmp_path / "plain.zarr"))
    assert (zarr.open(store, mode="r")[...] == np.eye(3)).all()
