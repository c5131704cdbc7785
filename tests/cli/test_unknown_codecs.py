"""Arrays of codecs that are not installed are not called damaged."""

import json

import numpy as np
import pytest
import zarr

from zarr_cae.cli import main


def archive(folder, zarr_format, codec):
    """Return an array whose metadata name another codec."""
    zarr.create_array(folder, data=np.zeros((32, 32), np.uint8), zarr_format=zarr_format)
    path = folder / ("zarr.json" if zarr_format == 3 else ".zarray")
    metadata = json.loads(path.read_text())
    if zarr_format == 3:
        metadata["codecs"][1] = {"name": codec, "configuration": {}}
    else:
        metadata["compressor"] = {"id": codec}
    path.write_text(json.dumps(metadata))
    return folder


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("codec", "advice"),
    [("jpegxl_of_nobody", "the package that wrote the array"), ("imagecodecs_jpeg2k", "imagecodecs,")],
)
def test_the_codec_and_its_package_are_named(tmp_path, capsys, zarr_format, codec, advice):
    path = archive(tmp_path / "a.zarr", zarr_format, codec)
    for command in (["info", str(path)], ["decode", str(path), str(tmp_path / "a.png")]):
        assert main(command) == 1
        message = capsys.readouterr().err
        assert repr(codec) in message
        assert advice in message
        assert "damaged" not in message


def test_damaged_metadata_are_called_damaged(tmp_path, capsys):
    path = archive(tmp_path / "a.zarr", 3, "jpegxl_of_nobody")
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array", "shape": 5}')
    assert main(["info", str(path)]) == 1
    assert "damaged" in capsys.readouterr().err
