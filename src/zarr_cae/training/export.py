"""From a trained network to a weights file: half-precision parameters, gains, contexts and integer tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zarr_cae.coder.header import LARGEST_SYMBOL
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.training.model import GainedAutoencoder
from zarr_cae.training.tables import fit_tables
from zarr_cae.weights.file import DEFAULT_MODEL, Metric, Weights, pack


@torch.no_grad()
def export(
    model: GainedAutoencoder,
    metric: Metric,
    provenance: Mapping[str, Any],
    images: Iterable[Tensor],
    name: str | None = None,
) -> bytes:
    """Return the bytes of a weights file of a trained network. `weights.registry.store` writes it.

    The contexts and integer tables are fitted to the symbols of `images`, some hundreds or more, each float32
    (1, 3, H, W) in [0, 1], sides multiples of 16 and at most 512, so that it is one tile.
    """
    model.to("cpu")
    tensors: dict[str, npt.NDArray[Any]] = {
        f"{part}.{key}": value.numpy().astype(np.float16)
        for part, module in (("analysis", model.analysis), ("synthesis", model.synthesis))
        for key, value in module.state_dict().items()
    }
    gain = model.log_gain.exp()
    tensors["gain"], tensors["shift"] = gain.numpy(), np.zeros_like(gain.numpy())
    step = model.log_step.exp().numpy()
    tensors["step"], tensors["offset"] = step, np.zeros_like(step)
    latents = [model.analysis(image)[0] for image in images]
    predicted = model.density.predicted.bool().numpy()
    fitted = []
    for row, mix in zip(gain[:, :, None, None], model.density.mix, strict=True):
        rounded = [(values * row).round().clamp(-LARGEST_SYMBOL, LARGEST_SYMBOL).short() for values in latents]
        fitted.append(fit_tables([tile.numpy() for tile in rounded], predicted, mix.numpy()))
    for kind in ("minimum", "length"):
        tensors[f"tables.{kind}"] = np.stack([getattr(own, kind) for own in fitted])
    tensors["tables.frequency"] = np.concatenate([own.frequency for own in fitted])
    for kind in ("source", "weight", "threshold", "predicted", "zero"):
        stacked = np.stack([getattr(own.contexts, kind) for own in fitted])
        tensors[f"contexts.{kind}"] = stacked.astype(np.uint8) if stacked.dtype == np.bool_ else stacked
    for part, value in model.density.state_dict().items():
        tensors[f"density.{part}"] = value.numpy().astype(np.float16)
    return pack(
        tensors,
        model=DEFAULT_MODEL,
        metric=metric,
        qualities=model.qualities,
        architecture=asdict(model.widths),
        provenance=provenance,
        name=name,
    )


@torch.no_grad()
def restore(model: GainedAutoencoder, exported: Weights) -> None:
    """Load the network that `export` wrote, to train it on. Raises CAEConfigurationError if it is of another form."""
    info = exported.info
    if info.model != DEFAULT_MODEL or info.qualities != model.qualities:
        raise CAEConfigurationError(
            f"cae: weights {info.digest} are of {info.model!r} for qualities {list(info.qualities)}; training goes on "
            f"from {DEFAULT_MODEL!r} for qualities {list(model.qualities)}"
        )
    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in exported.tensors.items()}
    state = {name: value for name, value in tensors.items() if name.startswith(("analysis.", "synthesis.", "density."))}
    state |= {"log_gain": tensors["gain"].log(), "log_step": tensors["step"].log()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CAEConfigurationError(f"cae: weights {info.digest} do not fit the network: {error}") from error
