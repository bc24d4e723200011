"""Products of the Hessian with a vector: one pass each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hesse.differences import require_graph
from hesse.errors import ArgumentError, NonFiniteWarning, warn
from hesse.evaluation import evaluated, remark, require_deterministic, value_of
from hesse.finite import first_non_finite, is_finite
from hesse.gradient import Gradient, on_the_graph, require_influence
from hesse.problem import Problem, from_function
from hesse.questions.trace import total
from hesse.runtime.random_state import random_state_kept


def hvp(
    func: Callable[..., Tensor],
    inputs: Any,
    v: Any = None,
    create_graph: bool = False,
    strict: bool = False,
) -> Any:
    r"""The product of the Hessian with a vector, $H v$, by one double backward.

    Args:
        func: `func(*inputs)` or a closure `func()`, see `hessian`.
        inputs: a tensor, or a tuple, list or dict of tensors, nested as you like.
        v: the vector, in the same container and shapes as `inputs`.
        create_graph: make a result that can be differentiated again.
        strict: raise where an input does not influence the output (closure form: or does not
            require grad); without it its part of the product is zero.

    Returns:
        $H v$ in the container of `inputs`. The function's value is not returned with it, other than
        by `torch.autograd.functional.hvp`.

    Raises:
        HesseError: see `hessian`.

    Source: B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).

    Example:
        >>> import torch, hesse
        >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
        >>> hesse.hvp(lambda x: x[0] ** 2 * x[1], x, v)
        tensor([4., 2.])
    """
    problem = from_function(func, inputs)
    if v is None:
        v = problem.pack(_one(problem))
    return problem.pack(_product(problem, problem.unpack("v", v), create_graph, strict))


def second_directional_derivative(
    func: Callable[..., Tensor], inputs: Any, v: Any, create_graph: bool = False
) -> Tensor:
    r"""The second derivative along a direction, $v^T H v = \mathrm{d}^2 f(x + h v)/\mathrm{d}h^2$ at $h=0$.

    The direction is not normalised: twice the vector gives four times the result.

    Args:
        func: `func(*inputs)` or a closure `func()`, see `hessian`.
        inputs: a tensor, or a tuple, list or dict of tensors, nested as you like.
        v: the direction, in the same container and shapes as `inputs`.
        create_graph: make a result that can be differentiated again.

    Returns:
        A tensor without dimensions. Half precision is summed, and given back, in float32.

    Raises:
        HesseError: see `hessian`.

    Example:
        >>> import torch, hesse
        >>> x, v = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.0])
        >>> along = hesse.second_directional_derivative(lambda x: x.sin().sum(), x, v)
        >>> torch.allclose(along, -x[0].sin())
        True
    """
    problem = from_function(func, inputs)
    vectors = problem.unpack("v", v)
    products = _product(problem, vectors, create_graph, strict=False)
    wide = [torch.promote_types(vector.dtype, torch.float32) for vector in vectors]
    return total(
        [p.to(dtype) * vector.to(dtype) for p, vector, dtype in zip(products, vectors, wide, strict=True)]
    )


def _one(problem: Problem) -> list[Tensor]:
    """The vector of a function of a single number."""
    if problem.parameters != 1:
        raise ArgumentError(
            f"v can be left out only where the inputs hold a single element, met {problem.parameters:,}; "
            f"pass a vector shaped like the inputs"
        )
    return [torch.ones_like(tensor) for tensor in problem.tensors]


def _product(problem: Problem, vectors: Sequence[Tensor], create_graph: bool, strict: bool) -> list[Tensor]:
    everything = range(len(vectors))
    if not vectors:
        return []
    with random_state_kept() as random_numbers:
        with evaluated(problem, strict, create_graph) as evaluation:
            gradient = Gradient(evaluation)
            remark(evaluation)
            require_graph(problem, gradient, strict, once=True)
            if strict:
                require_influence(problem, gradient, curved=True)
            products = gradient.product(vectors, everything, everything, create_graph, last=True)
            if create_graph:
                products = on_the_graph(products, gradient.leaves)
            # A sum is the cheapest test; if it overflows, the second test finds nothing.
            if not math.isfinite(total(products).item()) and not all(map(is_finite, products)):
                trouble = first_non_finite(problem, gradient)
                warn(NonFiniteWarning, trouble or "the product holds a NaN or an infinity")
        if random_numbers.used:  # they may be what the function depends on (dropout)
            require_deterministic(gradient.value, value_of(problem))
    return products
