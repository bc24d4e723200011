"""Normalizing flows of zuko, by the negative log likelihood of points of a plane."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import zuko
from torch import Tensor, nn

from benchmarks.models.model import Catalogue, Problem, by_parameters

MODELS = Catalogue("zuko", ("zuko",))

_FEATURES = 3


def _likelihood(make: Callable[[], nn.Module], points: int, train: bool) -> Problem:
    flow, x = make(), torch.randn(points, _FEATURES)

    def loss() -> Tensor:
        return -flow().log_prob(x).mean()

    return by_parameters(flow, loss, train)


def _row(name: str, what: str, make: Callable[[], nn.Module], points: int = 16, train: bool = False) -> None:
    MODELS.put(name, what, partial(_likelihood, make, points, train))


_SMOOTH = {"hidden_features": (16, 16), "activation": nn.Tanh}

_row("maf", "masked autoregressive flow", partial(zuko.flows.MAF, _FEATURES, transforms=2, **_SMOOTH))
_row("nsf", "neural spline flow", partial(zuko.flows.NSF, _FEATURES, bins=4, transforms=2, **_SMOOTH))
_row(
    "realnvp",
    "RealNVP, by ReLU networks",
    partial(zuko.flows.RealNVP, _FEATURES, transforms=2, hidden_features=(16, 16)),
)
_row("nice", "NICE", partial(zuko.flows.NICE, _FEATURES, transforms=2, **_SMOOTH))
_row("sospf", "sum of squares polynomial flow", partial(zuko.flows.SOSPF, _FEATURES, transforms=2, **_SMOOTH))
_row(
    "bpf",
    "Bernstein polynomial flow",
    partial(zuko.flows.BPF, _FEATURES, degree=5, transforms=2, **_SMOOTH),
)
_row("gf", "Gaussianization flow", partial(zuko.flows.GF, _FEATURES, transforms=2, **_SMOOTH))
_row(
    "naf",
    "neural autoregressive flow",
    partial(zuko.flows.NAF, _FEATURES, transforms=1, signal=4, network={"hidden_features": (8,)}, **_SMOOTH),
)
_row(
    "cnf",
    "continuous flow by its adjoint, whose gradient is computed without a graph",
    partial(zuko.flows.CNF, _FEATURES, hidden_features=(8,), activation=nn.Tanh),
    4,
    train=True,  # by no parameters otherwise
)
