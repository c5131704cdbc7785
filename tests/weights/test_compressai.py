"""CompressAI's checkpoints, with seeded random weights in CompressAI's file format."""

import hashlib
import itertools
import os
import re
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import zarr

from zarr_cae import CAECodec, CAEConfigurationError
from zarr_cae.coder import rans
from zarr_cae.coder.tables import PRECISION
from zarr_cae.config import Settings
from zarr_cae.networks.engine import Engine
from zarr_cae.weights import compressai, registry
from zarr_cae.weights.file import ZOO_MODEL

N, M = 8, 12


def reparametrised(value):
    return torch.sqrt(value + 2.0**-36)


def state_dict(seed=0):
    """Return a state dict of CompressAI 1.2.8's `FactorizedPrior(8, 12)`, with varied latents and no tables."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=random) * scale

    state = {}
    for part, sizes in (("g_a", (3, N, N, N, M)), ("g_s", (M, N, N, N, 3))):
        for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            shape = (outputs, inputs, 5, 5) if part == "g_a" else (inputs, outputs, 5, 5)
            scale = (2.0 if part == "g_a" else 1.0) / (5 * inputs**0.5)
            state[f"{part}.{2 * index}.weight"] = normal(*shape, scale=scale)
            state[f"{part}.{2 * index}.bias"] = normal(outputs, scale=0.1)
            if index < 3:
                state[f"{part}.{2 * index + 1}.beta"] = reparametrised(torch.ones(N) + normal(N).abs() * 0.1)
                gamma = 0.1 * torch.eye(N) + normal(N, N).abs() * 0.01
                state[f"{part}.{2 * index + 1}.gamma"] = reparametrised(gamma)
                state[f"{part}.{2 * index + 1}.beta_reparam.pedestal"] = torch.tensor([2.0**-36])
    widths = (1, 3, 3, 3, 3, 1)
    for layer in range(5):
        state[f"entropy_bottleneck._matrix{layer}"] = normal(M, widths[layer + 1], widths[layer], scale=0.3) - 0.2
        state[f"entropy_bottleneck._bias{layer}"] = normal(M, widths[layer + 1], 1, scale=0.3)
        if layer < 4:
            state[f"entropy_bottleneck._factor{layer}"] = normal(M, widths[layer + 1], 1, scale=0.2)
    state["entropy_bottleneck.quantiles"] = torch.tensor([-10.0, 0, 10]) + normal(M, 1, 1)
    state["entropy_bottleneck._offset"] = torch.empty(0, dtype=torch.int32)
    state["entropy_bottleneck._quantized_cdf"] = torch.empty(0, dtype=torch.int32)
    state["entropy_bottleneck._cdf_length"] = torch.empty(0, dtype=torch.int32)
    return state


@pytest.fixture
def folder(cache):
    """Return a folder for checkpoints, beside that of imported weights."""
    return cache.parent


def converted(state, folder, quality=3, metric="ms-ssim"):
    torch.save(state, folder / "checkpoint.pth.tar")
    info = registry.store(compressai.convert(folder / "checkpoint.pth.tar", quality=quality, metric=metric))
    return registry.load(info.path)


def test_the_same_file_from_the_same_checkpoint(folder):
    first = converted(state_dict(), folder)
    assert converted(state_dict(), folder).info == first.info
    assert first.info.architecture == {"hidden": N, "latent": M}
    assert first.info.qualities == (3,)
    assert converted(state_dict(seed=1), folder).info.digest != first.info.digest


def test_names_of_older_and_newer_compressai(folder):
    new = state_dict()
    plural = {"matrix": "matrices", "bias": "biases", "factor": "factors"}

    def rename(prefix, key):
        return re.sub(r"\._(matrix|bias|factor)(\d)", lambda found: f".{prefix}{plural[found[1]]}.{found[2]}", key)

    older = {f"module.{rename('_', key)}": value for key, value in new.items()}
    newer = {rename("", key): value for key, value in new.items()}
    expected = converted(new, folder).tensors
    for renamed in (older, newer):
        tensors = converted(renamed, folder).tensors
        assert all((tensors[name] == value).all() for name, value in expected.items())


def test_against_compressai_itself(folder):
    """The symbols are equal, pixels agree within one grey level, and the density predicts the payload."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from compressai.models import FactorizedPrior
    except Exception as error:  # noqa: BLE001 - a torchvision that does not match torch raises RuntimeError
        pytest.skip(f"compressai cannot be imported here: {error}")
    network = FactorizedPrior(N, M)
    own = network.state_dict()
    for key, value in state_dict().items():
        listed = key.replace("_matrix", "matrices.").replace("_bias", "biases.").replace("_factor", "factors.")
        for name in (key, listed):
            if name in own and own[name].shape == value.shape:
                own[name] = value
    network.load_state_dict(own)
    network.entropy_bottleneck._update_quantiles()
    network.update(force=True)
    network.eval()
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        latents = network.g_a(images)
        medians = network.entropy_bottleneck._get_medians().reshape(1, M, 1, 1)
        symbols = network.entropy_bottleneck.quantize(latents, "symbols", medians)
        strings = network.compress(images)
        decoded = network.decompress(**strings)["x_hat"]
    loaded = converted(network.state_dict(), folder)
    settings = Settings(device="cpu")
    engine = Engine(loaded, torch.device("cpu"))
    ours = engine.analyse(images.numpy(), 3, settings).result()
    assert len(np.unique(ours)) > 5
    np.testing.assert_array_equal(ours, symbols.numpy())
    pixels = np.clip(engine.synthesise(ours, 3, 3, settings).result(), 0, 1)
    assert np.abs(pixels - decoded.numpy()).max() < 1 / 255
    theirs = sum(len(string) for string in strings["strings"][0])
    payload = sum(len(rans.encode(one, loaded.tables[0], 3)) for one in ours)
    assert payload < theirs * 1.1 + 16


