"""Refined symbols: a lower Lagrangian, whatever counts in the error, in pieces and in batches."""

import multiprocessing
import os
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from weights_files import bundled

from zarr_cae.coder.tables import ideal_bits
from zarr_cae.config import Settings
from zarr_cae.errors import CAEError
from zarr_cae.networks import refine as module
from zarr_cae.networks.code_lengths import CodeLengths
from zarr_cae.networks.device import PASS_PIXELS
from zarr_cae.networks.engine import Engine, engine_for
from zarr_cae.networks.refine import refine
from zarr_cae.pixels.convert import to_planes
from zarr_cae.pixels.layout import Layout
from zarr_cae.weights.file import trade_off

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


@pytest.fixture(scope="module")
def planes(photograph):
    return to_planes(np.array(photograph[:192, :224]), Layout((192, 224, 3), 2), (0, 255))


@pytest.fixture(scope="module")
def strip(photograph):
    return to_planes(np.array(photograph[192:256]), Layout((64, 512, 3), 2), (0, 255))


def refined(planes, quality, *, counts=None, settings=None, symbols=None, engine=None):
    """Return the symbols of planes, and the refined ones."""
    settings = settings or Settings(device="cpu", effort=4)
    engine = engine or engine_for(bundled(quality), settings)
    counts = np.ones(planes.shape, bool) if counts is None else counts
    symbols = engine.analyse(planes, quality, settings).result() if symbols is None else symbols
    return symbols, refine(engine, planes, counts, symbols, quality, settings).result(300)


