"""How far approximate diagonals are from exact ones, and what they take beside one gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hesse
from benchmarks.cases import COMMON, DEEP_MLPS, RESIDUAL_CNNS, TRANSFORMER_2, Case
from benchmarks.measure import measure

CASES = tuple(
    case
    for case in (*COMMON, *DEEP_MLPS, *RESIDUAL_CNNS, TRANSFORMER_2)
    if case.name
    in ("tanh-mlp", "deep-mlp", "deep-relu", "cnn", "relu-resnet", "transformer", "transformer-2")
)
_EXACT, _GRADIENT = "hesse.hessian_diagonal", "one gradient"
_REPEATS = 9


def answer_approximate(case: Case, device: str, repeats: int | None) -> dict[str, Any]:
    """Time and quality of every kind, for one case."""
    func, tensors = case.problem(device)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    measured = measure(
        {
            f"hesse.approximate_diagonal, {kind}": partial(hesse.approximate_diagonal, func, tensors, kind)
            for kind in ("hesscale", "becker-lecun")
        }
        | {
            _EXACT: partial(hesse.hessian_diagonal, func, tensors),
            _GRADIENT: lambda: torch.autograd.grad(func(*leaves), leaves),
        },
        repeats or _REPEATS,
    )
    exact, contestants = measured[_EXACT].result, {}
    for who, found in measured.items():
        record = contestants[who] = {
            "seconds": found.seconds,
            "slowest": max(found.times),
            "gradients": found.seconds / measured[_GRADIENT].seconds,
        }
        if who not in (_EXACT, _GRADIENT):
            record |= quality(found.result, exact)
        shown = ", ".join(f"{key} {value:.3g}" for key, value in record.items())
        print(f"{'approximate':11} {case.name:15} {who:44} {shown}", flush=True)
    coordinates = sum(tensor.numel() for tensor in tensors)
    return {"description": case.description, "coordinates": coordinates, "contestants": contestants}


def quality(found: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """Error in norm, share of signs that are right, and rank correlation, over all coordinates."""
    one, other = (torch.cat([part.flatten().double() for part in parts]) for parts in (found, exact))
    return {
        "relative_error": ((one - other).norm() / other.norm()).item(),
        "right_signs": (one.sign() == other.sign()).double().mean().item(),
        "rank_correlation": torch.corrcoef(torch.stack([_ranks(one), _ranks(other)]))[0, 1].item(),
    }


def _ranks(values: Tensor) -> Tensor:
    """The mean rank of equal values for each."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[which]