def test_through_zarr(folder):
    loaded = converted(state_dict(), folder)
    codec = CAECodec(quality=3, metric="ms-ssim", model="bmshj2018-factorized")
    assert codec.weights == loaded.info.digest
    array = zarr.create_array({}, shape=(40, 50, 3), dtype="uint8", serializer=codec, compressors=None)
    array[:] = np.arange(6000, dtype="uint8").reshape(40, 50, 3)
    assert array[:].shape == (40, 50, 3)


def test_tables_follow_the_density_when_the_checkpoint_has_none(folder):
    """Return Ballé's density, computed independently with torch."""
    state = state_dict()
    loaded = converted(state, folder)
    for channel in range(M):
        start, length = loaded.tensors["tables.length"][0, :channel].sum(), loaded.tensors["tables.length"][0, channel]
        row = loaded.tables[0].frequency[start : start + length].astype(float)
        symbols = torch.arange(length - 1) + int(loaded.tables[0].minimum[channel])
        edges = torch.cat([symbols - 0.5, symbols[-1:] + 0.5]).double()
        x = (edges + state["entropy_bottleneck.quantiles"][channel, 0, 1])[None]
        for layer in range(5):
            x = torch.nn.functional.softplus(state[f"entropy_bottleneck._matrix{layer}"][channel].double()) @ x
            x = x + state[f"entropy_bottleneck._bias{layer}"][channel].double()
            if layer < 4:
                x = x + torch.tanh(state[f"entropy_bottleneck._factor{layer}"][channel].double()) * torch.tanh(x)
        expected = np.diff(torch.sigmoid(x)[0].numpy())
        np.testing.assert_allclose(row[:-1] / row.sum(), expected, atol=2 / 2**PRECISION)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 not really"])
def test_files_that_are_no_checkpoints(folder, content):
    (folder / "x.pth.tar").write_bytes(content)
    with pytest.raises(CAEConfigurationError, match="not a checkpoint"):
        compressai.convert(folder / "x.pth.tar", quality=1, metric="mse")


def test_checkpoints_of_something_else(folder):
    torch.save({"fc.weight": torch.zeros(3, 3)}, folder / "x.pth.tar")
    with pytest.raises(CAEConfigurationError, match="not a bmshj2018-factorized state dict"):
        compressai.convert(folder / "x.pth.tar", quality=1, metric="mse")


class Evil:
    def __reduce__(self):
        return (print, ("owned",))


def test_nothing_is_unpickled(folder, capsys):
    torch.save({"g_a.0.weight": Evil()}, folder / "x.pth.tar")
    with pytest.raises(CAEConfigurationError, match="only tensors"):
        compressai.convert(folder / "x.pth.tar", quality=1, metric="mse")
    assert "owned" not in capsys.readouterr().out


def without(*names):
    """Return the state dict without the keys that contain one of these strings."""
    return {key: value for key, value in state_dict().items() if not any(name in key for name in names)}


def with_tables(**changed):
    """Return the state dict with tables of 8 symbols per channel, in CompressAI's form."""
    cdf = torch.tensor([0, 100, 800, 20000, 40000, 60000, 65000, 65500, 65520, 65536, 0, 0], dtype=torch.int32)
    stored = {
        "_quantized_cdf": cdf.repeat(M, 1), "_cdf_length": torch.full((M,), 10, dtype=torch.int32),
        "_offset": torch.full((M,), -3, dtype=torch.int32), **changed,
    }  # fmt: skip
    return {**state_dict(), **{f"entropy_bottleneck.{name}": value for name, value in stored.items()}}


