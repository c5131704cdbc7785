"""Every kind of file as a slide: axes, metadata, windows equal to the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from zarr_cae.cli import main
from zarr_cae.errors import CAEConfigurationError, CAEError
from zarr_cae.slides.sources import CachedRows, Slide, open_slide

tifffile = pytest.importorskip("tifffile")
Write = Callable[..., Path]


def whole(slide: Slide) -> np.ndarray:
    return slide.read([slice(0, length) for length in slide.shape])


@pytest.mark.parametrize(
    "options",
    [{"tile": (64, 64)}, {"tile": None}, {"tile": None, "rowsperstrip": 7, "compression": "lzw"},
     {"tile": (64, 128), "compression": "zlib", "predictor": True}, {"tile": None, "compression": "deflate"},
     {"tile": (64, 64), "planarconfig": "separate"}, {"bigtiff": True, "byteorder": ">"},
     {"compression": "jpeg2000", "compressionargs": {"level": 0, "reversible": True}}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_tiff_windows_are_those_of_the_whole(write: Write, tissue: np.ndarray, options, dtype: str) -> None:
    pixels = tissue.astype(dtype) * (257 if dtype == "u2" else 1)
    stored = pixels.transpose(2, 0, 1) if "planarconfig" in options else pixels
    slide = open_slide(write("a.tif", stored, **options))
    assert (slide.axes, slide.rgb, slide.dtype) == ("cyx", True, np.dtype(dtype))
    assert slide.shape == (3, 300, 420)
    np.testing.assert_array_equal(whole(slide), pixels.transpose(2, 0, 1))
    for rows, columns in itertools.product([(0, 1), (60, 70), (130, 300)], [(0, 420), (63, 65), (419, 420)]):
        window = (slice(0, 3), slice(*rows), slice(*columns))
        np.testing.assert_array_equal(slide.read(window), pixels.transpose(2, 0, 1)[window])
    slide.close()


def test_lossy_tiles_are_decoded_to_colours(write: Write, tissue: np.ndarray) -> None:
    slide = open_slide(write("a.svs", tissue, compression="jpeg", compressionargs={"level": 95}))
    assert np.abs(whole(slide).astype(int) - tissue.transpose(2, 0, 1)).mean() < 3
    slide.close()


@given(st.integers(1, 40), st.integers(1, 9), st.data())
@settings(deadline=None)
def test_cached_rows_are_those_of_the_array(rows: int, chunk: int, data) -> None:
    array = np.arange(rows * 30 * 2).reshape(2, rows, 30)
    cached = CachedRows(array, 1, 2, chunk)
    cached._step = chunk  # of a few rows, so that windows reach over several
    for _ in range(4):
        bounds = [
            sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in array.shape
        ]
        window = tuple(slice(*pair) for pair in bounds)
        np.testing.assert_array_equal(cached[window], array[window])


def test_ome_tiff_keeps_axes_names_and_sizes(write: Write) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (3, 2, 70, 90)).astype(np.uint16)
    metadata = {
        "axes": "ZCYX", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25,
        "PhysicalSizeYUnit": "µm", "PhysicalSizeZ": 2000.0, "PhysicalSizeZUnit": "nm", "SignificantBits": 12,
        "Channel": {"Name": ["DAPI", "GFP"], "Color": [0x0000FFFF, 0x00FF00FF]},
    }  # fmt: skip
    slide = open_slide(write("a.ome.tif", pixels, photometric="minisblack", metadata=metadata))
    assert (slide.name, slide.axes, slide.rgb) == ("a", "czyx", False)
    np.testing.assert_array_equal(whole(slide), pixels.transpose(1, 0, 2, 3))
    found = slide.metadata
    assert found.pixel_size == {"x": (0.5, "micrometer"), "y": (0.25, "micrometer"), "z": (2000.0, "nanometer")}
    assert found.channel_names == ("DAPI", "GFP")
    assert found.channel_colours == ("0000FF", "00FF00")
    assert found.value_range == (0, 4095)
    slide.close()


def test_resolution_profile_and_description(write: Write, tissue: np.ndarray) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = write(
        "a.tif", tissue, resolution=(40000, 20000), resolutionunit="CENTIMETER", iccprofile=profile,
        description="stained with H&E", metadata=None,
    )  # fmt: skip
    slide = open_slide(path)
    assert slide.metadata.pixel_size == {"x": (0.25, "micrometer"), "y": (0.5, "micrometer")}
    assert slide.metadata.dpi == (101600, 50800)
    assert slide.metadata.icc_profile == profile
    assert slide.metadata.further["description"] == "stained with H&E"
    slide.close()
    slide = open_slide(write("b.tif", tissue, resolution=(300, 300), resolutionunit="INCH"))
    assert slide.metadata.pixel_size == {}  # the resolution of a print, not of a microscope
    assert slide.metadata.dpi == (300, 300)
    slide.close()


def test_svs_says_micrometres_a_pixel(write: Write, tissue: np.ndarray) -> None:
    path = write(
        "a.svs", tissue, description="Aperio Image Library v1\r\n420x300|AppMag = 20|MPP = 0.4990", metadata=None
    )
    slide = open_slide(path)
    assert slide.metadata.pixel_size == {"x": (0.499, "micrometer"), "y": (0.499, "micrometer")}
    slide.close()


@pytest.mark.parametrize("how", ["pages", "subifds"])
def test_levels_of_a_pyramid(tmp_path: Path, tissue: np.ndarray, how: str) -> None:
    small = [tissue[::2, ::2], tissue[::4, ::4]]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        options = {"photometric": "rgb", "tile": (64, 64)}
        file.write(tissue, subifds=2 if how == "subifds" else None, resolution=(1e5, 1e5), resolutionunit=3, **options)
        for level in small:
            file.write(level, subfiletype=1, **options)
    for level, expected in enumerate([tissue, *small]):
        slide = open_slide(tmp_path / "a.tif", level=level)
        assert slide.levels == ((300, 420), (150, 210), (75, 105))
        np.testing.assert_array_equal(whole(slide), expected.transpose(2, 0, 1))
        assert slide.metadata.pixel_size["x"] == (pytest.approx(0.1 * 2**level), "micrometer")
        slide.close()
    with pytest.raises(CAEConfigurationError, match="no level 3; its levels are 0: 420 x 300"):
        open_slide(tmp_path / "a.tif", level=3)


def test_images_of_several_sizes_are_a_choice(tmp_path: Path, tissue: np.ndarray) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(tissue, photometric="rgb")
        file.write(tissue[:100, :390], photometric="rgb")
    with pytest.raises(CAEConfigurationError, match=r"--series: 0: 300 x 420 x 3.*1: 100 x 390 x 3"):
        open_slide(tmp_path / "a.tif")
    slide = open_slide(tmp_path / "a.tif", series=1)
    np.testing.assert_array_equal(whole(slide), tissue[:100, :390].transpose(2, 0, 1))
    slide.close()
    with pytest.raises(CAEConfigurationError, match="no series 2"):
        open_slide(tmp_path / "a.tif", series=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_pillow(tmp_path: Path, tissue: np.ndarray, orientation: int) -> None:
    from PIL import ImageOps

    tifffile.imwrite(tmp_path / "a.tif", tissue, photometric="rgb", tile=(64, 64), extratags=[(274, 3, 1, orientation)])
    with Image.open(tmp_path / "a.tif") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    slide = open_slide(tmp_path / "a.tif")
    assert slide.shape == upright.transpose(2, 0, 1).shape
    np.testing.assert_array_equal(whole(slide), upright.transpose(2, 0, 1))
    window = (slice(1, 3), slice(70, 120), slice(5, 200))
    np.testing.assert_array_equal(slide.read(window), upright.transpose(2, 0, 1)[window])
    slide.close()


def test_arrays(tmp_path: Path, tissue: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", tissue)
    zarr.create_array(tmp_path / "a.zarr", data=tissue, chunks=(100, 100, 3))
    zarr.create_array(tmp_path / "b.zarr", data=tissue.transpose(2, 0, 1), dimension_names=("c", "y", "x"))
    for name in ("a.npy", "a.zarr", "b.zarr"):
        slide = open_slide(tmp_path / name)
        assert slide.axes == "cyx"
        np.testing.assert_array_equal(whole(slide), tissue.transpose(2, 0, 1))
    np.save(tmp_path / "c.npy", np.zeros((2, 3, 4, 5, 6, 7)))
    with pytest.raises(CAEConfigurationError, match="expected"):
        open_slide(tmp_path / "c.npy")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_of_both_versions(tmp_path: Path, tissue: np.ndarray, version: str) -> None:
    pixels = tissue.transpose(2, 0, 1)
    group = zarr.create_group(tmp_path / "a.ome.zarr", zarr_format=2 if version == "0.4" else 3)
    for level in range(2):
        group.create_array(
            str(level), data=np.ascontiguousarray(pixels[:, :: 2**level, :: 2**level]), chunks=(3, 64, 64)
        )
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx")]
    datasets = [
        {"path": str(n), "coordinateTransformations": [{"type": "scale", "scale": [1, 0.5 * 2**n, 0.5 * 2**n]}]}
        for n in range(2)
    ]
    fields = {"multiscales": [{"axes": axes, "datasets": datasets, "version": version}], "omero": {
        "channels": [{"color": colour, "label": colour} for colour in ("FF0000", "00FF00", "0000FF")]}}  # fmt: skip
    group.attrs.update(fields if version == "0.4" else {"ome": {"version": "0.5", **fields}})
    for level in range(2):
        slide = open_slide(tmp_path / "a.ome.zarr", level=level)
        assert (slide.name, slide.axes, slide.rgb) == ("a", "cyx", True)
        assert slide.metadata.pixel_size["y"] == (0.5 * 2**level, "micrometer")
        np.testing.assert_array_equal(whole(slide), pixels[:, :: 2**level, :: 2**level])


def test_sixteen_bit_colour_pictures(tmp_path: Path, tissue: np.ndarray) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    deep = tissue.astype(np.uint16) * 200 + 7
    contents = {
        "a.png": imagecodecs.png_encode(deep), "a.jp2": imagecodecs.jpeg2k_encode(deep, level=0, reversible=True),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        slide = open_slide(tmp_path / name)
        assert slide.dtype == np.uint16, name
        np.testing.assert_array_equal(whole(slide), deep.transpose(2, 0, 1))
    (tmp_path / "a.ppm").write_bytes(b"P6 420 300 65535\n" + deep.astype(">u2").tobytes())
    with pytest.raises(CAEConfigurationError, match="16 bits a colour"):
        open_slide(tmp_path / "a.ppm")


def test_openslide_reads_the_same(write: Write, tissue: np.ndarray) -> None:
    pytest.importorskip("openslide")
    from zarr_cae.slides.openslides import open_with_openslide

    path = write("a.tif", tissue, tile=(256, 256), compression="jpeg", compressionargs={"level": 100})
    with_openslide, with_tifffile = open_with_openslide(path), open_slide(path)
    assert with_openslide.shape == with_tifffile.shape == (3, 300, 420)
    assert np.abs(whole(with_openslide).astype(int) - whole(with_tifffile)).max() <= 4
    with pytest.raises(CAEConfigurationError, match="no level 1"):
        open_with_openslide(path, level=1)
    with_openslide.close()
    with_tifffile.close()


def test_damaged_files_are_refused(tmp_path: Path, tissue: np.ndarray) -> None:
    (tmp_path / "a.tif").write_bytes(b"II*\0" + b"\xff" * 40)
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.mrxs").write_bytes(b"no slide")
    for name in ("a.tif", "b.png", "c.mrxs"):
        with pytest.raises(CAEConfigurationError, match=name):
            open_slide(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_slide(tmp_path / "none.tif")


def test_damaged_tiffs_raise_our_errors(write: Write, tissue: np.ndarray, tmp_path: Path) -> None:
    random, refused = np.random.default_rng(0), 0
    for options in ({"compression": "zlib"}, {"tile": None, "compression": "lzw"}, {"compression": "jpeg"}):
        content = write("a.tif", tissue[:100, :100], **options).read_bytes()
        for place in random.integers(8, len(content), 25):
            noise = bytearray(content)
            noise[place : place + 4] = random.bytes(4)
            for damaged in (content[:place], bytes(noise)):
                (tmp_path / "b.tif").write_bytes(damaged)
                try:
                    slide = open_slide(tmp_path / "b.tif")
                    try:
                        if np.prod(slide.shape) < 10**7:
                            whole(slide)
                    finally:
                        slide.close()
                except (CAEError, OSError):
                    refused += 1
    assert refused > 40


def write_dicom(path: Path, pixels: np.ndarray, spacing: float, **changes: object) -> None:
    """Write a level of a slide as a DICOM file of uncompressed tiles of 64 x 64."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid

    def nested(**values: object) -> Dataset:
        dataset = Dataset()
        for name, value in values.items():
            setattr(dataset, name, value)
        return dataset

    rows, columns, samples = pixels.shape
    padded = np.pad(pixels, [(0, -rows % 64), (0, -columns % 64), (0, 0)])
    tiles = padded.reshape(padded.shape[0] // 64, 64, -1, 64, samples).swapaxes(1, 2)
    measures = nested(PixelSpacing=[spacing / 1000, spacing / 1000], SliceThickness=0.001, SpacingBetweenSlices=0.001)
    frame_type = nested(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])
    illumination = nested(CodeValue="111744", CodingSchemeDesignator="DCM", CodeMeaning="Brightfield illumination")
    optical_path = nested(
        OpticalPathIdentifier="1", IlluminationTypeCodeSequence=[illumination], ICCProfile=b"a profile "
    )
    slide = nested(
        SOPClassUID=VLWholeSlideMicroscopyImageStorage, SOPInstanceUID=generate_uid(), StudyInstanceUID="1.2.3",
        SeriesInstanceUID="1.2.3.4", FrameOfReferenceUID="1.2.3.5", Modality="SM", ContainerIdentifier="a",
        ImageType=["ORIGINAL" if spacing < 0.5 else "DERIVED", "PRIMARY", "VOLUME", "NONE"],
        VolumetricProperties="VOLUME",
        Rows=64, Columns=64, TotalPixelMatrixRows=rows, TotalPixelMatrixColumns=columns, SamplesPerPixel=samples,
        PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=8, BitsStored=8, HighBit=7,
        PixelRepresentation=0, NumberOfFrames=tiles.shape[0] * tiles.shape[1], DimensionOrganizationType="TILED_FULL",
        ImagedVolumeWidth=columns * spacing / 1000, ImagedVolumeHeight=rows * spacing / 1000, ImagedVolumeDepth=0.001,
        NumberOfOpticalPaths=1, TotalPixelMatrixFocalPlanes=1, FocusMethod="AUTO", ExtendedDepthOfField="NO",
        SharedFunctionalGroupsSequence=[
            nested(PixelMeasuresSequence=[measures], WholeSlideMicroscopyImageFrameTypeSequence=[frame_type])
        ],
        OpticalPathSequence=[optical_path], PixelData=tiles.tobytes(),
    )  # fmt: skip
    for name, value in changes.items():
        setattr(slide, name, value)
    slide.file_meta = FileMetaDataset()
    slide.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slide.file_meta.MediaStorageSOPClassUID = slide.SOPClassUID
    slide.file_meta.MediaStorageSOPInstanceUID = slide.SOPInstanceUID
    slide.save_as(path, enforce_file_format=True)


