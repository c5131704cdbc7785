"""The rooms of the package: who may import whom, and what opening an array may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "zarr_cae"
ROOMS = [
    "errors", "framing", "contexts", "tables", "loops", "kernels", "rans", "entropy", "pixels", "windows", "pillow",
    "settings", "transforms", "inference", "tensors", "microbatch", "weights", "zoo", "engine", "plans", "chunks",
    "partial", "codec", "latents", "rewriting", "bottleneck", "patches", "training", "bjontegaard", "evaluation",
    "rivals", "cli", "__main__", "__init__",
]  # fmt: skip
ONLY = {
    "torch": {"transforms", "inference", "tensors", "engine", "training", "zoo"},
    "zarr": {"settings", "plans", "chunks", "codec", "latents", "bottleneck", "patches", "cli", "training", "__init__"},
    "numba": {"kernels"},
    "compressai": {"zoo"},
    "PIL": {"pillow", "training", "evaluation", "rivals", "cli"},
}


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module
            names.add(node.module)
            if node.module == "zarr_cae":
                names |= {f"zarr_cae.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"{path.name}:{node.lineno} imports relatively")
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    own = room(path)
    assert own in ROOMS, f"{own} is no room; add it to the table in this test, in its place"
    for name in imported(path):
        head, *rest = name.split(".")
        if head == "zarr_cae" and rest and rest[0] != own:
            assert ROOMS.index(rest[0]) < ROOMS.index(own), f"{own} imports {rest[0]}, which stands above it"
        if head in ONLY:
            assert own in ONLY[head], f"{own} imports {head}; only {sorted(ONLY[head])} may"


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
