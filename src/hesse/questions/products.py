"""Products of the Hessian with a vector: one pass each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesse.data.loss import Loss
from hesse.data.problem import problem_of
from hesse.errors import ArgumentError
from hesse.look.learned import Learned
from hesse.look.meter import Meter
from hesse.planning.plan import Estimate, Plan, Share
from hesse.problem import Problem
from hesse.products import Practice, differentiable, multiplied
from hesse.runtime.memory import Budget
from hesse.runtime.progress import ProgressOption
from hesse.runtime.random_state import random_state_kept
from hesse.runtime.total import total


def hvp(
    func: Callable[..., Tensor] | Loss,
    inputs: Any = None,
    v: Any = None,
    create_graph: bool = False,
    strict: bool = False,
    *,
    method: Plan | str = "auto",
    memory: int | str | None = None,
    progress: ProgressOption = None,
    flat: bool = False,
) -> Any:
    r"""The product of the Hessian with a vector, $H v$, by one double backward; or with many vectors.

    Args:
        func: `func(*inputs)` or a closure `func()`, see `hessian`.
        inputs: a tensor, or a tuple, list or dict of tensors, nested as you like.
        v: the vector, in the same container as `inputs`, with as many elements in every tensor. Many vectors
            have one more dimension in front, [k, *shape], of the same k for all tensors, and share the
            function's evaluation; they are taken in batches. May be left out where there is a single element.
        create_graph: make a result that can be differentiated again.
        strict: see `hessian`; without it, an input that does not influence the output, or (closure form)
            does not require grad, has a product of zero.
        method: a plan by `hesse.plan("hvp", func, inputs)`. Of a function that needs no isolation (it draws
            no random numbers, changes nothing in place and calls nothing that torch cannot differentiate
            twice) the plan remembers that, which a loop of products over a small function pays for only once.
        memory: budget for the batches of many vectors, see `hessian`.
        progress: see `hessian`; for many vectors.
        flat: `v` is a vector [P], or many as [k, P], with the coordinates in the order of the inputs, and so
            is the answer.

    Returns:
        $H v$ in the container of `inputs`, for many vectors with the dimension in front. The function's
        value is not returned with it, other than by `torch.autograd.functional.hvp`.

    Raises:
        HesseError: see `hessian`.

    Source: B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).

    Example:
        >>> import torch, hesse
        >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
        >>> hesse.hvp(lambda x: x[0] ** 2 * x[1], x, v)
        tensor([4., 2.])
        >>> hesse.hvp(lambda x: x[0] ** 2 * x[1], x, torch.eye(2))
        tensor([[4., 2.],
                [2., 0.]])
    """
    problem, v = _asked(func, inputs, v)
    if v is None:
        v = problem.pack(_one(problem))
    elif flat:
        v = problem.split("v", v)
    vectors, count = problem.unpack_many("v", v)
    found = multiplied(
        problem, vectors, count, create_graph, strict, memory, progress, Practice(_learned(problem, method))
    )
    return problem.flat(found, lead=int(count is not None)) if flat else problem.pack(found)


def second_directional_derivative(
    func: Callable[..., Tensor] | Loss,
    inputs: Any = None,
    v: Any = None,
    create_graph: bool = False,
    *,
    method: Plan | str = "auto",
) -> Tensor:
    r"""The second derivative along a direction, $v^T H v = \mathrm{d}^2 f(x + h v)/\mathrm{d}h^2$ at $h=0$.

    The direction is not normalised: twice the vector gives four times the result.

    Args:
        func: `func(*inputs)` or a closure `func()`, see `hessian`.
        inputs: a tensor, or a tuple, list or dict of tensors, nested as you like.
        v: the direction, in the same container and shapes as `inputs`.
        create_graph: make a result that can be differentiated again.
        method: see `hvp`.

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
    problem, v = _asked(func, inputs, v)
    vectors = problem.unpack("v", v)
    practice = Practice(_learned(problem, method))
    products = multiplied(problem, vectors, None, create_graph, practice=practice)
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


def plan_of_product(problem: Problem, memory: int | str | None) -> Plan:
    """What one product takes, and whether the function needs isolation."""
    if not problem.tensors:
        return Plan.of_nothing("product")
    shares = tuple(
        Share(name, tensor.shape, tensor.dtype, "dense", "by a double backward")
        for name, tensor in zip(problem.names, problem.tensors, strict=True)
    )
    size = sum(tensor.nbytes for tensor in problem.tensors)
    if problem.summands is not None:
        with random_state_kept():
            problem = next(iter(problem.summands)).problem
    practice = Practice()
    with differentiable(problem, False, False, practice) as gradient:
        meter = Meter(gradient, Budget(memory, problem.tensors[0].device), size)
        last = max(map(gradient.made, range(len(problem.tensors))))
        cost = meter.products(1, 0, last, meter.column, limit=1)
    known = practice.learned
    return Plan(
        question="product",
        method="dense",
        reason="a double backward" + (", without isolation" if known and known.plain is not None else ""),
        passes=1,
        check_passes=0,
        flops=cost.flops,
        peak_bytes=size + cost.bytes,
        answer_bytes=size,
        seconds=cost.seconds + meter.product,
        estimates=(Estimate("dense", None, 1, cost.flops, size + cost.bytes, cost.seconds + meter.product),),
        shares=shares,
        learned=known,
    )


def _asked(func: Any, inputs: Any, v: Any) -> tuple[Problem, Any]:
    """The problem, and the vector; of a loss over data, which knows its inputs, that comes second."""
    if isinstance(func, Loss) and v is None:
        return problem_of(func, None), inputs
    return problem_of(func, inputs), v


def _learned(problem: Problem, method: Plan | str) -> Learned | None:
    """What a plan knows of the function."""
    if isinstance(method, Plan):
        method.require_fit("product", problem)
        return method.learned
    if method not in ("auto", "dense"):
        raise ArgumentError(f'method must be "auto", "dense" or a Plan for products, met {method!r}')
    return None
