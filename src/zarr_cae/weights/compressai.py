"""Convert CompressAI's `bmshj2018-factorized` checkpoints to weights files.

A checkpoint is the state dict that CompressAI publishes: GDN parameters under its square-root reparametrisation, the
density as a small monotone network, and usually the integer tables made from it. Conversion undoes the
reparametrisation, and keeps the tables if there are any. The same checkpoint always gives the same file.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from zarr_cae.coder.frequencies import trimmed_frequencies
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.weights import registry
from zarr_cae.weights.architecture import LARGEST_WIDTH, parameter_shapes
from zarr_cae.weights.file import ZOO_MODEL, pack

Array = npt.NDArray[Any]
_PEDESTAL = 2.0**-36
_BETA_MINIMUM = 1e-6
_LIMIT = 1024
_ENTROPY_KEY = re.compile(r"entropy_bottleneck\._?(matri|bias|factor)(?:ces|x|es|s)?\.?(\d)$")
_CONVOLUTION_KEY = re.compile(r"(g_[as])\.(\d+)\.(weight|bias|beta|gamma)$")
_KINDS = {"matri": "matrix", "bias": "bias", "factor": "factor"}
_PARTS = {"g_a": "analysis", "g_s": "synthesis"}
_KEYS = {part: key for key, part in _PARTS.items()}
_MODULES = (*_PARTS, "entropy_bottleneck")
_DENSITY_WIDTHS = (1, 3, 3, 3, 3, 1)
_CDF, _CDF_LENGTH, _OFFSET = (f"entropy_bottleneck.{name}" for name in ("_quantized_cdf", "_cdf_length", "_offset"))
CODER_TABLES = {"compressai.cumulative": _CDF, "compressai.length": _CDF_LENGTH, "compressai.offset": _OFFSET}
"""The tensors of a weights file that decode CompressAI's own streams, and their keys in a checkpoint."""


def fetch(*, quality: int, metric: str) -> Path:
    """Download CompressAI's checkpoint for this configuration, convert it and put it into the cache folder.

    The address comes from CompressAI's own table, and the file's hash must begin with the digits in its name. Nothing
    is downloaded if such weights are on this machine already.

    Returns
    -------
    Path
        The weights file.

    Raises
    ------
    CAEConfigurationError
        If compressai can't be imported or the download fails.
    """
    for info in registry.available():
        if (info.model, info.metric) == (ZOO_MODEL, metric) and quality in info.qualities:
            return info.path
    try:
        from compressai.zoo.image import model_urls
    except Exception as error:  # a torchvision that does not match torch may raise anything
        raise CAEConfigurationError(
            f"cae: the addresses of CompressAI's checkpoints come from compressai, which can't be imported ({error}); "
            "install it with a matching torchvision, or get the checkpoint elsewhere and use "
            "`zarr-cae weights import FILE --quality Q --metric M`"
        ) from error
    import torch

    url: str = model_urls[ZOO_MODEL][metric][quality]
    prefix = Path(url).name.split(".")[0].rsplit("-", 1)[1]
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / Path(url).name
        try:
            torch.hub.download_url_to_file(url, str(checkpoint), hash_prefix=prefix, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise CAEConfigurationError(f"cae: {url} could not be fetched: {error}") from error
        return registry.store(convert(checkpoint, quality=quality, metric=metric)).path


def convert(checkpoint: Path, *, quality: int, metric: str) -> bytes:
    """Return the bytes of a weights file made from a checkpoint, a state dict written by `torch.save` or safetensors.

    Raises
    ------
    CAEConfigurationError
        If it is not a whole state dict of `bmshj2018-factorized`; the message names the key.
    """
    content = checkpoint.read_bytes()
    state = _named(_read(checkpoint))
    hidden, latent = (_outputs(state, key, checkpoint) for key in ("g_a.0.weight", "g_a.6.weight"))
    _check(state, _shapes(hidden, latent), checkpoint)
    tensors: dict[str, Array] = {}
    for key, value in state.items():
        if found := _CONVOLUTION_KEY.fullmatch(key):
            part, index, parameter = found.groups()
            tensors[f"{_PARTS[part]}.{index}.{parameter}"] = plain = _plain(parameter, value)
            if not np.isfinite(plain).all():
                _refuse(checkpoint, f"the squares of {key} are not finite")
    medians = _single(state["entropy_bottleneck.quantiles"][:, 0, 1])[None]
    tensors |= _tables(state, medians[0].astype(np.float64), checkpoint)
    if state.get(_CDF, np.empty(0)).size:  # caecodec's chunks are coded with these
        tensors |= {name: state[key].astype(np.int32) for name, key in CODER_TABLES.items()}
    ones = np.ones_like(medians)
    tensors |= {"gain": ones, "shift": medians, "step": ones, "offset": medians}
    return pack(
        tensors,
        model=ZOO_MODEL,
        metric=metric,
        qualities=(quality,),
        architecture={"hidden": hidden, "latent": latent},
        provenance={"source": "CompressAI zoo", "checkpoint_sha256": hashlib.sha256(content).hexdigest()},
    )


def _refuse(checkpoint: Path, fault: str) -> NoReturn:
    raise CAEConfigurationError(f"cae: {checkpoint} is not a {ZOO_MODEL} state dict: {fault}")


def _read(checkpoint: Path) -> Mapping[str, Array]:
    import pickle
    import struct

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: Any
    damage = (RuntimeError, EOFError, ValueError, LookupError, TypeError, pickle.UnpicklingError, struct.error)
    try:
        if checkpoint.suffix == ".safetensors":
            state = load_file(checkpoint)
        else:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state) if isinstance(state, dict) else {}
        found = {key: value for key, value in dict(state).items() if isinstance(value, torch.Tensor)}
        return {str(key): value.detach().numpy() for key, value in found.items()}
    except (*damage, SafetensorError) as error:
        raise CAEConfigurationError(
            f"cae: {checkpoint} is not a checkpoint that holds only tensors: {error}"
        ) from error


