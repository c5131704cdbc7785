"""Every rate-distortion figure of the README: both families, both chunk sizes, grey images, rivals, a plot.

    python benchmarks/rd.py IMAGES --published kodak_rd.json [--out FOLDER]

IMAGES is a folder, for the README the 24 Kodak images; the JSON holds published curves (name: bpp, psnr, ms_ssim) to
take BD-rates against. It runs these commands, one after the other, and prints what they print:

    zarr-cae evaluate IMAGES --metric mse,ms-ssim --chunks image --against jpeg,webp,... --published ...
    zarr-cae evaluate IMAGES --metric mse,ms-ssim --chunks 256 --published ...
    zarr-cae evaluate IMAGES --metric mse,ms-ssim --chunks image --grey --against jpeg

and with --out leaves a CSV of every measurement and a plot of each there.
"""

import argparse
import sys
from pathlib import Path

from zarr_cae.cli import main as zarr_cae
from zarr_cae.rivals import RIVALS

RUNS = {
    "image": ["--chunks", "image", "--against", ",".join(name for name in RIVALS if name != "jpegxl3")],
    "chunks-256": ["--chunks", "256"],
    "grey": ["--chunks", "image", "--grey", "--against", "jpeg"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--published", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=tuple(RUNS))
    arguments = parser.parse_args()
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
        print(f"\n$ zarr-cae {' '.join(command)}\n", flush=True)
        if status := zarr_cae(command):
            return int(status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
