"""Posteriors of Pyro, by their unconstrained parameters."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from pyro import distributions as dist
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from benchmarks.models.model import Catalogue, Problem, by_inputs

MODELS = Catalogue("pyro", ("pyro-ppl",))


def _posterior(model: Callable[..., None], *data: Tensor) -> Problem:
    """The potential energy that Pyro gives to its samplers, by what it samples."""
    pyro.clear_param_store()
    start, potential, _, _ = initialize_model(model, data)
    names, points = list(start), [value.detach().clone() for value in start.values()]

    def energy(*values: Tensor) -> Tensor:
        return potential(dict(zip(names, values, strict=True)))

    return by_inputs(energy, *points)


@MODELS.row("posterior of the eight schools, effects by their standard scores", "hessian", "latents")
def eight_schools() -> Problem:
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(effects: Tensor, errors: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        spread = pyro.sample("spread", dist.HalfCauchy(torch.tensor(5.0)))
        with pyro.plate("schools", len(effects)):
            score = pyro.sample("score", dist.Normal(0.0, 1.0))
            pyro.sample("seen", dist.Normal(mean + spread * score, errors), obs=effects)

    return _posterior(model, effects, errors)


@MODELS.row("posterior of a regression with correlated groups", "hessian", "latents")
def correlated_groups() -> Problem:
    groups, x = torch.arange(60) % 6, torch.randn(60)
    y = 0.5 + x + 0.3 * torch.randn(60)

    def model(groups: Tensor, x: Tensor, y: Tensor) -> None:
        factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
        scales = pyro.sample("scales", dist.LogNormal(torch.zeros(2), torch.ones(2)).to_event(1))
        noise = pyro.sample("noise", dist.Exponential(torch.tensor(1.0)))
        degrees = pyro.sample("degrees", dist.Gamma(torch.tensor(2.0), torch.tensor(0.1)))
        with pyro.plate("groups", 6):
            lower = scales[:, None] * factor
            line = pyro.sample("line", dist.MultivariateNormal(torch.zeros(2), scale_tril=lower))
        with pyro.plate("points", len(x)):
            mean = line[groups, 0] + line[groups, 1] * x
            pyro.sample("seen", dist.StudentT(degrees + 2, mean, noise), obs=y)

    return _posterior(model, groups, x, y)


@MODELS.row("posterior of a mixture whose kinds are summed over", "hessian", "latents")
def mixture() -> Problem:
    points = torch.cat([torch.randn(20) - 2, torch.randn(20) + 2])

    @pyro.infer.config_enumerate
    def model(points: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("kinds", 3):
            means = pyro.sample("means", dist.Normal(0.0, 3.0))
            scales = pyro.sample("scales", dist.LogNormal(0.0, 0.5))
        with pyro.plate("points", len(points)):
            kind = pyro.sample("kind", dist.Categorical(shares))
            pyro.sample("seen", dist.Normal(means[kind], scales[kind]), obs=points)

    return _posterior(model, points)