def _named(state: Mapping[str, Array]) -> dict[str, Array]:
    """Return the state dict under the keys of `_shapes`; versions of CompressAI use different keys."""
    named = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        found = _ENTROPY_KEY.fullmatch(name)
        named[f"entropy_bottleneck._{_KINDS[found[1]]}{found[2]}" if found else name] = value
    return named


def _outputs(state: Mapping[str, Array], key: str, checkpoint: Path) -> int:
    """Return the number of output channels of a convolution of the analysis transform."""
    if key not in state:
        _refuse(checkpoint, f"it has no {key}")
    shape = state[key].shape
    if len(shape) != 4 or not 1 <= shape[0] <= LARGEST_WIDTH:
        _refuse(checkpoint, f"expected {key} of shape (1 to {LARGEST_WIDTH}, channels, 5, 5), got {shape}")
    return int(shape[0])


def _shapes(hidden: int, latent: int) -> dict[str, tuple[int, ...]]:
    """Return the parameters of CompressAI's `FactorizedPrior(hidden, latent)`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(ZOO_MODEL, {"hidden": hidden, "latent": latent}).items():
        part, _, parameter = name.partition(".")
        shapes[f"{_KEYS[part]}.{parameter}"] = shape
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(_DENSITY_WIDTHS)):
        shapes[f"entropy_bottleneck._matrix{layer}"] = (latent, outputs, inputs)
        shapes[f"entropy_bottleneck._bias{layer}"] = (latent, outputs, 1)
        if layer < len(_DENSITY_WIDTHS) - 2:
            shapes[f"entropy_bottleneck._factor{layer}"] = (latent, outputs, 1)
    return {**shapes, "entropy_bottleneck.quantiles": (latent, 1, 3)}


def _check(state: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], checkpoint: Path) -> None:
    """Refuse parameters that are missing, not finite, or of another shape, kind or network."""
    for key, shape in shapes.items():
        if key not in state:
            _refuse(checkpoint, f"it has no {key}")
        value = state[key]
        if value.shape != shape or value.dtype.kind != "f":
            _refuse(checkpoint, f"expected {key} as floats of shape {shape}, got {value.dtype} {value.shape}")
        if not np.isfinite(_single(value)).all():
            _refuse(checkpoint, f"{key} holds values that are not finite")
    for key in state:
        unknown = _CONVOLUTION_KEY.fullmatch(key) and key not in shapes
        if unknown or key.partition(".")[0] not in _MODULES:
            _refuse(checkpoint, f"it has {key}, which that model does not have")


def _plain(parameter: str, value: Array) -> Array:
    """Undo CompressAI's NonNegativeParametrizer: stored x means max(x, bound)^2 - pedestal."""
    if parameter not in ("beta", "gamma"):
        return _single(value)
    minimum = _BETA_MINIMUM if parameter == "beta" else 0.0
    bound = np.float32((minimum + _PEDESTAL) ** 0.5)
    with np.errstate(over="ignore"):
        return np.maximum(_single(value), bound) ** 2 - np.float32(_PEDESTAL)


