"""The engine: devices, tiles, batches."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from weights_files import bundled

from zarr_cae.config import Settings
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.networks.device import PASS_PIXELS, choose_device
from zarr_cae.networks.engine import Engine, engine_for
from zarr_cae.networks.pieces import HALO, LEAST_COLUMNS
from zarr_cae.pixels.convert import to_planes
from zarr_cae.pixels.layout import Layout
from zarr_cae.weights.file import Weights

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]
RARE = {"cpu": 1e-4, "cuda": 5e-3}
"""Share of symbols that may round to the other side in other sizes: a GPU may sum convolutions in another order."""


@pytest.fixture(scope="module")
def planes(photograph):
    return to_planes(np.array(photograph[:400, :336]), Layout((400, 336, 3), 2), (0, 255))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quality", [4, 8])
def test_there_and_back(planes, device, quality):
    settings = Settings(device=device)
    engine = engine_for(bundled(quality), settings)
    symbols = engine.analyse(planes, quality, settings).result()
    assert symbols.dtype == np.int16
    assert symbols.shape == (1, engine.weights.latent_channels, 25, 21)
    back = engine.synthesise(symbols, quality, 3, settings).result()
    assert back.shape == planes.shape
    assert -10 * np.log10(np.square(back - planes).mean()) > 28


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("quality", "columns", "tile"), [(1, 336, 160), (6, 512, 128), (8, 336, 160), (6, 1024, 256)])
def test_tiles_equal_the_whole(photograph, device, quality, columns, tile):
    """The default precision may be bfloat16 in parts. Planes are narrower and wider than the least width of a tile."""
    pixels = np.hstack([photograph, photograph[:, ::-1]])[:400, :columns]
    planes = to_planes(pixels, Layout(pixels.shape, 2), (0, 255))
    whole, tiled = Settings(device=device, tile=2048), Settings(device=device, tile=tile)
    engine = engine_for(bundled(quality), whole)
    expected, symbols = (engine.analyse(planes, quality, settings).result() for settings in (whole, tiled))
    assert (symbols != expected).mean() < RARE[device]
    if device == "cuda":  # CUDA may sum convolutions of other sizes in another order
        assert np.abs(symbols - expected).max() <= 1
        symbols = expected
    first = engine.synthesise(expected, quality, 3, whole).result()
    second = engine.synthesise(symbols, quality, 3, tiled).result()
    levels = [np.rint(image.clip(0, 1) * 255) for image in (first, second)]
    assert np.abs(levels[0] - levels[1]).max() <= 1


def test_compiled_networks_give_the_same(planes, monkeypatch):
    """`torch.compile` has its simplest backend here: the default one takes a minute and a C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, compiled = (Settings(device="cpu", precision="float32", compile=on) for on in (False, True))
    engine, traced = (engine_for(bundled(2), settings) for settings in (plain, compiled))
    assert traced is not engine
    assert all(isinstance(network, torch._dynamo.OptimizedModule) for network in traced.networks)
    for crop in (planes[:, :, :64, :48], planes[:, :, :32, :32].repeat(3, 0)):
        symbols = engine.analyse(crop, 2, plain).result()
        assert (traced.analyse(crop, 2, compiled).result() != symbols).mean() < 1e-3
        back = [
            one.synthesise(symbols, 2, 3, settings).result() for one, settings in ((engine, plain), (traced, compiled))
        ]
        assert np.abs(back[0] - back[1]).max() < 1 / 255


def test_memory_of_a_forward_pass_is_bounded(planes):
    """A pass has no more pixels than a batch, or a tile with its surroundings, for planes of any size and number."""
    settings = Settings(device="cpu", tile=128)
    engine = Engine(bundled(1), torch.device("cpu"))
    sizes = []
    for network, unit in ((engine._analysis, 1), (engine._synthesis, 16)):
        network.register_forward_pre_hook(
            lambda _, given, unit=unit: sizes.append([len(given[0]), *(side * unit for side in given[0].shape[2:])])
        )
    wide = planes.repeat(3, 3)
    engine.synthesise(engine.analyse(wide, 1, settings).result(), 1, 3, settings).result()
    assert sum(count for count, _, _ in sizes) == 2 * 4 * 2
    assert max(count * rows * columns for count, rows, columns in sizes) <= PASS_PIXELS["cpu"]
    _, rows, columns = np.max(sizes, 0)
    assert 128 < rows <= 128 + 2 * 16 * HALO
    assert columns == 16 * LEAST_COLUMNS
    counts = []
    engine._analysis.register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
    many = np.zeros((300, 1, 64, 64), np.float32)
    assert len(engine.analyse(many, 1, Settings(device="cpu")).result()) == 300
    assert sum(counts) == 300
    assert max(counts) <= PASS_PIXELS["cpu"] // 64**2