@pytest.mark.filterwarnings("ignore")
def test_dicom_slides(tissue: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("wsidicom")
    folder = tmp_path / "slide"
    folder.mkdir()
    write_dicom(folder / "0.dcm", tissue, 0.25)
    write_dicom(folder / "1.dcm", tissue[::2, ::2], 0.5)
    for path, level, pixels in (
        (folder, 0, tissue), (folder, 1, tissue[::2, ::2]), (folder / "0.dcm", 0, tissue),
    ):  # fmt: skip
        slide = open_slide(path, level=level)
        assert (slide.axes, slide.rgb, slide.dtype) == ("cyx", True, np.dtype(np.uint8))
        np.testing.assert_array_equal(whole(slide), pixels.transpose(2, 0, 1))
        window = (slice(1, 3), slice(60, 70), slice(100, 150))
        np.testing.assert_array_equal(slide.read(window), pixels.transpose(2, 0, 1)[window])
        assert slide.metadata.pixel_size == dict.fromkeys("xy", (0.25 * 2**level, "micrometer"))
        assert slide.metadata.icc_profile == b"a profile "
        slide.close()
    assert slide.levels == ((300, 420),)
    with pytest.raises(CAEConfigurationError, match="no level 2; its levels are 0: 420 x 300, 1: 210 x 150"):
        open_slide(folder, level=2)
    assert main(["convert", str(folder), str(tmp_path / "a.ome.zarr"), "--chunks", "128", "--level", "1"]) == 0
    assert zarr.open_array(tmp_path / "a.ome.zarr" / "0").shape == (3, 150, 210)


@pytest.mark.filterwarnings("ignore")
def test_damaged_dicom_is_refused(tissue: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("wsidicom")
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(64))
    write_dicom(tmp_path / "b.dcm", tissue, 0.25, Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    write_dicom(tmp_path / "c.dcm", tissue, 0.25)
    (tmp_path / "c.dcm").write_bytes((tmp_path / "c.dcm").read_bytes()[:-200_000])
    for name in "abc":
        with pytest.raises(CAEError, match=name):
            whole(open_slide(tmp_path / f"{name}.dcm"))
