"""Rewrite `zarr.json` documents so that CAE arrays appear as their latents.

How an array of pixels appears
------------------------------
The chunks and their number stay the same. `zarr_cae.latents.codec.latent_shape` computes the shapes.

* Rows and columns: one latent position covers 16 x 16 pixels of a chunk, counted from the chunk's corner. If 16 does
  not divide the chunk's edge, the last position covers fewer pixels. Chunks of c rows have ceil(c / 16) rows of
  latents, so n rows of pixels have `n // c * ceil(c / 16) + ceil(n % c / 16)` rows of latents. This is ceil(n / 16) if
  16 divides c.
* Channel axis: M latent channels for an RGB chunk; M for each grey plane, plane after plane. With the codec's `colour`:
  M for the plane of the three colours, and then M for each other channel, in ascending order.
* No channel axis: the latents have an additional last axis of length M.
* Tiles whose pixels are stored exactly may have the latents of smoothed pixels, if those of the pixels themselves are
  far from what the networks saw in training.
* Other axes do not change.
* Names of axes: `y` becomes `y_latent`, because its length differs, so that coordinates or masks along `y` fit in the
  same data set. This holds for rows, columns and the channel axis. If 16 does not divide the chunk's edge c, the
  name is `y_latent_c` (`y_latent_100`), since its length depends on c. An additional axis is named `latent`, if other
  axes have names. Other axes keep their names.
* Attributes stay, except for the CF attributes that say how to unpack pixels (`PIXEL_ATTRIBUTES`): xarray would apply
  them to the latents. The attribute `cae_bottleneck` describes the latents, and holds the attributes that were removed.
  If the array has an attribute of this name itself, it does not appear here, but stays in the archive.
* dtype float32. Chunks that were never written read as NaN, the fill value. (zarr does not store chunks that are all
  fill value.) Their latents do not exist, and no number can replace them. NaN raises no error: one such patch turns
  a network in training to NaN. So `as_torch_dataset` raises on NaN, unless `missing` gives a
  replacement. Other readers must look for NaN, or the archive must be written with
  `config={"write_empty_chunks": True}`.

Supported: a transpose before `cae`, bytes-to-bytes codecs after it, sharding around it, also nested. These raise
CAEConfigurationError when the array is opened: other filters before `cae`, chunk grids that are not regular, and
weights that are neither on this machine nor in the archive. If a member of consolidated metadata raises it, the
consolidated metadata are left out, so that the other members can still be opened. Arrays without `cae` do not change.
Arrays of zarr v2 that caecodec wrote appear in the same way (`metadata_v2`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zarr_cae.codec.cae import NAME as CAE_NAME
from zarr_cae.codec.cae import CAECodec, layout_of, loaded
from zarr_cae.coder.frame import STRIDE
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.latents.codec import NAME as LATENTS_NAME
from zarr_cae.latents.codec import CAEBottleneckCodec, latent_shape
from zarr_cae.latents.view import rewrite_arrays
from zarr_cae.weights.registry import is_digest

ATTRIBUTE = "cae_bottleneck"
"""The attribute that says how latent positions map to pixels."""
PIXEL_ATTRIBUTES = frozenset(
    {
        "_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned", "valid_min", "valid_max",
        "valid_range", "actual_range", "flag_values", "flag_masks", "flag_meanings",
    }
)  # fmt: skip
"""Attributes of the CF conventions that hold for pixel values only."""
SHARDING = "sharding_indexed"

Document = dict[str, Any]


def rewrite(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a `zarr.json` document in which CAE arrays appear as their latents.

    Parameters
    ----------
    document
        The metadata of an array or a group, with or without consolidated metadata. It is not modified.

    Returns
    -------
    Mapping
        `document` itself if there is nothing to rewrite. Otherwise a new document that shares the parts that did not
        change, so attributes may be nested as deeply as JSON can be read.

    Raises
    ------
    CAEConfigurationError
        If the latents of a CAE array can't be served; WeightsNotFoundError if its weights are not on this machine.
    """
    return rewrite_arrays(document, _rewrite_if_cae)


def _rewrite_if_cae(array: Mapping[str, Any]) -> Mapping[str, Any]:
    if not has_codec(array.get("codecs"), CAE_NAME):
        return array
    try:
        return _rewrite_array(array)
    except CAEConfigurationError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CAEConfigurationError(f"cae: the metadata of the array are malformed: {error!r}") from error


