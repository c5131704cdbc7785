"""BD-rate, against the single cubic of VCEG-M33, published pairs and analytic curves."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_cae.errors import CAEConfigurationError
from zarr_cae.evaluation.bd_rate import bd_rate

# CompressAI, results/image/kodak: averages over the 24 Kodak images.
FACTORIZED = (
    [0.12262, 0.18853, 0.28781, 0.44038, 0.64814, 0.96698, 1.35117, 1.83327],
    [26.90882, 28.21793, 29.61692, 31.27709, 32.95612, 35.38092, 37.39693, 39.62131],
)
HYPERPRIOR = (
    [0.13129, 0.20889, 0.31986, 0.47836, 0.66869, 0.93883, 1.25917, 1.66022],
    [27.58154, 29.1967, 30.97216, 32.83818, 34.52626, 36.74335, 38.58385, 40.55687],
)
CHENG2020 = (
    [0.11959, 0.1838, 0.27095, 0.41738, 0.59447, 0.80574],
    [28.58235, 29.96927, 31.34278, 33.39031, 35.11887, 36.7041],
)


def vceg_m33(anchor_rate, anchor_quality, rate, quality):
    """Return the original BD-rate: one cubic polynomial of log rate over quality for each curve."""
    low, high = max(min(anchor_quality), min(quality)), min(max(anchor_quality), max(quality))
    areas = []
    for r, q in ((anchor_rate, anchor_quality), (rate, quality)):
        integral = np.polyint(np.polyfit(q, np.log(r), 3))
        areas.append(np.polyval(integral, high) - np.polyval(integral, low))
    return 100 * (math.exp((areas[1] - areas[0]) / (high - low)) - 1)


@pytest.mark.parametrize("curve", [HYPERPRIOR, CHENG2020])
def test_bd_rate_of_published_curves_agrees_with_the_single_cubic(curve):
    value = bd_rate(*FACTORIZED, *curve)
    assert value == pytest.approx(vceg_m33(*FACTORIZED, *curve), abs=1.0)
    back = bd_rate(*curve, *FACTORIZED)
    assert (1 + value / 100) * (1 + back / 100) == pytest.approx(1.0)  # exact: the interval is the same


def test_bd_rate_of_a_published_pair():
    # scipy.interpolate.PchipInterpolator over the same numbers, integrated by its antiderivative.
    assert bd_rate(*FACTORIZED, *HYPERPRIOR) == pytest.approx(-21.13067867, abs=1e-6)
    assert bd_rate(*FACTORIZED, *CHENG2020) == pytest.approx(-39.30456285, abs=1e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 4.0])
def test_bd_rate_of_a_constant_factor_is_exact(factor):
    rate, quality = map(np.array, FACTORIZED)
    assert bd_rate(rate, quality, factor * rate, quality) == pytest.approx(100 * (factor - 1), abs=1e-9)
    order = np.random.default_rng(0).permutation(len(rate))
    assert bd_rate(rate, quality, factor * rate[order], quality[order]) == pytest.approx(100 * (factor - 1))


@settings(max_examples=50, deadline=None)
@given(
    st.floats(0.2, 5),
    st.floats(-4, 4, allow_subnormal=False),
    st.floats(0.02, 0.3),
    st.lists(st.floats(0.1, 3), min_size=1, max_size=8),
    st.lists(st.floats(0.1, 3), min_size=1, max_size=8),
)
def test_bd_rate_of_exponential_curves_is_analytic(factor, shift, slope, anchor_steps, steps):
    """PCHIP reproduces straight lines in log rate with any knots, so the result does not depend on them."""
    anchor_quality = 30 + np.cumsum([0, *anchor_steps, 5])
    quality = 30 + shift + np.cumsum([0, *steps, 5])
    value = bd_rate(np.exp(slope * anchor_quality), anchor_quality, factor * np.exp(slope * quality), quality)
    assert value == pytest.approx(100 * (factor - 1), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("rate", "quality", "match"),
    [
        ([1, 2], [10, 12], "overlap"),
        ([1, 2], [10, 26.90882], "overlap"),
        ([1], [30], "two or more"),
        ([1, 2], [30, 31, 32], "two or more"),
        ([[1, 2]], [[30, 31]], "two or more"),
        ([0, 1], [30, 31], "finite"),
        ([1, 2], [30, math.inf], "finite"),
        ([1, math.nan], [30, 31], "finite"),
        ([1, 2, 3], [30, 32, 31], "rises strictly"),
        ([1, 1, 3], [30, 31, 32], "rises strictly"),
    ],
)
def test_bd_rate_refuses(rate, quality, match):
    with pytest.raises(CAEConfigurationError, match=f"^cae: .*{match}"):
        bd_rate(*FACTORIZED, rate, quality)
