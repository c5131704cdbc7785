"""`verify` checks every stored chunk of an archive."""

import numpy as np
import pytest
import zarr
from archives import chunks_of, read, write
from zarr.codecs import Crc32cCodec

from zarr_cae import CAECodec, WeightsNotFoundError
from zarr_cae.cli import main
from zarr_cae.codec.verify import verify

PIXELS = np.random.default_rng(0).integers(0, 256, (80, 96, 3)).astype(np.uint8)


def create(path, **options):
    keywords = {"chunks": (32, 32, 3), "serializer": CAECodec(quality=2), "compressors": None, **options}
    array = zarr.create_array(path, shape=PIXELS.shape, dtype="uint8", **keywords)
    array[...] = PIXELS
    return array


def damage(store, key, place, value=0xFF):
    content = bytearray(read(store, key))
    content[place] ^= value
    write(store, key, bytes(content))


@pytest.mark.parametrize("deep", [False, True])
def test_a_good_array(pipeline, deep):
    array, done = create({}), []
    result = verify(array, deep=deep, advance=done.append)
    assert (result.chunks, result.bad, sum(done)) == (9, [], 9)
    assert (result.lowest is not None) == deep
    if deep:  # chunks at the edges are decoded whole, so the range may be wider than that of the array
        assert result.lowest <= array[...].min()
        assert result.highest >= array[...].max()


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", ["", "photo"])
def test_bad_chunks_by_their_keys(pipeline, deep, name):
    array = create({}, name=name or None)
    store, prefix = array.store_path.store, f"{name}/" if name else ""
    damage(store, f"{prefix}c/0/1/0", 40)
    write(store, f"{prefix}c/2/0/0", read(store, f"{prefix}c/2/0/0")[:-1])
    write(store, f"{prefix}c/2/2/0", b"")
    result = verify(array, deep=deep)
    assert [bad.key for bad in result.bad] == [f"{prefix}c/{place}/0" for place in ("0/1", "2/0", "2/2")]
    assert all("FrameError" in bad.reason for bad in result.bad)
    assert result.chunks == 9


def test_damage_beyond_the_edge_of_the_array_is_found(pipeline):
    """Reading the array skips tiles beyond its edge; `verify` checks the whole chunk."""
    array = create({}, chunks=(64, 64, 3))
    store = array.store_path.store
    damage(store, "c/1/1/0", len(read(store, "c/1/1/0")) - 6)
    assert [bad.key for bad in verify(array).bad] == ["c/1/1/0"]


def test_chunks_that_were_never_written_are_no_fault(pipeline):
    stored = {}
    array = create(stored)
    del stored["c/1/1/0"]
    result = verify(array)
    assert (result.chunks, result.absent, result.bad) == (8, 1, [])


@pytest.mark.skipif("array.rectilinear_chunks" not in zarr.config, reason="this zarr has no rectilinear grids")
@pytest.mark.parametrize("deep", [False, True])
def test_chunks_of_several_sizes(pipeline, deep):
    with zarr.config.set({"array.rectilinear_chunks": True}):
        array = create({}, chunks=[[48, 32], [32, 64], [3]])
        store = array.store_path.store
        result = verify(array, deep=deep)
        assert (result.chunks, result.absent, result.bad) == (4, 0, [])
        damage(store, "c/1/1/0", 40)
        assert [bad.key for bad in verify(array, deep=deep).bad] == ["c/1/1/0"]


@pytest.mark.parametrize("deep", [False, True])
def test_inner_chunks_of_shards(pipeline, deep):
    array = create({}, shards=(64, 64, 3), compressors=[Crc32cCodec()])
    store = array.store_path.store
    assert verify(array, deep=deep).bad == []
    assert verify(array, deep=deep).chunks == len(chunks_of(store)) == 4
    damage(store, "c/0/0/0", 60)
    (bad,) = verify(array, deep=deep).bad
    assert bad.key.startswith("c/0/0/0 inner chunk ")
    write(store, "c/1/0/0", b"no shard")
    assert verify(array, deep=deep).bad[-1].key == "c/1/0/0"


def test_arrays_of_other_codecs_are_read():
    array = zarr.create_array({}, data=np.arange(64.0), chunks=(16,), compressors=[Crc32cCodec()], name="a")
    damage(array.store_path.store, "a/c/2", 3)
    result = verify(array)
    assert [bad.key for bad in result.bad] == ["a/c/2"]
    assert (result.chunks, result.lowest, result.highest) == (4, 0.0, 63.0)


def test_missing_weights_are_no_fault_of_the_chunks():
    array = create({})
    document = read(array.store_path.store, "zarr.json").replace(
        array.metadata.codecs[0].weights.encode(), b"sha256:" + b"0" * 64
    )
    write(array.store_path.store, "zarr.json", document)
    with pytest.raises(WeightsNotFoundError):
        verify(zarr.open_array(array.store_path.store, mode="r"))


def test_the_command(tmp_path, capsys):
    array = create(tmp_path / "a.zarr", name="photo")
    zarr.create_array(tmp_path / "a.zarr", name="mask", data=np.eye(8))
    assert main(["verify", str(tmp_path / "a.zarr")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "mask: 1 chunks, 0 bad chunks, values from 0.0 to 1.0", "photo: 9 chunks, 0 bad chunks"
    ]  # fmt: skip
    assert main(["verify", "--deep", str(tmp_path / "a.zarr" / "photo")]) == 0
    assert "values from" in capsys.readouterr().out
    (tmp_path / "a.zarr" / "photo" / "c" / "0" / "0" / "0").unlink()
    assert main(["verify", str(tmp_path / "a.zarr" / "photo")]) == 0
    assert "8 chunks, 0 bad chunks, 1 not stored" in capsys.readouterr().out
    damage(array.store_path.store, "photo/c/1/1/0", 30)
    assert main(["verify", str(tmp_path / "a.zarr")]) == 1
    printed = capsys.readouterr()
    assert "  photo/c/1/1/0: FrameError" in printed.out
    assert "1 bad chunks" in printed.err
