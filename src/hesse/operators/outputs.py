r"""What counts as the curvature of a loss by a model's output: scalars of the output with that Hessian.

Every matrix $J^T K J$ is the Gauss-Newton matrix of some loss: of the loss itself, or, for a sum of squared
gradients $\gamma_n$ of single samples, of $\tfrac12 \sum_n (\gamma_n^T z_n)^2$ with the gradients held fixed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesse.data.loss import AtOutput, Reduction
from hesse.errors import ArgumentError

Draw = Callable[[Tensor, torch.Generator], Tensor]
"""Targets drawn from what a model predicts, given its output."""


def itself(at: AtOutput) -> Tensor:
    """The loss: the Gauss-Newton matrix."""
    return at.loss(at.output)


def empirical(reduction: Reduction, at: AtOutput) -> Tensor:
    """Squared gradients at the targets of the data."""
    if reduction == "mean" and not at.told and len(at.output) != at.count:
        raise ArgumentError(
            f"the model's output has {len(at.output)} rows for {at.count} samples, so that what the gradient "
            f"of one is cannot be told; pass samples= to Loss, with the number that the mean is taken over"
        )
    return _squares(at, _slopes(at, at.targets), at.count if reduction == "mean" else 1)


def sampled(reduction: Reduction, draw: Draw, seed: int, at: AtOutput) -> Tensor:
    """Squared gradients at drawn targets.

    Of a mean over several outputs of a sample as well, every one counts less, and so does its square: to have
    the Gauss-Newton matrix for its expectation, it is scaled by what one counts, not by the square of that.
    """
    z = at.output.detach()
    drawn = draw(z, torch.Generator(z.device).manual_seed(hash((seed, at.number)) % 2**63))
    if drawn.shape == getattr(at.targets, "shape", None) and not at.targets.is_floating_point():
        drawn = torch.where(at.targets == _IGNORED, at.targets, drawn)
    counted = drawn.numel() if drawn.is_floating_point() else int((drawn != _IGNORED).sum())
    return _squares(at, _slopes(at, drawn), counted if reduction == "mean" else 1)


_IGNORED = -100
"""The class that torch's cross entropy leaves out."""


def _slopes(at: AtOutput, targets: Any) -> Tensor:
    """The gradient of the loss by the output."""
    with torch.enable_grad():
        z = at.output.detach().requires_grad_()
        (found,) = torch.autograd.grad(at.loss(z, targets), [z])
    return found


def _squares(at: AtOutput, slopes: Tensor, scale: int) -> Tensor:
    """Half the squares of the output along the gradient of every sample, a row.

    `scale`: the gradient of a mean holds one part in so many of that of every sample.
    """
    along = slopes * at.output
    rows = along.flatten(1).sum(1) if along.dim() > 1 else along
    return 0.5 * scale * rows.square().sum()


def likelihood_of(loss_fn: Any) -> Draw:
    """How targets are drawn for a loss that is known to be a negative log-likelihood.

    Raises:
        ArgumentError: it is not known.
    """
    keywords: dict[str, Any] = {}
    while isinstance(loss_fn, functools.partial):
        keywords = {**loss_fn.keywords, **keywords}
        loss_fn = loss_fn.func
    for function, module, draw, plain in _KNOWN:
        if loss_fn is function or isinstance(loss_fn, module):
            for name, value in plain.items():
                met = keywords.get(name, getattr(loss_fn, name, value))
                if met != value:
                    raise ArgumentError(
                        f'loss_fn with {name}={met} is no log-likelihood; use kind="empirical"'
                    )
            return draw
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    raise ArgumentError(
        f"loss_fn, {name}, is not known to be a negative log-likelihood (as are "
        f"{', '.join(function.__name__ for function, *_ in _KNOWN)})"
        f'; use kind="empirical", or GaussNewtonOperator'
    )


def _categories(z: Tensor, generator: torch.Generator) -> Tensor:
    classes = z.movedim(1, -1) if z.dim() > 1 else z
    drawn = torch.multinomial(classes.softmax(-1).reshape(-1, classes.shape[-1]), 1, generator=generator)
    return drawn.reshape(classes.shape[:-1])


def _normal(z: Tensor, generator: torch.Generator) -> Tensor:
    """Of variance one half, for which a squared error is the log-likelihood."""
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    return z + noise / 2**0.5


def _binary(z: Tensor, generator: torch.Generator) -> Tensor:
    return torch.bernoulli(z.sigmoid(), generator=generator)


def _counts(z: Tensor, generator: torch.Generator) -> Tensor:
    return torch.poisson(z.exp(), generator=generator)


_Known = tuple[Callable[..., Any], type[nn.Module], Draw, dict[str, Any]]
_KNOWN: tuple[_Known, ...] = (
    (
        F.cross_entropy,
        nn.CrossEntropyLoss,
        _categories,
        {"weight": None, "label_smoothing": 0.0, "ignore_index": _IGNORED},
    ),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, _binary, {"weight": None, "pos_weight": None}),
    (F.mse_loss, nn.MSELoss, _normal, {}),
    (F.poisson_nll_loss, nn.PoissonNLLLoss, _counts, {"log_input": True}),
)
