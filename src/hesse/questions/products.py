"""Products of the Hessian with a vector: one pass each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hesse.checks.differences import require_graph
from hesse.errors import ArgumentError, NonFiniteWarning, warn
from hesse.look.evaluation import evaluated, evaluated_plainly, glanced, remark, require_deterministic
from hesse.look.finite import first_non_finite, is_finite
from hesse.look.gradient import Gradient, on_the_graph, require_influence
from hesse.look.learned import Learned
from hesse.look.meter import Meter
from hesse.planning.plan import Estimate, Plan, Share
from hesse.problem import Problem, from_function
from hesse.questions.trace import total
from hesse.runtime import random_state
from hesse.runtime.batches import stacks
from hesse.runtime.chunks import ChunkSize
from hesse.runtime.memory import Budget, bytes_per_column
from hesse.runtime.plain import plain_calls
from hesse.runtime.progress import Progress, ProgressOption
from hesse.runtime.random_state import random_state_kept
from hesse.runtime.room import Room


def hvp(
    func: Callable[..., Tensor],
    inputs: Any,
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
    problem = from_function(func, inputs)
    if v is None:
        v = problem.pack(_one(problem))
    elif flat:
        v = problem.split("v", v)
    vectors, count = problem.unpack_many("v", v)
    plain = None if create_graph or strict else _plain(problem, method)
    if count is None:
        products = _product(problem, vectors, create_graph, strict, plain)
    else:
        products = _products(problem, vectors, count, create_graph, strict, memory, progress)
    return problem.flat(products, lead=int(count is not None)) if flat else problem.pack(products)


def second_directional_derivative(
    func: Callable[..., Tensor],
    inputs: Any,
    v: Any,
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
    problem = from_function(func, inputs)
    vectors = problem.unpack("v", v)
    plain = None if create_graph else _plain(problem, method)
    products = _product(problem, vectors, create_graph, strict=False, plain=plain)
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
    with _differentiable(problem, create_graph=False, strict=False) as gradient:
        assert gradient is not None
        random = random_state.current().used
        plain = None if random or gradient.evaluation.customs else plain_calls(gradient.evaluation.watch)
        meter = Meter(gradient, Budget(memory, problem.tensors[0].device), size)
        last = max(map(gradient.made, range(len(problem.tensors))))
        cost = meter.products(1, 0, last, meter.column, limit=1)
    return Plan(
        question="product",
        method="dense",
        reason="a double backward" + (", without isolation" if plain is not None else ""),
        passes=1,
        check_passes=0,
        flops=cost.flops,
        peak_bytes=size + cost.bytes,
        answer_bytes=size,
        seconds=cost.seconds + meter.product,
        estimates=(Estimate("dense", None, 1, cost.flops, size + cost.bytes, cost.seconds + meter.product),),
        shares=shares,
        learned=Learned(gradient.evaluation.seconds, recorded=False, plain=plain),
    )


def _plain(problem: Problem, method: Plan | str) -> frozenset[str] | None:
    """What the function of a plan calls, where that needs no isolation."""
    if isinstance(method, Plan):
        method.require_fit("product", problem)
        return method.learned.plain if method.learned else None
    if method not in ("auto", "dense"):
        raise ArgumentError(f'method must be "auto", "dense" or a Plan for products, met {method!r}')
    return None


def _product(
    problem: Problem,
    vectors: Sequence[Tensor],
    create_graph: bool,
    strict: bool,
    plain: frozenset[str] | None,
) -> list[Tensor]:
    """The product with one vector, after which the graph is gone; `plain`: see `plain_calls`."""
    everything = range(len(vectors))
    evaluation = None if plain is None else evaluated_plainly(problem, plain)
    if evaluation is not None:
        products = Gradient(evaluation).product(vectors, everything, everything, last=True)
        if math.isfinite(total(products).item()):
            return products
    with _differentiable(problem, create_graph, strict) as gradient:
        if gradient is None:
            return []
        products = gradient.product(vectors, everything, everything, create_graph, last=True)
        _finished(problem, gradient, products)
        return on_the_graph(products, gradient.leaves) if create_graph else products


def _products(
    problem: Problem,
    vectors: Sequence[Tensor],
    count: int,
    create_graph: bool,
    strict: bool,
    memory: int | str | None,
    progress: ProgressOption,
) -> list[Tensor]:
    """Products with many vectors, [k, *shape] for every tensor."""
    everything = range(len(vectors))
    budget = Budget(memory, problem.tensors[0].device)
    with Progress(progress) as told, _differentiable(problem, create_graph, strict) as gradient:
        assert gradient is not None
        width = sum(vector.nbytes for vector in vectors) // max(1, count)
        column = bytes_per_column([part for part in gradient.parts if part is not None])
        room = Room(budget.left() - count * width, column + width, budget.in_use)
        told.expect(count)
        made = stacks(
            lambda *some: gradient.product(some, everything, everything, create_graph),
            lambda numbers: [vector[numbers.start : numbers.stop] for vector in vectors],
            count,
            ChunkSize(room, count, gradient.evaluation.seconds),
            told,
        )
        parts = [list(some) for _, some in made]
        products = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        products = products or [vector.clone() for vector in vectors]  # of no vectors
        _finished(problem, gradient, products)
        return on_the_graph(products, gradient.leaves) if create_graph else products


@contextmanager
def _differentiable(problem: Problem, create_graph: bool, strict: bool) -> Iterator[Gradient | None]:
    """The gradient for products; None where there is nothing to differentiate by."""
    if not problem.tensors:
        yield None
        return
    with random_state_kept() as random_numbers:
        with evaluated(problem, strict, create_graph) as evaluation:
            gradient = Gradient(evaluation)
            remark(evaluation)
            require_graph(problem, gradient, strict, once=True)
            if strict:
                require_influence(problem, gradient, curved=True)
            yield gradient
        if random_numbers.used:  # they may be what the function depends on (dropout)
            require_deterministic(gradient.value, glanced(problem).value)


def _finished(problem: Problem, gradient: Gradient, products: Sequence[Tensor]) -> None:
    """Warn of what is not finite."""
    # A sum is the cheapest test; if it overflows, the second test finds nothing.
    if not math.isfinite(total(products).item()) and not all(map(is_finite, products)):
        trouble = first_non_finite(problem, gradient)
        warn(NonFiniteWarning, trouble or "the product holds a NaN or an infinity")
