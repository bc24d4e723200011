"""Surrogates and acquisition functions of BoTorch."""

from __future__ import annotations

import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

from benchmarks.models.model import Catalogue, Problem, by_inputs

MODELS = Catalogue("botorch", ("botorch", "gpytorch", "linear-operator"))

_POINTS, _INPUTS = 20, 4


def _surrogate() -> tuple[SingleTaskGP, Tensor, Tensor]:
    """A surrogate, the best value and where it is."""
    x = torch.rand(_POINTS, _INPUTS)
    y = torch.sin(5 * x.sum(-1, keepdim=True)) + 0.1 * torch.randn(_POINTS, 1)
    model = SingleTaskGP(x, y, input_transform=Normalize(_INPUTS), outcome_transform=Standardize(1))
    return model, y.max(), x[y.argmax()]


@MODELS.row("posterior of a surrogate's hyperparameters", "hessian", "hyperparameters")
def surrogate() -> Problem:
    model, *_ = _surrogate()
    marginal = ExactMarginalLogLikelihood(model.likelihood, model)

    def loss() -> Tensor:
        return -marginal(model(*model.train_inputs), model.train_targets)

    # Its scales have no transform that would keep them positive, so that no noise is put on them.
    model.train()
    return Problem(loss, list(model.parameters()))


@MODELS.row("logarithm of the expected improvement by the next point", "hessian", "inputs")
def expected_improvement() -> Problem:
    model, best, place = _surrogate()
    acquisition = LogExpectedImprovement(model.eval(), best)
    return by_inputs(lambda x: acquisition(x[None]).sum(), place + 0.1 * torch.randn(_INPUTS))


@MODELS.row("expected improvement by the next 3 points, by quasi Monte Carlo", "hessian", "inputs")
def batch_improvement() -> Problem:
    model, best, place = _surrogate()
    sampler = SobolQMCNormalSampler(torch.Size([32]), seed=0)
    acquisition = qLogExpectedImprovement(model.eval(), best, sampler=sampler)
    return by_inputs(lambda x: acquisition(x[None]).sum(), place + 0.1 * torch.randn(3, _INPUTS))
