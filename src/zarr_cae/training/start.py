"""Weights that training starts from: an exported file or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zarr_cae.errors import CAEConfigurationError, WeightsNotFoundError
from zarr_cae.training.model import RANGES, Range
from zarr_cae.training.trainer import Recipe, Trainer, read_checkpoint, trained_lambdas
from zarr_cae.weights import registry
from zarr_cae.weights.file import DEFAULT_MODEL, Metric, WeightsInfo


@dataclass(frozen=True)
class Start:
    """Weights to start from, and what they were trained for."""

    name: str
    """The digest, or the name of the checkpoint file."""
    rates: Range
    metric: Metric
    lambdas: tuple[float, ...]
    exported: WeightsInfo | None
    checkpoint: Path | None

    @classmethod
    def find(cls, source: str | Path) -> Start:
        """Find weights by `sha256:<digest>` or by the path of a checkpoint.

        Raises
        ------
        WeightsNotFoundError
            If no file on this machine has the digest.
        CAEConfigurationError
            If the file is not a checkpoint, or its network cannot be trained here.
        """
        if not str(source).startswith("sha256:"):
            path = Path(source)
            if not path.is_file():
                raise CAEConfigurationError(f"cae: {source} is neither sha256:<digest> nor a checkpoint file")
            recipe = Recipe(**read_checkpoint(path)["recipe"])
            return cls(path.name, recipe.rates, recipe.metric, recipe.lambdas, None, path)
        info = registry.find_digest(str(source))
        if info is None:
            raise WeightsNotFoundError(
                f"cae: weights {source} are not on this machine; see `zarr-cae weights list` for those that are"
            )
        rates = next((name for name, qualities in RANGES.items() if qualities == info.qualities), None)
        if rates is None or info.model != DEFAULT_MODEL:
            raise CAEConfigurationError(
                f"cae: weights {source} are of {info.model!r}; only {DEFAULT_MODEL!r} can be trained"
            )
        return cls(info.digest, rates, info.metric, trained_lambdas(info), info, None)

    def put_into(self, trainer: Trainer) -> None:
        """Give the network of a trainer these weights."""
        if self.exported is not None:
            trainer.start_from(registry.load(self.exported.path))
        elif self.checkpoint is not None:
            trainer.start_from_checkpoint(self.checkpoint)
