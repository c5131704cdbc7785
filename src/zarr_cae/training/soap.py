"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv:2409.11321, algorithm 3).

Convolution kernels, as tensors (outputs, inputs, taps), are rotated along each axis into the eigenbasis of the running
second moment of their gradient along that axis; there Adam scales them. Everything else has plain Adam.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Soap(torch.optim.Optimizer):
    """The optimiser. Groups may hold `rotate` (default False): whether their 4-axis parameters are rotated."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        every: int = 10,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "every": every, "rotate": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have gradients; the first call only sets up the bases."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        rotate = group["rotate"] and parameter.dim() == 4
        assert parameter.grad is not None
        gradient = parameter.grad.flatten(2) if rotate else parameter.grad
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
            if rotate:
                state["moments"] = [_moment(gradient, axis) for axis in range(3)]
                state["bases"] = [torch.linalg.eigh(moment)[1].flip(1) for moment in state["moments"]]
                return
        first, second = group["betas"]
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        turned, mean = gradient, state["mean"]
        if rotate:
            turned, mean = _turn(gradient, state["bases"]), _turn(mean, state["bases"])
        state["square"].mul_(second).addcmul_(turned, turned, value=1 - second)
        root = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        update = mean / root / (1 - first ** state["step"])
        if rotate:
            update = _turn(update, [basis.T for basis in state["bases"]]).reshape(parameter.shape)
        parameter.add_(update, alpha=-group["lr"])
        if rotate:
            for axis, moment in enumerate(state["moments"]):
                moment.lerp_(_moment(gradient, axis), 1 - second)
            if state["step"] % group["every"] == 0:
                _refresh(state)


def _moment(gradient: Tensor, axis: int) -> Tensor:
    """Return the second moment of (A, B, C) along an axis: (n, n)."""
    rows = gradient.movedim(axis, 0).flatten(1)
    return rows @ rows.T


def _turn(tensor: Tensor, bases: list[Tensor]) -> Tensor:
    """Multiply each axis by its basis. Each product moves its axis to the end, so three products restore the order."""
    for basis in bases:
        tensor = torch.tensordot(tensor, basis, dims=([0], [0]))
    return tensor


def _refresh(state: dict[str, Any]) -> None:
    """Take one step of power iteration on each basis, sorted by falling eigenvalue because QR needs that order."""
    for axis, (moment, basis) in enumerate(zip(state["moments"], state["bases"], strict=True)):
        order = torch.einsum("ij,ik,kj->j", basis, moment, basis).argsort(descending=True)
        state["square"] = state["square"].index_select(axis, order)
        state["bases"][axis] = torch.linalg.qr(moment @ basis[:, order])[0]
