"""Find the weights and coder tables of caecodec's arrays, whose metadata name only quality and metric."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from zarr_cae.errors import CAEConfigurationError, WeightsNotFoundError
from zarr_cae.legacy.stream import CumulativeTables
from zarr_cae.weights import registry
from zarr_cae.weights.file import ZOO_MODEL, Weights, WeightsInfo, pack

__all__ = ["cumulative_tables", "find", "with_margin"]

_TENSORS = ("compressai.cumulative", "compressai.length", "compressai.offset")


def find(quality: int, metric: str, digest: str | None = None) -> WeightsInfo:
    """Return the imported weights that decode caecodec's arrays of this quality and metric.

    Parameters
    ----------
    quality, metric
        From the metadata of the array.
    digest
        `sha256:...` of the weights file; None if the metadata do not name it, as caecodec's never do.

    Raises
    ------
    WeightsNotFoundError
        If no such weights are on this machine.
    CAEConfigurationError
        If there are several: nothing tells which of them the array was written with.
    """
    if digest is not None:
        return registry.find(digest, model=ZOO_MODEL, quality=quality, metric=metric)
    known = [
        info
        for info in registry.available()
        if info.model == ZOO_MODEL and info.metric == metric and quality in info.qualities and not _has_margin(info)
    ]
    found = [info for info in known if len(known) == 1 or _has_tables(registry.load(info.path))]
    if not found:
        raise WeightsNotFoundError(
            f"cae: caecodec's array needs CompressAI's weights {ZOO_MODEL}, quality {quality}, metric {metric!r}, "
            "which are not on this machine; run `zarr-cae weights import FILE "
            f"--quality {quality} --metric {metric}` with the checkpoint, or `zarr-cae weights fetch "
            f"--quality {quality} --metric {metric}` where there is a network"
        )
    if len(found) > 1:
        names = ", ".join(str(info.path) for info in found)
        raise CAEConfigurationError(
            f"cae: caecodec's array needs the weights {ZOO_MODEL}, quality {quality}, metric {metric!r}, and there are "
            f"{len(found)} of them: {names}; its metadata do not say which, so leave only the right one there, or set "
            f"{registry.CACHE_VARIABLE} to a folder that holds only that"
        )
    return found[0]


def with_margin(weights: Weights) -> Weights:
    """Derive weights for caecodec's arrays whose chunks are decoded whole.

    Their networks continue a chunk by one reflected latent position on each side, as caecodec does. The file is stored
    beside the imported one. The same checkpoint always gives the same digest.
    """
    if _has_margin(weights.info):
        return weights
    info = weights.info
    content = pack(
        {name: tensor for name, tensor in weights.tensors.items() if name not in _TENSORS},
        model=info.model,
        metric=info.metric,
        qualities=info.qualities,
        architecture={**info.architecture, "margin": 1},
        provenance=info.provenance,
    )
    return registry.load(registry.store(content).path)


def _has_margin(info: WeightsInfo) -> bool:
    return bool(info.architecture.get("margin"))


def _has_tables(weights: Weights) -> bool:
    return all(name in weights.tensors for name in _TENSORS)


def cumulative_tables(weights: Weights) -> CumulativeTables:
    """Return the tables with which CompressAI codes latents.

    Raises CAEConfigurationError if the weights file does not have them, or they do not fit its networks.
    """
    return _tables(weights.info.path)


@lru_cache(maxsize=16)
def _tables(path: Path) -> CumulativeTables:
    weights = registry.load(path)
    if not _has_tables(weights):
        raise CAEConfigurationError(
            f"cae: weights file {path} has no tables of CompressAI's coder: its checkpoint had none, or an older "
            "zarr-cae imported it; import the checkpoint again, after `update()` of the model if it has no tables"
        )
    tables = CumulativeTables(*(weights.tensors[name] for name in _TENSORS))
    if tables.channels != weights.latent_channels:
        raise CAEConfigurationError(
            f"cae: weights file {path}: expected CompressAI's tables of {weights.latent_channels} channels, got "
            f"{tables.channels}; import the checkpoint again"
        )
    return tables