def test_tables_of_the_checkpoint_are_kept(folder):
    table = converted(with_tables(), folder).tables[0]
    assert set(table.minimum) == {-3}
    expected = np.diff([0, 100, 800, 20000, 40000, 60000, 65000, 65500, 65520]) / 16
    np.testing.assert_allclose(table.frequency[: table.length[0] - 1], expected[: table.length[0] - 1], atol=2)


@pytest.mark.parametrize("name", sorted(key for key in without("pedestal", "_offset", "_cdf")))
def test_a_missing_tensor_is_named(folder, name):
    torch.save(without(name), folder / "x.pth.tar")
    with pytest.raises(CAEConfigurationError, match=rf"x\.pth\.tar is not a bmshj.* it has no {re.escape(name)}$"):
        compressai.convert(folder / "x.pth.tar", quality=3, metric="mse")


ODD = {
    "scalar": ({"g_a.0.weight": torch.tensor(1.0)}, "g_a.0.weight"),
    "empty": ({"g_a.6.weight": torch.zeros(0, N, 5, 5)}, "g_a.6.weight"),
    "narrow": ({"g_s.4.weight": torch.zeros(N, N + 1, 5, 5)}, "g_s.4.weight"),
    "kernel": ({"g_a.2.weight": torch.zeros(N, N, 3, 3)}, "g_a.2.weight"),
    "integers": ({"g_a.2.bias": torch.zeros(N, dtype=torch.int32)}, "g_a.2.bias"),
    "complex": ({"g_a.2.bias": torch.zeros(N, dtype=torch.complex64)}, "g_a.2.bias"),
    "nan": ({"g_a.0.weight": torch.full((N, 3, 5, 5), torch.nan)}, "g_a.0.weight"),
    "infinite": ({"g_s.6.bias": torch.full((3,), torch.inf)}, "g_s.6.bias"),
    "beyond float32": ({"g_s.6.bias": torch.full((3,), 1e300, dtype=torch.float64)}, "g_s.6.bias"),
    "squares": ({"g_a.1.gamma": torch.full((N, N), 1e30)}, "g_a.1.gamma"),
    "quantiles": ({"entropy_bottleneck.quantiles": torch.zeros(3)}, "entropy_bottleneck.quantiles"),
    "nan quantiles": ({"entropy_bottleneck.quantiles": torch.full((M, 1, 3), torch.nan)}, "quantiles"),
    "factor": ({"entropy_bottleneck._factor0": torch.zeros(M, 3)}, "entropy_bottleneck._factor0"),
    "flat density": ({"entropy_bottleneck._matrix0": torch.full((M, 3, 1), -1e30)}, "entropy_bottleneck"),
    "another model": ({"h_a.0.weight": torch.zeros(N, M, 3, 3)}, "h_a.0.weight"),
    "more layers": ({"g_a.8.weight": torch.zeros(M, M, 5, 5)}, "g_a.8.weight"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_checkpoints_are_refused_by_the_key(folder, case):
    changed, named = ODD[case]
    torch.save({**state_dict(), **changed}, folder / "x.pth.tar")
    with pytest.raises(CAEConfigurationError, match=f"not a bmshj2018-factorized state dict: .*{re.escape(named)}"):
        compressai.convert(folder / "x.pth.tar", quality=3, metric="mse")


@pytest.mark.parametrize(
    ("name", "value"),
    [("_cdf_length", None), ("_offset", None), ("_cdf_length", torch.full((M,), 13)), ("_cdf_length", torch.zeros(M)),
     ("_cdf_length", torch.full((M,), 2)), ("_cdf_length", torch.tensor(10)), ("_cdf_length", torch.full((2,), 10)),
     ("_offset", torch.full((M - 1,), -3)), ("_quantized_cdf", torch.ones(M, dtype=torch.int32)),
     ("_quantized_cdf", torch.ones(M, 12)), ("_quantized_cdf", torch.ones(M, 12, dtype=torch.int32)),
     ("_quantized_cdf", torch.arange(12 * M, 0, -1).reshape(M, 12)), ("_offset", torch.full((M,), 40000))],
)  # fmt: skip
def test_odd_tables_are_refused_by_the_key(folder, name, value):
    state = with_tables(**({} if value is None else {name: value}))
    if value is None:
        del state[f"entropy_bottleneck.{name}"]
    torch.save(state, folder / "x.pth.tar")
    with pytest.raises(CAEConfigurationError, match=rf"state dict: .*entropy_bottleneck\.({name}|\* give no tables)"):
        compressai.convert(folder / "x.pth.tar", quality=3, metric="mse")


@pytest.mark.parametrize(
    "state",
    [{"state_dict": [torch.zeros(3)]}, [torch.zeros(3)], {1: torch.zeros(3)}, torch.zeros(3), {},
     {"g_a.0.weight": torch.zeros(8, 3, 5, 5, dtype=torch.bfloat16)}],
)  # fmt: skip
def test_checkpoints_that_are_not_a_dict_of_tensors(folder, state):
    torch.save(state, folder / "x.pth.tar")
    with pytest.raises(CAEConfigurationError, match=r"x\.pth\.tar is not a"):
        compressai.convert(folder / "x.pth.tar", quality=3, metric="mse")


def test_safetensors_and_parameters_give_the_same_network(folder):
    from safetensors.torch import save_file

    expected = converted(state_dict(), folder).tensors
    tensors = converted(
        {key: torch.nn.Parameter(value) for key, value in state_dict().items() if value.numel()}, folder
    )
    save_file(state_dict(), folder / "x.safetensors")
    info = registry.store(compressai.convert(folder / "x.safetensors", quality=3, metric="mse"))
    for found in (tensors.tensors, registry.load(info.path).tensors):
        assert all((found[name] == value).all() for name, value in expected.items())
    (folder / "x.safetensors").write_bytes(b"junk of more than eight bytes")
    with pytest.raises(CAEConfigurationError, match=r"x\.safetensors is not a checkpoint"):
        compressai.convert(folder / "x.safetensors", quality=3, metric="mse")


@pytest.fixture
def zoo_of_files(folder, monkeypatch):
    """Make a table of addresses of local files; the file of quality 2 does not match the digits in its name."""
    torch.save(state_dict(), folder / "x.pth.tar")
    content = (folder / "x.pth.tar").read_bytes()
    urls = {}
    for quality, digest in {1: hashlib.sha256(content).hexdigest()[:8], 2: "deadbeef"}.items():
        path = folder / f"bmshj2018-factorized-prior-{quality}-{digest}.pth.tar"
        path.write_bytes(content)
        urls[quality] = path.as_uri()
    urls[3] = (folder / "bmshj2018-factorized-prior-3-00000000.pth.tar").as_uri()
    for name in ("compressai", "compressai.zoo", "compressai.zoo.image"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["compressai.zoo.image"].model_urls = {ZOO_MODEL: {"mse": urls}}
    return folder


def test_fetch(zoo_of_files, monkeypatch, capfd):
    download, asked = torch.hub.download_url_to_file, []

    def counted(url, *arguments, **keywords):
        asked.append(url)
        return download(url, *arguments, **keywords)

    monkeypatch.setattr(torch.hub, "download_url_to_file", counted)
    path = compressai.fetch(quality=1, metric="mse")
    assert len(asked) == 1
    assert capfd.readouterr() == ("", "")  # no progress bar where there is no terminal
    (info,) = (info for info in registry.available() if info.path.parent == zoo_of_files / "cache")
    assert (info.path, info.model, info.metric, info.qualities) == (path, ZOO_MODEL, "mse", (1,))
    assert CAECodec(1, model=ZOO_MODEL).weights == info.digest
    monkeypatch.setitem(sys.modules, "compressai", None)
    assert compressai.fetch(quality=1, metric="mse") == path
    assert len(asked) == 1  # nothing is downloaded again


def test_fetch_shows_its_progress_on_a_terminal(zoo_of_files, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    compressai.fetch(quality=1, metric="mse")
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize(("quality", "message"), [(2, "invalid hash value"), (3, "No such file")])
def test_fetch_of_a_wrong_or_damaged_file(zoo_of_files, quality, message):
    with pytest.raises(CAEConfigurationError, match=f"prior-{quality}.* could not be fetched: .*{message}"):
        compressai.fetch(quality=quality, metric="mse")
    assert not (zoo_of_files / "cache").exists()


def test_fetch_without_compressai_names_the_remedy(tmp_path):
    code = (
        "import sys; sys.modules['compressai'] = None\n"
        "from zarr_cae import CAEConfigurationError; from zarr_cae.weights import compressai\n"
        "try: compressai.fetch(quality=1, metric='mse')\n"
        "except CAEConfigurationError as error: assert 'weights import' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    environment = {**os.environ, "ZARR_CAE_WEIGHTS": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)
