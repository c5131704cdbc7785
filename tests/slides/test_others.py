"""Other libraries read the pyramids that `convert` writes, and write pyramids with `CAECodec`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from zarr_cae import CAECodec, open_bottleneck
from zarr_cae.cli import main
from zarr_cae.evaluation.measures import psnr

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the other libraries


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, tissue: np.ndarray) -> Path:
    """Return an OME-Zarr image of three levels: 300 x 420, 150 x 210, 75 x 105."""
    tifffile = pytest.importorskip("tifffile")
    folder = tmp_path_factory.mktemp("image")
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    tifffile.imwrite(folder / "a.ome.tif", tissue, photometric="rgb", tile=(64, 64), metadata=metadata)
    out = folder / "a.ome.zarr"
    options = ["-q", "5", "--chunks", "64", "--shards", "128", "--levels", "3"]
    assert main(["convert", str(folder / "a.ome.tif"), str(out), *options]) == 0
    return out


def same(found: np.ndarray, tissue: np.ndarray) -> bool:
    return psnr(np.asarray(found).transpose(1, 2, 0), tissue) > 30


def test_ome_zarr_models_validates(image: Path) -> None:
    models = pytest.importorskip("ome_zarr_models")
    found = models.open_ome_zarr(zarr.open_group(image, mode="r"))
    assert type(found).__name__ == "Image"
    assert found.attributes.ome.version == "0.5"
    assert len(found.attributes.ome.multiscales[0].datasets) == 3


def test_yaozarrs_validates(image: Path) -> None:
    yaozarrs = pytest.importorskip("yaozarrs")
    yaozarrs.validate_zarr_store(str(image))


def test_ome_zarr_py_reads(image: Path, tissue: np.ndarray) -> None:
    pytest.importorskip("ome_zarr")
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    location = parse_url(str(image))
    assert location is not None
    node = next(iter(Reader(location)()))
    assert [level.shape for level in node.data] == [(3, 300, 420), (3, 150, 210), (3, 75, 105)]
    assert same(node.data[0].compute(), tissue)
    assert node.metadata["channel_names"] == ["red", "green", "blue"]


def test_napari_ome_zarr_reads(image: Path, tissue: np.ndarray) -> None:
    pytest.importorskip("napari")
    module = pytest.importorskip("napari_ome_zarr")
    reader = module.napari_get_reader(str(image))
    data, properties, *_ = reader(str(image))[0]
    assert np.allclose(properties["scale"][-2:], 0.25)
    assert same(data[0].compute(), tissue)


def test_dask_and_xarray_read(image: Path, tissue: np.ndarray) -> None:
    dask = pytest.importorskip("dask.array")
    xarray = pytest.importorskip("xarray")
    assert same(dask.from_zarr(str(image), component="0").compute(), tissue)
    levels = {
        f"scale{n}": xarray.Dataset({"image": (("c", "y", "x"), dask.from_zarr(str(image), component=str(n)))})
        for n in range(3)
    }
    tree = xarray.DataTree.from_dict(levels)
    assert same(tree["scale0/image"].values, tissue)
    assert tree["scale1/image"].shape == (3, 150, 210)


def test_spatialdata_holds_the_levels(image: Path, tissue: np.ndarray) -> None:
    """SpatialData has no reader of single OME-Zarr images, so dask opens the levels."""
    spatialdata = pytest.importorskip("spatialdata")
    dask = pytest.importorskip("dask.array")
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Scale

    scales = zarr.open_group(image, mode="r").attrs["ome"]["multiscales"][0]["datasets"]
    micrometres = scales[0]["coordinateTransformations"][0]["scale"]
    element = Image2DModel.parse(
        dask.from_zarr(str(image), component="0"), dims=("c", "y", "x"), c_coords=["red", "green", "blue"],
        transformations={"micrometer": Scale(micrometres[1:], axes=("y", "x"))},
    )  # fmt: skip
    data = spatialdata.SpatialData(images={"slide": element})
    assert same(data["slide"].to_numpy(), tissue)
    part = data.query.bounding_box(
        axes=("y", "x"), min_coordinate=[25, 50], max_coordinate=[50, 100], target_coordinate_system="micrometer"
    )
    assert same(part["slide"].to_numpy(), tissue[100:200, 200:400])


def test_ngff_zarr_reads_metadata_but_no_pixels(image: Path) -> None:
    """The reader is written in Rust and has a fixed list of codecs."""
    ngff_zarr = pytest.importorskip("ngff_zarr", minversion="0.50")
    with pytest.raises(Exception, match="codec cae is not supported"):
        ngff_zarr.from_ngff_zarr(str(image))


def test_ome_zarr_py_writes_with_the_codec(tissue: np.ndarray, tmp_path: Path) -> None:
    writer = pytest.importorskip("ome_zarr.writer")
    group = zarr.create_group(tmp_path / "a.ome.zarr")
    codec = CAECodec(5, channel_axis=-3)
    options = {"chunks": (3, 64, 64), "serializer": codec, "compressors": None}
    writer.write_image(
        tissue.transpose(2, 0, 1), group, axes="cyx", scale_factors=[2, 4], storage_options=options,
        scale={"y": 0.25, "x": 0.25},
    )  # fmt: skip
    path = group.attrs["ome"]["multiscales"][0]["datasets"][0]["path"]
    assert isinstance(group[path].metadata.codecs[0], CAECodec)
    assert same(group[path][...], tissue)


def test_ngff_zarr_writes_metadata_and_zarr_the_pixels(tissue: np.ndarray, tmp_path: Path) -> None:
    ngff_zarr = pytest.importorskip("ngff_zarr", minversion="0.50")
    image = ngff_zarr.to_ngff_image(
        np.ascontiguousarray(tissue.transpose(2, 0, 1)), dims=("c", "y", "x"), scale={"y": 0.25, "x": 0.25}
    )
    scales = ngff_zarr.to_multiscales(image, scale_factors=[2, 4], chunks=64)
    out = tmp_path / "a.ome.zarr"
    ngff_zarr.to_ngff_zarr(str(out), scales, version="0.5", metadata_only=True, consolidate_metadata=False)
    for level, dataset in zip(scales.images, scales.metadata.datasets, strict=True):
        array = zarr.create_array(
            out, name=dataset.path, shape=level.data.shape, dtype="uint8", chunks=(3, 64, 64), overwrite=True,
            serializer=CAECodec(5, channel_axis=-3), compressors=None, dimension_names=("c", "y", "x"),
        )  # fmt: skip
        array[...] = level.data.compute()
    group = zarr.open_group(out, mode="r")
    assert same(group[scales.metadata.datasets[0].path][...], tissue)


def test_latents_say_where_they_lie(image: Path) -> None:
    latents = open_bottleneck(image)
    entry = latents.attrs["ome"]["multiscales"][0]
    assert [axis["name"] for axis in entry["axes"]] == list(latents["0"].metadata.dimension_names)
    for level, dataset in enumerate(entry["datasets"]):
        scale, translation = (one[one["type"]] for one in dataset["coordinateTransformations"])
        assert scale == [1, 4 * 2**level, 4 * 2**level]
        pixel = 0.25 * 2**level
        assert translation == pytest.approx([0, *[0.25 * (2**level - 1) / 2 + 7.5 * pixel] * 2])
    assert latents["1"].shape[1:] == (-(-150 // 16), -(-210 // 16))
    assert "omero" not in latents.attrs["ome"]


def test_latents_of_uneven_chunks_have_no_scales(tissue: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", tissue)
    out = str(tmp_path / "a.ome.zarr")
    assert main(["convert", str(tmp_path / "a.npy"), out, "-q", "1", "--chunks", "100", "--shards", "none"]) == 0
    latents = open_bottleneck(out)
    assert "multiscales" not in latents.attrs["ome"]
    assert latents["0"].ndim == 3
