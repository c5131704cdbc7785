"""Metadata of the bottleneck: `zarr.json` documents rewritten so that CAE arrays appear as their latents.

How an array of pixels appears
------------------------------
Chunks stay what they are, and so does their number; `latents.latent_shape` gives the shapes.

* Rows and columns: one latent position for 16 x 16 pixels of a chunk, counted from the chunk's corner; where 16 does
  not divide a chunk's edge its last position covers fewer. Chunks of c rows have ceil(c / 16) rows of latents, so n
  rows of pixels have `n // c * ceil(c / 16) + ceil(n % c / 16)`: simply ceil(n / 16) where 16 divides c.
* Channel axis: M latent channels for an RGB chunk; for grey planes M for each, plane by plane.
* No channel axis: a last axis of length M is added, named "latent" if the others have names.
* Other axes stay. Names of axes and attributes come along; the attribute `cae_bottleneck` describes the mapping. An
  attribute of that name that the array has itself does not show here, but stays in the archive.
* dtype float32. Chunks that were never written (zarr does not store chunks that are all fill value) read as NaN, the
  fill value. Their latents do not exist, would depend on the network and differ between channels, so no single number
  is right, and any could be mistaken for a real one, which is never NaN. NaN does not fail by itself: one such patch
  silently turns a network being trained to NaN. So `as_torch_dataset` raises on it unless told what to put there; who
  reads the array otherwise must look for NaN, or write with `config={"write_empty_chunks": True}`.

Served: transpose before, any bytes-to-bytes codec after, sharding around, also nested. Refused when opened, with
CAEConfigurationError: other filters before `cae`, chunk grids that are not regular, and weights that are not on this
machine. Where that befalls a member of consolidated metadata, the group appears without these, so that the others
can still be opened. Arrays without `cae`, and all of zarr_format 2, pass through unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zarr_cae.codec import cae as codec
from zarr_cae.coder.frame import STRIDE
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.latents import codec as latents
from zarr_cae.pixels.layout import resolve_channel_axis

ATTRIBUTE = "cae_bottleneck"
"""The attribute that says how latent positions map to pixels."""
_SHARDING = "sharding_indexed"

Document = dict[str, Any]


def rewrite(document: Mapping[str, Any]) -> Document:
    """A `zarr.json` document as the view shows it: a deep copy, with CAE arrays as their latents.

    Raises
    ------
    CAEConfigurationError
        For a CAE array whose latents can't be served; WeightsNotFoundError if its weights are not on this machine.
    """
    result = copy.deepcopy(dict(document))
    if result.get("node_type") == "array" and holds(result.get("codecs"), codec.NAME):
        try:
            return _rewrite_array(result)
        except CAEConfigurationError:
            raise
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise CAEConfigurationError(f"cae: the metadata of the array are malformed: {error!r}") from error
    consolidated = result.get("consolidated_metadata")
    if isinstance(consolidated, dict) and isinstance(consolidated.get("metadata"), dict):
        try:
            consolidated["metadata"] = {
                path: rewrite(node) if isinstance(node, dict) else node
                for path, node in consolidated["metadata"].items()
            }
        except CAEConfigurationError:
            del result["consolidated_metadata"]  # zarr reads the members one by one, and meets the reason there
    return result


def _named(entry: object) -> tuple[str, Any]:
    """Name and configuration, which may be anything, of a codec's entry, which may be the bare name."""
    if isinstance(entry, dict):
        return str(entry.get("name")), entry.get("configuration", {})
    return str(entry), {}


def holds(codecs: object, name: str) -> bool:
    """Whether a chain of codecs, as metadata writes it, has one of this name, also in shards."""
    for own, configuration in map(_named, codecs if isinstance(codecs, list | tuple) else ()):
        inside = configuration.get("codecs") if own == _SHARDING and isinstance(configuration, dict) else None
        if own == name or holds(inside, name):
            return True
    return False


@dataclass(frozen=True)
class _View:
    """How latents appear: the codec that decodes them, and which axis of the array each of its axes is."""

    codec: latents.CAEBottleneckCodec
    axes: tuple[int, ...]
    channels: int

    @property
    def added(self) -> bool:
        """Whether the latents have a last axis of their own."""
        return self.codec.layout.channel_axis is None

    def shape(self, shape: Sequence[int], axes: Sequence[int]) -> list[int]:
        """Shape of the latents for a shape of pixels whose axis i is axis axes[i] of the array."""
        length = dict(zip(axes, shape, strict=True))
        found = latents.latent_shape([length[axis] for axis in self.axes], self.codec.layout, self.channels)
        own = dict(zip(self.axes, found, strict=False))
        return [*(own[axis] for axis in axes), *([self.channels] if self.added else [])]


