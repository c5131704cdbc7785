"""OME-Zarr metadata of a pyramid of latents: axes and scales of the pixels, rewritten for latent positions.

A latent position covers 16 x 16 pixels, so the scales of rows and columns are 16 times those of the pixels, and the
centre of position 0 lies 7.5 pixels from the centre of pixel 0. This holds where 16 divides the edges of all chunks;
otherwise the positions are not evenly spaced, and the metadata are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from zarr_cae.coder.frame import STRIDE
from zarr_cae.latents.metadata import ATTRIBUTE, Document

__all__ = ["level_keys", "level_paths", "rewrite_multiscales"]

_SPATIAL = ("rows", "columns")


def level_paths(document: Mapping[str, Any]) -> list[str]:
    """Return the paths of the levels of all images of a group's metadata; empty if it is not an OME-Zarr image.

    The paths are relative to the group; paths that lead out of it are left out.
    """
    try:
        entries = document["attributes"]["ome"]["multiscales"]
        paths = [dataset["path"] for entry in entries for dataset in entry["datasets"]]
    except (KeyError, TypeError):
        return []
    return [path for path in paths if isinstance(path, str) and not {"", ".", ".."} & set(path.split("/"))]


def level_keys(key: str, content: bytes) -> dict[str, str]:
    """Return the keys of the metadata of the levels, by path, for the key and the content of a group's `zarr.json`."""
    if b'"multiscales"' not in content:
        return {}
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    prefix = key.removesuffix("zarr.json")
    return {path: f"{prefix}{path}/zarr.json" for path in level_paths(document)}


def rewrite_multiscales(document: Mapping[str, Any], levels: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the metadata of a group with `multiscales` of latents.

    Parameters
    ----------
    document
        The `zarr.json` of a group, not modified.
    levels
        The rewritten `zarr.json` of the arrays of its levels, by path.

    Returns
    -------
    Mapping
        `document` itself if no level has latents. Without `multiscales` if the positions are not evenly spaced, or the
        metadata are malformed. `omero`, which says how pixel values are shown, is left out in both cases.
    """
    if not any(ATTRIBUTE in level.get("attributes", {}) for level in levels.values()):
        return document
    ome = document["attributes"]["ome"]
    kept = {name: value for name, value in ome.items() if name not in {"multiscales", "omero"}}
    try:
        kept["multiscales"] = [_entry(entry, levels) for entry in ome["multiscales"]]
    except (KeyError, IndexError, TypeError, ValueError):
        kept.pop("multiscales", None)
    return {**document, "attributes": {**document["attributes"], "ome": kept}}


def _entry(entry: Mapping[str, Any], levels: Mapping[str, Mapping[str, Any]]) -> Document:
    mappings = [levels[dataset["path"]]["attributes"][ATTRIBUTE] for dataset in entry["datasets"]]
    axes = [_axes(entry["axes"], mapping["axes"], levels[dataset["path"]].get("dimension_names"))
            for mapping, dataset in zip(mappings, entry["datasets"], strict=True)]  # fmt: skip
    if any(other != axes[0] for other in axes):
        raise ValueError("the levels have different axes")
    datasets = [_dataset(dataset, mapping) for dataset, mapping in zip(entry["datasets"], mappings, strict=True)]
    return {**entry, "axes": axes[0], "datasets": datasets}


def _axes(axes: list[Document], roles: list[str], names: list[str] | None) -> list[Document]:
    """Return the axes, named as the dimensions of the latents."""
    if len(roles) > len(axes):
        axes = [*axes, {"name": "latent", "type": "channel"}]
    names = [axis["name"] for axis in axes] if names is None else names
    return [{**axis, "name": name} for axis, name in zip(axes, names, strict=True)]


def _dataset(dataset: Mapping[str, Any], mapping: Mapping[str, Any]) -> Document:
    """Return a level whose scale and translation are those of latent positions."""
    roles = mapping["axes"]
    edges = [edge for edge, role in zip(mapping["pixel_chunk_shape"], roles, strict=False) if role in _SPATIAL]
    if any(edge % STRIDE for edge in edges):
        raise ValueError("latent positions are not evenly spaced")
    changes = {change["type"]: change[change["type"]] for change in dataset["coordinateTransformations"]}
    scale = [float(size) for size in changes["scale"]]
    shift = [float(size) for size in changes.get("translation", [0.0] * len(scale))]
    extra = len(roles) - len(scale)
    scale, shift = scale + [1.0] * extra, shift + [0.0] * extra
    factors = [STRIDE if role in _SPATIAL else 1 for role in roles]
    pairs = list(zip(scale, shift, factors, strict=True))
    return {
        **dataset,
        "coordinateTransformations": [
            {"type": "scale", "scale": [size * factor for size, _, factor in pairs]},
            {"type": "translation", "translation": [at + size * (factor - 1) / 2 for size, at, factor in pairs]},
        ],
    }
