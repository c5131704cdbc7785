"""Rival codecs: round trips on a smooth synthetic image, 4:4:4, settings, errors."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.classical import RIVALS, evaluate_rival
from zarr_cae.evaluation.measures import psnr

IMAGECODECS = {"avif", "jpegxl", "jpegxl3"}


def picture(height=168, width=200):
    """Smooth colour with a little grain, so that rates behave as on a photograph."""
    y, x = np.mgrid[:height, :width] / 25.0
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(x * y / 3)], axis=-1)
    grain = np.random.default_rng(0).normal(0, 3, (height, width, 1))
    return np.clip(np.round(127.5 + 90 * waves + grain), 0, 255).astype(np.uint8)


@pytest.fixture(params=RIVALS)
def rival(request):
    if request.param in IMAGECODECS:
        pytest.importorskip("imagecodecs")
    return RIVALS[request.param]


def test_names():
    assert list(RIVALS) == ["jpeg", "webp", "avif", "jpegxl", "jpegxl3", "jpeg2000"]
    assert all(name == rival.name for name, rival in RIVALS.items())


def test_round_trip_and_rising_rate(rival):
    image = picture()
    sizes, qualities = [], []
    for setting in (rival.settings[1], rival.settings[len(rival.settings) // 2], rival.settings[-1]):
        data = rival.encode(image, setting)
        assert type(data) is bytes
        decoded = rival.decode(data)
        assert decoded.dtype == np.uint8
        assert decoded.shape == image.shape
        sizes.append(len(data))
        qualities.append(psnr(image, decoded))
    assert sizes == sorted(set(sizes))
    assert qualities == sorted(set(qualities))
    assert qualities[-1] > 32


def test_settings_lie_within_limits_in_order_of_rate(rival):
    least, greatest = rival.limits
    assert all(least <= setting <= greatest for setting in rival.settings)
    assert len(rival.settings) >= 8
    assert list(rival.settings) == sorted(rival.settings, reverse=rival.name.startswith("jpegxl"))


@pytest.mark.parametrize("shape", [(1, 1), (17, 31)])
def test_odd_sizes(rival, shape):
    image = picture()[: shape[0], : shape[1]]
    assert rival.decode(rival.encode(np.ascontiguousarray(image), rival.settings[-1])).shape == image.shape


def test_chroma_is_not_subsampled_where_the_format_can():
    """Columns of red and blue in turn survive 4:4:4 and turn to purple at 4:2:0."""
    pytest.importorskip("imagecodecs")
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, ::2, 0] = 200
    image[:, 1::2, 2] = 200
    quality = {
        name: psnr(image, rival.decode(rival.encode(image, rival.settings[-1]))) for name, rival in RIVALS.items()
    }
    assert quality.pop("webp") < 16
    assert min(quality.values()) > 25


def test_jpeg2000_meets_its_target_rate_with_the_irreversible_wavelet():
    image = picture()
    data = RIVALS["jpeg2000"].encode(image, 1.0)
    assert 0.85 < 8 * len(data) / (168 * 200) <= 1.0
    assert data[:4] == b"\xff\x4f\xff\x51"  # a bare codestream
    style = data.index(b"\xff\x52")  # COD: length, style, progression, layers, transform of components, levels, ...
    assert data[style + 8] == 1  # with colour transform
    assert data[style + 13] == 0  # 9/7


def test_jpeg_is_444():
    with Image.open(io.BytesIO(RIVALS["jpeg"].encode(picture(), 50))) as image:
        assert [sampling for _, *sampling, _ in image.layer] == [[1, 1]] * 3


def test_evaluate_rival():
    image = picture()
    points = evaluate_rival("jpeg", [("a", image), ("b", image[::-1])], settings=[30, 80])
    assert [(p.codec, p.image, p.setting) for p in points] == [
        ("jpeg", "a", 30), ("jpeg", "a", 80), ("jpeg", "b", 30), ("jpeg", "b", 80)
    ]  # fmt: skip
    assert points[0].bpp == 8 * len(RIVALS["jpeg"].encode(image, 30)) / (168 * 200)
    assert points[0].psnr < points[1].psnr
    assert points[0].ms_ssim < points[1].ms_ssim < 1
    assert points[0].delta_e > points[1].delta_e > 0
    assert min(p.encode_seconds for p in points) > 0
    assert min(p.decode_seconds for p in points) > 0
    assert len(evaluate_rival("jpeg", [("a", image)])) == len(RIVALS["jpeg"].settings)


def test_evaluate_rival_refuses():
    image = picture()
    with pytest.raises(CAEConfigurationError, match=r"^cae: .*'gif'; there are jpeg, webp"):
        evaluate_rival("gif", [("a", image)])
    for wrong in (image[..., 0], image / 255.0, image[..., :2]):
        with pytest.raises(CAEConfigurationError, match=r"^cae: .*\(H, W, 3\) uint8 images, a is"):
            evaluate_rival("jpeg", [("a", wrong)])
    for setting in (0, 96, float("nan")):
        with pytest.raises(CAEConfigurationError, match=r"^cae: settings of jpeg are from 1 to 95"):
            evaluate_rival("jpeg", [("a", image)], [setting])


@pytest.mark.parametrize("name", sorted(IMAGECODECS))
def test_missing_imagecodecs_names_the_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(CAEConfigurationError, match=r"^cae: .*zarr-cae\[compare\]"):
        evaluate_rival(name, [("a", picture())])
