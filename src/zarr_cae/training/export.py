"""From a trained network to a weights file: half-precision parameters, gains and integer frequency tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zarr_cae import weights
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.tables import trimmed_frequencies
from zarr_cae.training.model import GainedAutoencoder

_WIDEST = 2047
"""Symbols beyond this are left to the escape whatever the density says."""


def integer_tables(probabilities: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[Any]]:
    """Trim and quantise bin probabilities (Q, M, 2 limit + 1) of the integers -limit to limit, once and for all."""
    limit = probabilities.shape[2] // 2
    rows = [[trimmed_frequencies(channel, -limit) for channel in quality] for quality in probabilities]
    return {
        "tables.minimum": np.array([[minimum for minimum, _ in row] for row in rows], np.int32),
        "tables.length": np.array([[len(frequency) for _, frequency in row] for row in rows], np.int32),
        "tables.frequency": np.concatenate([frequency for row in rows for _, frequency in row]).astype(np.uint16),
    }


@torch.no_grad()
def export(model: GainedAutoencoder, metric: weights.Metric, provenance: Mapping[str, Any]) -> bytes:
    """The bytes of the weights file of a trained network; put them in place with `weights.store`."""
    model = model.cpu()
    tensors: dict[str, npt.NDArray[Any]] = {
        f"{part}.{name}": value.numpy().astype(np.float16)
        for part, module in (("analysis", model.analysis), ("synthesis", model.synthesis))
        for name, value in module.state_dict().items()
    }
    gain = model.log_gain.exp().numpy()
    tensors["gain"], tensors["shift"] = gain, np.zeros_like(gain)
    step = model.log_step.exp().numpy()
    tensors["step"], tensors["offset"] = step, np.zeros_like(step)
    tensors |= integer_tables(model.density.probabilities(_WIDEST).numpy())
    for name, value in model.density.state_dict().items():
        tensors[f"density.{name}"] = value.numpy()
    return weights.pack(
        tensors,
        model=weights.DEFAULT_MODEL,
        metric=metric,
        qualities=model.qualities,
        architecture=asdict(model.widths),
        provenance=provenance,
    )


@torch.no_grad()
def restore(model: GainedAutoencoder, exported: weights.Weights) -> None:
    """Load the network that `export` wrote, to train it on. Raises CAEConfigurationError if it is of another form."""
    info = exported.info
    if info.model != weights.DEFAULT_MODEL or info.qualities != model.qualities:
        raise CAEConfigurationError(
            f"cae: weights {info.digest} are of {info.model!r} for qualities {list(info.qualities)}; training goes on "
            f"from {weights.DEFAULT_MODEL!r} for qualities {list(model.qualities)}"
        )
    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in exported.tensors.items()}
    state = {name: value for name, value in tensors.items() if name.startswith(("analysis.", "synthesis.", "density."))}
    state |= {"log_gain": tensors["gain"].log(), "log_step": tensors["step"].log()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CAEConfigurationError(f"cae: weights {info.digest} do not fit the network: {error}") from error
