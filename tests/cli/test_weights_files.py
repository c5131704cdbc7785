"""`zarr-cae weights`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import refused
from weights_files import tiny

from zarr_cae import CAECodec, CAEConfigurationError
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
    assert "photographs: photographs" in out
    assert "licence of the data: research" in out
    assert "steps on 1627 images" in out
    assert Path(out.rstrip().rpartition("limits: ")[2]).is_file()
    Path("junk.safetensors").write_bytes(b"junk")
    refused(capsys, "weights", "import", "junk.safetensors")
    assert "--quality" in refused(capsys, "weights", "import", "checkpoint.pth.tar")
    refused(capsys, "weights", "import", "checkpoint.pth.tar", "--quality", "1", "--metric", "mse")
    assert not list(here.glob("weights/*"))


def test_fitted_and_unprintable_provenance_is_listed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = {"fitted from": "sha256:" + "ab" * 32, "windows": 36, "minutes": 10.0}
    registry.store(tiny(provenance=fitted))
    registry.store(tiny(provenance={"steps": "\x1b[31m"}, name="other"))
    assert main(["weights", "list"]) == 0
    out = capsys.readouterr().out
    assert "fitted from sha256:abababab, 36 windows, 10.0 min" in out
    assert "\x1b" not in out


def test_a_name_that_is_none_is_refused(here: Path) -> None:
    for name in ("", "A", "x" * 64, "\x1b[31m", "sha256:1"):
        with pytest.raises(CAEConfigurationError, match="its name"):
            registry.store(tiny(name=name))
    assert not list(here.glob("weights/*"))
