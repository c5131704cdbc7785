"""`cae.effort` through zarr: fewer bytes at no worse Lagrangian, for every kind of chunk."""

import numpy as np
import pytest
import zarr
from archives import chunks_of

import zarr_cae
from zarr_cae import CAECodec
from zarr_cae.codec import effort as module
from zarr_cae.codec.cae import loaded
from zarr_cae.weights.file import trade_off


def coded(pixels, effort, *, chunks=None, **options):
    """Write pixels with an effort; return the bytes of the chunks, and what is read."""
    options = {"quality": 3, **options}
    fill = options.pop("fill_value", 0)
    codec = CAECodec(**options)
    with zarr_cae.configure(effort=effort, device="cpu"):
        array = zarr.create_array(
            {}, shape=pixels.shape, chunks=chunks or pixels.shape, dtype=pixels.dtype, serializer=codec,
            compressors=None, fill_value=fill,
        )  # fmt: skip
        array[...] = pixels
    assert "effort" not in str(array.metadata.to_dict())
    return sum(map(len, chunks_of(array.store).values())), array[...], array


def cost(pixels, nbytes, back, quality, *, where=None, extent=255):
    """Return the Lagrangian in bits."""
    weights = loaded(CAECodec(quality))
    squares = np.square((back.astype(np.float64) - pixels) * 255 / extent)
    squares = squares[where] if where is not None else squares
    components = pixels.shape[-1] if pixels.ndim == 3 else 1
    return 8 * nbytes + trade_off(weights.info, quality) * squares.sum() / components


@pytest.mark.parametrize(
    ("rows", "columns", "chunks", "grey"),
    [(96, 80, None, False), (101, 70, None, False), (96, 80, None, True), (70, 101, (48, 48, 3), False)],
)
def test_fewer_bytes_and_less_error(photograph, pipeline, rows, columns, chunks, grey):
    pixels = np.ascontiguousarray(photograph[100 : 100 + rows, 200 : 200 + columns])
    pixels = np.ascontiguousarray(pixels[..., 1]) if grey else pixels
    before, plain, _ = coded(pixels, 1, chunks=chunks)
    after, back, _ = coded(pixels, 5, chunks=chunks)
    assert cost(pixels, after, back, 3) < 0.99 * cost(pixels, before, plain, 3)
    again, same, _ = coded(pixels, 5, chunks=chunks)
    assert again == after
    np.testing.assert_array_equal(same, back)


def test_padding_does_not_count(photograph, monkeypatch):
    pixels = np.ascontiguousarray(photograph[:50, :70])
    seen = []
    counts = module.counting_samples
    monkeypatch.setattr(module, "counting_samples", lambda *given: seen.append(counts(*given)) or seen[-1])
    coded(pixels, 2)
    assert seen[0].shape == (1, 3, 64, 80)
    assert seen[0][:, :, :50, :70].all()
    assert seen[0].sum() == 3 * 50 * 70


def test_masked_pixels_do_not_count(photograph, monkeypatch):
    pixels = np.where(photograph[:96, :96] == 7, 8, photograph[:96, :96])
    mask = np.hypot(*(np.indices((96, 96)) - 48)) > 40
    pixels[mask] = 7
    seen = []
    counts = module.counting_samples
    monkeypatch.setattr(module, "counting_samples", lambda *given: seen.append(counts(*given)) or seen[-1])
    options = {"nodata": 7, "fill_value": 7}
    before, plain, _ = coded(pixels, 0, **options)
    after, back, _ = coded(pixels, 5, **options)
    np.testing.assert_array_equal(back == 7, mask[..., None].repeat(3, 2))
    np.testing.assert_array_equal(seen[0][0], ~mask[None].repeat(3, 0))
    assert cost(pixels, after, back, 3, where=~mask) < 0.985 * cost(pixels, before, plain, 3, where=~mask)


def test_other_dtypes_and_the_root(photograph):
    pixels = (photograph[:80, :80, 0].astype(np.uint16) ** 2) // 16
    options = {"value_range": (0, 4095), "value_transform": "sqrt"}
    before, plain, _ = coded(pixels, 0, **options)
    after, back, _ = coded(pixels, 5, **options)
    roots = [np.sqrt(one.astype(np.float64)) for one in (pixels, plain, back)]
    extent = np.sqrt(4095)
    costs = [cost(roots[0], size, back, 3, extent=extent) for size, back in ((before, roots[1]), (after, roots[2]))]
    assert costs[1] < 0.985 * costs[0]


def test_channels_beside_the_colours(photograph):
    pixels = np.concatenate([photograph[:64, :64], photograph[:64, :64, :1]], 2)
    before, plain, _ = coded(pixels, 0, channel_axis=-1, colour=(0, 1, 2))
    after, back, _ = coded(pixels, 5, channel_axis=-1, colour=(0, 1, 2))
    assert cost(pixels, after, back, 3) < cost(pixels, before, plain, 3)


@pytest.mark.parametrize("demand", [30, 33, 60])
def test_a_least_psnr_is_reached(photograph, demand):
    pixels = np.ascontiguousarray(photograph[:64, :64])
    before, plain, _ = coded(pixels, 1, min_psnr=demand)
    after, back, _ = coded(pixels, 4, min_psnr=demand)
    errors = [np.square(one.astype(float) - pixels).mean() for one in (plain, back)]
    assert 10 * np.log10(255**2 / max(errors[1], 1e-9)) >= demand
    assert after <= 1.05 * before
    if demand == 60:  # exact tiles
        np.testing.assert_array_equal(back, pixels)
        assert after == before


def test_refined_symbols_that_miss_the_demand_are_not_stored(photograph, monkeypatch):
    pixels = np.ascontiguousarray(photograph[:64, :64])
    before, plain, _ = coded(pixels, 0, min_psnr=30)
    monkeypatch.setattr(module, "reaches", lambda *_: False)
    after, back, _ = coded(pixels, 3, min_psnr=30)
    assert after == before
    np.testing.assert_array_equal(back, plain)


def test_ms_ssim_stays_as_it_is(photograph):
    pixels = np.ascontiguousarray(photograph[:64, :64])
    assert coded(pixels, 0, metric="ms-ssim")[0] == coded(pixels, 5, metric="ms-ssim")[0]


def test_writes_of_parts_do_not_use_it(photograph, monkeypatch):
    pixels = np.ascontiguousarray(photograph[:128, :128])
    _, _, array = coded(pixels, 1)
    monkeypatch.setattr(module, "counting_samples", None)  # a call would fail
    with zarr_cae.configure(effort=3):
        array[:16, :16] = 200
    assert abs(array[:16, :16].astype(int) - 200).mean() < 12
