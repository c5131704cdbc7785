"""Run the Python blocks and the commands of README.md as they stand, in order, in one folder."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

README = Path(__file__).parents[1] / "README.md"
LEGACY = Path(__file__).parent / "fixtures" / "legacy"


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


@pytest.fixture
def inputs(tmp_path):
    """Make the files that the commands read: a picture, a slide, an old archive, and a folder of images."""
    subprocess.run([sys.executable, "-m", "zarr_cae", "demo"], cwd=tmp_path, check=True)
    (tmp_path / "demo.png").rename(tmp_path / "photo.png")
    picture = Image.open(tmp_path / "photo.png").convert("RGB")
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "slide.svs", np.asarray(picture), photometric="rgb", tile=(256, 256))
    shutil.copytree(LEGACY / "photo.zarr", tmp_path / "old.zarr")
    (tmp_path / "images").mkdir()
    for number in range(2):
        picture.crop((128 * number, 256, 128 * number + 128, 384)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_commands_run_one_after_the_other(inputs):
    """Run all commands in order. The longest ones get further arguments that make them short."""
    pytest.importorskip("uvicorn")
    further = {
        "fit": ["--fit", "5s"],
        "compare": ["--region", "0,0,192,192", "--qualities", "1", "--against", "jpeg"],
        "serve": ["--port", "0"],
        "train": ["--steps", "2", "--crop", "32", "--crops-per-quality", "1", "--threads", "1"],
    }
    environment = {**os.environ, "ZARR_CAE_WEIGHTS": str(inputs / "weights")}

    def run(*arguments):
        subprocess.run([sys.executable, "-m", "zarr_cae", *arguments], cwd=inputs, check=True, env=environment)

    run("weights", "import", str(LEGACY / "checkpoint.safetensors"), "--quality", "1", "--metric", "mse")
    for name, *arguments in commands():
        if name == "serve":
            serve(inputs, environment, [name, *arguments, *further[name]])
        else:
            run(name, *arguments, *further.get("fit" if "--fit" in arguments else name, []))
    made = ["photo.zarr", "back.png", "slide.ome.zarr", "report.html", "new.zarr", "folder"]
    made += ["photo.zarr/.cae", "own.zarr/.cae"]
    assert [name for name in made if not (inputs / name).exists()] == []


def serve(folder, environment, arguments):
    """Run `zarr-cae serve`, read its page, and stop it by Ctrl-C."""
    command = [sys.executable, "-m", "zarr_cae", *arguments]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.search(r"http://\S+", process.stdout.readline())[0]
            with urllib.request.urlopen(address, timeout=60) as page:
                assert b"<html" in page.read()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) in {0, 130}


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_relative_links_and_pictures_exist():
    found = re.findall(r"\]\((?!https?://|#)([^)#]+)", README.read_text("utf-8"))
    assert found
    missing = [target for target in found if not (README.parent / target).exists()]
    assert not missing, missing