def codec_entry(entry: object) -> tuple[str, Any]:
    """Return the name and the configuration of a codec from its entry in metadata, which may be the bare name.

    The configuration is unchecked, so it may be any JSON value.
    """
    if isinstance(entry, dict):
        return str(entry.get("name")), entry.get("configuration", {})
    return str(entry), {}


def has_codec(codecs: object, name: str) -> bool:
    """Return whether a chain of codecs in metadata contains the codec `name`, also inside shards."""
    for own, configuration in map(codec_entry, codecs if isinstance(codecs, list | tuple) else ()):
        inside = configuration.get("codecs") if own == SHARDING and isinstance(configuration, dict) else None
        if own == name or has_codec(inside, name):
            return True
    return False


def weights_of(document: Mapping[str, Any]) -> set[str]:
    """Return the digests of the weights of an array, or of all arrays in the consolidated metadata of a group."""
    consolidated = document.get("consolidated_metadata")
    members = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    nodes = [document, *(members.values() if isinstance(members, dict) else ())]
    chains = [node.get("codecs") for node in nodes if isinstance(node, dict)]
    found = set()
    while chains:
        chain = chains.pop()
        for name, configuration in map(codec_entry, chain if isinstance(chain, list) else ()):
            if isinstance(configuration, dict) and name == SHARDING:
                chains.append(configuration.get("codecs"))
            elif isinstance(configuration, dict) and name == CAE_NAME and is_digest(configuration.get("weights")):
                found.add(configuration["weights"])
    return found


@dataclass(frozen=True)
class _View:
    """The codec that decodes the latents, and the axis of the array for each of the codec's axes."""

    codec: CAEBottleneckCodec
    axes: tuple[int, ...]
    channels: int

    @property
    def adds_axis(self) -> bool:
        """Whether the latents have a last axis that the pixels do not have."""
        return self.codec.layout.channel_axis is None

    @property
    def roles(self) -> list[str]:
        """The role of each axis of the latents: "batch", "rows", "columns" or "latents"."""
        layout = self.codec.layout
        roles = ["batch"] * len(self.axes)
        rows, columns = sorted(self.axes[axis] for axis in layout.spatial_axes)  # in the order of the array's axes
        roles[rows], roles[columns] = "rows", "columns"
        if layout.channel_axis is None:
            return [*roles, "latents"]
        roles[self.axes[layout.channel_axis]] = "latents"
        return roles

    @property
    def pixel_chunk_shape(self) -> list[int]:
        """The shape in pixels of a chunk of the codec `cae`, with the axes of the array."""
        lengths = dict(zip(self.axes, self.codec.chunk_shape, strict=True))
        return [lengths[axis] for axis in range(len(lengths))]

    def shape(self, shape: Sequence[int], axes: Sequence[int]) -> list[int]:
        """Return the shape of the latents for a shape in pixels whose axis i is axis axes[i] of the array."""
        length = dict(zip(axes, shape, strict=True))
        found = latent_shape([length[axis] for axis in self.axes], self.codec.layout, self.channels)
        own = dict(zip(self.axes, found, strict=False))
        return [*(own[axis] for axis in axes), *([self.channels] if self.adds_axis else [])]


def _rewrite_array(array: Mapping[str, Any]) -> Document:
    name, grid = codec_entry(array["chunk_grid"])
    if name != "regular":
        raise CAEConfigurationError(
            f"cae: latents of an array with chunk grid {name!r} can't be served: chunks of different sizes have "
            "latents of different sizes; rewrite the array with a regular grid"
        )
    shape, chunk = array["shape"], grid["chunk_shape"]
    axes = tuple(range(len(shape)))
    view = _find(array["codecs"], axes, shape, chunk)
    attributes = dict(array.get("attributes") or {})
    of_pixels = {name: attributes.pop(name) for name in sorted(PIXEL_ATTRIBUTES & attributes.keys())}
    attributes[ATTRIBUTE] = {**_mapping(view, array), **({"pixel_attributes": of_pixels} if of_pixels else {})}
    changed = {
        "attributes": attributes,
        "shape": view.shape(shape, axes),
        "chunk_grid": {"name": name, "configuration": {**grid, "chunk_shape": view.shape(chunk, axes)}},
        "data_type": "float32",
        "fill_value": "NaN",
        "codecs": _rewrite_codecs(array["codecs"], axes, view),
    }
    if view.adds_axis:
        encoding = {"encoding": array["chunk_key_encoding"]}
        changed["chunk_key_encoding"] = {"name": LATENTS_NAME, "configuration": encoding}
    if array.get("dimension_names") is not None:
        changed["dimension_names"] = _dimension_names(array["dimension_names"], view)
    return {**array, **changed}


