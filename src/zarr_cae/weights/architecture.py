"""The parameters of each kind of network, by name and shape, known without torch.

With these, a weights file is checked from its header alone, before the header decides how much memory is allocated.
`networks/transforms.py` holds the networks themselves; a test compares the two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

Shape = tuple[int, ...]

LARGEST_WIDTH = 1024
"""Largest number of channels of a layer in a weights file. The bundled networks have at most 320."""

LARGEST_MARGIN = 2
"""Largest number of latent positions by which a network may continue its planes; it has no parameters."""


def parameter_shapes(model: str, architecture: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shape of each parameter of a pair of networks.

    Parameters
    ----------
    model
        "cae-v1" or "bmshj2018-factorized".
    architecture
        The number of channels of each layer: the fields of `networks.transforms.Widths`, or `hidden` and `latent`.
        "bmshj2018-factorized" may also have `margin`, the latent positions by which planes are continued: 0 to 2.

    Returns
    -------
    dict
        Shapes by the names that the parameters have in weights files, such as "analysis.conv1.weight".

    Raises
    ------
    ValueError
        If the architecture has other fields, or a number of channels is not an integer from 1 to 1024.
    """
    fields, make = _MODELS[model]
    architecture = dict(architecture)
    margin = architecture.pop("margin", 0) if model == "bmshj2018-factorized" else 0
    if type(margin) is not int or not 0 <= margin <= LARGEST_MARGIN:
        raise ValueError(f"margin must be an integer from 0 to {LARGEST_MARGIN}, got {margin!r:.40}")
    if set(architecture) != set(fields):
        raise ValueError(f"expected the fields {', '.join(fields)}, got {', '.join(map(str, architecture)) or 'none'}")
    for name, width in architecture.items():
        if type(width) is not int or not 1 <= width <= LARGEST_WIDTH:
            raise ValueError(f"{name} must be an integer from 1 to {LARGEST_WIDTH}, got {width!r:.40}")
    return make(**architecture)


def _cae_shapes(
    *, quarter: int, quarter_hidden: int, eighth: int, eighth_hidden: int, latent: int, latent_hidden: int
) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for part in ("analysis", "synthesis"):
        for name, fine, coarse, stride in (("1", 3, quarter, 4), ("2", quarter, eighth, 2), ("3", eighth, latent, 2)):
            # The kernel of a transposed convolution has its inputs first, so that both parts have the same shape.
            shapes[f"{part}.conv{name}.weight"] = (coarse, fine, 2 * stride, 2 * stride)
            shapes[f"{part}.conv{name}.bias"] = (coarse if part == "analysis" else fine,)
        for name, width, hidden in (
            ("1", quarter, quarter_hidden), ("2", eighth, eighth_hidden), ("3", latent, latent_hidden),
        ):  # fmt: skip
            shapes[f"{part}.residual{name}.reduce.weight"] = (hidden, width, 3, 3)
            shapes[f"{part}.residual{name}.reduce.bias"] = (hidden,)
            shapes[f"{part}.residual{name}.expand.weight"] = (width, hidden, 3, 3)
            shapes[f"{part}.residual{name}.expand.bias"] = (width,)
        for name, width in (("1", quarter), ("2", eighth)):
            shapes[f"{part}.gdn{name}.beta"] = (width,)
            shapes[f"{part}.gdn{name}.gamma"] = (width, width)
    return shapes


def _factorized_shapes(*, hidden: int, latent: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for part, widths in (
        ("analysis", (3, hidden, hidden, hidden, latent)),
        ("synthesis", (latent, hidden, hidden, hidden, 3)),
    ):
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            ends = (outputs, inputs) if part == "analysis" else (inputs, outputs)
            shapes[f"{part}.{2 * layer}.weight"] = (*ends, 5, 5)
            shapes[f"{part}.{2 * layer}.bias"] = (outputs,)
        for layer in (1, 3, 5):
            shapes[f"{part}.{layer}.beta"] = (hidden,)
            shapes[f"{part}.{layer}.gamma"] = (hidden, hidden)
    return shapes


_MODELS: dict[str, tuple[tuple[str, ...], Callable[..., dict[str, Shape]]]] = {
    "cae-v1": (
        ("quarter", "quarter_hidden", "eighth", "eighth_hidden", "latent", "latent_hidden"), _cae_shapes,
    ),
    "bmshj2018-factorized": (("hidden", "latent"), _factorized_shapes),
}  # fmt: skip
