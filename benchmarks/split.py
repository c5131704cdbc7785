"""Split tiles of the domains and photographs into training and held-out images: by slide, place or repository.

    python benchmarks/split.py SOURCES OUT

SOURCES holds the tar files: photos-*.tar, and histology, satellite and microscopy as
DOMAIN-train-open.tar, in any folder of it. OUT gets the folders train/DOMAIN and heldout/DOMAIN, with the tiles under
their names in the tars. No slide and no place is on both sides, as tiles of one look alike:

    histology    by slide: all tiles of a case go where the MD5 of its name sends them, one case of seven is held out;
                 tiles of dsb2018 have no slide in their name, and go one by one
    satellite    by place: four of them are held out
    microscopy   by source: all of CellProfiler's examples, and of dsb2018 the MD5 of the name sends one of eight
    photos       the photographs that `zarr-cae train` holds out: every twentieth of those of at least 128 px

Training tiles of more than 8 bits are scaled to 8 by their largest value, as `zarr-cae train` reads 8 bits. Held-out
ones stay as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

DOMAINS = ("histology", "satellite", "microscopy")
PLACES = ("naip_riverside", "nd_naip", "oam_banepa", "seneca")
SMALLEST, EVERY = 128, 20


def chance(name: str) -> int:
    """Return a number that is the same on every machine."""
    return int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest(), 16)


def is_held_out(domain: str, name: str) -> bool:
    """Return whether a tile of a domain is held out, by its name alone."""
    if domain == "histology":
        words = name.split("__")
        return chance(name if name.startswith("dsb") else "__".join(words[:2])) % 7 == 0
    if domain == "satellite":
        return name.startswith(PLACES)
    return name.startswith("cp_") or (name.startswith("dsb") and chance(name) % 8 == 0)


def members(tars: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield the images in some tar files, by name."""
    found: dict[str, tuple[Path, str]] = {}
    for path in tars:
        with tarfile.open(path) as archive:
            found |= {PurePosixPath(one.name).name: (path, one.name) for one in archive if one.isfile()}
    for path in tars:
        with tarfile.open(path) as archive:
            for name, (_, inside) in sorted(item for item in found.items() if item[1][0] == path):
                stream = archive.extractfile(inside)
                if stream is not None and not name.endswith(".md"):
                    yield name, stream.read()


def eight_bits(content: bytes) -> bytes:
    """Return an image of 8 bits: as it is, or scaled by its largest value."""
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image)
    if pixels.dtype == np.uint8:
        return content
    scaled = np.rint(pixels.astype(float) * 255 / max(int(pixels.max()), 1)).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(scaled).save(stream, "PNG")
    return stream.getvalue()


def put(out: Path, side: str, domain: str, name: str, content: bytes) -> None:
    folder = out / side / domain
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    for domain in DOMAINS:
        for name, content in members(sorted(arguments.sources.rglob(f"{domain}-train-open.tar"))):
            held_out = is_held_out(domain, name)
            convert = domain == "microscopy" and not held_out
            side = "heldout" if held_out else "train"
            put(arguments.out, side, domain, name, eight_bits(content) if convert else content)
    photographs = sorted(members(sorted(arguments.sources.rglob("photos-*.tar"))))
    large = 0
    for name, content in photographs:
        held_out = min(Image.open(io.BytesIO(content)).size) >= SMALLEST
        large += held_out
        put(arguments.out, "heldout" if held_out and large % EVERY == 0 else "train", "photos", name, content)
    for domain in (*DOMAINS, "photos"):
        sides = {side: sum(1 for _ in (arguments.out / side / domain).glob("*")) for side in ("train", "heldout")}
        print(f"{domain}: {sides['train']} to train on, {sides['heldout']} held out")


if __name__ == "__main__":
    main()