def _dimension_names(names: Sequence[str | None], view: _View) -> list[str | None]:
    """Return names for the axes of latents that differ from all names of the axes of pixels."""
    taken = {name for name in names if name is not None}
    result: list[str | None] = []
    for axis, role in enumerate(view.roles):
        name = names[axis] if axis < len(names) else "latent"
        if name is not None and role != "batch":
            if axis < len(names):
                chunk = view.pixel_chunk_shape[axis]
                name = f"{name}_latent" + (f"_{chunk}" if role != "latents" and chunk % STRIDE else "")
            while name in taken:
                name += "_"
            taken.add(name)
        result.append(name)
    return result


def _find(codecs: Sequence[object], axes: tuple[int, ...], shape: Sequence[int], chunk: Sequence[int]) -> _View:
    """Find the codec `cae` in a chain of codecs.

    Parameters
    ----------
    codecs
        The chain, which codes pieces of shape `chunk`.
    axes
        Axis i of the pieces is axis axes[i] of the array.
    shape
        The shape with which `cae` resolves its channel axis: the array's, or inside a shard the inner chunk's.
    chunk
        The shape of the pieces.
    """
    for name, configuration in map(codec_entry, codecs):
        if name == "transpose":
            order = configuration.get("order")
            if not isinstance(order, list | tuple) or sorted(order) != list(range(len(axes))):
                raise CAEConfigurationError(f"cae: latents behind a transpose of order {order!r} can't be served")
            axes, shape, chunk = (tuple(item[i] for i in order) for item in (axes, shape, chunk))
        elif name == SHARDING:
            inner = configuration["chunk_shape"]
            return _find(configuration["codecs"], axes, inner, inner)
        elif name == CAE_NAME:
            cae = CAECodec.from_dict({"name": name, "configuration": configuration})
            axis = layout_of(cae, tuple(shape)).channel_axis
            own = {**configuration, "channel_axis": axis, "weights": cae.weights, "chunk_shape": list(chunk)}
            found = CAEBottleneckCodec.from_dict({"name": LATENTS_NAME, "configuration": own})
            return _View(found, axes, loaded(cae).latent_channels)
        else:
            raise CAEConfigurationError(
                f"cae: latents behind filter {name!r} can't be served: its effect on shapes is unknown; only "
                "'transpose' is supported"
            )
    raise CAEConfigurationError(
        "cae: the metadata of the array are malformed: a shard without 'cae' stands before 'cae' in the chain of codecs"
    )


def _rewrite_codecs(codecs: Sequence[Any], axes: tuple[int, ...], view: _View) -> list[Any]:
    """Return the chain of codecs for latents; axis i of its input is axis axes[i] of the array."""
    result: list[Any] = []
    for entry in codecs:
        name, configuration = codec_entry(entry)
        if name == "transpose":
            order = list(configuration["order"])
            axes = tuple(axes[i] for i in order)
            changed = {"order": [*order, len(order)] if view.adds_axis else order}
        elif name == SHARDING:
            inside = _rewrite_codecs(configuration["codecs"], axes, view)
            changed = {"chunk_shape": view.shape(configuration["chunk_shape"], axes), "codecs": inside}
        else:
            result.append(view.codec.to_dict() if name == CAE_NAME else entry)
            continue
        result.append({**entry, "configuration": {**configuration, **changed}})
    return result


def _mapping(view: _View, array: Mapping[str, Any]) -> Document:
    """Return the attribute that describes the latents to their readers."""
    cae, layout = view.codec.cae, view.codec.layout
    return {
        "stride": STRIDE,
        "axes": view.roles,
        "latent_channels": view.channels,
        "planes": "grey" if layout.grey else "rgb and grey" if layout.planes_per_image > 1 else "rgb",
        **({} if cae.colour is None else {"colour": list(cae.colour)}),
        "pixel_shape": list(array["shape"]),
        "pixel_chunk_shape": view.pixel_chunk_shape,
        "pixel_data_type": array["data_type"],
        "position": "with c the pixel_chunk_shape along rows or columns and p = ceil(c / stride), latent position i "
        "covers the stride pixels from i // p * c + i % p * stride on, up to the end of their chunk",
        "model": cae.model,
        "quality": cae.quality,
        "metric": cae.metric,
        "weights": cae.weights,
    }
