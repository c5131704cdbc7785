"""Classical codecs: round trips on a smooth synthetic image, 4:4:4, settings, errors."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.classical import CLASSICAL, evaluate_classical, match, spread
from zarr_cae.evaluation.measures import psnr

IMAGECODECS = {"avif", "jpegxl", "jpegxl3"}


def picture(height=168, width=200):
    """Return smooth colours with a little grain, so that rates behave as on a photograph."""
    y, x = np.mgrid[:height, :width] / 25.0
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(x * y / 3)], axis=-1)
    grain = np.random.default_rng(0).normal(0, 3, (height, width, 1))
    return np.clip(np.round(127.5 + 90 * waves + grain), 0, 255).astype(np.uint8)


@pytest.fixture(params=CLASSICAL)
def codec(request):
    if request.param in IMAGECODECS:
        pytest.importorskip("imagecodecs")
    return CLASSICAL[request.param]


def test_names():
    assert list(CLASSICAL) == ["jpeg", "webp", "avif", "jpegxl", "jpegxl3", "jpeg2000"]
    assert all(name == codec.name for name, codec in CLASSICAL.items())


def test_round_trip_and_rising_rate(codec):
    image = picture()
    sizes, qualities = [], []
    for setting in (codec.settings[1], codec.settings[len(codec.settings) // 2], codec.settings[-1]):
        data = codec.encode(image, setting)
        assert type(data) is bytes
        decoded = codec.decode(data, False)
        assert decoded.dtype == np.uint8
        assert decoded.shape == image.shape
        sizes.append(len(data))
        qualities.append(psnr(image, decoded))
    assert sizes == sorted(set(sizes))
    assert qualities == sorted(set(qualities))
    assert qualities[-1] > 32


def test_grey_stays_grey_and_costs_no_more_than_the_same_as_colours(codec):
    grey = picture()[..., 0]
    setting = codec.settings[len(codec.settings) // 2]
    data = codec.encode(grey, setting)
    decoded = codec.decode(data, True)
    assert (decoded.shape, decoded.dtype) == (grey.shape, np.uint8)
    assert 25 < psnr(grey, decoded) < 60  # lossy
    if codec.name != "jpeg2000":  # its setting is the rate
        assert len(data) <= len(codec.encode(np.repeat(grey[..., None], 3, 2), setting)) + 8  # headers differ


def test_spread_keeps_both_ends():
    assert spread((1, 2, 3, 4, 5, 6), 3) == (1, 3, 6)
    assert spread((1, 2), 5) == spread((1, 2), None) == (1, 2)


def test_settings_lie_within_limits_in_order_of_rate(codec):
    least, greatest = codec.limits
    assert all(least <= setting <= greatest for setting in codec.settings)
    assert len(codec.settings) >= 8
    assert list(codec.settings) == sorted(codec.settings, reverse=codec.name.startswith("jpegxl"))


@pytest.mark.parametrize("shape", [(1, 1), (17, 31)])
def test_odd_sizes(codec, shape):
    image = picture()[: shape[0], : shape[1]]
    assert codec.decode(codec.encode(np.ascontiguousarray(image), codec.settings[-1]), False).shape == image.shape


def test_chroma_is_not_subsampled_where_the_format_can():
    """Alternating columns of red and blue survive 4:4:4 and turn to purple at 4:2:0."""
    pytest.importorskip("imagecodecs")
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, ::2, 0] = 200
    image[:, 1::2, 2] = 200
    quality = {
        name: psnr(image, codec.decode(codec.encode(image, codec.settings[-1]), False))
        for name, codec in CLASSICAL.items()
    }
    assert quality.pop("webp") < 16
    assert min(quality.values()) > 25


def test_jpeg2000_meets_its_target_rate_with_the_irreversible_wavelet():
    image = picture()
    data = CLASSICAL["jpeg2000"].encode(image, 1.0)
    assert 0.85 < 8 * len(data) / (168 * 200) <= 1.0
    assert data[:4] == b"\xff\x4f\xff\x51"  # a bare codestream
    style = data.index(b"\xff\x52")  # COD: length, style, progression, layers, transform of components, levels, ...
    assert data[style + 8] == 1  # with colour transform
    assert data[style + 13] == 0  # 9/7


def test_jpeg_is_444():
    with Image.open(io.BytesIO(CLASSICAL["jpeg"].encode(picture(), 50))) as image:
        assert [sampling for _, *sampling, _ in image.layer] == [[1, 1]] * 3


def test_evaluate_classical():
    image = picture()
    points = evaluate_classical("jpeg", [("a", image), ("b", image[::-1])], settings=[30, 80])
    assert [(p.codec, p.image, p.setting) for p in points] == [
        ("jpeg", "a", 30), ("jpeg", "a", 80), ("jpeg", "b", 30), ("jpeg", "b", 80)
    ]  # fmt: skip
    assert points[0].bpp == 8 * len(CLASSICAL["jpeg"].encode(image, 30)) / (168 * 200)
    assert points[0].psnr < points[1].psnr
    assert points[0].ms_ssim < points[1].ms_ssim < 1
    assert points[0].delta_e > points[1].delta_e > 0
    assert min(p.encode_seconds for p in points) > 0
    assert min(p.decode_seconds for p in points) > 0
    assert len(evaluate_classical("jpeg", [("a", image)])) == len(CLASSICAL["jpeg"].settings)


def test_evaluate_classical_refuses():
    image = picture()
    with pytest.raises(CAEConfigurationError, match=r"^cae: .*'gif'; there are jpeg, webp"):
        evaluate_classical("gif", [("a", image)])
    for wrong in (image[None], image / 255.0, image[..., :2]):
        with pytest.raises(CAEConfigurationError, match=r"^cae: .*\(H, W, 3\) or \(H, W\) uint8 images"):
            evaluate_classical("jpeg", [("a", wrong)])
    for setting in (0, 96, float("nan")):
        with pytest.raises(CAEConfigurationError, match=r"^cae: settings of jpeg are from 1 to 95"):
            evaluate_classical("jpeg", [("a", image)], [setting])


@pytest.mark.parametrize("name", sorted(IMAGECODECS))
def test_missing_imagecodecs_names_the_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(CAEConfigurationError, match=r"^cae: .*zarr-cae\[compare\]"):
        evaluate_classical(name, [("a", picture())])


@pytest.mark.parametrize("name", ["jpeg", "webp", "jpeg2000"])
def test_match_comes_near_to_the_target(name):
    image = picture()
    codec = CLASSICAL[name]
    setting, coded = match(codec, image, "bytes", 4000)
    assert coded.nbytes == len(codec.encode(image, setting))
    assert coded.nbytes == pytest.approx(4000, rel=0.1)
    _, coded = match(codec, image, "psnr", 33.0)
    assert psnr(image, coded.pixels) == pytest.approx(33.0, abs=0.6)


def test_match_out_of_reach_gives_the_nearest_end():
    setting, coded = match(CLASSICAL["jpeg"], picture(), "bytes", 1)
    assert setting == 1
    assert coded.nbytes == len(CLASSICAL["jpeg"].encode(picture(), 1))
    assert match(CLASSICAL["jpeg"], picture(), "psnr", 99)[0] == 95
