"""Normalizing flows of nflows, by their negative log likelihood."""

from __future__ import annotations

import torch
from nflows import distributions, flows, transforms
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.model import Catalogue, Problem, by_parameters

MODELS = Catalogue("nflows", ("nflows",))

_FEATURES = 4


def _likelihood(flow: nn.Module, train: bool = False) -> Problem:
    x = torch.randn(16, _FEATURES)

    def loss() -> Tensor:
        return -flow.log_prob(x).mean()

    return by_parameters(flow, loss, train)


@MODELS.row("masked autoregressive flow, with residual blocks")
def maf() -> Problem:
    return _likelihood(flows.MaskedAutoregressiveFlow(_FEATURES, 16, 2, 1, activation=torch.tanh))


@MODELS.row("RealNVP with batch norm, in training")
def realnvp() -> Problem:
    flow = flows.SimpleRealNVP(
        _FEATURES, 16, 2, 1, activation=F.elu, batch_norm_within_layers=True, batch_norm_between_layers=True
    )
    return _likelihood(flow, train=True)


@MODELS.row("rational quadratic splines, with a linear map by its LU decomposition")
def spline() -> Problem:
    layers = [
        transforms.LULinear(_FEATURES),
        transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            _FEATURES, 16, num_bins=4, tails="linear", tail_bound=3.0, num_blocks=1, activation=torch.tanh
        ),
        transforms.SVDLinear(_FEATURES, num_householder=2),
    ]
    return _likelihood(
        flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([_FEATURES]))
    )
