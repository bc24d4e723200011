"""The covariance matrix of maximum-likelihood estimates."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hesse.data.loss import Loss
from hesse.data.problem import problem_of
from hesse.errors import ArgumentError
from hesse.operators.curvature import Curvature, FisherOperator
from hesse.problem import Problem

Scale = Literal["sum", "mean", "deviance"]


@dataclass(frozen=True)
class Covariance:
    """What is known of estimates; what `covariance` gives.

    Attributes:
        matrix: the covariance matrix [P, P].
        names: what its rows and columns are called, one for every coordinate.
        estimates: the params at which it was taken, in their container.
        standard_errors: the roots of its diagonal, in the same container.
    """

    matrix: Tensor
    names: tuple[str, ...]
    estimates: Any
    standard_errors: Any

    @property
    def correlation(self) -> Tensor:
        """The covariance over the standard errors of both, [P, P], with ones on the diagonal."""
        errors = self.matrix.diagonal().sqrt()
        return self.matrix / errors[:, None] / errors

    def interval(self, level: float = 0.95) -> tuple[Any, Any]:
        """The lower and the upper ends of Wald's confidence intervals, each in the container of the params.

        The estimate minus and plus its standard error times a quantile of the normal distribution, 1.96 for
        the level 0.95; every coordinate by itself.

        Raises:
            ArgumentError: the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ArgumentError(f"level must be between 0 and 1, say 0.95, met {level!r}")
        quantile = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()
        lower, upper = (
            pytree.tree_map(lambda x, e, q=q: x + q * e, self.estimates, self.standard_errors)
            for q in (-quantile, quantile)
        )
        return lower, upper


def covariance(
    nll: Callable[..., Tensor] | Loss,
    params: Any = None,
    *,
    scale: Scale | None = None,
    samples: int | None = None,
    kind: Literal["hessian", "sandwich"] = "hessian",
    memory: int | str | None = None,
) -> Covariance:
    r"""The covariance matrix of maximum-likelihood estimates, the inverse of the observed information.

    With $\ell_n$ the negative log-likelihood of observation n, and at the estimates
    $H = \sum_n \nabla^2 \ell_n$, it is

    $$C = H^{-1}, \qquad \text{or} \qquad C = H^{-1} \Big(\sum_n \nabla\ell_n \nabla\ell_n^T\Big) H^{-1}$$

    for kind "sandwich", which also holds where the model is not the true one. The sums are over observations;
    what `nll` gives may be on another scale, which therefore has to be stated. The units are those of the
    params squared. A penalty in `nll` counts as prior knowledge. That the Hessian is positive
    definite is checked, that the gradient is zero is not.

    Args:
        nll: a negative log-likelihood, but for a constant: a function, or closure, of `params`, see
            `hessian`; or a `Loss`.
        params: the estimates: a tensor, or a tuple, list or dict of tensors. Not with a `Loss`.
        scale: what `nll` gives: the "sum" over observations, as above; their "mean"; or the "deviance", twice
            the sum. Not with a `Loss`, which knows its reduction and the number of samples. A sum of squared
            residuals is none of them: divide it by twice their variance, known or estimated as the sum over
            N - P, for a "sum".
        samples: the number of observations N, with a "mean".
        kind: "hessian", or, of a `Loss`, "sandwich"; observations are then the rows of the model's output.
        memory: see `hessian`.

    Returns:
        A `Covariance` with `.matrix`, `.names`, `.standard_errors`, `.correlation` and `.interval(level)`.
        Inverses are taken in double precision and given in the dtype of the params.

    Raises:
        HesseError: `ArgumentError` where the scale is not stated, or where the Hessian is not positive
            definite: the data do not determine the params, or these are no minimum. See `hessian` for others.

    Source: B. Efron, D. V. Hinkley, "Assessing the accuracy of the maximum likelihood estimator: observed
    versus expected Fisher information", Biometrika 65 (1978); H. White, "Maximum likelihood estimation of
    misspecified models", Econometrica 50 (1982), for the sandwich.

    Example:
        >>> import torch, hesse
        >>> counts = torch.tensor([3.0, 5.0, 4.0, 8.0])
        >>> nll = lambda p: (p["rate"] - counts * p["rate"].log()).sum()  # Poisson, fitted by the mean
        >>> fit = hesse.covariance(nll, {"rate": counts.mean()}, scale="sum")
        >>> fit.standard_errors  # the root of the mean over N
        {'rate': tensor(1.1180)}
        >>> lower, upper = fit.interval(0.95)
        >>> print(f"{lower['rate']:.2f} to {upper['rate']:.2f}")
        2.81 to 7.19
    """
    if kind not in ("hessian", "sandwich"):
        raise ArgumentError(f'kind must be "hessian" or "sandwich", met {kind!r}')
    factor = _factor(nll, scale, samples)
    if kind == "sandwich" and not isinstance(nll, Loss):
        raise ArgumentError('kind="sandwich" needs the gradient of every observation; pass a Loss as nll')
    problem = problem_of(nll, params, argument="params")
    if not problem.tensors:
        raise ArgumentError("params holds no tensor; pass at least one estimate")
    information = Curvature(problem, memory, None)
    H = factor * information.to_dense().double()
    names = _coordinates(problem)
    matrix = _inverse((H + H.T) / 2, names, torch.finfo(information.dtype).eps)
    if isinstance(nll, Loss) and kind == "sandwich":
        matrix = (
            matrix @ (factor * FisherOperator(nll, "empirical", memory=memory).to_dense().double()) @ matrix
        )
    errors = matrix.diagonal().sqrt().split(problem.sizes)
    return Covariance(
        matrix.to(information.dtype),
        names,
        problem.pack([tensor.detach().clone() for tensor in problem.tensors]),
        problem.pack([e.view(t.shape).to(t.dtype) for e, t in zip(errors, problem.tensors, strict=True)]),
    )


