"""zarr and OME-Zarr (0.4 and 0.5) arrays as slides."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import zarr

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.slides.metadata import SlideMetadata, unit_name
from zarr_cae.slides.ome import SOURCE
from zarr_cae.slides.sources import Slide, guessed_axes

__all__ = ["described_array", "kept_metadata", "open_zarr"]

_AXES = frozenset("tczyx")
_MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError)
"""The errors that malformed metadata of OME-Zarr cause here."""


def open_zarr(path: Path, *, level: int = 0) -> Slide:
    """Open a zarr array, a level of an OME-Zarr image, or the only array of a group."""
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    try:
        node = zarr.open(path, mode="r")
    except FileNotFoundError as error:
        raise CAEConfigurationError(f"cae: {path} holds no zarr array or group") from error
    name = path.name.removesuffix(".zarr").removesuffix(".ome")
    if isinstance(node, zarr.Group):
        return replace(_image(path, node, level), name=name)
    if level:
        raise CAEConfigurationError(f"cae: {path} is one array, so it has no level {level}")
    names = getattr(node.metadata, "dimension_names", None)
    return replace(_array(path, node, names, node.attrs.asdict()), name=name)


def _array(path: Path, array: zarr.Array[Any], names: Any, attributes: Mapping[str, Any]) -> Slide:
    if names is not None and len(set(names)) == len(names) and set(names) <= _AXES and {"y", "x"} <= set(names):
        stored = "".join(names)
        rgb = stored.endswith("c") and array.shape[-1] == 3
    else:
        stored, rgb = guessed_axes(array.shape, path)
    return Slide(path.stem, array, stored, rgb, kept_metadata(attributes))


def _image(path: Path, group: zarr.Group, level: int) -> Slide:
    attributes: dict[str, Any] = dict(group.attrs.asdict())
    ome: Any = attributes.get("ome", attributes)  # version 0.4 has the same fields at the top
    found = ome.get("multiscales") if isinstance(ome, dict) else None
    if not found:
        members = [member for _, member in group.members(max_depth=None) if isinstance(member, zarr.Array)]
        if len(members) != 1:
            raise CAEConfigurationError(
                f"cae: {path} is a group of {len(members)} arrays and no OME-Zarr image; name one array in it"
            )
        return _array(path, members[0], getattr(members[0].metadata, "dimension_names", None), attributes)
    try:
        datasets = found[0]["datasets"]
        if not 0 <= level < len(datasets):
            sizes = (_size(group[one["path"]], [axis["name"] for axis in found[0]["axes"]]) for one in datasets)
            levels = ", ".join(f"{index}: {size[1]} x {size[0]}" for index, size in enumerate(sizes))
            raise CAEConfigurationError(f"cae: {path} has no level {level}; its levels are {levels}")
        array = group[datasets[level]["path"]]
        axes = [axis["name"] for axis in found[0]["axes"]]
        assert isinstance(array, zarr.Array)
        slide = _array(path, array, axes, attributes)
        metadata = _described(slide.metadata, ome, found[0]["axes"], datasets[level])
    except _MALFORMED as error:
        if isinstance(error, CAEConfigurationError):
            raise
        raise CAEConfigurationError(f"cae: the OME-Zarr metadata of {path} are malformed: {error!r}") from error
    colours = [colour.upper() for colour in metadata.channel_colours]
    rgb = slide.rgb or ("c" in axes and colours == ["FF0000", "00FF00", "0000FF"] and array.dtype.kind == "u")
    return replace(slide, metadata=metadata, rgb=rgb, levels=tuple(_size(group[one["path"]], axes) for one in datasets))


def _described(metadata: SlideMetadata, ome: Any, axes: Any, dataset: Any) -> SlideMetadata:
    """Return metadata with the pixel size of a level and the channels that an OME-Zarr image has, where it has them."""
    scales = [one["scale"] for one in dataset["coordinateTransformations"] if one["type"] == "scale"]
    sizes = {
        axis["name"]: (float(size), str(unit_name(axis["unit"])))
        for axis, size in zip(axes, scales[0], strict=True)
        if axis.get("type") in {"space", "time"} and unit_name(str(axis.get("unit")))
    }
    channels = ome.get("omero", {}).get("channels", [])
    return replace(
        metadata,
        pixel_size=sizes,
        channel_names=tuple(str(one.get("label", "")) for one in channels),
        channel_colours=tuple(str(one.get("color", "")) for one in channels),
    )


def described_array(array: zarr.Array[Any]) -> tuple[tuple[str | None, ...], SlideMetadata]:
    """Return the names of the axes of a local array, and what is known of its pixels.

    Pixel sizes and channel names are those of the OME-Zarr image of which the array is a level. Where there is none, or
    it does not say, they are those that the array's own attributes keep.
    """
    names = tuple(getattr(array.metadata, "dimension_names", None) or ())
    kept = kept_metadata(array.attrs.asdict())
    folder = Path(str(array.store_path).removeprefix("file://"))
    for parent in folder.parents:
        try:
            attributes: dict[str, Any] = dict(zarr.open_group(parent, mode="r").attrs.asdict())
            ome: Any = attributes.get("ome", attributes)
            for image in ome.get("multiscales", ()):
                for dataset in image["datasets"]:
                    if parent / dataset["path"] == folder:
                        axes = tuple(str(axis["name"]) for axis in image["axes"])
                        found = _described(kept, ome, image["axes"], dataset)
                        sizes = found.pixel_size or kept.pixel_size
                        channels = found.channel_names or kept.channel_names
                        return names or axes, replace(found, pixel_size=sizes, channel_names=channels)
        except FileNotFoundError:  # it is no group, so neither is any folder above
            break
        except _MALFORMED:
            continue
    return names, kept


def _size(array: Any, axes: list[str]) -> tuple[int, int]:
    return array.shape[axes.index("y")], array.shape[axes.index("x")]


def kept_metadata(attributes: Mapping[str, Any]) -> SlideMetadata:
    """Return the metadata of the original file that an archive of this package keeps in its attributes."""
    kept = attributes.get(SOURCE)
    if not isinstance(kept, dict):
        return SlideMetadata()
    known = {"icc_profile", "dpi", "pixel_size", "channel_names"}
    further = {name: value for name, value in kept.items() if name not in known}
    try:
        across, down = kept.get("dpi", (None, None))
        return SlideMetadata(
            {
                str(axis): (float(size), unit)
                for axis, (size, unit) in kept.get("pixel_size", {}).items()
                if unit_name(unit) == unit
            },
            tuple(str(name) for name in kept.get("channel_names", ())),
            icc_profile=base64.b64decode(kept["icc_profile"], validate=True) if "icc_profile" in kept else None,
            dpi=None if across is None else (float(across), float(down)),
            further=further,
        )
    except (AttributeError, TypeError, ValueError, binascii.Error):  # not those that this package writes
        return SlideMetadata(further=further)