def _single(value: Array) -> Array:
    """Return the value as float32, infinite if float32 can't hold it."""
    with np.errstate(over="ignore"):
        return value.astype(np.float32)


def _tables(state: Mapping[str, Array], medians: Array, checkpoint: Path) -> dict[str, Array]:
    if state.get(_CDF, np.empty(0)).size:
        channels = _stored_probabilities(state, len(medians), checkpoint)
    else:
        channels = [(row, -_LIMIT) for row in _probabilities(state, medians)]
    try:
        rows = [trimmed_frequencies(probability, first) for probability, first in channels]
    except CAEConfigurationError as error:
        _refuse(checkpoint, f"its entropy_bottleneck.* give no tables: {str(error).removeprefix('cae: ')}")
    return {
        "tables.minimum": np.array([[minimum for minimum, _ in rows]], np.int32),
        "tables.length": np.array([[len(frequency) for _, frequency in rows]], np.int32),
        "tables.frequency": np.concatenate([frequency for _, frequency in rows]).astype(np.uint16),
    }


def _stored_probabilities(state: Mapping[str, Array], latent: int, checkpoint: Path) -> list[tuple[Array, int]]:
    """Return bin probabilities and the first bin's symbol of each channel, from the checkpoint's integer tables."""
    for key, dimensions in {_CDF: 2, _CDF_LENGTH: 1, _OFFSET: 1}.items():
        if key not in state:
            _refuse(checkpoint, f"it has no {key}")
        value = state[key]
        if value.dtype.kind not in "iu" or value.ndim != dimensions or len(value) != latent:
            _refuse(checkpoint, f"expected {key} as integers of {latent} channels, got {value.dtype} {value.shape}")
    cdf, lengths, offsets = state[_CDF].astype(np.float64), state[_CDF_LENGTH], state[_OFFSET].astype(np.int64)
    if lengths.min() < 3 or lengths.max() > cdf.shape[1]:
        _refuse(checkpoint, f"expected {_CDF_LENGTH} of 3 to {cdf.shape[1]}, got {lengths.min()} to {lengths.max()}")
    rows = zip(cdf, lengths, offsets, strict=True)
    return [(np.diff(row[: length - 1]) / 65536, int(offset)) for row, length, offset in rows]


def _probabilities(state: Mapping[str, Array], medians: Array) -> Array:
    """Return bin probabilities (M, 2 limit + 1) of Ballé's density network (arXiv:1802.01436, section 6.1), float64."""
    edges = np.arange(-_LIMIT, _LIMIT + 2) - 0.5
    logits = (medians[:, None] + edges)[:, None, :]
    layers = len(_DENSITY_WIDTHS) - 1
    for layer in range(layers):
        matrix, bias = (state[f"entropy_bottleneck._{name}{layer}"].astype(np.float64) for name in ("matrix", "bias"))
        logits = np.logaddexp(0, matrix) @ logits + bias
        if layer < layers - 1:
            factor = state[f"entropy_bottleneck._factor{layer}"].astype(np.float64)
            logits = logits + np.tanh(factor) * np.tanh(logits)
    logits = logits[:, 0, :]
    lower_tail = logits[:, :-1] + logits[:, 1:] <= 0
    cdf, complement = _sigmoid(logits), _sigmoid(-logits)  # the smaller of the two keeps its digits
    return np.where(lower_tail, np.diff(cdf), -np.diff(complement))


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))