def _factor(nll: Any, scale: Scale | None, samples: int | None) -> float:
    """What the objective is multiplied by to be the sum over observations."""
    if isinstance(nll, Loss):
        if scale is not None or samples is not None:
            raise ArgumentError("scale and samples must be left out with a Loss, which knows its own")
        if nll.loss_fn is torch.nn.functional.mse_loss or isinstance(nll.loss_fn, torch.nn.MSELoss):
            raise ArgumentError(
                "nll is a mean squared error, a log-likelihood for a variance of one half alone; divide the "
                "square by twice the variance: loss_fn=lambda z, y: F.mse_loss(z, y) / (2 * variance)"
            )
        return nll.samples if nll.reduction == "mean" else 1.0
    if scale not in ("sum", "mean", "deviance"):
        raise ArgumentError(
            f'scale must say what nll gives of the negative log-likelihood: its "sum" over observations, '
            f'their "mean" (with samples=N), or the "deviance", twice the sum; met {scale!r}'
        )
    if (scale == "mean") != (samples is not None) or (samples is not None and samples < 1):
        raise ArgumentError(
            f'samples must be the number of observations for scale="mean", and left out for others; met '
            f"samples={samples!r} with scale={scale!r}"
        )
    return {"sum": 1.0, "mean": samples or 1, "deviance": 0.5}[scale]


def _inverse(H: Tensor, names: tuple[str, ...], eps: float) -> Tensor:
    """The inverse, taken in units in which the diagonal is one.

    Raises:
        ArgumentError: the matrix is not positive definite, but for rounding.
    """
    if not torch.isfinite(H).all():
        raise ArgumentError("nll has a Hessian that is not finite at params; look for NaN in params and data")
    diagonal = H.diagonal()
    units = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    values, vectors = torch.linalg.eigh(units[:, None] * H * units)
    rounding = 10 * len(H) * eps
    if values[0] <= rounding:
        flat = values[0] >= -rounding
        along = _combination(units * vectors[:, 0], names)
        raise ArgumentError(
            f"nll has a Hessian that is not positive definite at params: scaled to a unit diagonal it has "
            f"the eigenvalue {values[0]:.2g} along {along}; "
            + (
                "the data do not determine this combination (columns that depend on each other?): leave one "
                "of these out, or add a prior to nll"
                if flat
                else "params are no minimum: go on with the fit, with hesse.Objective say"
            )
        )
    scaled = units[:, None] * vectors
    found: Tensor = scaled / values @ scaled.T
    return found


def _combination(direction: Tensor, names: tuple[str, ...]) -> str:
    """The largest parts of a direction, with one for the largest of all."""
    direction = direction / direction[direction.abs().argmax()]
    largest = [i for i in direction.abs().argsort(descending=True).tolist() if direction[i].abs() > 1e-3]
    parts = [f"{direction[i]:+.4g} {names[i]}" for i in largest[:6]]
    return " ".join([*parts, *(["..."] if len(largest) > len(parts) else [])])


def _coordinates(problem: Problem) -> tuple[str, ...]:
    """A name for every coordinate: that of its tensor, a key of a dict by itself, and an index."""
    plain = [re.sub(r"^params\['([^']*)'\]$", r"\1", name) for name in problem.names]
    return tuple(
        name + (str(list(index)) if index else "")
        for name, tensor in zip(plain, problem.tensors, strict=True)
        for index in product(*map(range, tensor.shape))
    )
