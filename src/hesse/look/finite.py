"""Find where a NaN or an infinity first appears."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hesse.look.evaluation import evaluate
from hesse.look.gradient import Gradient
from hesse.problem import Problem
from hesse.runtime.isolation import isolated


def is_finite(tensor: Tensor) -> bool:
    """Are all elements finite? By their sum, and by the extremes (NaN wins both) where that overflows."""
    if math.isfinite(tensor.detach().sum().item()):
        return True
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor.detach()))


def first_non_finite(problem: Problem, gradient: Gradient) -> str | None:
    """Say which is the first of inputs, calls, value and gradient that is not finite."""
    for name, tensor in zip(problem.names, problem.tensors, strict=True):
        if not is_finite(tensor):
            return f"{name} itself holds {_kind(tensor)}"
    if not is_finite(gradient.value):
        with isolated() as watch, _Finder() as finder:
            evaluate(problem, problem.leaves(), watch)
        where = f", first in the result of {finder.first}" if finder.first else ""
        return f"the value of func is {_kind(gradient.value)}{where}"
    for name, part in zip(problem.names, gradient.plain, strict=True):
        if part is not None and not is_finite(part):
            return f"the gradient by {name} holds {_kind(part)}, though the value is finite"
    return None


def _kind(tensor: Tensor) -> str:
    return "NaN" if bool(torch.isnan(tensor.detach()).any()) else "an infinity"


class _Finder(TorchFunctionMode):
    """Remembers the first call with a result that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.first is None:
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and not is_finite(leaf):
                    self.first = f"torch's {getattr(func, '__name__', func)}"
        return result
