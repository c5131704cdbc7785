"""Run every Python block of README.md as it stands, in order, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of the README in this language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def indented_commands() -> list[str]:
    """Return the lines of the README that are indented by four spaces and start with `zarr-cae`."""
    return re.findall(r"^    (zarr-cae .*)$", README.read_text("utf-8"), re.MULTILINE)


@pytest.mark.slow
def test_blocks_run_one_after_the_other(tmp_path):
    assert len(blocks("python")) >= 3
    environment = {**os.environ, "MPLBACKEND": "agg"}
    subprocess.run([sys.executable, "-m", "zarr_cae", "demo"], cwd=tmp_path, check=True, env=environment)
    script = tmp_path / "readme.py"
    # One process for all blocks, with the guard that worker processes started by "spawn" need.
    body = "\n".join(blocks("python"))
    script.write_text(
        "def main():\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + "\n\nif __name__ == '__main__':\n    main()\n"
    )
    subprocess.run([sys.executable, "-W", "error", str(script)], cwd=tmp_path, check=True, env=environment)


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_relative_links_and_pictures_exist():
    found = re.findall(r"\]\((?!https?://|#)([^)#]+)", README.read_text("utf-8"))
    assert found
    missing = [target for target in found if not (README.parent / target).exists()]
    assert not missing, missing
