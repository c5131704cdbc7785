"""Pixels without data: the mask is exact, whatever is masked and however chunks are written and read."""

import json

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import zarr
from archives import coder_of, read, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zarr_cae import CAECodec, open_bottleneck
from zarr_cae.codec.cae import loaded
from zarr_cae.codec.chunk import encode_chunk
from zarr_cae.codec.plan import run
from zarr_cae.codec.verify import verify
from zarr_cae.coder.frame import pack, parse_frame
from zarr_cae.coder.lossless import encode_pixels
from zarr_cae.errors import CAEConfigurationError, CAEDataError, FrameError

KINDS = [
    ("uint8", (0, 255), 0), ("uint8", (0, 255), 255), ("uint8", (0, 200), 254), ("uint8", (0, 255), 128),
    ("int16", (-100, 400), -32768), ("uint16", (0, 4095), 65535), ("int64", (0, 1000), -(2**63)), ("int8", (-9, 9), 0),
    (">u2", (0, 4095), 65535), ("float16", (0, 1), np.nan), ("float32", (0, 1), np.nan), ("float32", (0, 1), 0.5),
    ("float64", (-1, 1), -9999.0), ("float64", (-1, 1), np.inf), (">f4", (0, 1), np.nan), ("float32", (0, 1), 1.0),
]  # fmt: skip


def same(pixels, nodata):
    return np.isnan(pixels) if np.isnan(nodata) else pixels == np.dtype(pixels.dtype).type(nodata)


def create(shape, dtype, value_range, nodata, *, chunks=None, fill=None, channel_axis=None, quality=3, **keywords):
    return zarr.create_array(
        {}, shape=shape, chunks=chunks or shape, dtype=dtype, compressors=None,
        fill_value=value_range[0] if fill is None else fill,
        serializer=CAECodec(quality, value_range=value_range, nodata=nodata, channel_axis=channel_axis), **keywords,
    )  # fmt: skip


def image(shape, dtype, value_range, nodata, mask):
    """A smooth image in the value range, and the nodata value where the mask is true, and only there."""
    y, x = np.indices(shape)[:2]
    low, high = value_range
    smooth = low + (high - low) * (0.5 + 0.45 * np.sin(x / 9) * np.cos(y / 7))
    pixels = (np.rint(smooth) if np.dtype(dtype).kind in "iu" else smooth).astype(dtype)
    step = 1 if np.dtype(dtype).kind in "iu" else 0.01
    pixels[same(pixels, nodata)] = nodata - step if nodata >= high else nodata + step
    pixels[mask] = nodata
    return pixels


MASKS = st.one_of(
    arrays.arrays(bool, (40, 37), elements=st.booleans()),
    arrays.arrays(bool, (40, 37), elements=st.just(False), fill=st.just(True)),
    st.just(np.zeros((40, 37), bool)),
    st.just(np.ones((40, 37), bool)),
    st.just(np.indices((40, 37)).sum(0) % 2 == 0),
    st.just(np.hypot(*(np.indices((40, 37)) - 18)) > 15),
)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(KINDS), mask=MASKS)
def test_masks_come_back_exactly(kind, mask):
    dtype, value_range, nodata = kind
    pixels = image(mask.shape, dtype, value_range, nodata, mask)
    array = create(mask.shape, dtype, value_range, nodata)
    array[:] = pixels
    for window in ((slice(None), slice(None)), (slice(3, 20), slice(17, 37)), (slice(39, 40), 0)):
        assert np.array_equal(same(array[window], nodata), mask[window])
    values = array[:][~mask].astype(float)
    assert ((value_range[0] <= values) & (values <= value_range[1])).all() or nodata == value_range[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::zarr_cae.CAEWearWarning")
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=st.sampled_from(KINDS), mask=MASKS, change=MASKS, data=st.data())
def test_partial_writes_keep_the_mask(kind, mask, change, data):
    dtype, value_range, nodata = kind
    array = create(mask.shape, dtype, value_range, nodata)
    array[:] = image(mask.shape, dtype, value_range, nodata, mask)
    wanted = mask.copy()
    for _ in range(2):
        top, left = data.draw(st.integers(0, 39)), data.draw(st.integers(0, 36))
        rows, columns = data.draw(st.integers(1, 40 - top)), data.draw(st.integers(1, 37 - left))
        window = slice(top, top + rows), slice(left, left + columns)
        array[window] = image(mask.shape, dtype, value_range, nodata, change)[window]
        wanted[window] = change[window]
        assert np.array_equal(same(array[:], nodata), wanted)


