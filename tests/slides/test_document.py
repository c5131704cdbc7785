"""Run the examples of `zarr_cae/slides/README.md` as they stand, in order, in one folder."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

DOCUMENT = resources.files("zarr_cae") / "slides" / "README.md"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_examples_run_one_after_the_other(tmp_path: Path) -> None:
    for module in ("tifffile", "dask.array", "ome_zarr", "ngff_zarr"):
        pytest.importorskip(module)
    examples = r"^```python\n(.*?)^```$|^    zarr-cae ([^\n]*)$"
    found = re.findall(examples, DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert [bool(block) for block, _ in found] == [True, False, True, True, True, True]
    for block, command in found:
        arguments = ["-c", block] if block else ["-m", "zarr_cae", *command.split()]
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "16 patches" in done.stdout
