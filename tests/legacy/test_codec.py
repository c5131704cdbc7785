"""Read and write caecodec's archives under zarr 3."""

import json
import shutil
import struct
import subprocess
import sys
from importlib.metadata import entry_points

import numcodecs
import numpy as np
import pytest
import zarr

from zarr_cae import CAEConfigurationError, CAEDataError, FrameError, StreamError, WeightsNotFoundError
from zarr_cae.cli import main
from zarr_cae.legacy.codec import ConvolutionalAutoencoder
from zarr_cae.weights import registry
from zarr_cae.weights.compressai import convert

FIELDS = {
    "quality", "metric", "gpu", "patch_size", "bottleneck_channels", "downsampling_factor", "partial_decompress",
}  # fmt: skip


def distance(a, b):
    return np.abs(a.astype(int) - b).max()


def test_pixels_of_an_old_archive(imported, old, decoded):
    array = zarr.open(old, mode="r")
    assert array.metadata.zarr_format == 2
    assert distance(array[...], decoded) <= 1
    assert distance(array[10:70, 40:60], decoded[10:70, 40:60]) <= 1


def test_latents_of_old_chunks(imported, old, latents):
    codec = ConvolutionalAutoencoder(quality=1, partial_decompress=True)
    for key, expected in latents.items():
        found = codec.decode((old / key).read_bytes())
        assert found.dtype == np.float32
        assert (found == expected).all()


def test_pixels_though_the_metadata_say_partial_decompress(imported, old, decoded, tmp_path):
    shutil.copytree(old, tmp_path / "old.zarr")
    path = tmp_path / "old.zarr" / ".zarray"
    metadata = json.loads(path.read_text())
    metadata["compressor"]["partial_decompress"] = True
    path.write_text(json.dumps(metadata))
    array = zarr.open(tmp_path / "old.zarr", mode="r")
    assert array.compressors[0].partial_decompress
    assert distance(array[...], decoded) <= 1


def test_weights_imported_by_the_command(cache, old, decoded, capsys):
    with pytest.raises(WeightsNotFoundError, match="weights import FILE --quality 1"):
        zarr.open(old, mode="r")[...]
    checkpoint = str(old.parent / "checkpoint.safetensors")
    assert main(["weights", "import", checkpoint, "--quality", "1", "--metric", "mse"]) == 0
    assert distance(zarr.open(old, mode="r")[...], decoded) <= 1


def test_new_arrays_of_zarr_2(imported, tmp_path, decoded):
    codec = ConvolutionalAutoencoder(quality=1, gpu=False)
    array = zarr.create_array(
        tmp_path / "new.zarr", shape=decoded.shape, chunks=(64, 48, 3), dtype="uint8", compressors=codec, zarr_format=2
    )
    array[...] = decoded
    assert (tmp_path / "new.zarr" / "1.1.0").read_bytes().startswith(b"ZCAE")
    again = zarr.open(tmp_path / "new.zarr", mode="r")
    config = json.loads((tmp_path / "new.zarr" / ".zarray").read_text())["compressor"]
    assert set(config) == FIELDS | {"id", "weights"}
    assert config["weights"] == imported.digest
    assert config["bottleneck_channels"] == 12
    direct = codec.decode(codec.encode(np.ascontiguousarray(decoded[:64, :48])))
    assert direct.shape == (64, 48, 3)
    assert (again[:64, :48] == direct).all()


def test_configuration_of_caecodec_stays(imported, old):
    stored = json.loads((old / ".zarray").read_text())["compressor"]
    assert numcodecs.get_codec(stored).get_config() == stored
    assert numcodecs.get_codec(stored) == numcodecs.get_codec(dict(stored))


def test_out_is_filled(imported, old):
    codec, chunk = ConvolutionalAutoencoder(quality=1), (old / "0.0.0").read_bytes()
    out = np.zeros((64, 48, 3), np.uint8)
    codec.decode(chunk, out)
    assert (out == codec.decode(chunk)).all()


def test_found_by_entry_point():
    found = {entry.name: entry.value for entry in entry_points(group="numcodecs.codecs")}
    assert found.get("cae") == "zarr_cae.legacy.codec:ConvolutionalAutoencoder", "install the package anew"