@pytest.mark.parametrize(
    ("shape", "chunks", "axis"),
    [((50, 40, 3), (32, 40, 3), -1), ((3, 40, 50), (3, 24, 50), 0), ((2, 5, 40, 33), (1, 5, 40, 20), 1),
     ((4, 33, 40), (3, 33, 40), None)],
)  # fmt: skip
def test_channels_and_batch_axes(shape, chunks, axis):
    random = np.random.default_rng(1)
    mask = random.random(shape) < 0.3
    pixels = np.where(mask, np.nan, 0.5).astype("f4")
    array = create(shape, "float32", (0, 1), np.nan, chunks=chunks, channel_axis=axis, fill=np.nan)
    array[:] = pixels
    assert np.array_equal(np.isnan(array[:]), mask)
    window = (*([slice(0, 2)] * (len(shape) - 2)), slice(7, 23), slice(1, 3))
    assert np.array_equal(np.isnan(array[window]), mask[window])
    pixels[window] = np.where(mask[window], 0.25, np.nan)
    array[window] = pixels[window]
    assert np.array_equal(np.isnan(array[:]), np.isnan(pixels))


@pytest.mark.parametrize("nodata", [np.inf, -np.inf])
def test_an_infinite_fill_value_is_no_pixel(nodata):
    """Partial writes beside pixels that were never written compare these with the fill value, without a warning."""
    array = create((40, 40), "float32", (0, 1), nodata, fill=nodata)
    array[:20, :20] = 0.5
    array[10:30, 10:30] = 0.25
    expected = np.ones((40, 40), bool)
    expected[:20, :20] = expected[10:30, 10:30] = False
    assert np.array_equal(array[...] == nodata, expected)