def _rewrite_array(array: Document) -> Document:
    name, grid = _named(array["chunk_grid"])
    if name != "regular":
        raise CAEConfigurationError(
            f"cae: latents of an array with chunk grid {name!r} can't be served: chunks of different sizes have "
            "latents of different sizes; rewrite the array with a regular grid"
        )
    shape, chunk = array["shape"], grid["chunk_shape"]
    axes = tuple(range(len(shape)))
    view = _find(array["codecs"], axes, shape, chunk)
    chunk_of_array = [0] * len(axes)
    for axis, length in zip(view.axes, view.codec.chunk_shape, strict=True):
        chunk_of_array[axis] = length
    array["attributes"] = {**(array.get("attributes") or {}), ATTRIBUTE: _mapping(view, array, chunk_of_array)}
    array["shape"] = view.shape(shape, axes)
    grid["chunk_shape"] = view.shape(chunk, axes)
    array["data_type"], array["fill_value"] = "float32", "NaN"
    array["codecs"] = _rewrite_codecs(array["codecs"], axes, view)
    if view.added:
        array["chunk_key_encoding"] = {
            "name": latents.NAME,
            "configuration": {"encoding": array["chunk_key_encoding"]},
        }
        names = array.get("dimension_names")
        if names is not None:
            new = "latent"
            while new in names:
                new += "_"
            array["dimension_names"] = [*names, new]
    return array


def _find(codecs: Sequence[object], axes: tuple[int, ...], shape: Sequence[int], chunk: Sequence[int]) -> _View:
    """The codec `cae` in a chain that gets pieces of shape `chunk`, whose axis i is axis axes[i] of the array.

    `shape` is the one by which `cae` resolves its channel axis: the array's, or the chunk's inside a shard.
    """
    for name, configuration in map(_named, codecs):
        if name == "transpose":
            order = configuration.get("order")
            if not isinstance(order, list | tuple) or sorted(order) != list(range(len(axes))):
                raise CAEConfigurationError(f"cae: latents behind a transpose of order {order!r} can't be served")
            axes, shape, chunk = (tuple(item[i] for i in order) for item in (axes, shape, chunk))
        elif name == _SHARDING:
            inner = configuration["chunk_shape"]
            return _find(configuration["codecs"], axes, inner, inner)
        elif name == codec.NAME:
            cae = codec.CAECodec.from_dict({"name": name, "configuration": configuration})
            axis = resolve_channel_axis(tuple(shape), cae.channel_axis)
            own = {**configuration, "channel_axis": axis, "weights": cae.weights, "chunk_shape": list(chunk)}
            found = latents.CAEBottleneckCodec.from_dict({"name": latents.NAME, "configuration": own})
            return _View(found, axes, codec.loaded(cae).latent_channels)
        else:
            raise CAEConfigurationError(
                f"cae: latents behind filter {name!r} can't be served: how it changes shapes is not known here; only "
                "'transpose' is"
            )
    raise CAEConfigurationError(
        "cae: the metadata of the array are malformed: a shard without 'cae' stands before 'cae' in the chain of codecs"
    )


def _rewrite_codecs(codecs: Sequence[Any], axes: tuple[int, ...], view: _View) -> list[Any]:
    """The chain for latents, whose input has these axes of the array, and perhaps one more at the end."""
    result = []
    for entry in codecs:
        name, configuration = _named(entry)
        if name == "transpose":
            order = list(configuration["order"])
            axes = tuple(axes[i] for i in order)
            configuration["order"] = [*order, len(order)] if view.added else order
        elif name == _SHARDING:
            configuration["chunk_shape"] = view.shape(configuration["chunk_shape"], axes)
            configuration["codecs"] = _rewrite_codecs(configuration["codecs"], axes, view)
        result.append(view.codec.to_dict() if name == codec.NAME else entry)
    return result


def _mapping(view: _View, array: Document, chunk: list[int]) -> Document:
    """The attribute that tells users of the latents what they are."""
    layout, cae = view.codec.layout, view.codec.cae
    roles = dict.fromkeys(range(len(chunk)), "batch")
    rows, columns = sorted(view.axes[axis] for axis in layout.spatial_axes)  # as users of the array see them
    roles |= {rows: "rows", columns: "columns"}
    roles[len(chunk) if layout.channel_axis is None else view.axes[layout.channel_axis]] = "latents"
    return {
        "stride": STRIDE,
        "axes": [roles[axis] for axis in sorted(roles)],
        "latent_channels": view.channels,
        "planes": "grey" if layout.grey else "rgb",
        "pixel_shape": list(array["shape"]),
        "pixel_chunk_shape": chunk,
        "pixel_data_type": array["data_type"],
        "position": "with c the pixel_chunk_shape along rows or columns and p = ceil(c / stride), latent position i "
        "covers the stride pixels from i // p * c + i % p * stride on, up to the end of their chunk",
        "model": cae.model,
        "quality": cae.quality,
        "metric": cae.metric,
        "weights": cae.weights,
    }
