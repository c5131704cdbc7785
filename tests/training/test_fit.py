"""A fit to a collection."""

import numpy as np
import pytest
import torch

from zarr_cae import CAECodec, CAEConfigurationError
from zarr_cae.cli.evaluate import code
from zarr_cae.training import fit as fit_module
from zarr_cae.training.data import Crops
from zarr_cae.training.export import export
from zarr_cae.training.fit import archive_saved, bytes_saved, coded_curves, fit_weights
from zarr_cae.training.sampling import ImageSource, ImageStack, filled
from zarr_cae.training.start import Start
from zarr_cae.training.trainer import Recipe, Trainer
from zarr_cae.training.unlike import pictures_to_check
from zarr_cae.weights import registry


@pytest.fixture
def threads():
    """Keep the number of torch's threads."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def test_other_sources_are_refused(photograph):
    for wrong in (photograph.astype(np.uint16), photograph[..., 0], "x", [photograph, photograph[..., 0]]):
        with pytest.raises(CAEConfigurationError, match="a fit needs uint8"):
            fit_weights(wrong)
    for options, message in (({"minutes": 0}, "time"), ({"quality": 9}, "from 1 to 8")):
        with pytest.raises(CAEConfigurationError, match=message):
            fit_weights(photograph, **options)
    with pytest.raises(CAEConfigurationError, match="at least 96 px"):
        fit_weights(photograph[:128, :128], metric="ms-ssim")


def test_each_array_of_a_list_is_a_part_of_the_collection(photograph):
    arrays = [photograph, photograph[:64], np.stack([photograph[:32]] * 2)]
    parts = fit_module._parts(arrays)
    assert [part.open().array.shape for part in parts] == [array.shape for array in arrays]


def test_bytes_saved_at_equal_psnr():
    old = ([1.0, 2.0, 3.0], [30.0, 33.0, 36.0])
    assert bytes_saved(old, old) == 0
    assert bytes_saved(old, ([value + np.log(0.8) for value in old[0]], old[1])) == pytest.approx(0.2)
    assert bytes_saved(old, (old[0], [value - 1 for value in old[1]])) < 0
    assert bytes_saved(old, (old[0], [50.0, 51.0, 52.0])) == 0


def test_a_loss_on_large_pictures_is_not_hidden_by_savings_on_small_ones():
    levels = [30.0, 40.0]
    small, large = ([1.0, 2.0], levels), ([8.0, 9.0], levels)
    halved, grown = ([value - np.log(2) for value in small[0]], levels), ([value + 0.05 for value in large[0]], levels)
    assert archive_saved([small] * 9 + [large], [halved] * 9 + [grown]) < 0
    assert archive_saved([small, large], [halved, large]) > 0


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_decoded_samples_without_data_do_not_change_the_distortion(photograph, metric):
    planes = photograph[:96, :96].transpose(2, 0, 1)[None].astype(np.float32) / 255
    decoded = np.clip(planes + np.random.default_rng(0).normal(0, 0.05, planes.shape), 0, 1)
    data = np.ones(planes.shape, bool)
    data[:, :, 20:40, 30:] = False
    other = np.where(data, decoded, 1 - planes)
    found = fit_module._distortion(planes, decoded, data, metric)
    assert 0 < found == fit_module._distortion(planes, other, data, metric)
    assert found < fit_module._distortion(planes, other, np.ones_like(data), metric)


def grey(pixels):
    return np.broadcast_to(pixels[..., :1], pixels.shape)


@pytest.mark.parametrize("layout", [grey, np.array])
def test_samples_without_data_do_not_count_in_the_comparison(photograph, layout):
    weights = registry.load(registry.find_digest(registry.default_digest("cae-v1", 2, "mse")).path)
    window = photograph[:64, :64].astype(np.float32)
    window[:, 32:] = np.random.default_rng(0).integers(0, 256, (64, 32, 3))  # costs bytes, and has a low PSNR
    ((_, noisy),) = coded_curves(weights, [layout(window)])
    window[:, 32:] = np.nan
    ((sizes, levels),) = coded_curves(weights, [layout(window)])
    ((smooth_sizes, smooth_levels),) = coded_curves(weights, [layout(filled(window))])
    assert sizes == smooth_sizes
    assert min(np.subtract(levels, noisy)) > 3
    assert max(np.subtract(levels, smooth_levels)) < -0.1  # the filled half is easy, but does not count


@pytest.fixture
def trainer(photograph):
    """Return a trainer with the bundled weights, on windows of a photograph."""
    start = Start.find(registry.default_digest("cae-v1", 4, "mse"))
    recipe = Recipe("low", minutes=1, crop=32, crops_per_quality=1, lambdas=start.lambdas, schedule="fit", unlike=0.5)
    trainer = Trainer(recipe, Crops.of([photograph[:64, :64]] * 3, recipe, [photograph[256:320, :64]]))
    start.put_into(trainer)
    return trainer


def test_a_network_that_forgot_goes_back_towards_the_start(trainer):
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    unlike = [picture[:64, :64] for picture in pictures_to_check()[2:5:2]]
    same = fit_module._that_remembers(trainer, before, unlike)
    torch.testing.assert_close(same.state_dict(), before)

    last = "synthesis.conv1.weight"
    trainer.average[last] = 0.4 * before[last]  # pictures of less than half of their contrast
    model = fit_module._that_remembers(trainer, before, unlike)
    share = float((model.state_dict()[last] / before[last]).median())
    assert 0.4 < share < 1

    trainer.average[last] = -30 * before[last]
    assert fit_module._that_remembers(trainer, before, unlike) is None


@pytest.mark.slow
def test_fitted_tables_know_the_padding_of_chunks_at_the_edge(photograph, trainer):
    busy = (photograph + np.random.default_rng(0).normal(0, 25, photograph.shape)).clip(0, 255).astype(np.uint8)
    windows = [busy[top : top + 128, left : left + 128] for top in (0, 128, 256) for left in (0, 128, 256)]
    model = trainer.averaged()

    def size(known):
        with registry.temporary(export(model, "mse", {}, fit_module._tensors(known))) as weights:
            edge = busy[384:, 384:].copy()
            edge[16:] = 0
            ((sizes, _),) = coded_curves(weights, [edge])
        return np.exp(sizes).sum()

    assert size(fit_module._for_tables(windows, 0)) < 0.9 * size(windows)


def test_the_phases_of_a_fit_train_what_they_name(trainer):
    def changed():
        old = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        for _ in range(2):  # the first step only sets up the bases of the optimiser
            trainer.train_step()
        new = trainer.model.state_dict()
        return {name.partition(".")[0] for name, value in old.items() if not torch.equal(value, new[name])}

    assert changed() == {"density"}
    trainer.seconds = 0.1 * 60
    assert changed() == {"density", "synthesis", "log_step"}
    trainer.seconds = 0.5 * 60
    assert changed() == {"density", "synthesis", "log_step", "analysis", "log_gain"}
    trainer.seconds = 0.95 * 60
    assert changed() == {"density", "synthesis", "log_step"}


@pytest.mark.slow
def test_a_fit_of_a_second_does_no_harm(photograph, tmp_path, monkeypatch, threads):
    monkeypatch.setenv("ZARR_CAE_WEIGHTS", str(tmp_path))
    found = fit_weights(photograph[:256, :256], minutes=0.01, crop=64)
    assert found.start == registry.default_digest("cae-v1", 5, "mse")
    assert found.held_out == "4 of 16 windows, side by side"
    assert found.saved >= 0
    if found.digest == found.start:
        assert found.reason
        assert not list(tmp_path.iterdir())
    else:
        assert registry.find_digest(found.digest).path.parent == tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fit_to_pixels_without_data(photograph, tmp_path, monkeypatch, threads):
    monkeypatch.setenv("ZARR_CAE_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(fit_module, "pictures_to_check", lambda: pictures_to_check()[::3])
    starts = range(0, 384, 96)
    pixels = np.stack([photograph[top : top + 96, left : left + 96, 0] for top in starts for left in starts])
    pixels = pixels.astype(np.float32)
    pixels[:, 30:60, 50:] = np.nan
    part = ImageSource(pixels.size, lambda: ImageStack(pixels, None, (0, 255), nodata=np.nan))
    found = fit_weights([part], minutes=0.01, crop=64)
    assert np.isfinite(found.saved)
    assert found.saved >= 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fit_to_dark_pictures_does_not_forget_photographs(photograph, tmp_path, monkeypatch, threads):
    monkeypatch.setenv("ZARR_CAE_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(fit_module, "pictures_to_check", lambda: pictures_to_check()[::3])
    dark = np.random.default_rng(0).poisson(2, (4, 128, 128, 3)).astype(np.uint8) * 8  # weak light
    mixed = np.concatenate([dark, np.stack([photograph[top : top + 128, :128] for top in (0, 128)])])
    found = fit_weights(mixed, minutes=0.3, crop=64)
    part = photograph[256:384, 256:384]
    floor = part.astype(float).var((0, 1)).mean()
    for quality in (1, 5):
        error = {
            digest: np.square(code(part, CAECodec(quality, weights=digest), 128).pixels.astype(float) - part).mean()
            for digest in (found.start, found.digest)
        }
        assert error[found.digest] < 0.5 * floor
    assert found.saved >= 0
    assert (found.saved > 0) == (found.digest != found.start)