def bits_and_error(planes, symbols, quality, counts=None):
    """Return the bits of planes, and their error in bits, by other code than that of the refinement."""
    weights, settings = bundled(quality), Settings(device="cpu")
    bits = [ideal_bits(one, weights.tables[weights.row(quality)]) for one in symbols]
    components = planes.shape[1]
    back = engine_for(weights, settings).synthesise(symbols, quality, components, settings).result()
    squares = np.square(back.clip(0, 1) - planes) * (1 if counts is None else counts)
    return np.array(bits), trade_off(weights.info, quality) * 255**2 / components * squares.sum((1, 2, 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("quality", "components"), [(1, 3), (4, 1), (7, 3)])
def test_the_lagrangian_falls(planes, quality, components, device):
    crops = np.concatenate([planes[:, :components, n : n + 96, n : n + 80] for n in (0, 96)])
    before, after = refined(crops, quality, settings=Settings(device=device, effort=4))
    assert after.dtype == np.int16
    assert after.shape == before.shape
    costs = [sum(bits_and_error(crops, symbols, quality)) for symbols in (before, after)]
    assert (costs[1] < 0.985 * costs[0]).all()
    assert (before != after).mean() < 0.2
    np.testing.assert_array_equal(np.abs(before - after) <= 4, True)  # one by each step at most


def test_more_steps_are_better(planes):
    crop = planes[:, :, 96:176, 96:176]
    costs = [
        sum(bits_and_error(crop, refined(crop, 3, settings=Settings(device="cpu", effort=n))[1], 3)) for n in (1, 4, 16)
    ]
    assert costs[0] > costs[1] > costs[2]


def test_samples_that_do_not_count_cost_nothing(planes):
    crop = np.ascontiguousarray(planes[:, :, :96, :96])
    counts = np.ones(crop.shape, bool)
    counts[..., 32:] = False
    _, usual = refined(crop, 4)
    _, after = refined(crop, 4, counts=counts)
    costs = [sum(bits_and_error(crop, symbols, 4, counts)) for symbols in (usual, after)]
    assert costs[1] < 0.995 * costs[0]
    changed = crop.copy()
    changed[~counts] = 0.5  # what they hold makes no difference
    symbols = engine_for(bundled(4), Settings(device="cpu")).analyse(crop, 4, Settings(device="cpu")).result()
    np.testing.assert_array_equal(refined(changed, 4, counts=counts, symbols=symbols)[1], after)


@pytest.mark.slow
def test_pieces_are_as_good_as_the_whole(strip):
    """Pieces see enough around them, and take each step together: no seam between them."""
    symbols, whole = refined(strip, 4)
    _, pieces = refined(strip, 4, settings=Settings(device="cpu", effort=4, tile=128))
    costs = [sum(bits_and_error(strip, one, 4))[0] for one in (symbols, whole, pieces)]
    assert costs[2] < costs[1] + 0.1 * (costs[0] - costs[1])
    settings = Settings(device="cpu")
    engine = engine_for(bundled(4), settings)
    images = [engine.synthesise(one, 4, 3, settings).result() for one in (symbols, pieces)]
    errors = [np.square(image - strip).mean((0, 1, 2)) for image in images]
    seams = np.isin((np.arange(512) + 16) % 128, range(32)) & (np.arange(512) > 32) & (np.arange(512) < 480)
    assert errors[1][seams].mean() / errors[0][seams].mean() < 1.05 * errors[1].mean() / errors[0].mean()


def test_large_planes_run_in_pieces(strip):
    settings = Settings(device="cpu", effort=3, tile=96)
    symbols, after = refined(strip, 1, settings=settings)
    assert sum(bits_and_error(strip, after, 1)) < 0.99 * sum(bits_and_error(strip, symbols, 1))


def test_the_bits_are_those_of_the_coder(planes):
    for quality in (2, 6):
        weights, settings = bundled(quality), Settings(device="cpu")
        tables = weights.tables[weights.row(quality)]
        symbols = engine_for(weights, settings).analyse(planes, quality, settings).result()
        now, up, _ = CodeLengths(tables, "cpu").around(torch.from_numpy(symbols).float())
        assert float(now.sum()) == pytest.approx(ideal_bits(symbols[0], tables), rel=1e-3)
        channel = next(n for n in range(tables.channels - 1, 0, -1) if not tables.contexts.predicted[n])
        changed = symbols.copy()
        changed[0, channel, 5, 5] += 1  # no later channel has it as a source, or few
        last = float((up - now)[0, channel, 5, 5])
        assert last == pytest.approx(ideal_bits(changed[0], tables) - ideal_bits(symbols[0], tables), abs=0.5)


def test_nothing_that_is_worse_is_kept(planes, monkeypatch):
    """Each plane keeps its own symbols if its moves were no good."""
    monkeypatch.setattr(module, "_moves", lambda up, down, share: torch.ones(up.shape, dtype=torch.int16))
    before, after = refined(planes[:, :, :64, :64], 4)
    np.testing.assert_array_equal(before, after)


def test_results_do_not_depend_on_the_batch(planes):
    crops = np.concatenate([planes[:, :, n : n + 64, :64] for n in (0, 64)])
    _, together = refined(crops, 4)
    alone = np.concatenate([refined(crop[None], 4)[1] for crop in crops])
    assert (together != alone).mean() < 1e-3  # transposed convolutions round differently in other batches


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_there_is_nothing_to_do_without_effort_or_a_known_error(planes, metric):
    settings = Settings(device="cpu", effort=0 if metric == "mse" else 5)
    engine = engine_for(bundled(4, metric), settings)
    crop = planes[:, :, :64, :64]
    symbols, after = refined(crop, 4, settings=settings, engine=engine)
    assert after is symbols


def test_the_lambda_is_that_of_the_training():
    info = replace(bundled(2).info, provenance={"recipe": {"lambdas": [0.1, 0.2, 0.3, 0.4, 0.5]}})
    assert trade_off(info, 2) == 0.2
    usual = trade_off(replace(info, provenance={}), 2)
    assert usual == 0.0035
    for wrong in ([0.1], "many", [None] * 5, [-1.0] * 5, [float("nan")] * 5, None):
        assert trade_off(replace(info, provenance={"recipe": {"lambdas": wrong}}), 2) == usual
    assert trade_off(replace(info, provenance={"recipe": "none"}), 2) == usual
    assert trade_off(bundled(2, "ms-ssim").info, 2) is None


def test_it_ends_soon_after_it_is_cancelled(planes):
    settings = Settings(device="cpu", effort=1000)
    engine = Engine(bundled(1), torch.device("cpu"))
    crop = np.ascontiguousarray(planes[:, :, :64, :64])
    symbols = engine.analyse(crop, 1, settings).result()
    future = refine(engine, crop, np.ones(crop.shape, bool), symbols, 1, settings)
    while engine.batcher.statistics.batches < 4:
        time.sleep(0.01)
    assert future.cancel()
    engine.batcher.close()  # waits for the batch that runs
    assert engine.batcher.statistics.batches < 1000
    assert engine.batcher.statistics.pending == 0


def test_it_fails_as_a_whole(strip):
    settings = Settings(device="cpu", effort=3, tile=64)
    engine = Engine(bundled(1), torch.device("cpu"))
    symbols = engine.analyse(strip, 1, settings).result()
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 12:  # in the second step
            raise MemoryError("too much")

    engine._synthesis.register_forward_pre_hook(fail)
    future = refine(engine, strip, np.ones(strip.shape, bool), symbols, 1, settings)
    with pytest.raises(MemoryError, match="too much"):
        future.result(250)
    engine.batcher.close()
    with pytest.raises(CAEError, match="closed"):
        refine(engine, strip, np.ones(strip.shape, bool), symbols, 1, settings)


def test_memory_is_bounded(strip):
    """A pass has no more planes than fit one with gradients, or one piece with its surroundings."""
    settings = Settings(device="cpu", effort=1, tile=64)
    engine = Engine(bundled(1), torch.device("cpu"))
    many = np.concatenate([strip] * 3)
    symbols = engine.analyse(many, 1, settings).result()
    shapes = []
    engine._synthesis.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    refine(engine, many, np.ones(many.shape, bool), symbols, 1, settings).result(250)
    assert max(count * height * width for count, _, height, width in shapes) * 256 <= PASS_PIXELS["cpu"] // 4
    assert max(width for *_, width in shapes) == 4 + 2 * 12
    assert len(shapes) >= 2 * 8


def in_child(crop, symbols):
    _, again = refined(crop, 1, symbols=symbols)
    os._exit(0 if (again != symbols).any() else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_refines_too(planes):
    crop = planes[:, :, :64, :64]
    symbols, _ = refined(crop, 1)
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(crop, symbols))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork with threads
        child.start()
    child.join(120)
    assert child.exitcode == 0
