"""Measures of distortion and rate."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import noisy, picture

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation import measures


def test_psnr_by_hand():
    a = np.zeros((4, 5, 3), np.uint8)
    assert measures.psnr(a, a) == math.inf
    assert measures.psnr(a, a + 1) == pytest.approx(20 * math.log10(255))  # MSE 1: 48.13 dB
    b = a.copy()
    b[0, 0, 0] = 255  # MSE 255^2 / 60
    assert measures.psnr(a, b) == measures.psnr(b, a) == pytest.approx(10 * math.log10(60))
    assert measures.psnr([0.0, 1.0], [0.0, 0.9], peak=1.0) == pytest.approx(10 * math.log10(200))
    assert measures.psnr(np.array([0], np.uint16), np.array([65535], np.uint16), peak=65535) == 0.0


@pytest.mark.parametrize("shape", [(192, 256), (161, 161), (163, 175), (176, 337)])
@pytest.mark.parametrize("sigma", [2, 25, 120])
def test_ms_ssim_equals_pytorch_msssim(shape, sigma):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("pytorch_msssim")
    a = picture(*shape)
    b = noisy(a, sigma)
    tensors = [torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None] for image in (a, b)]
    expected = reference.ms_ssim(*tensors, data_range=255).item()
    assert measures.ms_ssim(a, b) == pytest.approx(expected, abs=1e-5)
    grey = reference.ms_ssim(*(t[:, :1] for t in tensors), data_range=255).item()
    assert measures.ms_ssim(a[..., 0], b[..., 0]) == pytest.approx(grey, abs=1e-5)
    unit = measures.ms_ssim(a / 255, b / 255, peak=1.0)
    assert unit == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_of_negative_contrast_is_zero_as_in_pytorch_msssim():
    a = np.random.default_rng(1).integers(0, 256, (161, 170), np.uint8)
    assert measures.ms_ssim(a, 255 - a) == 0.0


def test_ms_ssim_by_hand():
    a = picture()
    assert measures.ms_ssim(a, a) == 1.0
    # Flat images: contrast is 1 at every scale, so only the coarsest scale's luminance term remains.
    c1 = (0.01 * 255) ** 2
    flat = np.full((176, 176), 100, np.uint8), np.full((176, 176), 150, np.uint8)
    luminance = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert measures.ms_ssim(*flat) == pytest.approx(luminance**0.1333, abs=1e-4)  # float32


def test_ms_ssim_decibels():
    assert measures.ms_ssim_decibels(0.99) == pytest.approx(20.0)
    assert measures.ms_ssim_decibels(0.0) == 0.0
    assert measures.ms_ssim_decibels(1.0) == math.inf
    assert math.isnan(measures.ms_ssim_decibels(math.nan))
    with pytest.raises(CAEConfigurationError, match=r"^cae: "):
        measures.ms_ssim_decibels(1.5)


LAB = {  # sRGB under D65, L a b as tabulated by Lindbloom
    (255, 0, 0): (53.2408, 80.0925, 67.2032),
    (0, 255, 0): (87.7347, -86.1827, 83.1793),
    (0, 0, 255): (32.2970, 79.1875, -107.8602),
    (255, 255, 255): (100.0, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
    (128, 128, 128): (53.5850, 0.0, 0.0),
    (2, 2, 2): (0.5483, 0.0, 0.0),  # on both linear branches: 2 / 255 / 12.92 * 903.2963
}


@pytest.mark.parametrize("first", LAB)
@pytest.mark.parametrize("second", LAB)
def test_cie76_by_hand(first, second):
    a, b = (np.full((2, 3, 3), colour, np.uint8) for colour in (first, second))
    assert measures.cie76(a, b) == pytest.approx(math.dist(LAB[first], LAB[second]), abs=0.02)


def test_cie76_is_a_mean_over_pixels_and_takes_grey():
    a = np.zeros((2, 2), np.uint8)
    b = a.copy()
    b[0, 1] = 255
    assert measures.cie76(a, b) == pytest.approx(25.0)


def test_bits_per_pixel():
    assert measures.bits_per_pixel(1000, 100, 80) == 1.0
    for wrong in ((1, 0, 5), (1, 5, 0), (-1, 5, 5)):
        with pytest.raises(CAEConfigurationError, match=r"^cae: "):
            measures.bits_per_pixel(*wrong)


def test_measures_refuse_images_that_they_cannot_compare():
    a = picture()
    for function in (measures.psnr, measures.ms_ssim, measures.cie76):
        with pytest.raises(CAEConfigurationError, match=r"^cae: .*one shape"):
            function(a, a[:-1])
        with pytest.raises(CAEConfigurationError, match=r"^cae: "):
            function(a[:0], a[:0])
    with pytest.raises(CAEConfigurationError, match="161 px or more"):
        measures.ms_ssim(a[:160], a[:160])
    with pytest.raises(CAEConfigurationError, match="not of shape"):
        measures.ms_ssim(a[None], a[None])
    with pytest.raises(CAEConfigurationError, match="uint8"):
        measures.cie76(a / 1.0, a / 1.0)
    with pytest.raises(CAEConfigurationError, match="uint8"):
        measures.cie76(a[..., :2], a[..., :2])


def test_psnr_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a = picture()
    b = noisy(a, 9)
    assert measures.psnr(a, b) == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=255))


def test_ssim_by_hand():
    pytest.importorskip("skimage")
    a = picture()
    assert measures.ssim(a, a) == pytest.approx(1.0)
    assert measures.ssim(a[..., 0], a[..., 0]) == pytest.approx(1.0)
    # Flat images have no contrast: only the luminance term remains.
    c1 = (0.01 * 255) ** 2
    flat = np.full((11, 11), 100, np.uint8), np.full((11, 11), 150, np.uint8)
    assert measures.ssim(*flat) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-6)
    values = [measures.ssim(a, noisy(a, sigma)) for sigma in (2, 10, 40)]
    assert values == sorted(values, reverse=True)
    assert measures.ssim(a / 255, noisy(a, 10) / 255, peak=1.0) == pytest.approx(values[1])


@pytest.mark.parametrize(
    ("name", "library"), [("ssim", "skimage"), ("cie76", "skimage"), ("ms_ssim", "pytorch_msssim")]
)
def test_missing_libraries_name_the_extra(name, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    for module in [module for module in sys.modules if module.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(CAEConfigurationError, match=rf"^cae: .*{library}.*pip install \"zarr-cae\[compare\]\""):
        getattr(measures, name)(picture(), picture())


def test_modules_import_only_numpy():
    """The package's __init__ is left out: it imports the codec, hence zarr."""
    package = str(Path(measures.__file__).parents[1])
    code = (
        "import sys, types; package = types.ModuleType('zarr_cae'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['zarr_cae'] = package; import zarr_cae.evaluation.plot, zarr_cae.evaluation.classical; "
        "print(*{'PIL', 'imagecodecs', 'matplotlib', 'pytorch_msssim', 'scipy', 'skimage', 'torch', 'zarr'} "
        "& {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, package], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