def spied(engine):
    """Return a list that records (thread, torch's number of threads) of each analysis."""
    seen = []
    engine._analysis.register_forward_pre_hook(lambda *_: seen.append((threading.get_ident(), torch.get_num_threads())))
    return seen


@contextmanager
def together(engine, planes, settings):
    """Let no worker take a request of this block before all are queued: another request fills the lanes."""
    entered, queued = threading.Event(), threading.Event()

    def hold(*_):
        entered.set()
        assert queued.wait(60)

    hook = engine._analysis.register_forward_pre_hook(hold)
    first = engine.analyse(planes[:, :, :16, :16], 1, settings)
    assert entered.wait(60)
    hook.remove()
    try:
        yield
    finally:
        queued.set()
    first.result(60)


def test_a_lone_request_has_all_threads(planes):
    """Torch's own number of threads does not change."""
    before = torch.get_num_threads()
    engine, settings = Engine(bundled(1), torch.device("cpu")), Settings(device="cpu", threads=3)
    seen = spied(engine)
    engine.analyse(planes[:, :, :64, :64], 1, settings).result()
    engine.analyse(planes, 1, settings).result()
    engine.analyse(planes, 1, replace(settings, threads=2)).result()
    assert [threads for _, threads in seen] == [3, 3, 2]
    with ThreadPoolExecutor(1) as another:
        assert another.submit(torch.get_num_threads).result() == before
    assert torch.get_num_threads() == before


def test_requests_run_on_a_thread_each(planes):
    """Requests do not wait for each other, and together use no more threads than the settings allow."""
    engine, settings = Engine(bundled(1), torch.device("cpu")), Settings(device="cpu", threads=3)
    seen, both = [], threading.Barrier(2, timeout=60)

    def meet(*_):
        seen.append(torch.get_num_threads())
        both.wait()

    crops = [planes[:, :, :n, :64] for n in (64, 80)]
    with together(engine, planes, settings):
        engine._analysis.register_forward_pre_hook(meet)
        futures = [engine.analyse(crop, 1, settings) for crop in crops]
    symbols = [future.result(60) for future in futures]
    assert sorted(seen) in ([1, 1], [1, 2])
    engine = Engine(bundled(1), torch.device("cpu"))
    for crop, one in zip(crops, symbols, strict=True):
        np.testing.assert_array_equal(engine.analyse(crop, 1, settings).result(), one)


def test_pieces_of_a_large_request_are_spread_over_the_threads(planes):
    engine, settings = Engine(bundled(1), torch.device("cpu")), Settings(device="cpu", threads=2, tile=128)
    with together(engine, planes, settings):
        seen = spied(engine)
        future = engine.analyse(planes, 1, settings)
    assert future.result(60).shape == (1, engine.weights.latent_channels, 25, 21)
    assert len(seen) == 4
    assert len({ident for ident, _ in seen}) == 2
    assert max(threads for _, threads in seen[:-1]) == 1


def test_a_large_request_is_withdrawn_or_fails_as_a_whole(planes):
    engine, settings = Engine(bundled(1), torch.device("cpu")), Settings(device="cpu", tile=128)
    with together(engine, planes, settings):
        seen = spied(engine)
        future = engine.analyse(planes, 1, settings)
        assert future.cancel()
    wait_for = engine.analyse(planes[:, :, :64, :64], 1, settings).result()
    assert len(wait_for) == len(seen) == 1
    assert engine.batcher.statistics.pending == 0

    def fail(_, given):
        if given[0].shape[-1] > 200:
            raise MemoryError("too much")

    engine._analysis.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="too much"):
        engine.analyse(planes, 1, settings).result()
    assert len(engine.analyse(planes[:, :, :64, :64], 1, settings).result()) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_symbols_do_not_depend_on_the_batch(planes, device):
    settings = Settings(device=device)
    engine = engine_for(bundled(4), settings)
    crops = np.concatenate([planes[:, :, n : n + 64, n : n + 64] for n in range(0, 160, 16)])
    together = engine.analyse(crops, 4, settings).result()
    alone = np.concatenate([engine.analyse(crop[None], 4, settings).result() for crop in crops])
    if device == "cpu":
        np.testing.assert_array_equal(alone, together)
    assert np.abs(alone - together).max() <= 1
    assert (alone != together).mean() < RARE[device]


