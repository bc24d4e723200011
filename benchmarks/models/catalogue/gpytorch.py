"""Gaussian processes of GPyTorch: marginal likelihoods by hyperparameters, and a variational bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gpytorch
import torch
from gpytorch import kernels
from gpytorch.distributions import MultivariateNormal
from torch import Tensor, nn

from benchmarks.models.model import Catalogue, Problem, by_parameters

MODELS = Catalogue("gpytorch", ("gpytorch", "linear-operator"))

_POINTS, _INPUTS = 40, 3


class _Exact(gpytorch.models.ExactGP):
    """An exact process with a linear mean."""

    def __init__(self, x: Tensor, y: Tensor, kernel: nn.Module) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module, self.covar_module = gpytorch.means.LinearMean(_INPUTS), kernel

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def _data() -> tuple[Tensor, Tensor]:
    x = torch.rand(_POINTS, _INPUTS)
    return x, torch.sin(4 * x.sum(-1)) + 0.2 * torch.randn(_POINTS)


def _marginal(make: Callable[[], nn.Module]) -> Problem:
    x, y = _data()
    model = _Exact(x, y, make())
    likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)

    def loss() -> Tensor:
        return -likelihood(model(x), y)

    return by_parameters(model, loss, train=True)


def _row(name: str, what: str, make: Callable[[], nn.Module]) -> None:
    MODELS.put(name, f"marginal likelihood, {what}", partial(_marginal, make), "hessian", "hyperparameters")


_row("rbf", "squared exponential", lambda: kernels.ScaleKernel(kernels.RBFKernel(ard_num_dims=_INPUTS)))
_row("matern", "Matern 5/2", lambda: kernels.ScaleKernel(kernels.MaternKernel(2.5, ard_num_dims=_INPUTS)))
_row(
    "sum",
    "periodic, rational quadratic and linear kernels combined",
    lambda: (
        kernels.ScaleKernel(kernels.PeriodicKernel())
        + kernels.ScaleKernel(kernels.RQKernel()) * kernels.LinearKernel()
    ),
)
_row("spectral-mixture", "spectral mixture", lambda: kernels.SpectralMixtureKernel(3, ard_num_dims=_INPUTS))


class _Deep(nn.Module):
    """A kernel on features that a network learns."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(_INPUTS, 8), nn.Tanh(), nn.Linear(8, 2))
        self.kernel = kernels.ScaleKernel(kernels.RBFKernel(ard_num_dims=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(self.features(x))


_row("deep-kernel", "squared exponential on learned features", _Deep)


@MODELS.row("marginal likelihood of two tasks", "hessian", "hyperparameters")
def multitask() -> Problem:
    x, y = _data()
    y = torch.stack([y, torch.cos(4 * x.sum(-1))], -1)
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2)

    class Tasks(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.MultitaskMean(gpytorch.means.ConstantMean(), num_tasks=2)
            self.covar_module = kernels.MultitaskKernel(kernels.RBFKernel(), num_tasks=2, rank=1)

        def forward(self, x: Tensor) -> MultivariateNormal:
            return gpytorch.distributions.MultitaskMultivariateNormal(
                self.mean_module(x), self.covar_module(x)
            )

    model = Tasks()
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)

    def loss() -> Tensor:
        return -marginal(model(x), y)

    return by_parameters(model, loss, train=True)


class _Variational(gpytorch.models.ApproximateGP):
    """A sparse process with a full covariance of its inducing values."""

    def __init__(self, points: Tensor) -> None:
        distribution = gpytorch.variational.CholeskyVariationalDistribution(len(points))
        super().__init__(gpytorch.variational.VariationalStrategy(self, points, distribution))
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = kernels.ScaleKernel(kernels.MaternKernel(2.5))

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


@MODELS.row("evidence bound of a sparse variational process that classifies", "hessian")
def variational() -> Problem:
    x, y = _data()
    model, likelihood = _Variational(x[:8].clone()), gpytorch.likelihoods.BernoulliLikelihood()
    model.train()
    model(x)  # the first call sets the variational mean, with noise
    bound = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=_POINTS)
    kinds = (y > 0).to(y.dtype)

    def loss() -> Tensor:
        return -bound(model(x), kinds)

    return by_parameters(model, loss, train=True)
