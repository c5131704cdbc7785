"""Small weights files that several test modules need."""

import numpy as np

from zarr_cae.weights import registry
from zarr_cae.weights.architecture import parameter_shapes
from zarr_cae.weights.file import pack

WIDTHS = {"quarter": 4, "quarter_hidden": 2, "eighth": 5, "eighth_hidden": 2, "latent": 3, "latent_hidden": 2}


def bundled(quality, metric="mse"):
    """Return the bundled weights for photographs."""
    digest = registry.default_digest("cae-v1", quality, metric)
    return registry.load(registry.find(digest, model="cae-v1", quality=quality, metric=metric).path)


def tiny(**changes) -> bytes:
    """Return a weights file for two qualities and three channels, without networks."""
    row = np.array([1, 4000, 50, 45], np.uint16)
    tensors = {name: np.ones((2, 3), np.float32) for name in ("gain", "shift", "step", "offset")}
    tensors |= {
        "tables.minimum": np.full((2, 3), -1, np.int32), "tables.length": np.full((2, 3), 4, np.int32),
        "tables.frequency": np.tile(row, 6),
    }  # fmt: skip
    keywords = {
        "model": "cae-v1",
        "metric": "mse",
        "qualities": (1, 2),
        "name": None,
        "architecture": {},
        "provenance": {},
    }
    for name, value in changes.items():
        if name in keywords:
            keywords[name] = value
        elif value is None:
            del tensors[name.replace("__", ".")]
        else:
            tensors[name.replace("__", ".")] = value
    return pack(tensors, **keywords)


def contexts(**changes):
    """Return the tensors of contexts with two sources and one class, for `tiny`."""
    arrays = {
        "source": np.array([[[-1, -1], [0, -1], [0, 1]]] * 2, np.int16), "weight": np.full((2, 3, 2), 100, np.uint8),
        "threshold": np.empty((2, 3, 0), np.uint16), "predicted": np.array([[1, 0, 0]] * 2, np.uint8),
        "zero": np.full((2, 3), 4000, np.uint16),
    }  # fmt: skip
    return {f"contexts__{name}": value for name, value in {**arrays, **changes}.items()}


def networks(**changes):
    """Return the architecture and the parameters of networks with three latent channels, for `tiny`."""
    shapes = parameter_shapes("cae-v1", WIDTHS)
    tensors = {name: np.full(shape, 0.01, np.float16) for name, shape in shapes.items()}
    return {"architecture": WIDTHS, **tensors, **changes}
