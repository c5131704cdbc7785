"""`encode --fit` and `convert --fit`."""

import json
import re

import numpy as np
import pytest
import zarr
from commands import refused
from PIL import Image
from weights_files import contexts, networks, tiny

import zarr_cae
from zarr_cae import WeightsNotFoundError
from zarr_cae.cli import main
from zarr_cae.cli.fitting import minutes
from zarr_cae.slides.journal import Journal
from zarr_cae.training import fit as fit_module
from zarr_cae.training.sampling import filled, sample_windows
from zarr_cae.weights import registry


@pytest.fixture
def folder(tmp_path, monkeypatch, move_weights, photograph):
    """Work in a folder with two pictures, and with weights of its own."""
    move_weights("weights")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph[:64, :96]).save("a.png")
    Image.fromarray(photograph[200:264, 200:296, 0]).save("b.png")
    return tmp_path


@pytest.fixture
def fits(monkeypatch):
    """Let each fit return small weights instead of training; return the calls, with the pixels that were sampled."""
    calls = []

    def fit_weights(parts, time, *, quality, metric, report):
        pictures = [part.open() for part in parts]
        shapes = []
        for picture in pictures:
            whole = tuple(slice(0, length) for length in picture.array.shape)
            shapes.append((np.asarray(picture.array[whole]).shape, picture.channel_axis))
            picture.close()
        calls.append((time, quality, metric, shapes))
        report(fit_module.FitProgress(0.5, 1, 0.1))
        info = registry.store(tiny(**networks(), **contexts(), provenance={"fit": len(calls)}))
        return fit_module.Fit(
            info.digest, 0.25, "sha256:" + "1" * 64, file_bytes=1_000_000, held_out="1 of 4 images"
        )  # fmt: skip

    monkeypatch.setattr(fit_module, "fit_weights", fit_weights)
    return calls


def digests(path):
    return {file.stem for file in path.rglob("*.safetensors")}


def test_times():
    assert [minutes(text) for text in ("10min", "90s", "1h", "2", "0.5 m")] == [10, 1.5, 60, 2, 0.5]
    for text in ("", "0", "ten", "-1min", "3 days"):
        with pytest.raises(ValueError, match="not a time"):
            minutes(text)


def test_encode_stores_fitted_weights_in_the_output(folder, fits, capsys, monkeypatch):
    assert main(["encode", "a.png", "b.png", "out.zarr", "-q", "2", "--fit", "10min"]) == 0
    assert fits == [(10, 2, "mse", [((64, 96, 3), 2), ((64, 96), None)])]
    told = capsys.readouterr().err
    assert "25.0% fewer bytes" in told
    assert "held out: 1 of 4 images\n" in told
    (digest,) = digests(folder / "out.zarr")
    pixels = zarr_cae.open("out.zarr", path="a")[...]
    assert {name for name, _ in zarr.open_group("out.zarr", mode="r").members()} == {"a", "b"}

    monkeypatch.setenv("ZARR_CAE_WEIGHTS", str(folder / "elsewhere"))
    with pytest.raises(WeightsNotFoundError, match=digest):
        zarr.open("out.zarr", path="a", mode="r")[...]
    np.testing.assert_array_equal(zarr_cae.open("out.zarr", path="a")[...], pixels)
    capsys.readouterr()
    assert main(["info", "out.zarr/a"]) == 0
    out = capsys.readouterr().out
    assert f"sha256:{digest[:12]}..., in the archive\n" in out
    assert "on this machine" not in out
    assert re.search(r"  latents  4 x 6 x \d+ float32\n", out)
    assert main(["decode", "out.zarr/a", "a.npy"]) == 0
    np.testing.assert_array_equal(np.load("a.npy"), pixels)


def test_a_fit_that_is_not_taken_is_named(folder, capsys, monkeypatch):
    start = registry.default_digest("cae-v1", 2, "mse")
    found = fit_module.Fit(start, 0.0, start, "held-out crops need 1.0% more bytes", held_out="2 of 12 images")
    monkeypatch.setattr(fit_module, "fit_weights", lambda *_, **__: found)
    assert main(["encode", "a.png", "out.zarr", "-q", "2", "--fit", "1s"]) == 0
    told = capsys.readouterr().err
    assert "not fitted: held-out crops need 1.0% more bytes" in told
    assert "held out: 2 of 12 images\n" in told
    assert zarr_cae.open("out.zarr").metadata.codecs[-1].weights == start


