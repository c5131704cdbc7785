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


def commands() -> list[list[str]]:
    """Return the commands of the README that start with `zarr-cae`, without the remarks behind them."""
    lines = re.findall(r"^    zarr-cae (.*)$", README.read_text("utf-8"), re.MULTILINE)
    return [re.split(r" {2,}", line)[0].split() for line in lines]


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


@pytest.mark.slow
def test_commands_run_one_after_the_other(tmp_path):
    """Run the commands that need no more than a picture: the others need a slide, an old archive or end by Ctrl-C."""
    needs = {"convert", "migrate", "serve", "train"}
    subprocess.run([sys.executable, "-m", "zarr_cae", "demo"], cwd=tmp_path, check=True)
    (tmp_path / "demo.png").rename(tmp_path / "photo.png")
    done = []
    for command in commands():
        if command[0] not in needs:
            more = (
                ["--region", "0,0,192,192", "--qualities", "1", "--against", "jpeg"] if command[0] == "compare" else []
            )
            subprocess.run([sys.executable, "-m", "zarr_cae", *command, *more], cwd=tmp_path, check=True)
            done.append(command[0])
    assert done[:4] == ["encode", "decode", "info", "verify"]
    assert needs | set(done) == {command[0] for command in commands()}


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_relative_links_and_pictures_exist():
    found = re.findall(r"\]\((?!https?://|#)([^)#]+)", README.read_text("utf-8"))
    assert found
    missing = [target for target in found if not (README.parent / target).exists()]
    assert not missing, missing
