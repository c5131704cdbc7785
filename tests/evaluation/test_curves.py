"""Points and curves, CSV, published curves."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from pictures import noisy, picture

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation import curves
from zarr_cae.evaluation.curves import Coded, Curve, Point
from zarr_cae.evaluation.measures import cie76, ms_ssim, psnr, ssim


def point(codec="cae", setting=1.0, image="a", bpp=0.5, psnr=30.0, ms_ssim=0.9):
    return Point(codec, setting, image, bpp, psnr, 0.875, ms_ssim, 2.5, 0.125, 0.25)


def test_curve_bd_rate_takes_ms_ssim_in_decibels():
    anchor = Curve("a", (0.1, 0.2, 0.4), (30.0, 32.0, 34.0), (0.9, 0.95, 0.98))
    ours = Curve("b", (0.05, 0.1, 0.2), (30.0, 32.0, 34.0), (0.9, 0.95, 0.98))
    assert ours.bd_rate(anchor) == pytest.approx(-50)
    assert anchor.bd_rate(ours, "ms_ssim") == pytest.approx(100)
    assert anchor.quality("ms_ssim") == pytest.approx((10.0, 13.0103, 16.9897))
    with pytest.raises(CAEConfigurationError, match="'bpp'"):
        anchor.quality("bpp")


def test_measure():
    a = picture()
    b = noisy(a, 10)
    got = curves.measure("cae", 4, "a.png", a, Coded(b, 2900, 0.5, 0.25))
    expected = Point("cae", 4, "a.png", 0.5, psnr(a, b), ssim(a, b), ms_ssim(a, b), cie76(a, b), 0.5, 0.25)
    assert got == expected
    small = curves.measure("cae", 4, "s", a[:9], Coded(b[:9], 1, 0, 0))
    assert math.isnan(small.ssim)
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
    low, high, jpeg = curves.average(points)
    assert (low.codec, low.setting, low.image, low.bpp, low.psnr) == ("cae", 1, "mean of 2", 0.5, 29.0)
    assert (high.setting, high.bpp, high.psnr) == (8, 1.5, 40.5)
    assert jpeg == replace(points[2], image="mean of 1")
    means = curves.to_curves(points)
    assert list(means) == ["cae", "jpeg"]
    assert means["cae"].bpp == (0.5, 1.5)
    assert means["cae"].psnr == (29.0, 40.5)
    assert means["cae"].ms_ssim == pytest.approx((0.85, 0.97))


def test_average_refuses_settings_on_different_images():
    for points in (
        [point(setting=1, image="a"), point(setting=2, image="b")],
        [point(setting=1, image="a"), point(setting=1, image="a")],
    ):
        with pytest.raises(CAEConfigurationError, match=r"^cae: every setting of cae"):
            curves.average(points)


def test_load_published(tmp_path):
    path = tmp_path / "rd.json"
    curve = {"bpp": [2, 1], "psnr": [35.5, 30], "ms_ssim": [0.99, 0.9]}
    path.write_text(json.dumps({"source": "x", "curves": {"jpeg": curve}}))
    assert curves.load_published(path) == {"jpeg": Curve("jpeg", (1.0, 2.0), (30.0, 35.5), (0.9, 0.99))}


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
        curves.load_published(path)
    with pytest.raises(CAEConfigurationError, match=r"^cae: "):
        curves.load_published(tmp_path / "missing")


def test_csv_round_trip(tmp_path):
    path = tmp_path / "points.csv"
    points = [
        point('a, "quoted" name', 0.1 + 0.2, "zürich.png", bpp=1 / 3, psnr=math.inf),
        replace(point(), delta_e=float(np.float64(2) / 7)),
    ]
    curves.write_csv(points, path)
    assert curves.read_csv(path) == points
    assert path.read_text("utf-8").splitlines()[0].startswith("codec,setting,image,bpp,psnr,ssim,ms_ssim,delta_e")
    curves.write_csv([], path)
    assert curves.read_csv(path) == []
    curves.write_csv([point(ms_ssim=math.nan)], path)
    assert math.isnan(curves.read_csv(path)[0].ms_ssim)


@pytest.mark.parametrize("text", ["", "a,b\n", "a,b\n1,2\n", "codec,setting,image\ncae,x,y\n", "\x00"])
def test_csv_refuses(tmp_path, text):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(CAEConfigurationError, match=r"^cae: .*table of points"):
        curves.read_csv(path)
    with pytest.raises(CAEConfigurationError, match=r"^cae: .*table of points"):
        curves.read_csv(tmp_path / "missing")


def test_csv_refuses_short_rows(tmp_path):
    path = tmp_path / "points.csv"
    curves.write_csv([point()], path)
    path.write_text(path.read_text().rstrip().rpartition(",")[0])
    with pytest.raises(CAEConfigurationError, match="table of points"):
        curves.read_csv(path)
