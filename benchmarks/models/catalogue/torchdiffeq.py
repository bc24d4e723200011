"""Neural differential equations of torchdiffeq, by the misfit of their paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from benchmarks.models.model import Catalogue, Problem, by_inputs, by_parameters

MODELS = Catalogue("torchdiffeq", ("torchdiffeq",))

_SIZE = 2


class _Field(nn.Module):
    """The slope of a path, by a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(_SIZE, 16), nn.Tanh(), nn.Linear(16, _SIZE))

    def forward(self, time: Tensor, state: Tensor) -> Tensor:
        return self.net(state)


def _misfit(solve: Callable[..., Tensor], **options: Any) -> Problem:
    field, start = _Field(), torch.randn(6, _SIZE)
    times, seen = torch.linspace(0, 1, 5), torch.randn(5, 6, _SIZE)

    def loss() -> Tensor:
        return (solve(field, start, times, **options) - seen).square().mean()

    return by_parameters(field, loss)


@MODELS.row("neural ODE by Runge and Kutta's method of steps that are fixed")
def rk4() -> Problem:
    return _misfit(odeint, method="rk4", options={"step_size": 0.125})


@MODELS.row("neural ODE by Dormand and Prince's method of steps that adapt")
def dopri5() -> Problem:
    return _misfit(odeint, method="dopri5", rtol=1e-6, atol=1e-8)


@MODELS.row("neural ODE by an implicit method of Adams")
def implicit_adams() -> Problem:
    return _misfit(odeint, method="implicit_adams", options={"step_size": 0.25})


@MODELS.row("neural ODE by its adjoint, whose gradient is computed without a graph")
def adjoint() -> Problem:
    return _misfit(odeint_adjoint, method="rk4", options={"step_size": 0.125})


@MODELS.row("misfit of a pendulum's path by its constants and start", "hessian", "inputs")
def pendulum() -> Problem:
    times, seen = torch.linspace(0, 4, 9), torch.randn(9, 2)

    def misfit(constants: Tensor, start: Tensor) -> Tensor:
        def slope(time: Tensor, state: Tensor) -> Tensor:
            angle, speed = state.unbind()
            return torch.stack([speed, -constants[0] * torch.sin(angle) - constants[1] * speed])

        return (odeint(slope, start, times, rtol=1e-6, atol=1e-8) - seen).square().mean()

    return by_inputs(misfit, torch.tensor([2.0, 0.1]), torch.tensor([1.0, 0.0]))
