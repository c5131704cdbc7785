"""CompressAI's `bmshj2018-factorized` checkpoints, converted once to weights files.

A checkpoint is the state dict that CompressAI publishes: GDN parameters under its square-root reparametrisation, the
density as a small monotone network, and usually the integer tables made from it. Conversion undoes the first and
keeps the last where they are there, so that everybody who converts the same checkpoint gets the same file.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_cae import weights
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.tables import trimmed_frequencies

Array = npt.NDArray[Any]
_PEDESTAL = 2.0**-36
_BETA_MINIMUM = 1e-6
_LIMIT = 1024
_ENTROPY_KEY = re.compile(r"entropy_bottleneck\._?(matri|bias|factor)(?:ces|x|es|s)?\.?(\d)$")
_CONVOLUTION_KEY = re.compile(r"(g_[as])\.(\d+)\.(weight|bias|beta|gamma)$")
_KINDS = {"matri": "matrix", "bias": "bias", "factor": "factor"}


def fetch(*, quality: int, metric: str) -> Path:
    """Download CompressAI's checkpoint for this configuration, convert it and put it into the cache folder.

    The address comes from CompressAI's own table, and the file's hash must begin as its name says. Returns the
    weights file. Raises CAEConfigurationError if compressai cannot be imported or the download fails.
    """
    try:
        from compressai.zoo.image import model_urls
    except Exception as error:  # a torchvision that does not match torch raises whatever it likes
        raise CAEConfigurationError(
            f"cae: the CompressAI zoo's addresses are read from compressai, which cannot be imported ({error}); "
            "install it with a matching torchvision, or get the checkpoint elsewhere and use "
            "`zarr-cae weights import FILE --quality Q --metric M`"
        ) from error
    import torch

    url: str = model_urls[weights.ZOO_MODEL][metric][quality]
    prefix = Path(url).name.split(".")[0].rsplit("-", 1)[1]
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / Path(url).name
        try:
            torch.hub.download_url_to_file(url, str(checkpoint), hash_prefix=prefix)
        except (OSError, RuntimeError) as error:
            raise CAEConfigurationError(f"cae: {url} could not be fetched: {error}") from error
        return weights.store(convert(checkpoint, quality=quality, metric=metric)).path


def convert(checkpoint: Path, *, quality: int, metric: str) -> bytes:
    """The bytes of a weights file made from a checkpoint (`torch.save`d or safetensors state dict).

    Raises CAEConfigurationError if it is not a state dict of `bmshj2018-factorized`.
    """
    content = checkpoint.read_bytes()
    state = _read(checkpoint)
    tensors: dict[str, Array] = {}
    density: dict[str, Array] = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        if found := _CONVOLUTION_KEY.fullmatch(name):
            part, index, parameter = found.groups()
            part = "analysis" if part == "g_a" else "synthesis"
            tensors[f"{part}.{index}.{parameter}"] = _plain(parameter, value)
        elif found := _ENTROPY_KEY.fullmatch(name):
            density[f"{_KINDS[found[1]]}{found[2]}"] = value.astype(np.float64)
        elif name.startswith("entropy_bottleneck."):
            density[name.removeprefix("entropy_bottleneck.")] = value
    try:
        hidden, latent = len(tensors["analysis.0.weight"]), len(tensors["analysis.6.weight"])
        medians = density["quantiles"][:, 0, 1].astype(np.float32)[None]
    except KeyError as error:
        raise CAEConfigurationError(
            f"cae: {checkpoint} is not a {weights.ZOO_MODEL} state dict: it has no {error}"
        ) from error
    tensors |= _tables(density, medians[0].astype(np.float64))
    ones = np.ones_like(medians)
    tensors |= {"gain": ones, "shift": medians, "step": ones, "offset": medians}
    return weights.pack(
        tensors,
        model=weights.ZOO_MODEL,
        metric=metric,
        qualities=(quality,),
        architecture={"hidden": hidden, "latent": latent},
        provenance={"source": "CompressAI zoo", "checkpoint_sha256": hashlib.sha256(content).hexdigest()},
    )


def _read(checkpoint: Path) -> Mapping[str, Array]:
    if checkpoint.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return dict(load_file(checkpoint))
    import pickle
    import struct

    import torch

    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, struct.error) as error:
        raise CAEConfigurationError(
            f"cae: {checkpoint} is not a checkpoint that holds only tensors: {error}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {key: value.numpy() for key, value in state.items() if isinstance(value, torch.Tensor)}


def _plain(parameter: str, value: Array) -> Array:
    """Undo CompressAI's NonNegativeParametrizer: stored x means max(x, bound)^2 - pedestal."""
    if parameter not in ("beta", "gamma"):
        return value.astype(np.float32)
    minimum = _BETA_MINIMUM if parameter == "beta" else 0.0
    bound = np.float32((minimum + _PEDESTAL) ** 0.5)
    return np.maximum(value, bound) ** 2 - np.float32(_PEDESTAL)


def _tables(density: Mapping[str, Array], medians: Array) -> dict[str, Array]:
    cdf = density.get("_quantized_cdf", np.empty(0))
    if cdf.size:
        lengths, offsets = density["_cdf_length"], density["_offset"]
        channels = [
            (np.diff(row[: length - 1].astype(np.float64)) / 65536, int(offset))
            for row, length, offset in zip(cdf, lengths, offsets, strict=True)
        ]
    else:
        channels = [(row, -_LIMIT) for row in _probabilities(density, medians)]
    rows = [trimmed_frequencies(probability, first) for probability, first in channels]
    return {
        "tables.minimum": np.array([[minimum for minimum, _ in rows]], np.int32),
        "tables.length": np.array([[len(frequency) for _, frequency in rows]], np.int32),
        "tables.frequency": np.concatenate([frequency for _, frequency in rows]).astype(np.uint16),
    }


def _probabilities(density: Mapping[str, Array], medians: Array) -> Array:
    """Bin probabilities (M, 2 limit + 1) of Ballé's density network (arXiv:1802.01436, section 6.1) in float64."""
    edges = np.arange(-_LIMIT, _LIMIT + 2) - 0.5
    logits = (medians[:, None] + edges)[:, None, :]
    layers = sum(name.startswith("matrix") for name in density)
    for layer in range(layers):
        matrix = density[f"matrix{layer}"]
        logits = np.logaddexp(0, matrix) @ logits + density[f"bias{layer}"]
        if layer < layers - 1:
            logits = logits + np.tanh(density[f"factor{layer}"]) * np.tanh(logits)
    logits = logits[:, 0, :]
    lower_tail = logits[:, :-1] + logits[:, 1:] <= 0
    cdf, complement = _sigmoid(logits), _sigmoid(-logits)  # whichever keeps its digits
    return np.where(lower_tail, np.diff(cdf), -np.diff(complement))


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))
