"""`zarr-cae weights`: list, import, embed and fetch weights files."""

from __future__ import annotations

import argparse
from pathlib import Path

from zarr_cae.cli.arguments import Commands, command, quality, refuse, table
from zarr_cae.cli.images import absent
from zarr_cae.weights import registry
from zarr_cae.weights.families import FAMILIES
from zarr_cae.weights.file import DEFAULT_MODEL, METRICS, ZOO_MODEL, WeightsInfo

_WIDEST = 60
"""Characters of the column that says how weights were trained."""


def add(commands: Commands) -> None:
    """Declare `weights list`, `path`, `import`, `embed` and `fetch`."""
    parser = commands.add_parser(
        "weights", help="List, import or fetch weights files", description="Weights files on this machine."
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    command(actions, "list", list_weights, "List the weights files on this machine.")
    command(actions, "path", show_path, f"Show the folder of imported weights; ${registry.CACHE_VARIABLE} changes it.")
    importing = command(
        actions, "import", import_file,
        "Store weights under their digest. FILE is an export of `zarr-cae train` (.safetensors), an archive that "
        "holds its weights (OUT.zarr), or a "
        f"CompressAI checkpoint of {ZOO_MODEL} (.pth.tar, .pt), which needs --quality and --metric.",
    )  # fmt: skip
    importing.add_argument("file", type=Path, metavar="FILE")
    importing.add_argument("--quality", type=quality, help="quality of a CompressAI checkpoint")
    importing.add_argument("--metric", choices=METRICS, help="metric of a CompressAI checkpoint")
    embedding = command(
        actions, "embed", embed,
        "Store the weights of an archive in the archive, so that it opens on other machines with `zarr_cae.open`.",
    )  # fmt: skip
    embedding.add_argument("archive", type=Path, metavar="OUT.zarr")
    fetching = command(
        actions, "fetch", fetch,
        f"Download CompressAI's weights of {ZOO_MODEL}. Needs compressai and a network.",
    )  # fmt: skip
    fetching.add_argument("--quality", type=quality, required=True)
    fetching.add_argument("--metric", choices=METRICS, required=True)


def list_weights(_: argparse.Namespace) -> None:
    """Run `zarr-cae weights list`."""
    known = list(registry.available())
    rows = [
        [
            _name(info), info.model, info.metric, ",".join(map(str, info.qualities)),
            f"{info.path.stat().st_size / 1e6:.1f} MB",
            "bundled" if info.path.parent == registry.bundled_folder() else "imported", _origin(info), info.digest,
        ]
        for info in known
    ]  # fmt: skip
    print(table(["name", "model", "metric", "qualities", "size", "from", "trained", "digest"], rows))
    for name in dict.fromkeys(map(_name, known)):
        if name in FAMILIES:
            family = FAMILIES[name]
            print(f"\n{name}: {family.domain}\n  data: {family.data}\n  licence of the data: {family.licence}")
    print(f"\nData, licences and limits: {registry.bundled_folder() / 'README.md'}")


def _name(info: WeightsInfo) -> str:
    return info.name or (registry.DEFAULT_NAME if info.path.parent == registry.bundled_folder() else "-")


def _origin(info: WeightsInfo) -> str:
    """Return in a few words how weights came about, by their provenance, which anybody may have written."""
    known = info.provenance
    if "fitted from" in known:
        words = (
            f"fitted from {str(known['fitted from'])[:15]}, {known.get('windows')} windows, {known.get('minutes')} min"
        )
    elif "steps" in known:
        words = f"{known['steps']} steps on {known.get('images')} images"
    else:
        words = str(known.get("source", "-"))
    return words[:_WIDEST] if words.isprintable() else "-"


def show_path(_: argparse.Namespace) -> None:
    """Run `zarr-cae weights path`."""
    print(registry.cache_folder())


def import_file(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae weights import`."""
    path: Path = arguments.file
    if path.is_dir():
        from zarr_cae.codec.embedded import import_weights

        print("\n".join(map(described, import_weights(path))))
        return
    if path.suffix == ".safetensors" and arguments.quality is arguments.metric is None:
        content = path.read_bytes()
    else:
        if arguments.quality is None or arguments.metric is None:
            refuse(f"{path} is taken for a CompressAI checkpoint; say which one with --quality Q --metric M")
        if not path.is_file():
            refuse(absent(path))
        from zarr_cae.weights.compressai import convert

        content = convert(path, quality=arguments.quality, metric=arguments.metric)
    print(described(registry.store(content)))


def embed(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae weights embed`."""
    from zarr_cae.codec.embedded import embed_weights

    path: Path = arguments.archive
    if not path.exists():
        refuse(absent(path))
    if not path.is_dir():
        refuse(f"{path} is not a folder with a zarr hierarchy")
    for digest in embed_weights(path):
        print(digest)


def fetch(arguments: argparse.Namespace) -> None:
    """Run `zarr-cae weights fetch`."""
    from zarr_cae.weights.compressai import fetch

    path = fetch(quality=arguments.quality, metric=arguments.metric)
    print(described(next(info for info in registry.available() if info.path == path)))


def described(info: WeightsInfo) -> str:
    """Return the digest and path of a weights file, and the codec that uses it."""
    qualities = ", ".join(map(str, info.qualities))
    model = "" if info.model == DEFAULT_MODEL else f"model={info.model!r}, "
    metric = "" if info.metric == "mse" else f"metric={info.metric!r}, "
    return (
        f"{info.digest}\n  {info.path}\n  {info.model}, {info.metric}, quality {qualities}: "
        f"CAECodec(quality={info.qualities[-1]}, {metric}{model}weights={info.digest!r})"
    )
