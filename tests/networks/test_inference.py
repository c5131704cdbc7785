"""Networks prepared for inference: the recast last layer, and lowered precision."""

import numpy as np
import pytest
import torch
import zarr
from weights_files import bundled

from zarr_cae import CAECodec
from zarr_cae.config import Settings
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.networks.engine import Engine, engine_for
from zarr_cae.networks.inference import SubpixelConv, SubpixelConv5, bfloat16_is_fast, choose_precision, prepare
from zarr_cae.networks.transforms import GDN, FactorizedSynthesis, SquareGDN, Upsampling
from zarr_cae.pixels.convert import to_planes
from zarr_cae.pixels.layout import Layout

CPU = torch.device("cpu")


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(5, 3, 4), (4, 7, 2), (1, 1, 8)])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_subpixel_convolution_is_the_transposed_one(inputs, outputs, stride, size):
    torch.manual_seed(0)
    transposed = Upsampling(inputs, outputs, stride)
    given = torch.randn(2, inputs, *size)
    with torch.no_grad():
        expected, result = transposed(given), SubpixelConv(transposed)(given)
    assert result.shape == expected.shape == (2, outputs, stride * size[0], stride * size[1])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_subpixel_convolution_is_that_of_compressai(size):
    torch.manual_seed(0)
    transposed = torch.nn.ConvTranspose2d(4, 3, 5, stride=2, padding=2, output_padding=1)
    given = torch.randn(2, 4, *size)
    with torch.no_grad():
        expected, result = transposed(given), SubpixelConv5(transposed)(given)
    assert result.shape == expected.shape == (2, 3, 2 * size[0], 2 * size[1])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [GDN, SquareGDN])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("onednn", [True, False])
def test_normalisation_is_the_same_with_and_without_gradients(monkeypatch, kind, inverse, dtype, onednn):
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.manual_seed(0)
    layer = kind(6, inverse=inverse)
    with torch.no_grad():
        layer.gamma.copy_(torch.rand(6, 6))
    layer = layer.to(dtype)
    given = torch.randn(2, 6, 5, 7, dtype=dtype)
    kept = given.clone()
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            result = layer(given.contiguous(memory_format=layout))
        expected = layer(given.clone().requires_grad_())
        expected.sum().backward()
        torch.testing.assert_close(result, expected.detach())
        torch.testing.assert_close(given, kept, rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "levels", "rms"), [("auto", 1, 0.1), ("bfloat16", 4, 0.6)])
@pytest.mark.parametrize("quality", [4, 8])
def test_lowered_precision_keeps_the_pixels(photograph, precision, levels, rms, quality):
    """Pixels of the same symbols differ from those in float32 by few grey levels."""
    loaded, settings = bundled(quality), Settings(device="cpu")
    planes = to_planes(np.array(photograph[:256, :256]), Layout((256, 256, 3), 2), (0, 255))
    exact, low = Engine(loaded, CPU, "float32"), Engine(loaded, CPU, precision)
    symbols = exact.analyse(planes, quality, settings).result()
    apart = 255 * (
        low.synthesise(symbols, quality, 3, settings).result()
        - exact.synthesise(symbols, quality, 3, settings).result()
    )
    assert 0 < np.abs(apart).max() < levels
    assert np.sqrt(np.square(apart).mean()) < rms
    assert (low.analyse(planes, quality, settings).result() != symbols).mean() < 0.05


def tf32(values):
    """Return float32 values rounded to the ten bits of mantissa that a GPU multiplies, and other values unchanged."""
    if values.dtype != torch.float32:
        return values
    bits = values.contiguous().view(torch.int32)
    return (bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(("precision", "levels", "rms"), [("float32", 0.3, 0.05), ("auto", 1, 0.1)])
@pytest.mark.parametrize("quality", [1, 8])
def test_tf32_keeps_the_pixels(photograph, precision, levels, rms, quality):
    """TF32, torch's default on GPUs, simulated on the CPU: convolutions multiply float32 in fewer bits."""
    loaded, settings = bundled(quality), Settings(device="cpu")
    planes = to_planes(np.array(photograph[:256, :256]), Layout((256, 256, 3), 2), (0, 255))
    exact, low = Engine(loaded, CPU, "float32"), Engine(loaded, CPU, precision)
    for module in (module for network in low.networks for module in network.modules()):
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.weight.data = tf32(module.weight.data)
            module.register_forward_pre_hook(lambda _, given: (tf32(given[0]), *given[1:]))
    symbols = exact.analyse(planes, quality, settings).result()
    apart = 255 * (
        low.synthesise(symbols, quality, 3, settings).result()
        - exact.synthesise(symbols, quality, 3, settings).result()
    )
    assert 0 < np.abs(apart).max() < levels
    assert np.sqrt(np.square(apart).mean()) < rms
    assert (low.analyse(planes, quality, settings).result() != symbols).mean() < 0.01


def test_layers_at_the_latents_scale_stay_exact():
    network = Engine(bundled(4), CPU, "bfloat16").networks[1]
    dtypes = {name: next(module.parameters()).dtype for name, module in network.named_children()}
    assert dtypes.pop("conv3") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_other_networks_stay_in_float32():
    network = prepare(FactorizedSynthesis(4, 6), "bfloat16", CPU)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_auto_is_float32_where_bfloat16_is_slow(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert not bfloat16_is_fast(CPU)
    assert choose_precision("auto", CPU) == "float32"
    assert choose_precision("bfloat16", CPU) == "bfloat16"
    for name in ("amx_bf16", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"avx2": True, name: True})
        assert choose_precision("auto", CPU) == "auto"


def test_precision_is_a_setting():
    with pytest.raises(CAEConfigurationError, match=r"cae\.precision must be one of .*, got 'int8'"):
        choose_precision("int8", CPU)
    loaded = bundled(1)
    engines = {engine_for(loaded, Settings(device="cpu", precision=name)) for name in ("float32", "bfloat16")}
    assert len(engines) == 2
    array = zarr.create_array(
        {}, shape=(32, 32, 3), chunks=(32, 32, 3), dtype="uint8", serializer=CAECodec(quality=1), compressors=None
    )
    with zarr.config.set({"cae.precision": "half"}), pytest.raises(CAEConfigurationError, match=r"cae\.precision"):
        array[:] = 5
