"""Several images in one output: a group with an OME-Zarr image for each file.

The group has the layout that OME-Zarr calls `bioformats2raw.layout`: the attributes of its member `OME` list the images
by name, so that a viewer that opens the group finds all of them. Until all images are complete, the journal holds them:

    .NAME.converting/             the journal of the whole output, with the choices that hold for all images
        images/.A.converting/     the journal of image A and its source, as for an output of one image
        out/                      the group, to which the images are moved at the end
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import zarr

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.slides.conversion import Conversion
from zarr_cae.slides.journal import Journal, check_settings, journal_folder
from zarr_cae.slides.ome import VERSION

__all__ = ["create_collection", "image_names", "image_target", "is_placed", "list_images"]

_LIST = "OME"
"""Name of the member that lists the images."""


def image_names(sources: Sequence[Path]) -> list[str]:
    """Return a name for the image of each source: the name of the file without its suffix.

    Raises
    ------
    CAEConfigurationError
        If two sources have the same name, or no member of a group can have the name.
    """
    names = [source.absolute().name.removesuffix(source.suffix).removesuffix(".ome") for source in sources]
    for name, source in zip(names, sources, strict=True):
        if name in {"", ".", ".."} or name.startswith("__") or name.upper() == _LIST:
            raise CAEConfigurationError(f"cae: {source}: no image in a group can have the name {name!r}; rename it")
        same = [str(other) for other, its_name in zip(sources, names, strict=True) if its_name == name]
        if len(same) > 1:
            what = f"{same[0]} is given twice" if len({*same}) == 1 else f"{' and '.join(same)} have the same name"
            raise CAEConfigurationError(f"cae: {what}: each would become image {name!r}; leave one out or rename it")
    return names


def create_collection(out: Path) -> None:
    """Write the metadata of the group that will hold the images."""
    zarr.create_group(out, attributes={"ome": {"version": VERSION, "bioformats2raw.layout": 3}}, overwrite=True)


def list_images(out: Path, names: Sequence[str]) -> None:
    """Write the list of the images in the group, and remove others, which an interrupted run of more files left."""
    for member in out.iterdir():
        if member.is_dir() and member.name not in names:
            shutil.rmtree(member)
    attributes = {"ome": {"version": VERSION, "series": list(names)}}
    zarr.create_group(out, path=_LIST, attributes=attributes, overwrite=True)


def image_target(whole: Journal, name: str) -> Path:
    """Return the place beside which one image has its journal, within the journal of the whole output."""
    folder = whole.folder / "images"
    folder.mkdir(exist_ok=True)
    return folder / name


def is_placed(whole: Journal, name: str, conversion: Conversion) -> bool:
    """Return whether an image is complete and was moved to the group already.

    Raises
    ------
    CAEConfigurationError
        If it was made from another source or with other settings.
    """
    if not (whole.out / name / "zarr.json").exists():
        return False
    check_settings(journal_folder(image_target(whole, name)), whole.out / name, conversion.settings)
    return True
