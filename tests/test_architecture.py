"""Contracts on imports (in pyproject.toml), the length of modules, and what opening an array imports."""

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "zarr_cae"
ROOT = PACKAGE.parent.parent


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_imports_keep_the_contracts_of_pyproject():
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 420


SILENT = """
import sys
import zarr
{before}
group = zarr.open_group({path!r}, mode="r")
assert [name for name, _ in group.members()] == ["photo"]
array = group["photo"]
assert array.shape == (64, 64, 3), array.shape
loaded = {{"torch", "compressai", "numba", "torchvision"}} & set(sys.modules)
assert not loaded, loaded
"""


@pytest.mark.parametrize("before", ["", "import zarr_cae"])
def test_opening_and_listing_import_neither_torch_nor_compressai(tmp_path, before):
    import zarr

    from zarr_cae import CAECodec

    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    group.create_array(
        "photo", shape=(64, 64, 3), chunks=(64, 64, 3), dtype="uint8", serializer=CAECodec(quality=1), compressors=None
    )
    code = SILENT.format(path=str(tmp_path / "g.zarr"), before=before)
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path)