def test_opening_needs_neither_weights_nor_torch(cache, old):
    code = (
        "import sys, zarr, numcodecs\n"
        "from zarr_cae.legacy.codec import ConvolutionalAutoencoder as codec\n"
        "numcodecs.register_codec(codec)\n"
        f"assert zarr.open({str(old)!r}, mode='r').shape == (96, 80, 3)\n"
        "assert not {'torch', 'numba', 'compressai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_several_weights_are_ambiguous(imported, old, tmp_path):
    import safetensors.numpy

    state = safetensors.numpy.load_file(old.parent / "checkpoint.safetensors")
    state["g_s.6.bias"] = state["g_s.6.bias"] + 1
    safetensors.numpy.save_file(state, tmp_path / "other.safetensors")
    registry.store(convert(tmp_path / "other.safetensors", quality=1, metric="mse"))
    with pytest.raises(CAEConfigurationError, match="do not say which"):
        zarr.open(old, mode="r")[...]


def test_weights_without_tables_of_compressai(cache, old, tmp_path):
    import safetensors.numpy

    state = safetensors.numpy.load_file(old.parent / "checkpoint.safetensors")
    for name in ("_quantized_cdf", "_cdf_length", "_offset"):
        state[f"entropy_bottleneck.{name}"] = np.empty(0, np.int32)
    safetensors.numpy.save_file(state, tmp_path / "without.safetensors")
    registry.store(convert(tmp_path / "without.safetensors", quality=1, metric="mse"))
    with pytest.raises(CAEConfigurationError, match="no tables of CompressAI's coder"):
        zarr.open(old, mode="r")[...]


@pytest.mark.parametrize(
    ("chunk", "error"),
    [
        (b"", FrameError),
        (bytes(31), FrameError),
        (bytes(40), FrameError),
        (struct.pack(">4Q", 64, 48, 0, 15) + bytes(8), FrameError),
        (struct.pack(">4Q", 1 << 40, 1 << 40, 0, 0) + bytes(8), FrameError),
        (struct.pack(">4Q", 20480, 20480, 0, 0) + bytes(5) + b"\1" + bytes(2), StreamError),
        (struct.pack(">4Q", 64, 48, 0, 16), StreamError),
        (b"ZCAE", FrameError),
        (b"ZCAE\1\0\1" + b"\xff" * 20, FrameError),
        (b"ZCAE\1\0\1\x40\x30\5\1\0" + bytes(4), FrameError),
    ],
)
def test_malformed_chunks_raise(imported, chunk, error):
    with pytest.raises(error):
        ConvolutionalAutoencoder(quality=1).decode(chunk)


def test_truncated_and_damaged_chunks_raise(imported, old):
    codec, chunk = ConvolutionalAutoencoder(quality=1, partial_decompress=True), (old / "0.0.0").read_bytes()
    for length in range(len(chunk)):
        with pytest.raises(CAEDataError):
            codec.decode(chunk[:length])
    for place in range(16):  # height and width
        damaged = bytearray(chunk)
        damaged[place] ^= 0x80
        with pytest.raises(CAEDataError):
            codec.decode(bytes(damaged))


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 9}, {"quality": "1"}, {"quality": True}, {"metric": "psnr"}, {"patch_size": 250}, {"patch_size": 0},
        {"downsampling_factor": 8}, {"bottleneck_channels": 0}, {"weights": "sha256:no"},
    ],
)  # fmt: skip
def test_parameters_out_of_range(imported, options):
    with pytest.raises(CAEConfigurationError):
        ConvolutionalAutoencoder(**{"quality": 1, **options})


def test_arrays_of_other_latent_channels(imported, old):
    stored = json.loads((old / ".zarray").read_text())["compressor"]
    codec = numcodecs.get_codec({**stored, "bottleneck_channels": 192})
    with pytest.raises(CAEConfigurationError, match="192 latent channels"):
        codec.decode((old / "0.0.0").read_bytes())


def test_unknown_fields_of_the_configuration():
    with pytest.raises(CAEConfigurationError, match="unknown fields"):
        ConvolutionalAutoencoder.from_config({"quality": 1, "colour": 3})


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((32, 32), np.uint8), np.zeros((32, 32, 4), np.uint8), np.zeros((32, 32, 3), np.uint16),
        np.zeros((0, 32, 3), np.uint8), np.asfortranarray(np.zeros((32, 32, 3), np.uint8)),
    ],
)  # fmt: skip
def test_chunks_that_cannot_be_coded(imported, pixels):
    with pytest.raises(CAEDataError):
        ConvolutionalAutoencoder(quality=1).encode(pixels)
