"""`zarr-cae weights`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import refused

from zarr_cae import CAECodec
from zarr_cae.cli import main
from zarr_cae.weights import registry


def test_weights_travel_with_an_archive(
    here: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    array = zarr.create_array("a.zarr", data=photo[:32, :32], serializer=CAECodec(quality=1), compressors=None)
    digest = array.metadata.codecs[-1].weights
    assert main(["weights", "embed", "a.zarr"]) == 0
    assert capsys.readouterr().out == f"{digest}\n"
    assert main(["weights", "import", "a.zarr"]) == 0
    assert digest in capsys.readouterr().out
    assert [path.stem for path in here.glob("weights/*")] == [digest.removeprefix("sha256:")]
    refused(capsys, "weights", "embed", "nowhere.zarr")


def test_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "path"]) == 0
    assert capsys.readouterr().out == f"{here / 'weights'}\n"
    assert main(["weights", "list"]) == 0
    out = capsys.readouterr().out
    for info in registry.available():
        assert info.digest in out
    assert "bundled" in out
    assert "imported" not in out
    Path("junk.safetensors").write_bytes(b"junk")
    refused(capsys, "weights", "import", "junk.safetensors")
    assert "--quality" in refused(capsys, "weights", "import", "checkpoint.pth.tar")
    refused(capsys, "weights", "import", "checkpoint.pth.tar", "--quality", "1", "--metric", "mse")
    assert not list(here.glob("weights/*"))
