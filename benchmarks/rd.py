"""The rate-distortion figures of README.md here: both families, chunk sizes, grey images, classical codecs, a plot.

    python benchmarks/rd.py IMAGES --published kodak_rd.json [--out FOLDER] [--only image]

IMAGES is a folder, for README.md the 24 Kodak images; the JSON holds published curves (name: bpp, psnr, ms_ssim) to
take BD-rates against. It runs these commands, one after the other, and prints what they print. They are called image,
chunks-256 and grey; --only runs one of them.

    zarr-cae evaluate IMAGES --metric mse,ms-ssim --chunks image --against jpeg,webp,... --published ...
    zarr-cae evaluate IMAGES --metric mse,ms-ssim --chunks 256 --published ...
    zarr-cae evaluate IMAGES --metric mse,ms-ssim --chunks image --grey --against jpeg

and with --out leaves a CSV of every measurement and a plot of each there.

    python benchmarks/rd.py --fine-tuning FOLDER [--minutes 8] [--density-only]

runs the example of fine-tuning of README.md here instead, where FOLDER is usr/share/stellarium/nebulae/default of the
package that it names. Of the pictures of at least 512 px on both sides every tenth by name is held out. With a folder
of its own for weights it runs

    zarr-cae train THE_REST --range low --from sha256:... --minutes 8 --threads 1 --bfloat16
    zarr-cae evaluate HELD_OUT --quality 1,2,3,4,5 --chunks 256 --csv before.csv
    zarr-cae evaluate HELD_OUT --quality 1,2,3,4,5 --chunks 256 --weights sha256:... --against jpegxl
        --published before.csv

With --density-only the first command has `--density-only --steps 300` in place of `--minutes 8`.
"""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from zarr_cae.cli import main as zarr_cae
from zarr_cae.evaluation.classical import CLASSICAL
from zarr_cae.weights.file import DEFAULT_MODEL
from zarr_cae.weights.registry import CACHE_VARIABLE, default_digest

RUNS = {
    "image": ["--chunks", "image", "--against", ",".join(name for name in CLASSICAL if name != "jpegxl3")],
    "chunks-256": ["--chunks", "256"],
    "grey": ["--chunks", "image", "--grey", "--against", "jpeg"],
}


def run(command: list[str], unprinted: list[str] | None = None) -> None:
    """Print and run a command of `zarr-cae`, and end this script if it fails."""
    print(f"\n$ zarr-cae {' '.join(word for word in command if word not in (unprinted or []))}\n", flush=True)
    if status := zarr_cae(command):
        sys.exit(status)


def fine_tune(folder: Path, length: list[str]) -> None:
    """Train the bundled weights (mse, qualities 1 to 5) further on some pictures, and compare them on others."""
    pictures = sorted(path for path in folder.rglob("*.png") if min(Image.open(path).size) >= 512)
    held_out = [str(path) for path in pictures[9::10]]
    rest = [str(path) for path in pictures if str(path) not in held_out]
    print(f"{len(rest)} pictures to train on, {len(held_out)} held out")
    with TemporaryDirectory() as temporary:
        os.environ[CACHE_VARIABLE], tuned = f"{temporary}/weights", f"{temporary}/tuned"
        start = ["--range", "low", "--from", default_digest(DEFAULT_MODEL, 1, "mse")]
        run(["train", *rest, "--out", tuned, *start, *length, "--threads", "1", "--bfloat16"], rest)
        (file,) = Path(tuned).glob("*.safetensors")
        run(["weights", "import", str(file)])
        before = f"{temporary}/before.csv"
        evaluate = ["evaluate", *held_out, "--quality", "1,2,3,4,5", "--chunks", "256"]
        run([*evaluate, "--csv", before], held_out)
        run([*evaluate, "--weights", f"sha256:{file.stem}", "--against", "jpegxl", "--published", before], held_out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--published", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=tuple(RUNS))
    parser.add_argument("--fine-tuning", type=Path, metavar="FOLDER")
    parser.add_argument("--minutes", default="8", help="of fine-tuning")
    parser.add_argument("--density-only", action="store_true", help="instead, for 300 steps")
    arguments = parser.parse_args()
    if (arguments.images is None) == (arguments.fine_tuning is None):
        parser.error("give either IMAGES or --fine-tuning FOLDER")
    if arguments.fine_tuning is not None:
        length = ["--density-only", "--steps", "300"] if arguments.density_only else ["--minutes", arguments.minutes]
        fine_tune(arguments.fine_tuning, length)
        return 0
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for name, options in RUNS.items():
        if arguments.only not in (None, name):
            continue
        command = ["evaluate", str(arguments.images), "--metric", "mse,ms-ssim", *options]
        if arguments.published is not None and name != "grey":  # the published curves are of colour images
            command += ["--published", str(arguments.published)]
        if arguments.out is not None:
            command += ["--csv", str(arguments.out / f"{name}.csv"), "--plot", str(arguments.out / f"{name}.png")]
        run(command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