@pytest.mark.parametrize("device", DEVICES)
def test_pixels_hardly_depend_on_the_batch(planes, device):
    """Transposed convolutions round differently in other batches, by far less than a grey level.

    On a GPU, in bfloat16 and TF32, the difference is less than one grey level.
    """
    settings = Settings(device=device)
    engine = engine_for(bundled(4), settings)
    symbols = engine.analyse(
        np.concatenate([planes[:, :, n : n + 64, :64] for n in range(0, 80, 16)]), 4, settings
    ).result()
    together = engine.synthesise(symbols, 4, 3, settings).result()
    alone = np.concatenate([engine.synthesise(one[None], 4, 3, settings).result() for one in symbols])
    assert np.abs(alone - together).max() < (0.1 if device == "cpu" else 1) / 255


def test_grey_planes_have_one_component(planes):
    settings = Settings()
    engine = engine_for(bundled(6), settings)
    grey = planes[:, :1]
    symbols = engine.analyse(grey, 6, settings).result()
    back = engine.synthesise(symbols, 6, 1, settings).result()
    assert back.shape == grey.shape
    assert -10 * np.log10(np.square(back - grey).mean()) > 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_changes_no_network(planes, dtype):
    settings = Settings(device="cpu", precision="float32")
    small = planes[:, :, :64, :64]
    expected = Engine(bundled(4), choose_device("cpu")).analyse(small, 4, settings).result()
    torch.set_default_dtype(dtype)
    try:
        engine = Engine(bundled(4), choose_device("cpu"))
        symbols = engine.analyse(small, 4, settings).result()
        back = engine.synthesise(symbols, 4, 3, settings).result()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for network in engine.networks for parameter in network.parameters()} == {torch.float32}
    assert np.array_equal(symbols, expected)
    assert back.dtype == np.float32


def test_engines_are_made_once():
    first = engine_for(bundled(2), Settings(device="cpu"))
    assert engine_for(bundled(3), Settings(device="cpu", threads=1)) is first


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "meta", ""])
def test_devices_that_do_not_exist_are_refused(name):
    with pytest.raises(CAEConfigurationError, match=r"cae\.device"):
        choose_device(name)


@pytest.fixture
def two_gpus(monkeypatch):
    """Make torch report two GPUs, of which the second is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False, raising=False)
    return monkeypatch


def test_gpus_have_numbers(two_gpus):
    assert [str(choose_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1", "cuda:1", "cuda:0", "cpu",
    ]  # fmt: skip
    two_gpus.delattr(torch.cuda, "_is_in_bad_fork")  # not public, so a torch without it must work
    assert str(choose_device("auto")) == "cuda:1"
    two_gpus.setattr("zarr_cae.networks.engine._engines", {})
    two_gpus.setattr("zarr_cae.networks.engine.Engine", lambda *_, **__: object())
    first, second, other = (
        engine_for(bundled(1), Settings(device=name, precision="float32")) for name in ("cuda", "cuda:1", "cuda:0")
    )
    assert first is second is not other


def test_a_child_of_a_process_that_used_a_gpu_has_none(two_gpus):
    two_gpus.setattr(torch.cuda, "_is_in_bad_fork", lambda: True, raising=False)
    two_gpus.delattr(torch.cuda, "current_device")  # would start CUDA, which torch refuses here
    assert [str(choose_device(name)) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    for name in ("cuda", "cuda:0"):
        with pytest.raises(CAEConfigurationError, match=rf"cae\.device is '{name}'.*forked.*'spawn'"):
            choose_device(name)
    with pytest.raises(CAEConfigurationError, match="sees 2 CUDA devices"):
        choose_device("cuda:9")


@pytest.mark.parametrize("architecture", [[1], {"depth": 3}, {"latent": -1}, {"latent": "many"}], ids=str)
def test_architectures_that_do_not_exist_are_refused(architecture):
    loaded = bundled(1)
    wrong = {**loaded.info.architecture, **architecture} if isinstance(architecture, dict) else architecture
    broken = Weights(replace(loaded.info, architecture=wrong), loaded.tensors, loaded.tables)
    with pytest.raises(CAEConfigurationError, match="architecture"):
        Engine(broken, torch.device("cpu"))


def test_networks_that_do_not_fit_their_architecture_are_refused():
    loaded = bundled(1)
    tensors = {name: value for name, value in loaded.tensors.items() if name != "analysis.conv1.bias"}
    broken = Weights(loaded.info, tensors, loaded.tables)
    with pytest.raises(CAEConfigurationError, match=r"analysis|conv1\.bias"):
        Engine(broken, torch.device("cpu"))
