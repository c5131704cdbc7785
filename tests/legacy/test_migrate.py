"""Migrate archives of zarr v2 to zarr v3."""

import json
import shutil
import time

import numcodecs
import numpy as np
import pytest
import torch
import zarr
from zarr.storage import LocalStore

from zarr_cae import CAEConfigurationError, CAEDataError, WeightsNotFoundError, open_bottleneck
from zarr_cae.cli import main
from zarr_cae.legacy.codec import ConvolutionalAutoencoder
from zarr_cae.legacy.migrate import migrate
from zarr_cae.networks.transforms import FactorizedAnalysis, FactorizedSynthesis
from zarr_cae.weights import registry


@pytest.fixture
def archive(imported, old, tmp_path):
    """Return a group with arrays of caecodec and others."""
    root = zarr.create_group(tmp_path / "old.zarr", zarr_format=2, attributes={"site": "x"})
    root.create_group("deep", attributes={"depth": 1})
    for path in ("photo", "deep/photo"):
        shutil.copytree(old, tmp_path / "old.zarr" / path)
    attributes = {"_ARRAY_DIMENSIONS": ["y", "x", "c"], "camera": "Nikon"}
    (tmp_path / "old.zarr" / "photo" / ".zattrs").write_text(json.dumps(attributes))
    mask = np.arange(63, dtype=">u2").reshape(7, 9)
    options = {"chunks": (4, 4), "compressors": numcodecs.Blosc("zstd"), "filters": None}
    root.create_array("mask", data=mask, attributes={"_ARRAY_DIMENSIONS": ["a", "b"]}, **options)
    root.create_array("fortran", data=mask.astype("f8"), order="F", compressors=None, filters=None, chunks=(3, 9))
    root.create_array("slashes", data=mask, chunk_key_encoding={"name": "v2", "separator": "/"}, chunks=(4, 4))
    return tmp_path / "old.zarr"


def test_everything_comes_along(archive, tmp_path):
    found = migrate(archive, tmp_path / "new.zarr", verify=True)
    assert (found.arrays, found.chunks) == (5, 4 + 4 + 6 + 3 + 6)
    before, after = zarr.open(archive, mode="r"), zarr.open(tmp_path / "new.zarr", mode="r")
    assert after.metadata.zarr_format == 3
    assert after.attrs["site"] == "x"
    assert after["deep"].attrs["depth"] == 1
    for name in ("mask", "fortran", "slashes"):
        assert (after[name][...] == before[name][...]).all()
        assert after[name].dtype == before[name].dtype.newbyteorder("=")
        assert after[name].chunks == before[name].chunks
    assert after["mask"].metadata.dimension_names == ("a", "b")
    photo = after["photo"]
    assert photo.metadata.dimension_names == ("y", "x", "c")
    assert photo.attrs.asdict() == {"camera": "Nikon"}
    assert photo.fill_value == 0
    for path in ("photo", "deep/photo"):
        assert (
            open_bottleneck(archive, path=path)[...] == open_bottleneck(tmp_path / "new.zarr", path=path)[...]
        ).all()


def test_pixels_stay(imported, old, tmp_path):
    """Pixels agree if patches are as large as chunks. With smaller patches only the seams may differ."""
    shutil.copytree(old, tmp_path / "old.zarr")
    path = tmp_path / "old.zarr" / ".zarray"
    metadata = json.loads(path.read_text())
    metadata["compressor"]["patch_size"] = 64
    path.write_text(json.dumps(metadata))
    migrate(tmp_path / "old.zarr", tmp_path / "new.zarr")
    before, after = (zarr.open(tmp_path / name, mode="r")[...] for name in ("old.zarr", "new.zarr"))
    # Columns of a chunk of 48 end amid the patch, where caecodec goes on with the latents of its padding.
    difference = np.abs(before.astype(int) - after)
    assert difference[:, :16].max() <= 1
    assert difference[:, 48:64].max() <= 1


@pytest.mark.parametrize("kind", [FactorizedAnalysis, FactorizedSynthesis])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_a_margin_is_a_reflection(kind, side):
    torch.manual_seed(0)
    with_margin, plain = kind(4, 6, margin=1), kind(4, 6)
    plain.load_state_dict(with_margin.state_dict())
    unit = 16 if kind is FactorizedAnalysis else 1
    x = torch.rand(2, 3 if unit == 16 else 6, side * unit, 3 * unit)
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (unit, unit), (unit, unit)), mode="reflect"))
    edge = 17 - unit
    with torch.no_grad():
        assert torch.equal(with_margin(x), plain(padded)[:, :, edge:-edge, edge:-edge])


def test_weights_with_a_margin_are_for_migrated_arrays_only(imported, old, tmp_path):
    migrate(old, tmp_path / "new.zarr")
    used = zarr.open(tmp_path / "new.zarr", mode="r").metadata.codecs[0].weights
    assert used != imported.digest
    assert registry.default_digest("bmshj2018-factorized", 1, "mse") == imported.digest
    assert ConvolutionalAutoencoder(quality=1).weights == imported.digest
    migrate(old, tmp_path / "again.zarr")
    assert zarr.open(tmp_path / "again.zarr", mode="r").metadata.codecs[0].weights == used


