"""`Pictures`: the arrays that are shown, their levels, and their tiles."""

import asyncio
import io

import numpy as np
import pytest
import zarr
from archives import create
from PIL import Image
from zarr.storage import LocalStore, StorePath

from zarr_cae import CAECodec, CAEConfigurationError, open_bottleneck

pytest.importorskip("starlette")
from zarr_cae.serve.pictures import Pictures


def tile(pictures, *place, at=()):
    content = asyncio.run(pictures.tile(*place, at))
    if content is None:
        return None
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def whole(pictures, picture, kind, scale, at=()):
    """Return all tiles of a scale as one picture."""
    rows, row = [], 0
    while (first := tile(pictures, picture, kind, scale, 0, row, at=at)) is not None:
        tiles, column = [first], 1
        while (next_one := tile(pictures, picture, kind, scale, column, row, at=at)) is not None:
            tiles.append(next_one)
            column += 1
        rows.append(np.concatenate(tiles, 1))
        row += 1
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory, photograph):
    """Return a pyramid of uneven sizes: 400 x 510, 200 x 255 and 100 x 128."""
    folder = tmp_path_factory.mktemp("pictures") / "p.zarr"
    group = zarr.create_group(folder)
    pixels = [np.asarray(Image.fromarray(photograph[:400, :510]).reduce(2**level)) for level in range(3)]
    for level, data in enumerate(pixels):
        create(data, (128, 128, 3), StorePath(LocalStore(folder), f"image/{level}"))
    datasets = [{"path": str(level)} for level in (2, 0, 1)]

    group["image"].attrs["ome"] = {"multiscales": [{"axes": [{"name": n} for n in "yxc"], "datasets": datasets}]}
    return folder, pixels


def test_levels_of_a_pyramid(pyramid):
    folder, pixels = pyramid
    pictures = Pictures(folder)
    (described,) = pictures.describe()
    assert (described["name"], described["width"], described["height"]) == ("image", 510, 400)
    assert [level["path"] for level in described["levels"]] == ["image/0", "image/1", "image/2"]
    assert described["level_of_scale"] == [0, 1]
    assert described["axes"] == []
    stored = zarr.open_group(folder, mode="r")
    for scale in range(2):
        found = whole(pictures, 0, "pixels", scale)
        assert found.shape == pixels[scale].shape
        assert np.abs(found.astype(int) - stored[f"image/{scale}"][...]).max() <= 1


def test_an_array_without_levels_is_reduced(tmp_path, photograph):
    data = photograph[:500, :300]
    zarr.create_array(tmp_path / "a.zarr", data=data)
    pictures = Pictures(tmp_path / "a.zarr")
    (described,) = pictures.describe()
    assert described["level_of_scale"] == [0, 0]
    assert described["latents"] is None
    assert np.array_equal(whole(pictures, 0, "pixels", 0), data)
    assert np.abs(whole(pictures, 0, "pixels", 1).astype(int) - Image.fromarray(data).reduce(2)).max() <= 1


def test_positions_along_other_axes(tmp_path, photograph):
    data = np.stack([photograph[:64, :96, 0], photograph[64:128, :96, 1]])[:, None].repeat(2, 1)
    codec = CAECodec(quality=4, channel_axis=None)
    array = create(data, (1, 1, 64, 96), tmp_path / "a.zarr", serializer=codec, dimension_names=["t", None, "y", "x"])
    pictures = Pictures(tmp_path / "a.zarr")
    (described,) = pictures.describe()
    assert described["axes"] == [{"name": "t", "length": 2}, {"name": "axis 1", "length": 2}]
    for time in range(2):
        found = whole(pictures, 0, "pixels", 0, (time, 1))
        assert np.abs(found.astype(int) - array[time, 1]).max() <= 1
    assert tile(pictures, 0, "pixels", 0, 0, 0, at=(2, 0)) is None
    assert tile(pictures, 0, "pixels", 0, 0, 0, at=(0,)) is None