@pytest.mark.slow
def test_shards_and_large_chunks_by_ranges(tmp_path):
    """Windows of local files are read by byte ranges: the mask is fetched beside the tiles."""
    y, x = np.indices((1100, 1060))
    mask = (x // 50 + y // 70) % 3 == 0
    pixels = np.where(mask, np.nan, (np.sin(x / 30) + 1) / 2).astype("f4")
    for name, chunks, shards in (("plain", (1100, 1060), None), ("shards", (64, 64), (1152, 1088))):
        array = zarr.create_array(
            tmp_path / name, shape=mask.shape, chunks=chunks, shards=shards, dtype="f4", fill_value=np.nan,
            serializer=CAECodec(2, value_range=(0, 1), nodata=np.nan), compressors=None,
        )  # fmt: skip
        array[:] = pixels
        window = array[600:700, 3:90]
        assert np.array_equal(np.isnan(window), mask[600:700, 3:90])
        assert np.nanmax(np.abs(window - pixels[600:700, 3:90])) < 0.1
        array[610:630, 10:20] = 0.5
        now = mask.copy()
        now[610:630, 10:20] = False
        assert np.array_equal(np.isnan(array[:]), now)


def test_a_mask_costs_little():
    """Holes are filled smoothly: a masked image takes hardly more bytes than the image without holes."""
    y, x = np.indices((128, 128))
    smooth = ((np.sin(x / 20) + 1) / 2).astype("f4")
    holes = np.where((x - 64) ** 2 + (y - 50) ** 2 < 900, np.nan, smooth)
    sizes = []
    for pixels in (smooth, holes):
        array = create(pixels.shape, "float32", (0, 1), np.nan, quality=4)
        array[:] = pixels
        sizes.append(len(read(array.store, "c/0/0")))
    assert sizes[1] < sizes[0] + 250


def test_chunks_of_nothing_but_nodata_are_not_stored():
    array = create((32, 32), "float32", (0, 1), np.nan, fill=np.nan)
    array[:] = np.nan
    assert array.nchunks_initialized == 0
    array[:5] = 0.5
    assert array.nchunks_initialized == 1
    assert np.isnan(array[5:]).all()
    array[:5] = np.nan
    assert array.nchunks_initialized == 0


def test_to_write_back_what_was_read_changes_nothing():
    mask = np.random.default_rng(2).random((40, 40)) < 0.4
    array = create(mask.shape, "float32", (0, 1), np.nan)
    array[:] = image(mask.shape, "float32", (0, 1), np.nan, mask)
    before = read(array.store, "c/0/0")
    array[3:20, 5:9] = array[3:20, 5:9]
    assert read(array.store, "c/0/0") == before


@pytest.mark.parametrize(
    ("given", "kept"),
    [(np.nan, "NaN"), ("NaN", "NaN"), (np.float32("inf"), "Infinity"), (-np.inf, "-Infinity"), (7.0, 7), (0.5, 0.5),
     (np.uint8(3), 3), (2**63, 2**63), (None, None)],
)  # fmt: skip
def test_nodata_in_metadata(given, kept):
    codec = CAECodec(nodata=given, value_range=(0, 1))
    assert codec.nodata == kept
    assert type(codec.nodata) is type(kept)
    stored = json.loads(json.dumps(codec.to_dict(), allow_nan=False))
    assert CAECodec.from_dict(stored) == codec
    assert hash(CAECodec.from_dict(stored)) == hash(codec)
    assert eval(repr(codec)) == codec
    assert ("nodata" in stored["configuration"]) == (kept is not None)


@pytest.mark.parametrize("bad", ["nan", True, [1], 1j, "7"])
def test_what_is_no_value(bad):
    with pytest.raises(CAEConfigurationError, match="nodata must be a number"):
        CAECodec(nodata=bad)


@pytest.mark.parametrize(
    ("dtype", "bad"), [("uint8", np.nan), ("uint8", 256), ("uint8", 0.5), ("int16", np.inf), ("float16", 1e9)]
)
def test_what_the_dtype_cannot_hold(dtype, bad):
    with pytest.raises(CAEConfigurationError, match="nodata must be a value of dtype"):
        create((32, 32), dtype, (0, 1), bad)


def test_fill_values():
    assert np.isnan(create((32, 32), "float32", (0, 1), np.nan, fill=np.nan)[0, 0])
    assert create((32, 32), "uint16", (0, 10), 65535, fill=65535)[0, 0] == 65535
    with pytest.raises(CAEConfigurationError, match=r"fill_value 3.0 lies outside.*nodata"):
        create((32, 32), "float32", (0, 1), np.nan, fill=3)


def test_arrays_without_nodata_refuse_nan_and_name_the_way_out():
    array = create((32, 32), "float32", (0, 1), None)
    with pytest.raises(CAEDataError, match=r"NaN.*nodata=float\('nan'\)"):
        array[:] = np.nan
    array[:] = 0.5
    with pytest.raises(CAEDataError, match=r"NaN.*nodata=float\('nan'\)"):
        array[:9, :9] = np.nan


def test_other_nan_than_nodata_is_refused():
    array = create((32, 32), "float32", (0, 1), -1)
    with pytest.raises(CAEDataError, match="NaN"):
        array[:] = np.nan


@pytest.mark.parametrize("transpose", [False, True])
def test_latents_and_verification(transpose):
    mask = np.random.default_rng(2).random((40, 40)) < 0.4
    filters = [zarr.codecs.TransposeCodec(order=(1, 0))] if transpose else None
    array = create(mask.shape, "float32", (0, 1), np.nan, filters=filters)
    array[:] = image(mask.shape, "float32", (0, 1), np.nan, mask)
    latents = open_bottleneck(array.store)[:]
    assert np.isfinite(latents).all()
    found = verify(array, deep=True)
    assert not found.bad
    assert 0 <= found.lowest <= found.highest <= 1


def test_xarray_floats_with_nan(tmp_path):
    xarray = pytest.importorskip("xarray")
    mask = np.random.default_rng(2).random((40, 40)) < 0.4
    data = xarray.Dataset({"height": (("y", "x"), image(mask.shape, "float32", (0, 1), np.nan, mask))})
    encoding = {"serializer": CAECodec(4, value_range=(0, 1), nodata=np.nan), "compressors": None}
    for name, fill in (("default", {}), ("zarr", {"fill_value": np.nan}), ("attribute", {"_FillValue": np.nan})):
        data.to_zarr(tmp_path / name, zarr_format=3, consolidated=False, encoding={"height": {**encoding, **fill}})
        found = xarray.open_zarr(tmp_path / name, consolidated=False)["height"]
        assert found.dtype == np.float32
        assert np.array_equal(found.isnull(), mask)
        assert np.array_equal(found[3:9, 20:].isnull(), mask[3:9, 20:])


def test_xarray_packed_integers_with_a_fill_value(tmp_path):
    xarray = pytest.importorskip("xarray")
    mask = np.random.default_rng(2).random((40, 40)) < 0.4
    data = xarray.Dataset({"height": (("y", "x"), image(mask.shape, "float32", (0, 1), np.nan, mask))})
    encoding = {
        "dtype": "uint16", "_FillValue": 65535, "scale_factor": 0.001, "compressors": None,
        "serializer": CAECodec(4, value_range=(0, 1000), nodata=65535),
    }  # fmt: skip
    data.to_zarr(tmp_path / "packed", zarr_format=3, consolidated=False, encoding={"height": encoding})
    found = xarray.open_zarr(tmp_path / "packed", consolidated=False)["height"]
    assert np.array_equal(found.isnull(), mask)
    assert float(np.abs(found - data["height"]).max()) < 0.3


# Frames of version 3, made by hand: what readers and partial writes must know whoever wrote them.


def stored(array, key="c/0/0"):
    return read(array.store, key)


def put(array, frame, key="c/0/0"):
    write(array.store, key, frame)


def with_exact_tile(array, pixels):
    """Store the one chunk of a grey array again, with its first tile exact and the row of the best quality."""
    codec = array.metadata.codecs[-1]
    best = loaded(codec).info.qualities[-1]
    other = CAECodec(best, channel_axis=None, weights=codec.weights, value_range=codec.value_range, nodata=pixels.min())
    coder = coder_of(array, other)
    frame = parse_frame(run(encode_chunk(coder, pixels)).to_bytes(), coder.header)
    put(array, pack(frame.header, frame.streams, exact={0: encode_pixels(pixels[None, :512, :512])}))


@pytest.fixture
def exact():
    """A chunk of 2 x 2 tiles, whose first is exact, and its pixels; of another row than that of the quality."""
    y, x = np.indices((540, 530))
    pixels = ((x * y // 7) % 200 + 20).astype("u1")
    pixels[:512, :512] = np.random.default_rng(3).integers(20, 220, (512, 512))
    array = create(pixels.shape, "uint8", (0, 255), None, quality=2)
    array[:] = (x // 8 + y // 8).astype("u1")
    with_exact_tile(array, pixels)
    return array, pixels


def test_exact_tiles_are_read(exact):
    array, pixels = exact
    whole = array[:]
    assert np.array_equal(whole[:512, :512], pixels[:512, :512])
    assert not np.array_equal(whole[512:], pixels[512:])
    for window in ((slice(500, 540), slice(490, 530)), (slice(3, 9), slice(511, 513)), (slice(530, 540), slice(0, 3))):
        difference = array[window].astype(int) - whole[window]
        assert np.abs(difference).max() <= 1
        assert not difference[: max(0, 512 - window[0].start), : max(0, 512 - window[1].start)].any()


@pytest.mark.filterwarnings("ignore::zarr_cae.CAEWearWarning")
def test_partial_writes_keep_exact_tiles_exact(exact):
    array, pixels = exact
    pixels[500:530, 100:110] = 77
    array[500:530, 100:110] = pixels[500:530, 100:110]
    array[535:540, 525:530] = 99
    assert np.array_equal(array[:512, :512], pixels[:512, :512])
    assert np.abs(array[535:540, 525:530].astype(int) - 99).max() < 60
    header = parse_frame(stored(array), coder_of(array).header).header
    assert (header.version, header.row) == (3, 4)


def test_masks_without_a_nodata_value_are_of_the_fill_value():
    array = create((32, 32), "float32", (0, 1), np.nan)
    array[:4] = np.nan
    other = create((32, 32), "float32", (0, 1), None)
    put(other, stored(array))
    assert (other[:4] == other.fill_value).all()
    assert np.isfinite(other[:]).all()


def test_damaged_masks_are_refused(tmp_path):
    array = create((32, 32), "float32", (0, 1), np.nan)
    array[:4] = np.nan
    frame = bytearray(stored(array))
    frame[22] ^= 1
    put(array, bytes(frame))
    with pytest.raises(FrameError, match="checksum"):
        array[:]
