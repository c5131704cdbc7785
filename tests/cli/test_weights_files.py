"""`zarr-cae weights`."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import refused

from zarr_cae.cli import main
from zarr_cae.weights import registry


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