@pytest.mark.parametrize("dtype", ["uint16", "float32", "int32", "bool"])
def test_values_of_other_types_are_stretched(tmp_path, photograph, dtype):
    data = photograph[:100, :100, 0] > 100 if dtype == "bool" else photograph[:100, :100, 0].astype(dtype) * 3
    zarr.create_array(tmp_path / "a.zarr", data=data)
    found = whole(Pictures(tmp_path / "a.zarr"), 0, "pixels", 0)
    assert found.dtype == np.uint8
    assert (found.min(), found.max()) == (0, 255)
    assert np.corrcoef(found.ravel(), data.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(tmp_path, value):
    data = np.full((40, 40), value, np.float32)
    zarr.create_array(tmp_path / "nothing.zarr", data=data)
    assert whole(Pictures(tmp_path / "nothing.zarr"), 0, "pixels", 0).shape == (40, 40)


def test_heat_maps(tmp_path, photograph):
    array = create(photograph, (128, 128, 3), tmp_path / "a.zarr")
    latents = open_bottleneck(array.store)[..., 5]
    pictures = Pictures(tmp_path / "a.zarr")
    (described,) = pictures.describe()
    assert described["latents"]["width"] == described["latents"]["height"] == 32
    found = whole(pictures, 0, "latents", 0, (5,)).astype(int)
    assert found.shape == (32, 32, 3)
    low, high = np.percentile(latents, (0.5, 99.5))
    blue, red = found[latents <= low], found[latents >= high]
    assert (blue[:, 2] > blue[:, 0]).all()
    assert (red[:, 0] > red[:, 2]).all()


def test_latents_that_were_never_written_are_grey(tmp_path, photograph):
    array = create(np.zeros_like(photograph[:128, :256]), (128, 128, 3), tmp_path / "a.zarr")
    array[:, :128] = photograph[:128, :128]
    found = whole(Pictures(tmp_path / "a.zarr"), 0, "latents", 0, (0,))
    assert (found[:, 8:] == 128).all()
    assert not (found[:, :8] == 128).all()


def test_grey_planes_and_their_order(tmp_path, photograph):
    data = np.ascontiguousarray(photograph[:64, :96, :2])
    array = create(data, (64, 96, 2), tmp_path / "a.zarr", serializer=CAECodec(quality=4, channel_axis=2))
    pictures = Pictures(tmp_path / "a.zarr")
    for plane in range(2):
        found = whole(pictures, 0, "pixels", 0, (plane,))
        assert np.abs(found.astype(int) - array[..., plane]).max() <= 1


def test_colours_first(tmp_path, photograph):
    data = np.ascontiguousarray(photograph[:64, :96].transpose(2, 0, 1))
    array = create(data, (3, 64, 96), tmp_path / "a.zarr", serializer=CAECodec(quality=4, channel_axis=0))
    found = whole(Pictures(tmp_path / "a.zarr"), 0, "pixels", 0)
    assert np.abs(found.astype(int) - array[...].transpose(1, 2, 0)).max() <= 1


def test_malformed_multiscales_are_shown_one_by_one(tmp_path, photograph):
    for number, scales in enumerate([5, [{}], [{"datasets": 1}], [{"datasets": [{"path": "none"}]}], {"a": 1}]):
        folder = tmp_path / f"{number}.zarr"
        group = zarr.create_group(folder, attributes={"multiscales": scales})
        group.create_array("a", data=photograph[:40, :40])
        assert [picture["name"] for picture in Pictures(folder).describe()] == ["a"]


def test_an_archive_without_pictures(tmp_path):
    group = zarr.create_group(tmp_path / "a.zarr")
    group.create_array("line", data=np.arange(5))
    with pytest.raises(CAEConfigurationError, match="rows and columns"):
        Pictures(tmp_path / "a.zarr")
