"""Training: data, the KLT start, the density, a few steps, checkpoints and export."""

from __future__ import annotations

import copy
import io
import itertools
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zarr_cae import CAEConfigurationError, CAEError
from zarr_cae.cli.demo import photograph
from zarr_cae.coder import rans
from zarr_cae.coder.contexts import to_differences
from zarr_cae.coder.tables import Tables, ideal_bits
from zarr_cae.training.data import Crops
from zarr_cae.training.density import Density
from zarr_cae.training.export import export, restore
from zarr_cae.training.loss import border_bias, mean_squared_error, multiscale_dissimilarity, rate_distortion
from zarr_cae.training.model import GainedAutoencoder, Pass, default_lambdas
from zarr_cae.training.patterns import draw_pattern
from zarr_cae.training.run import train_network
from zarr_cae.training.schedule import FIT_PHASES, PHASES, learning_rate, phase_at
from zarr_cae.training.soap import Soap
from zarr_cae.training.tables import _learned_sources, fit_tables
from zarr_cae.training.trainer import Progress, Recipe, Trainer, read_checkpoint
from zarr_cae.weights import registry


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return photograph()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photo: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("images")
    for index in range(6):
        crop = photo[60 * index : 60 * index + 128, 40 * index : 40 * index + 144]
        Image.fromarray(crop).save(path / f"{index}.png")
    return path


@pytest.fixture(scope="module")
def crops(folder: Path) -> Crops:
    return Crops([folder], crop=64, seed=0)


