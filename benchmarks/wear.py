"""Measure what writing a chunk in pieces costs, with and without `zarr_cae.buffered`.

    python benchmarks/wear.py [--quality 4,8]

A photograph of 256 x 256 pixels is one chunk. It is written at once, then in pieces, and read back. Columns: PSNR in dB
against the photograph, and the difference to the chunk that was written at once.
"""

import argparse
import contextlib
import warnings
from typing import Any

import zarr
from images import PHOTOGRAPH, read_rgb
from zarr.storage import MemoryStore

import zarr_cae
from zarr_cae.evaluation.measures import psnr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", default="4,8", help="qualities, 1 to 8, with commas between them")
    warnings.simplefilter("ignore", zarr_cae.CAEWearWarning)
    photo = read_rgb(PHOTOGRAPH)[100:356, 100:356]
    print(f"{'quality':>7}  {'codecs':12} {'pieces':16} {'plain':>16} {'buffered':>16}")
    for quality in map(int, parser.parse_args().quality.split(",")):
        for codecs, compressors in (("cae", None), ("cae and zstd", "auto")):
            whole = written(photo, quality, compressors, [...], use_buffer=False)
            print(f"{quality:7}  {codecs:12} {'whole':16} {whole:8.2f}")
            for name, pieces in PIECES.items():
                found = [written(photo, quality, compressors, pieces, use_buffer=one) for one in (False, True)]
                columns = " ".join(f"{one:8.2f} {f'({one - whole:+.2f})'}" for one in found)
                print(f"{quality:7}  {codecs:12} {name:16} {columns}", flush=True)


PIECES: dict[str, list[Any]] = {
    "16 rows": [slice(row, row + 16) for row in range(0, 256, 16)],
    "4 rows": [slice(row, row + 4) for row in range(0, 256, 4)],
    "1 row": [slice(row, row + 1) for row in range(256)],
    "64 x 64": [(slice(y, y + 64), slice(x, x + 64)) for y in range(0, 256, 64) for x in range(0, 256, 64)],
    "1 colour": [(..., colour) for colour in range(3)],
}


def written(photo: Any, quality: int, compressors: Any, pieces: list[Any], *, use_buffer: bool) -> float:
    """Write a photograph in pieces as one chunk, and return the PSNR of what is read back."""
    array = zarr.create_array(
        MemoryStore(), shape=photo.shape, chunks=photo.shape, dtype="uint8", compressors=compressors,
        serializer=zarr_cae.CAECodec(quality),
    )  # fmt: skip
    context: Any = zarr_cae.buffered(array) if use_buffer else contextlib.nullcontext(array)
    with context as target:
        for piece in pieces:
            target[piece] = photo[piece]
    return psnr(photo, array[...])


if __name__ == "__main__":
    main()
