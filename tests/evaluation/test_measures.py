"""Distortion measures, BD-rate, points and curves, CSV, plots."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation import measures as evaluation
from zarr_cae.evaluation.measures import Curve, Point


def picture(height=200, width=232):
    y, x = np.mgrid[:height, :width] / 40.0
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(x * y / 3)], axis=-1)
    return np.round(127.5 + 100 * waves).astype(np.uint8)


def noisy(image, sigma, seed=0):
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)


def test_psnr_by_hand():
    a = np.zeros((4, 5, 3), np.uint8)
    assert evaluation.psnr(a, a) == math.inf
    assert evaluation.psnr(a, a + 1) == pytest.approx(20 * math.log10(255))  # MSE 1: 48.13 dB
    b = a.copy()
    b[0, 0, 0] = 255  # MSE 255^2 / 60
    assert evaluation.psnr(a, b) == evaluation.psnr(b, a) == pytest.approx(10 * math.log10(60))
    assert evaluation.psnr([0.0, 1.0], [0.0, 0.9], peak=1.0) == pytest.approx(10 * math.log10(200))
    assert evaluation.psnr(np.array([0], np.uint16), np.array([65535], np.uint16), peak=65535) == 0.0


@pytest.mark.parametrize("shape", [(192, 256), (161, 161), (163, 175), (176, 337)])
@pytest.mark.parametrize("sigma", [2, 25, 120])
def test_ms_ssim_equals_pytorch_msssim(shape, sigma):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("pytorch_msssim")
    a = picture(*shape)
    b = noisy(a, sigma)
    tensors = [torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None] for image in (a, b)]
    expected = reference.ms_ssim(*tensors, data_range=255).item()
    assert evaluation.ms_ssim(a, b) == pytest.approx(expected, abs=1e-5)
    grey = reference.ms_ssim(*(t[:, :1] for t in tensors), data_range=255).item()
    assert evaluation.ms_ssim(a[..., 0], b[..., 0]) == pytest.approx(grey, abs=1e-5)
    unit = evaluation.ms_ssim(a / 255, b / 255, peak=1.0)
    assert unit == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_of_negative_contrast_is_zero_as_in_pytorch_msssim():
    a = np.random.default_rng(1).integers(0, 256, (161, 170), np.uint8)
    assert evaluation.ms_ssim(a, 255 - a) == 0.0


def test_ms_ssim_by_hand():
    a = picture()
    assert evaluation.ms_ssim(a, a) == 1.0
    # Flat images: contrast is 1 at every scale, so only the coarsest scale's luminance term remains.
    c1 = (0.01 * 255) ** 2
    flat = np.full((176, 176), 100, np.uint8), np.full((176, 176), 150, np.uint8)
    luminance = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert evaluation.ms_ssim(*flat) == pytest.approx(luminance**0.1333, abs=1e-5)


def test_ms_ssim_decibels():
    assert evaluation.ms_ssim_decibels(0.99) == pytest.approx(20.0)
    assert evaluation.ms_ssim_decibels(0.0) == 0.0
    assert evaluation.ms_ssim_decibels(1.0) == math.inf
    assert math.isnan(evaluation.ms_ssim_decibels(math.nan))
    with pytest.raises(CAEConfigurationError, match=r"^cae: "):
        evaluation.ms_ssim_decibels(1.5)


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
    assert evaluation.cie76(a, b) == pytest.approx(math.dist(LAB[first], LAB[second]), abs=2e-3)


def test_cie76_is_a_mean_over_pixels_and_takes_grey():
    a = np.zeros((2, 2), np.uint8)
    b = a.copy()
    b[0, 1] = 255
    assert evaluation.cie76(a, b) == pytest.approx(25.0)


def test_bits_per_pixel():
    assert evaluation.bits_per_pixel(1000, 100, 80) == 1.0
    for wrong in ((1, 0, 5), (1, 5, 0), (-1, 5, 5)):
        with pytest.raises(CAEConfigurationError, match=r"^cae: "):
            evaluation.bits_per_pixel(*wrong)


def test_measures_refuse_what_they_cannot_compare():
    a = picture()
    for function in (evaluation.psnr, evaluation.ms_ssim, evaluation.cie76):
        with pytest.raises(CAEConfigurationError, match=r"^cae: .*one shape"):
            function(a, a[:-1])
        with pytest.raises(CAEConfigurationError, match=r"^cae: "):
            function(a[:0], a[:0])
    with pytest.raises(CAEConfigurationError, match="above 160 px"):
        evaluation.ms_ssim(a[:160], a[:160])
    with pytest.raises(CAEConfigurationError, match="not of shape"):
        evaluation.ms_ssim(a[None], a[None])
    with pytest.raises(CAEConfigurationError, match="uint8"):
        evaluation.cie76(a / 1.0, a / 1.0)
    with pytest.raises(CAEConfigurationError, match="uint8"):
        evaluation.cie76(a[..., :2], a[..., :2])


def test_curve_bd_rate_takes_ms_ssim_in_decibels():
    anchor = Curve("a", (0.1, 0.2, 0.4), (30.0, 32.0, 34.0), (0.9, 0.95, 0.98))
    ours = Curve("b", (0.05, 0.1, 0.2), (30.0, 32.0, 34.0), (0.9, 0.95, 0.98))
    assert ours.bd_rate(anchor) == pytest.approx(-50)
    assert anchor.bd_rate(ours, "ms_ssim") == pytest.approx(100)
    assert anchor.quality("ms_ssim") == pytest.approx((10.0, 13.0103, 16.9897))
    with pytest.raises(CAEConfigurationError, match="'bpp'"):
        anchor.quality("bpp")


def point(codec="cae", setting=1.0, image="a", bpp=0.5, psnr=30.0, ms_ssim=0.9):
    return Point(codec, setting, image, bpp, psnr, ms_ssim, 2.5, 0.125, 0.25)


def test_measure():
    a = picture()
    b = noisy(a, 10)
    got = evaluation.measure("cae", 4, "a.png", a, b, nbytes=2900, encode_seconds=0.5, decode_seconds=0.25)
    expected = Point(
        "cae", 4, "a.png", 0.5, evaluation.psnr(a, b), evaluation.ms_ssim(a, b), evaluation.cie76(a, b), 0.5, 0.25
    )
    assert got == expected
    small = evaluation.measure("cae", 4, "s", a[:9], b[:9], nbytes=1, encode_seconds=0, decode_seconds=0)
    assert math.isnan(small.ms_ssim)
    assert small.psnr > 20


def test_average_and_to_curves():
    points = [
        point(setting=8, image="a", bpp=2.0, psnr=40.0, ms_ssim=0.98),
        point(setting=1, image="b", bpp=0.25, psnr=28.0, ms_ssim=0.8),
        point("jpeg", 50, image="a", bpp=1.0),
        point(setting=1, image="a", bpp=0.75, psnr=30.0, ms_ssim=0.9),
        point(setting=8, image="b", bpp=1.0, psnr=41.0, ms_ssim=0.96),
    ]
    low, high, jpeg = evaluation.average(points)
    assert (low.codec, low.setting, low.image, low.bpp, low.psnr) == ("cae", 1, "mean of 2", 0.5, 29.0)
    assert (high.setting, high.bpp, high.psnr) == (8, 1.5, 40.5)
    assert jpeg == replace(points[2], image="mean of 1")
    curves = evaluation.to_curves(points)
    assert list(curves) == ["cae", "jpeg"]
    assert curves["cae"].bpp == (0.5, 1.5)
    assert curves["cae"].psnr == (29.0, 40.5)
    assert curves["cae"].ms_ssim == pytest.approx((0.85, 0.97))


def test_average_refuses_settings_on_different_images():
    for points in (
        [point(setting=1, image="a"), point(setting=2, image="b")],
        [point(setting=1, image="a"), point(setting=1, image="a")],
    ):
        with pytest.raises(CAEConfigurationError, match=r"^cae: every setting of cae"):
            evaluation.average(points)


def test_load_published(tmp_path):
    path = tmp_path / "rd.json"
    curve = {"bpp": [2, 1], "psnr": [35.5, 30], "ms_ssim": [0.99, 0.9]}
    path.write_text(json.dumps({"source": "x", "curves": {"jpeg": curve}}))
    assert evaluation.load_published(path) == {"jpeg": Curve("jpeg", (1.0, 2.0), (30.0, 35.5), (0.9, 0.99))}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"curves": []}',
        '{"curves": {"a": {"bpp": [1]}}}',
        '{"curves": {"a": {"bpp": [], "psnr": [], "ms_ssim": []}}}',
        '{"curves": {"a": {"bpp": [1], "psnr": [1, 2], "ms_ssim": [1]}}}',
        '{"curves": {"a": {"bpp": [1], "psnr": ["x"], "ms_ssim": [1]}}}',
    ],
)
def test_load_published_refuses(tmp_path, text):
    path = tmp_path / "rd.json"
    path.write_text(text)
    with pytest.raises(CAEConfigurationError, match=r"^cae: .*rd\.json"):
        evaluation.load_published(path)
    with pytest.raises(CAEConfigurationError, match=r"^cae: "):
        evaluation.load_published(tmp_path / "missing")


def test_csv_round_trip(tmp_path):
    path = tmp_path / "points.csv"
    points = [
        point('a, "quoted" name', 0.1 + 0.2, "zürich.png", bpp=1 / 3, psnr=math.inf),
        replace(point(), delta_e=float(np.float64(2) / 7)),
    ]
    evaluation.write_csv(points, path)
    assert evaluation.read_csv(path) == points
    assert path.read_text("utf-8").splitlines()[0].startswith("codec,setting,image,bpp,psnr,ms_ssim,delta_e")
    evaluation.write_csv([], path)
    assert evaluation.read_csv(path) == []
    evaluation.write_csv([point(ms_ssim=math.nan)], path)
    assert math.isnan(evaluation.read_csv(path)[0].ms_ssim)


@pytest.mark.parametrize("text", ["", "a,b\n", "a,b\n1,2\n", "codec,setting,image\ncae,x,y\n", "\x00"])
def test_csv_refuses(tmp_path, text):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(CAEConfigurationError, match=r"^cae: .*table of points"):
        evaluation.read_csv(path)
    with pytest.raises(CAEConfigurationError, match=r"^cae: .*table of points"):
        evaluation.read_csv(tmp_path / "missing")


def test_csv_refuses_short_rows(tmp_path):
    path = tmp_path / "points.csv"
    evaluation.write_csv([point()], path)
    path.write_text(path.read_text().rstrip().rpartition(",")[0])
    with pytest.raises(CAEConfigurationError, match="table of points"):
        evaluation.read_csv(path)


def test_plot_writes_a_picture_and_leaves_pyplot_alone(tmp_path):
    pytest.importorskip("matplotlib")
    curves = [Curve(f"codec {i}", (0.1, 0.5, 2.0), (28.0 + i, 33.0, 40.0), (0.9, 0.97, 0.99)) for i in range(12)]
    curves.append(Curve("cae", (0.1, 1.0), (30.0, math.inf), (math.nan, 1.0)))
    path = tmp_path / "rd.png"
    had_pyplot = "matplotlib.pyplot" in sys.modules
    evaluation.plot(curves, path)
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 1200
        assert image.height > 500
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    with pytest.raises(CAEConfigurationError, match="no curves"):
        evaluation.plot([], path)


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CAEConfigurationError, match=r"^cae: .*zarr-cae\[compare\]"):
        evaluation.plot([Curve("a", (1.0,), (30.0,), (0.9,))], tmp_path / "rd.png")


def test_modules_import_only_numpy():
    """The package's __init__ is left out: it imports the codec, hence zarr."""
    package = str(Path(evaluation.__file__).parent)
    code = (
        "import sys, types; package = types.ModuleType('zarr_cae'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['zarr_cae'] = package; import zarr_cae.evaluation.measures, zarr_cae.evaluation.classical; "
        "print(*{'PIL', 'imagecodecs', 'matplotlib', 'torch', 'zarr'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, package], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
