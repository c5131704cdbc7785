"""Rewrite metadata of zarr v2 so that arrays of caecodec's codec `cae` appear as their latents.

They appear as arrays of zarr v3 do (`metadata`): their metadata are written in the form of zarr v3, rewritten, and
written back. The compressor becomes `cae_bottleneck` (`zarr_cae.legacy.latents`) with the same fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from zarr_cae.codec.cae import NAME
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.latents.codec import NAME as LATENTS_NAME
from zarr_cae.latents.metadata import rewrite
from zarr_cae.pixels.layout import RGB
from zarr_cae.weights.file import ZOO_MODEL

__all__ = ["DIMENSIONS_ATTRIBUTE", "has_compressor", "is_v2_metadata", "make", "sources"]

_ARRAY, _ATTRIBUTES, _CONSOLIDATED = ".zarray", ".zattrs", ".zmetadata"
DIMENSIONS_ATTRIBUTE = "_ARRAY_DIMENSIONS"
"""The attribute in which xarray keeps the names of axes in zarr v2."""

V2Document = Mapping[str, Any]
"""The content of `.zarray` or `.zattrs`."""


def is_v2_metadata(key: str) -> bool:
    """Return whether a key belongs to a document of zarr v2 that may need rewriting."""
    return key.rpartition("/")[2] in (_ARRAY, _ATTRIBUTES, _CONSOLIDATED)


def sources(key: str) -> tuple[str, ...]:
    """Return the keys whose values `make` needs for the value of a key."""
    folder, slash, name = key.rpartition("/")
    return (f"{folder}{slash}{_ARRAY}", key) if name == _ATTRIBUTES else (key,)


def make(key: str, stored: Sequence[bytes | None]) -> bytes | None:
    """Return the value of a key as the view shows it.

    Parameters
    ----------
    key
        A key for which `is_v2_metadata` is true.
    stored
        The values of its `sources`; None for those that do not exist.

    Returns
    -------
    bytes or None
        The stored value if there is nothing to rewrite; None if the key does not exist.

    Raises
    ------
    CAEConfigurationError
        If the latents of an array of caecodec can't be served; WeightsNotFoundError if its weights are not on this
        machine.
    """
    name = key.rpartition("/")[2]
    if name == _CONSOLIDATED:
        return _consolidated(stored[0])
    array = _parsed(stored[0])
    if array is None or not has_compressor(array, NAME):
        return stored[-1]
    attributes = {} if name == _ARRAY else _parsed(stored[1]) or {}
    changed = _rewrite(array, attributes)
    return json.dumps(changed[0] if name == _ARRAY else changed[1]).encode()


def has_compressor(array: V2Document, name: str) -> bool:
    """Return whether an array of zarr v2 has this compressor."""
    compressor = array.get("compressor")
    return isinstance(compressor, dict) and compressor.get("id") == name


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    try:
        document = json.loads(content or b"null")
    except (ValueError, RecursionError):
        return None  # zarr names the fault
    return document if isinstance(document, dict) else None


def _consolidated(content: bytes | None) -> bytes | None:
    document = _parsed(content)
    members = document.get("metadata") if document else None
    if document is None or not isinstance(members, dict):
        return content
    changed = dict(members)
    for path, array in members.items():
        if path.rpartition("/")[2] == _ARRAY and isinstance(array, dict) and has_compressor(array, NAME):
            attributes = path.removesuffix(_ARRAY) + _ATTRIBUTES
            try:
                changed[path], changed[attributes] = _rewrite(array, members.get(attributes) or {})
            except CAEConfigurationError:
                return None  # zarr then reads the members one by one, and raises for this one only
    return json.dumps({**document, "metadata": changed}).encode()


def _rewrite(array: V2Document, attributes: V2Document) -> tuple[V2Document, V2Document]:
    """Return an array's metadata and attributes as the view shows them."""
    try:
        shape, chunks, compressor = list(array["shape"]), list(array["chunks"]), array["compressor"]
        if len(shape) != 3 or shape[2] != RGB or chunks[2] != RGB or array["dtype"] != "|u1" or array.get("filters"):
            raise CAEConfigurationError(  # noqa: TRY301
                "cae: latents of caecodec's arrays need shape (rows, columns, 3) and chunks (rows, columns, 3) of "
                f"uint8 without filters; got {shape}, {chunks}, {array['dtype']}, {array.get('filters')}"
            )
        configuration = {
            "model": ZOO_MODEL, "quality": compressor["quality"], "metric": compressor["metric"], "channel_axis": 2,
            **{name: compressor[name] for name in ("weights",) if compressor.get(name)},
        }  # fmt: skip
        names = attributes.get(DIMENSIONS_ATTRIBUTE)
        changed = rewrite(
            {
                "zarr_format": 3, "node_type": "array", "shape": shape, "data_type": "uint8",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
                "chunk_key_encoding": {"name": "v2"}, "attributes": attributes,
                "codecs": [{"name": NAME, "configuration": configuration}], "dimension_names": names,
            }
        )  # fmt: skip
    except CAEConfigurationError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CAEConfigurationError(f"cae: the metadata of the array are malformed: {error!r}") from error
    own = {
        "shape": changed["shape"],
        "chunks": changed["chunk_grid"]["configuration"]["chunk_shape"],
        "dtype": "<f4",
        "fill_value": "NaN",
        "order": "C",
        "compressor": {**compressor, "id": LATENTS_NAME},
    }
    new_names = {} if names is None else {DIMENSIONS_ATTRIBUTE: changed["dimension_names"]}
    return {**array, **own}, {**changed["attributes"], **new_names}