RECIPE = Recipe("low", steps=8, crop=64, crops_per_quality=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def started(crops: Crops) -> Trainer:
    """A trainer at step 0; not to be trained."""
    return Trainer(RECIPE, crops)


@pytest.fixture
def trainer(started: Trainer, folder: Path) -> Trainer:
    """Another, with smaller crops to be quicker."""
    trainer = copy.deepcopy(started)
    trainer.crops = Crops([folder], crop=32, seed=0)
    return trainer


def test_bfloat16_gives_nearly_the_same_loss(folder: Path, started: Trainer) -> None:
    """What is multiplied in bfloat16 changes the loss a little; parameters and gradients stay in float32."""
    pixels = Crops([folder], crop=64, seed=5).batch(5)
    losses = []
    for low in (False, True):
        model = copy.deepcopy(started.model)
        model.low_precision = low
        torch.manual_seed(1)
        coded = model(pixels, noisy=True, straight_through=False, tune_decoder=False)
        loss = rate_distortion(coded, pixels[:, None], "mse", default_lambdas("mse", "low"))
        loss.backward()
        losses.append(loss.item())
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_the_decoder_is_tuned_in_float32(trainer: Trainer) -> None:
    trainer.recipe = replace(RECIPE, bfloat16=True, steps=2)
    lowered = []
    for trainer.step in (0, 1, 2):
        trainer.train_step()
        lowered.append(trainer.model.low_precision)
    assert lowered == [True, True, False]


# data


def test_folder_and_tar_give_the_same_crops(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for file in folder.iterdir():
            archive.add(file, file.name)
        archive.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    one, other = (Crops([path], crop=48, seed=3) for path in (folder, tmp_path / "images.tar"))
    first = one.batch(5)
    assert torch.equal(first, other.batch(5))
    assert first.shape == (5, 3, 48, 48)
    assert first.dtype == torch.float32
    assert 0 <= first.min() < first.max() <= 1
    assert not torch.equal(first, one.batch(5))  # the next ones are others
    assert torch.equal(one.held_out(4, 96), other.held_out(4, 96))


def test_held_out_images_are_never_trained_on(tmp_path: Path) -> None:
    for value in range(40):
        Image.fromarray(np.full((32, 32, 3), 6 * value, np.uint8)).save(tmp_path / f"{value:02}.png")
    crops = Crops([tmp_path], crop=32, seed=0, grey=0)
    seen = {round(float(crop.mean()) * 255) for crop in crops.batch(500)}
    kept = {round(float(crop.mean()) * 255) for crop in crops.held_out(9, 32)}
    assert len(kept) == 2
    assert len(crops) == 38
    assert not seen & kept


def test_a_tenth_of_the_crops_is_grey(crops: Crops) -> None:
    batch = crops.batch(400)
    grey = (batch[:, 0] == batch[:, 1]).flatten(1).all(1) & (batch[:, 1] == batch[:, 2]).flatten(1).all(1)
    assert 0.04 < float(grey.float().mean()) < 0.18


def test_patterns_keep_shape_and_range() -> None:
    random = np.random.default_rng(0)
    grey, colour = (random.integers(0, 256, (32, 48, depth)) for depth in (1, 3))
    kinds = set()
    for _ in range(60):
        for crop in (grey, colour):
            found = draw_pattern(crop, random)
            assert found.shape == (32, 48, 3)
            assert found.dtype == np.uint8
            assert not np.array_equal(found, np.broadcast_to(crop, found.shape))
            kinds.add(len(np.unique(found)) > 2)
    assert kinds == {True, False}  # two levels, and many


def test_some_crops_become_patterns(folder: Path) -> None:
    plain, mixed = (Crops([folder], crop=32, seed=0, patterns=share).batch(200) for share in (0, 0.2))
    two_levels = [sum(len(one.unique()) <= 6 for one in batch) for batch in (plain, mixed)]
    assert two_levels[0] == 0
    assert 5 < two_levels[1] < 60


@pytest.mark.parametrize(
    ("shape", "windows"),
    [
        ((100, 40), [(0, 0, 96, 32)]), ((64, 79), [(0, 0, 64, 64)]), ((64, 80), [(0, 0, 64, 64), (0, 16, 64, 64)]),
        ((130, 64), [(0, 0, 64, 64), (64, 0, 64, 64)]), ((32, 900), [(0, left, 32, 64) for left in (0, 64, 96)]),
    ],
)  # fmt: skip
def test_tables_are_fitted_to_windows_that_cover_the_images(
    tmp_path: Path, shape: tuple[int, int], windows: list[tuple[int, int, int, int]]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for name in ("0.png", "1.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    edge, largest = (128, 160) if shape == (100, 40) else (64, 160)
    found = list(Crops([tmp_path], crop=32, seed=0).tiles(edge, largest))
    assert len(found) == len(windows)
    for tile, (top, left, rows, columns) in zip(found, windows, strict=True):
        expected = pixels[top : top + rows, left : left + columns].transpose(2, 0, 1)[None]
        np.testing.assert_array_equal(tile.mul(255).round().numpy(), expected)


def test_data_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CAEError, match="does not exist"):
        Crops([tmp_path / "nowhere"], crop=32, seed=0)
    with pytest.raises(CAEError, match="at least 256 px"):
        Crops([folder], crop=256, seed=0)
    with pytest.raises(CAEError, match="multiple of 16"):
        Recipe("low", crop=50)
    with pytest.raises(CAEError, match="MS-SSIM"):
        Recipe("low", metric="ms-ssim", crop=80)


@pytest.mark.parametrize("damage", ["empty", "junk", "cut", "link", "gzip"])
def test_damaged_tar_files_are_named(folder: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w:gz" if damage == "gzip" else "w") as archive:
        for file in folder.iterdir():
            archive.add(file, file.name)
        if damage == "link":
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.LNKTYPE, "nowhere.png"
            archive.addfile(link)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "junk": b"x" * 2000, "link": content}.get(damage, content[: len(content) // 2]))
    with pytest.raises(CAEConfigurationError, match=r"training data .*images\.tar cannot be read as a tar file"):
        Crops([path], crop=32, seed=0)


@pytest.mark.parametrize("inside", [False, True], ids=["file", "tar"])
@pytest.mark.parametrize("error", [OSError, ValueError, SyntaxError, EOFError, MemoryError])
def test_damaged_images_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], inside: bool
) -> None:
    def fail(*_: object) -> None:
        raise error("of no sense")

    path = folder / "0.png"
    if inside:
        path = tmp_path / "images.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(folder / "0.png", "0.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(CAEConfigurationError, match=r"training image .*0\.png cannot be read.*of no sense"):
        Crops([path], crop=32, seed=0)


def test_deep_images_are_refused_by_their_mode(photo: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(photo[:64, :64, 0].astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(CAEConfigurationError, match="mode I;16; expected 8-bit"):
        Crops([tmp_path], crop=32, seed=0)


def test_images_over_the_limit_of_pillow_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert len(Crops([folder], crop=64, seed=0)) == 5
    assert Image.MAX_IMAGE_PIXELS == 100


# The KLT start


def test_klt_start_is_a_good_transform(started: Trainer, photo: np.ndarray) -> None:
    pixels = torch.from_numpy(photo[64:320, 64:320].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        model = started.model
        whole = model.synthesis(model.analysis(pixels)).clamp(0, 1)
        assert -10 * math.log10(torch.mean((whole - pixels) ** 2)) > 30
        coded = model(pixels.expand(5, -1, -1, -1), noisy=False, straight_through=True, tune_decoder=True)
        psnr = -10 * mean_squared_error(coded.pixels, pixels[None]).log10().flatten()
    assert (psnr > 18).all()
    assert psnr.tolist() == sorted(psnr.tolist())  # finer steps at higher qualities, from the start
    rates = coded.bits_per_pixel.flatten().tolist()
    assert rates == sorted(rates)


# The density


def test_density_sums_to_one_over_the_values_of_one_symbol() -> None:
    torch.manual_seed(1)
    density = Density(2, 3)
    sample = 3 * torch.randn(2, 4, 3, 8, 8) + torch.tensor([-2.0, 0.0, 5.0])[:, None, None]
    density.start_from(sample)
    density.predicted[1] = 1
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        symbols = sample[:, :1].round()
        assert torch.allclose(density.bits(symbols, symbols)[:, 0], -density(symbols, symbols).log2().sum((1, 2, 3, 4)))
        for channel in range(3):
            total = torch.zeros(2)
            for value in range(-100, 101):
                changed = symbols.clone()
                changed[:, 0, channel, 3, 5] = value
                likelihood = density(changed, changed)
                total += likelihood[:, 0, channel, 3, 5]
            assert torch.allclose(total, torch.ones(2), atol=1e-3)
            before = density(symbols, symbols)[:, 0, :channel]
            assert torch.equal(likelihood[:, 0, :channel], before)  # what is decoded earlier knows nothing of it


def test_density_widens_where_earlier_channels_are_busy_and_predicts_slow_ones() -> None:
    torch.manual_seed(1)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    slow = 20 * torch.sin(y / 9) + 15 * torch.cos(x / 7)
    busy = torch.where(x > 16, 5.0, 0.1) * torch.randn(4, 2, 32, 32)
    latents = torch.cat([slow.expand(4, 1, 32, 32), busy], 1)[None]
    density = Density(1, 3)
    density.start_from(latents)
    assert density.predicted.tolist() == [1, 0, 0]
    rounded = latents.round()
    optimiser = torch.optim.Adam(density.parameters(), 0.02)
    start = density.bits(rounded, rounded).sum()
    for _ in range(100):
        optimiser.zero_grad()
        bits = density.bits(rounded, rounded).sum()
        bits.backward()
        optimiser.step()
    alone = Density(1, 3)
    alone.start_from(latents)
    alone.response.requires_grad_(requires_grad=False).zero_()
    optimiser = torch.optim.Adam([p for p in alone.parameters() if p.requires_grad], 0.02)
    for _ in range(100):
        optimiser.zero_grad()
        alone.bits(rounded, rounded).sum().backward()
        optimiser.step()
    assert bits < start
    assert bits < 0.97 * alone.bits(rounded, rounded).sum()


def test_the_density_predicts_as_the_coder_does() -> None:
    symbols = torch.randint(-5, 6, (1, 1, 3, 7, 9), generator=torch.Generator().manual_seed(0)).float()
    density = Density(1, 3)
    density.predicted[:2] = 1
    differences = to_differences(symbols[0, 0].numpy().astype(np.int16), np.array([True, True, False]))
    np.testing.assert_array_equal(density._differences(symbols, symbols)[0, 0].numpy(), differences)


# The fit


def test_sources_are_those_that_move_the_learned_score_most() -> None:
    surroundings = np.random.default_rng(0).integers(0, 100, (24, 500)).astype(np.uint8)
    surroundings[3] = 7  # moves no score
    mix = np.zeros((24, 24), np.float32)
    mix[21, [1, 4, 5]] = 2, -3, 1
    mix[21, 22] = 7  # a later channel, of which the decoder knows nothing
    mix[22, :20] = np.where(np.arange(20) < 4, 0.1, 2)
    found = [dict(zip(*map(np.ndarray.tolist, one), strict=True)) for one in _learned_sources(mix, surroundings)]
    assert found[21] == {1: 182, 5: 91, -1: 0}
    assert found[22] == dict.fromkeys(range(4, 20), 273 // 16)
    assert all(one == {-1: 0} for one in (*found[:21], found[23]))


def test_a_channel_takes_the_sources_that_make_it_shorter() -> None:
    """Channel 2 is busy where channel 0 is: a regression sees it, learned weights may or may not."""
    rng = np.random.default_rng(0)
    busy = np.kron(rng.choice([0.1, 5.0], (40, 4, 4)), np.ones((8, 8)))
    symbols = rng.laplace(size=(40, 3, 32, 32))
    symbols[:, [0, 2]] *= busy[:, None]
    symbols = np.rint(symbols).astype(np.int16)
    blind, learned = np.zeros((3, 3), np.float32), np.zeros((3, 3), np.float32)
    blind[2, 1] = learned[2, 0] = 1
    bits = []
    for mix in (blind, learned):
        fitted = fit_tables(symbols, np.zeros(3, bool), mix)
        weight = dict(zip(fitted.contexts.source[2].tolist(), fitted.contexts.weight[2].tolist(), strict=True))
        assert weight[0] > 2 * weight.get(1, 0)
        tables = Tables(fitted.minimum, fitted.length, fitted.frequency, fitted.contexts)
        bits.append(ideal_bits(symbols[0], tables))
    assert bits[0] == pytest.approx(bits[1], rel=0.02)


def test_fitted_contexts_beat_tables_without() -> None:
    rng = np.random.default_rng(0)
    busy = np.kron(rng.choice([0.2, 4.0], (60, 4, 4), p=[0.7, 0.3]), np.ones((8, 8)))
    symbols = np.rint(rng.laplace(size=(60, 12, 32, 32)) * busy[:, None]).astype(np.int16)
    symbols[:, 0] = np.cumsum(rng.integers(-1, 2, (60, 32, 32)), axis=2)
    predicted = np.arange(12) == 0
    mix = np.tril(np.ones((12, 12), np.float32), -1)
    fitted, plain = fit_tables(symbols[:40], predicted, mix), fit_tables(symbols[:40], np.zeros(12, bool), mix)
    tables = Tables(fitted.minimum, fitted.length, fitted.frequency, fitted.contexts)
    length = sum(8 * len(rans.encode(tile, tables, 3)) for tile in symbols[40:])
    entropy = 0.0
    for channel in symbols.transpose(1, 0, 2, 3).reshape(12, -1):
        _, counts = np.unique(channel, return_counts=True)
        entropy -= (counts * np.log2(counts / counts.sum())).sum() / 3
    assert length < 0.85 * entropy
    with_prediction = ideal_bits(symbols[50], tables)
    without = ideal_bits(symbols[50], Tables(plain.minimum, plain.length, plain.frequency, plain.contexts))
    assert with_prediction < without


def test_channels_that_are_always_zero_can_be_fitted() -> None:
    tiles = np.zeros((3, 4, 8, 8), np.int16)
    tiles[:, 2, 0, 0] = 1
    fitted = fit_tables(tiles, np.zeros(4, bool), np.ones((4, 4), np.float32))
    tables = Tables(fitted.minimum, fitted.length, fitted.frequency, fitted.contexts)
    wild = np.full((4, 8, 8), 999, np.int16)
    assert np.array_equal(rans.decode(rans.encode(wild, tables, 3), (8, 8), tables, 3), wild)
    assert len(rans.encode(tiles[0], tables, 3)) < 12


def test_loss_is_rate_plus_weighed_distortion() -> None:
    pixels = torch.zeros(2, 1, 3, 16, 16)
    error = torch.zeros_like(pixels)
    error[..., 4:12, 4:12] = 0.1  # nothing at the borders
    coded = Pass(pixels + error, torch.tensor([[0.5], [1.0]]))
    loss = rate_distortion(coded, pixels, "mse", (0.0035, 0.0067))
    weight = np.array([0.0035, 0.0067]) ** -0.5
    each = np.array([0.0035, 0.0067]) * 255**2 * 0.01 / 4 + [0.5, 1.0]
    assert float(loss) == pytest.approx(np.mean(weight / weight.mean() * each), rel=1e-4)


@pytest.mark.parametrize("way", [lambda x: x, lambda x: x.flip(-2), lambda x: x.mT, lambda x: x.mT.flip(-1)])
def test_bias_along_borders_is_seen_at_each_side(way: Callable[[torch.Tensor], torch.Tensor]) -> None:
    pixels = torch.zeros(1, 2, 3, 32, 32)
    error = torch.zeros_like(pixels)
    error[0, 0, :, :2, :16] = 0.2  # one of the eight runs of 16 along the borders ...
    error[0, 1, :, 0, 0::2], error[0, 1, :, 0, 1::2] = 0.2, -0.2  # ... and none where errors cancel along them
    # 2 x 2 of the 32 samples of the run that the corner shares
    expected = 3 * (0.2**2 + (0.2 * 4 / 32) ** 2) / 3 / 8
    found = border_bias(way(error), pixels)
    assert found[0, 0].item() == pytest.approx(expected, rel=1e-4)
    assert found[0, 1].item() == pytest.approx(0.0, abs=0.2**2 / 16**2)


def mirrored_ms_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """MS-SSIM of (H, W) in [0, 1], each scale mirrored at its borders; written with loops, by the paper."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def blurred(image: np.ndarray) -> np.ndarray:
        padded = np.pad(image, 5, mode="symmetric")
        rows, columns = image.shape
        return np.array(
            [[(padded[y : y + 11, x : x + 11] * window).sum() for x in range(columns)] for y in range(rows)]
        )

    result = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mean1, mean2 = blurred(first), blurred(second)
        variances = blurred(first**2) - mean1**2 + blurred(second**2) - mean2**2
        value = (2 * (blurred(first * second) - mean1 * mean2) + 0.03**2) / (variances + 0.03**2)
        if scale == 4:
            value = value * (2 * mean1 * mean2 + 0.01**2) / (mean1**2 + mean2**2 + 0.01**2)
        result *= value.mean() ** weight
        first, second = (one.reshape(len(one) // 2, 2, -1, 2).mean((1, 3)) for one in (first, second))
    return result


def test_ms_ssim_sees_mirrored_borders(photo: np.ndarray) -> None:
    pixels = photo[100:196, 60:156].astype(np.float64).transpose(2, 0, 1) / 255
    worse = np.clip(pixels + np.random.default_rng(0).normal(0, 0.1, pixels.shape), 0, 1)
    worse[:, :8] += 0.1  # a brighter border
    expected = 1 - np.mean([mirrored_ms_ssim(*pair) for pair in zip(worse, pixels, strict=True)])
    found = multiscale_dissimilarity(*(torch.from_numpy(one).float()[None, None] for one in (worse, pixels)))
    assert found.item() == pytest.approx(expected, rel=1e-3)
    assert multiscale_dissimilarity(*[torch.from_numpy(pixels).float()[None, None]] * 2).item() == pytest.approx(
        0, abs=1e-5
    )


# The optimiser


def test_soap_is_adam_in_the_eigenbasis() -> None:
    torch.manual_seed(0)
    target = torch.randn(16, 12, 3, 3)
    rows, columns = (torch.linalg.qr(torch.randn(n, n))[0] * torch.logspace(-1.5, 0, n) for n in (16, 12))

    def trained(make: Callable[[torch.nn.Parameter], torch.optim.Optimizer]) -> float:
        kernel = torch.nn.Parameter(torch.zeros_like(target))
        optimiser = make(kernel)
        for _ in range(300):
            optimiser.zero_grad()
            loss = torch.einsum("oikl,op,iq->pqkl", kernel - target, rows, columns).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return loss.item()

    rotated = trained(lambda kernel: Soap([{"params": [kernel], "rotate": True}], 0.03))
    plain = trained(lambda kernel: Soap([{"params": [kernel]}], 0.03))
    adam = trained(lambda kernel: torch.optim.Adam([kernel], 0.03, betas=(0.9, 0.99)))
    assert plain == pytest.approx(adam, rel=1e-3)
    assert rotated < 0.1 * adam


# The loop


def test_schedule() -> None:
    assert learning_rate(0, 0) == pytest.approx(1 / 200)
    assert learning_rate(0.01, 5000) > 0.99
    assert learning_rate(PHASES[-1].begin - 1e-6, 5000) == pytest.approx(0.03, abs=1e-3)
    assert learning_rate(PHASES[-1].begin, 5000) == pytest.approx(0.30, abs=1e-3)
    assert learning_rate(1, 5000) == pytest.approx(0.01)
    assert [phase_at(share) for share in (0, 0.59, 0.6, 0.87, 0.88, 1)] == [PHASES[i] for i in (0, 0, 1, 1, 2, 2)]


def test_schedule_of_a_fit() -> None:
    begins = [phase.begin for phase in FIT_PHASES]
    assert [phase_at(begin, FIT_PHASES).trains for begin in begins] == ["densities", "decoder", "all", "decoder"]
    assert learning_rate(begins[2] + 0.1, 0, "fit") == pytest.approx(0.01, rel=0.1)  # the first steps are small
    for begin in begins:  # a phase begins gently, whatever the step
        assert learning_rate(begin, 5000, "fit") <= 0.05 < 0.2 < learning_rate(begin + 0.015, 5000, "fit")
    assert 0.8 < learning_rate(begins[2] + 0.1, 5000, "fit") <= 1
    assert learning_rate(1, 5000, "fit") < 0.02


def test_a_few_steps_reduce_the_loss_of_a_batch(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = trainer.crops.batch(10)
    monkeypatch.setattr(trainer.crops, "batch", lambda size: batch[:size])
    trainer.recipe = Recipe("low", steps=1000, crops_per_quality=2)
    trainer.step = 100  # past half of the warm-up
    reports = [trainer.train_step() for _ in range(20)]
    losses = [report.loss for report in reports]
    assert np.mean(losses[-6:]) < 0.95 * np.mean(losses[:6])
    assert reports[-1].step == 120
    assert len(reports[-1].bits_per_pixel) == len(reports[-1].psnr) == 5


def test_train_network_runs_to_its_end_in_all_phases_and_resumes(folder: Path, tmp_path: Path) -> None:
    reports: list[Progress] = []
    recipe = Recipe("low", steps=4, crop=32, crops_per_quality=1, patterns=0.5)

    def report(progress: Progress) -> None:
        reports.append(progress)
        if len(reports) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_network([folder], tmp_path / "run", recipe, report=report)
    assert read_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 2
    info = train_network([folder], tmp_path / "run", recipe, resume=True, report=report)
    assert [one.step for one in reports if not one.validation] == [1, 2, 3, 4]
    assert [one.step for one in reports if one.validation] == [4]
    assert all(math.isfinite(one.loss) for one in reports if not one.validation)
    assert info.provenance["recipe"]["patterns"] == 0.5
    names = {"checkpoint.pt", "log.csv", "run.json", info.path.name}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names


def test_resume_goes_on_as_if_nothing_had_happened(trainer: Trainer, folder: Path, tmp_path: Path) -> None:
    def step(trainer: Trainer) -> None:
        torch.manual_seed(trainer.step)
        trainer.crops = Crops([folder], crop=32, seed=trainer.step)
        trainer.train_step()

    resumed = copy.deepcopy(trainer)
    step(trainer)
    trainer.save(tmp_path / "c.pt")
    step(trainer)
    resumed.load(tmp_path / "c.pt")
    assert resumed.step == 1
    assert resumed.seconds > 0
    step(resumed)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert torch.equal(trainer.average[name], resumed.average[name]), name
    moments, again = (each.optimiser.state_dict()["state"] for each in (trainer, resumed))
    assert all(torch.equal(moments[key]["mean"], again[key]["mean"]) for key in moments)


def test_starting_from_a_checkpoints_weights_only(trainer: Trainer, tmp_path: Path) -> None:
    other = copy.deepcopy(trainer)
    trainer.train_step()
    trainer.save(tmp_path / "c.pt")
    other.start_from_checkpoint(tmp_path / "c.pt")
    assert other.step == 0
    assert torch.equal(other.model.log_gain, trainer.average["log_gain"])
    for start in (Trainer.load, Trainer.start_from_checkpoint):
        with pytest.raises(CAEError, match="'low' network"):
            start(_of_range("high"), tmp_path / "c.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(CAEError, match="not a checkpoint"):
        other.load(tmp_path / "junk.pt")
    torch.save({"recipe": {}}, tmp_path / "other.pt")
    with pytest.raises(CAEError, match="not a checkpoint"):
        other.load(tmp_path / "other.pt")


def _of_range(rates: str) -> Trainer:
    trainer = object.__new__(Trainer)
    trainer.recipe, trainer.device = Recipe(rates), torch.device("cpu")
    return trainer


def test_gains_and_densities_for_other_lambdas_lie_between_those_that_are_there(started: Trainer) -> None:
    model, pixels = started.averaged(), started.crops.batch(5)
    old = default_lambdas("mse", "low")
    before = copy.deepcopy(model.state_dict())
    model.move(old, old)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=name)
    bits = model(pixels, noisy=False, straight_through=True, tune_decoder=True).bits_per_pixel[:, 0]
    between = tuple((low * high) ** 0.5 for low, high in itertools.pairwise(old))
    model.move(old, (*between, 2 * old[-1]))
    gain = before["log_gain"]
    torch.testing.assert_close(model.log_gain[:-1], (gain[:-1] + gain[1:]) / 2)
    share = math.log(2 * old[-1] / old[-2]) / math.log(old[-1] / old[-2])
    torch.testing.assert_close(model.log_gain[-1], torch.lerp(gain[-2], gain[-1], share))
    # All five see other crops, but the same ones as before: each now needs more bits than the quality it was.
    assert (model(pixels, noisy=False, straight_through=True, tune_decoder=True).bits_per_pixel[:, 0] > bits).all()


def test_starting_for_other_lambdas(trainer: Trainer, started: Trainer, folder: Path, tmp_path: Path) -> None:
    """From a checkpoint and from an export of it alike; another metric's lambdas say nothing about gains."""
    own = (0.002, 0.004, 0.008, 0.016, 0.032)
    trainer.recipe = replace(RECIPE, lambdas=own)
    trainer.save(tmp_path / "c.pt")
    provenance = {"recipe": {"lambdas": list(own)}}
    images = list(trainer.crops.tiles())
    exported = registry.load(registry.store(export(trainer.averaged(), "mse", provenance, images), tmp_path).path)
    wanted = copy.deepcopy(trainer.model)
    wanted.load_state_dict(trainer.average)
    wanted.move(own, RECIPE.lambdas)
    for start in (
        lambda trainer: trainer.start_from_checkpoint(tmp_path / "c.pt"),
        lambda trainer: trainer.start_from(exported),
    ):
        other = copy.deepcopy(started)
        start(other)
        torch.testing.assert_close(other.model.log_gain, wanted.log_gain, atol=1e-4, rtol=0)
        torch.testing.assert_close(other.average["log_gain"], wanted.log_gain, atol=1e-4, rtol=0)
        other.recipe = replace(RECIPE, metric="ms-ssim", crop=96, lambdas=())
        start(other)
        torch.testing.assert_close(other.model.log_gain, trainer.average["log_gain"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("lambdas", [(1.0, 2.0), (1.0, 2.0, 3.0, 5.0, 4.0), (0.0, 1.0, 2.0, 3.0, 4.0), (1, 2, 3, 4, 4)])
def test_senseless_lambdas_are_refused(lambdas: tuple[float, ...]) -> None:
    with pytest.raises(CAEConfigurationError, match="5 ascending positive numbers"):
        Recipe("low", lambdas=lambdas)


@pytest.mark.parametrize("holdout", [0.0, 0.6, -0.1, math.nan])
def test_senseless_shares_to_hold_out_are_refused(holdout: float) -> None:
    with pytest.raises(CAEConfigurationError, match="holdout must be a share"):
        Recipe("low", holdout=holdout)


@pytest.mark.parametrize("unlike", [-0.1, 1.0, math.nan])
def test_senseless_shares_of_generated_pictures_are_refused(unlike: float) -> None:
    with pytest.raises(CAEConfigurationError, match="unlike must be a share"):
        Recipe("low", unlike=unlike)


def test_the_density_alone_is_trained(crops: Crops, started: Trainer) -> None:
    trainer = Trainer(replace(RECIPE, density_only=True, steps=30, rate=1e-2), crops)
    trainer.model.load_state_dict(started.average)
    batch = crops.batch(5)
    trainer.crops = copy.copy(crops)
    trainer.crops.batch = lambda size: batch[:size]  # type: ignore[method-assign]
    reports = [trainer.train_step() for _ in range(30)]
    changed = {
        name for name, value in trainer.model.state_dict().items() if not torch.equal(value, started.average[name])
    }
    assert changed
    assert all(name.startswith("density.") for name in changed)
    assert sum(reports[-1].bits_per_pixel) < 0.98 * sum(reports[0].bits_per_pixel)
    assert reports[-1].psnr == pytest.approx(reports[0].psnr)


# export


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_export_and_restore(started: Trainer, tmp_path: Path) -> None:
    model, images = started.averaged(), list(started.crops.tiles())
    content = export(model, "mse", {"seed": 0, "images": 6}, images, "histology")
    same = export(model, "mse", {"images": 6, "seed": 0}, images, "histology")
    assert content == same  # the same network is the same file
    info = registry.store(content, tmp_path)
    assert info.name == "histology"
    loaded = registry.load(info.path)
    assert info.qualities == (1, 2, 3, 4, 5)
    assert info.provenance == {"seed": 0, "images": 6}
    assert len(loaded.tables) == 5
    assert loaded.tensors["gain"].shape == (5, model.widths.latent)
    assert np.array_equal(loaded.tensors["gain"], model.log_gain.detach().exp().numpy())

    again = GainedAutoencoder("low")
    restore(again, loaded)
    for name, value in model.state_dict().items():
        precise = name.startswith("log_")
        assert torch.allclose(value, again.state_dict()[name], atol=1e-6 if precise else 1e-2), name
    assert export(again, "mse", {}, images) == export(again.eval(), "mse", {}, images)
    with pytest.raises(CAEError, match="qualities"):
        restore(GainedAutoencoder("high"), loaded)