@pytest.mark.filterwarnings("ignore:Numcodecs codecs")  # older zarr warns that other readers may not support them
def test_filters_of_numcodecs_stay(tmp_path):
    array = zarr.create_array(
        tmp_path / "old.zarr", data=np.arange(9), zarr_format=2, filters=[numcodecs.Delta("i8")], compressors=None
    )
    migrate(tmp_path / "old.zarr", tmp_path / "new.zarr")
    assert (zarr.open(tmp_path / "new.zarr", mode="r")[...] == array[...]).all()


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_goes_on_after_an_interruption(archive, tmp_path):
    new = tmp_path / "new.zarr"
    migrate(archive, new)
    whole = snapshot(new)
    first = new / "photo" / "c" / "0" / "0" / "0"
    second = new / "photo" / "c" / "1" / "0" / "0"
    first.unlink()
    second.write_bytes(second.read_bytes()[:40])
    (new / "mask" / "0.0").write_bytes(b"half")
    (new / "deep" / "photo" / "zarr.json").unlink()
    migrate(archive, new, verify=True)
    assert snapshot(new) == whole


class InterruptedAtWorkError(Exception):
    pass


def test_an_interrupted_migration_leaves_whole_chunks(archive, tmp_path):
    def start(steps):
        done = []

        def advance(count):
            done.append(count)
            if len(done) == 5:
                raise InterruptedAtWorkError

        return advance

    with pytest.raises(InterruptedAtWorkError):
        migrate(archive, tmp_path / "new.zarr", start=start)
    deadline = time.monotonic() + 60  # zarr's own threads end what they had begun
    while list((tmp_path / "new.zarr").rglob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    migrate(archive, tmp_path / "new.zarr", verify=True)


def test_verify_finds_other_symbols(archive, tmp_path):
    new = tmp_path / "new.zarr"
    migrate(archive, new)
    photo = new / "photo" / "c"
    shutil.copy(photo / "0" / "0" / "0", photo / "0" / "1" / "0")
    migrate(archive, new)  # checksums are good
    with pytest.raises(CAEDataError, match="photo/c/0/1/0"):
        migrate(archive, new, verify=True)


def test_a_damaged_chunk_is_named(archive, tmp_path):
    (archive / "deep" / "photo" / "1.0.0").write_bytes(b"damaged")
    with pytest.raises(CAEDataError, match=r"deep/photo/1\.0\.0"):
        migrate(archive, tmp_path / "new.zarr")


def test_chunks_of_this_package_are_moved_too(imported, tmp_path, decoded):
    array = zarr.create_array(
        tmp_path / "old.zarr", shape=(64, 96, 3), chunks=(64, 48, 3), dtype="uint8", zarr_format=2,
        compressors=ConvolutionalAutoencoder(quality=1),
    )  # fmt: skip
    array[...] = np.pad(decoded[:64], ((0, 0), (0, 16), (0, 0)))
    migrate(LocalStore(tmp_path / "old.zarr"), LocalStore(tmp_path / "new.zarr"), verify=True)
    assert (open_bottleneck(tmp_path / "old.zarr")[...] == open_bottleneck(tmp_path / "new.zarr")[...]).all()


def test_archives_that_cannot_be_migrated(archive, tmp_path, cache):
    with pytest.raises(CAEConfigurationError, match="no array or group of zarr v2"):
        migrate(tmp_path / "nothing.zarr", tmp_path / "new.zarr")
    zarr.create_group(tmp_path / "other.zarr", attributes={"not": "ours"})
    with pytest.raises(CAEConfigurationError, match="give another place"):
        migrate(archive, tmp_path / "other.zarr")
    (tmp_path / "full.zarr").mkdir()
    (tmp_path / "full.zarr" / "file").write_text("here")
    with pytest.raises(CAEConfigurationError, match="not empty"):
        migrate(archive, tmp_path / "full.zarr")
    registered = {path: path.read_bytes() for path in cache.glob("*.safetensors")}
    for path in registered:
        path.unlink()
    with pytest.raises(WeightsNotFoundError):
        migrate(archive, tmp_path / "new.zarr")
    assert not (tmp_path / "new.zarr" / "zarr.json").exists()


def test_the_command(archive, tmp_path, capsys):
    new = tmp_path / "new.zarr"
    assert main(["migrate", str(archive), str(new), "--verify"]) == 0
    assert "every symbol compared" in capsys.readouterr().out
    assert main(["migrate", str(archive), str(new)]) == 0
    for arguments in ([tmp_path / "no.zarr", new], [archive, tmp_path / "new"], [archive, archive / "inside.zarr"]):
        assert main(["migrate", *map(str, arguments)]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