@pytest.mark.parametrize("images", [["a.png"], ["a.png", "b.png"]])
def test_a_conversion_that_goes_on_is_not_fitted_again(folder, fits, monkeypatch, capsys, images):
    command = ["convert", *images, "out.ome.zarr", "-q", "2", "--chunks", "32", "--shards", "none", "--fit", "2"]
    record = Journal.record

    def interrupt(journal, block):
        record(journal, block)
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(Journal, "record", interrupt)
        assert main(command) == 130
    (settings,) = folder.glob(".*.converting/journal.json")
    assert len(fits) == 1
    assert fits[0][3] == [((3, 64, 96), 0), ((64, 96), None)][: len(images)]
    weights = json.loads(settings.read_text())["weights"]
    digest = weights[0] if isinstance(weights, list) else weights
    assert main(command) == 0
    assert len(fits) == 1
    assert "began with" in capsys.readouterr().err
    assert digests(folder / "out.ome.zarr") == {digest.removeprefix("sha256:")}
    monkeypatch.setenv("ZARR_CAE_WEIGHTS", str(folder / "elsewhere"))
    level = zarr_cae.open("out.ome.zarr", path="0" if len(images) == 1 else "a/0")
    assert level[...].shape == (3, 64, 96)

    assert main([*command, "--overwrite", "--restart"]) == 0
    assert len(fits) == 2


@pytest.fixture
def samples(monkeypatch):
    """Let each fit only sample the images; return the samples."""
    samples = []

    def fit_weights(parts, *_, **__):
        samples.append(sample_windows(parts, 0))
        start = registry.default_digest("cae-v1", 2, "mse")
        return fit_module.Fit(start, 0.0, start, "this is a test", held_out=samples[-1].description)

    monkeypatch.setattr(fit_module, "fit_weights", fit_weights)
    return samples


@pytest.mark.parametrize("command", ["encode", "convert"])
def test_one_of_several_files_is_held_out_whole(folder, samples, capsys, command):
    names = [f"{value}.png" for value in range(5)]
    for value, name in enumerate(names):
        noise = np.random.default_rng(value).integers(2, size=(128, 192, 3), dtype=np.uint8)
        Image.fromarray(noise + np.uint8(40 * value)).save(name)
    assert main([command, *names, "out.zarr", "-q", "2", "--fit", "1s"]) == 0
    (sample,) = samples
    assert {int(window.min()) for window in sample.held_out} == {80}
    assert {int(window.min()) for window in sample.windows} == {0, 40, 120, 160}
    assert "held out: 1 of 5 images\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["encode", "convert"])
def test_channels_of_one_place_are_held_out_together(folder, samples, photograph, command):
    tifffile = pytest.importorskip("tifffile")
    channels = np.stack([photograph[..., 0] // 8 + np.uint8(32 * channel) for channel in range(5)])
    tifffile.imwrite("m.ome.tif", channels, metadata={"axes": "CYX"}, photometric="minisblack")
    assert main([command, "m.ome.tif", "out.zarr", "-q", "2", "--fit", "1s"]) == 0
    (sample,) = samples
    assert {int(window.max()) // 32 for window in sample.windows} == {0, 1, 2, 3, 4}
    places = [{(window % 32).tobytes() for window in windows} for windows in (sample.windows, sample.held_out)]
    assert all(places)
    assert not places[0] & places[1]


@pytest.mark.parametrize("command", ["encode", "convert"])
def test_a_fit_sees_the_transformed_values(folder, samples, command):
    tifffile = pytest.importorskip("tifffile")
    counts = np.random.default_rng(0).poisson(5, (128, 128)).astype(np.uint16)
    tifffile.imwrite("m.tif", counts)
    options = ["-q", "2", "--fit", "1s", "--value-range", "0,1000", "--value-transform", "sqrt"]
    assert main([command, "m.tif", "out.zarr", *options]) == 0
    (sample,) = samples
    least, most = np.sqrt(0.375), np.sqrt(1000.375)
    coded = 255 * (np.sqrt(counts + 0.375) - least) / (most - least)
    blocks = [coded[top : top + 64, left : left + 64] for top in (0, 64) for left in (0, 64)]
    for window in [*sample.windows, *sample.held_out]:
        assert any(np.allclose(window[..., 0], block, atol=1e-3) for block in blocks)


@pytest.mark.parametrize("command", ["encode", "convert"])
@pytest.mark.parametrize(("dtype", "nodata"), [("float32", "nan"), ("uint16", "65535")])
def test_a_fit_fills_pixels_without_data(folder, samples, photograph, command, dtype, nodata):
    pixels = photograph[:256, :256, 0].astype(dtype) * 100
    pixels[40:80, 100:] = np.float32(nodata)
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite("m.tif", pixels)
    options = ["-q", "2", "--fit", "1s", "--value-range", "0,30000", "--nodata", nodata]
    assert main([command, "m.tif", "out.zarr", *options]) == 0
    (sample,) = samples
    windows = [*sample.windows, *sample.held_out]
    assert any(np.isnan(window).any() for window in windows)
    assert max(filled(window).max() for window in windows) <= 255


def test_mistakes_are_named(folder, fits, capsys):
    digest = registry.default_digest("cae-v1", 2, "mse")
    wrong = {
        ("encode", "--weights", digest): "leave --weights out",
        ("encode", "--model", "bmshj2018-factorized"): "for the model cae-v1",
        ("convert", "-q", "5,6"): "within one of these",
        ("convert", "--dask", "tcp://x:1"): "with --dask",
    }
    for (name, *options), message in wrong.items():
        assert message in refused(capsys, name, "a.png", "x.zarr", "--fit", "1s", *options)
    assert not fits
    assert not (folder / "x.zarr").exists()
