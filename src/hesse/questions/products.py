"""Products of the Hessian with a vector: one pass each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesse.checks.differences import require_graph
from hesse.data.loss import Loss
from hesse.data.problem import problem_of
from hesse.errors import ArgumentError, BudgetError, NonFiniteWarning, warn
from hesse.look.evaluation import (
    Evaluation,
    evaluated,
    evaluated_plainly,
    glanced,
    remark,
    require_deterministic,
)
from hesse.look.finite import first_non_finite, is_finite
from hesse.look.gauss_newton import gradient_of
from hesse.look.gradient import Gradient, on_the_graph, require_influence
from hesse.look.learned import Learned
from hesse.look.meter import Meter
from hesse.planning.plan import Estimate, Plan, Share
from hesse.problem import Problem, Summand
from hesse.questions.trace import total
from hesse.runtime import random_state
from hesse.runtime.batches import stacks
from hesse.runtime.chunks import ChunkSize
from hesse.runtime.memory import Budget, bytes_per_column, show
from hesse.runtime.plain import plain_calls
from hesse.runtime.progress import Progress, ProgressOption
from hesse.runtime.random_state import random_state_kept
from hesse.runtime.room import Room


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
    with _differentiable(problem, False, False, practice) as gradient:
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


@dataclass
class Practice:
    """What products with a function have taught, for those that follow.

    Attributes:
        learned: what it calls, where none of that needs isolation; None before the first one.
        size: of chunks of many vectors, the one that paid.
    """

    learned: Learned | None = None
    size: int = 0

    def learn(self, evaluation: Evaluation) -> None:
        """From an evaluation in isolation, unless something is known."""
        if self.learned is None:
            needed = random_state.current().used or evaluation.customs
            plain = None if needed else plain_calls(evaluation.watch)
            self.learned = Learned(evaluation.seconds, recorded=False, plain=plain)

    def evaluated(self, problem: Problem) -> Evaluation | None:
        """An evaluation without isolation, of a function that is known to need none."""
        plain = self.learned.plain if self.learned else None
        return None if plain is None else evaluated_plainly(problem, plain)


def multiplied(
    problem: Problem,
    vectors: Sequence[Tensor],
    count: int | None = None,
    create_graph: bool = False,
    strict: bool = False,
    memory: int | str | None = None,
    progress: ProgressOption = False,
    practice: Practice | None = None,
    into: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Products of the Hessian with a vector or, by a leading dimension of all tensors, with `count` of them.

    Over the summands of a sum, all vectors are taken with one after the other. `into`: zeros that products
    with many are added to.
    """
    practice = practice or Practice()
    if not problem.tensors:
        return []
    if count is None and problem.summands is None:
        return _product(problem, vectors, create_graph, strict, practice)
    budget, size = Budget(memory, problem.tensors[0].device), sum(vector.nbytes for vector in vectors)
    if count is not None and size > budget.total:
        raise BudgetError(
            f"the products with {count:,} vectors take {show(size)}, the memory budget is "
            f"{show(budget.total)}; take fewer vectors at a time, or raise memory="
        )
    summed = problem.summands is not None
    wide = [torch.promote_types(v.dtype, torch.float32) if summed else v.dtype for v in vectors]
    sums = list(into) or [torch.empty_like(v, dtype=d).zero_() for v, d in zip(vectors, wide, strict=True)]
    with random_state_kept(), Progress(progress) as told:  # data may be shuffled
        told.expect(count if problem.summands is None and count is not None else len(problem.summands or ()))
        for summand in problem.summands or [Summand(1.0, problem, None)]:
            if count is None:
                parts = _product(summand.problem, vectors, create_graph, strict, practice, check=False)
                _add(sums, slice(None), parts, summand.weight, create_graph)
            else:
                within = None if problem.summands else told
                _add_products(summand, vectors, sums, budget, create_graph, strict, practice, within)
            if problem.summands:
                told.advance(chunks=1)
    _require_finite(problem, sums)
    return [one.to(vector.dtype) for one, vector in zip(sums, vectors, strict=True)]


def _product(
    problem: Problem,
    vectors: Sequence[Tensor],
    create_graph: bool,
    strict: bool,
    practice: Practice,
    check: bool = True,
) -> list[Tensor]:
    """The product with one vector, after which the graph is gone; `check`: that it is finite."""
    everything = range(len(vectors))
    evaluation = None if create_graph or strict else practice.evaluated(problem)
    if evaluation is not None:
        products = gradient_of(evaluation).product(vectors, everything, everything, last=True)
        if not check or math.isfinite(total(products).item()):
            return products
    with _differentiable(problem, create_graph, strict, practice) as gradient:
        products = gradient.product(vectors, everything, everything, create_graph, last=True)
        if check:
            _warn_of_non_finite(problem, gradient, products)
        return on_the_graph(products, gradient.leaves) if create_graph else products


def _add_products(
    summand: Summand,
    vectors: Sequence[Tensor],
    sums: list[Tensor],
    budget: Budget,
    create_graph: bool,
    strict: bool,
    practice: Practice,
    told: Progress | None,
) -> None:
    """Add the products with many vectors, as many at a time as are fast and fit."""
    everything, count = range(len(vectors)), len(vectors[0])

    def add(gradient: Gradient) -> None:
        width = sum(vector.nbytes for vector in vectors) // max(1, count)
        column = bytes_per_column([part for part in gradient.parts if part is not None])
        room = Room(budget.left(), column + width, budget.in_use)
        chunks = ChunkSize(room, count, gradient.evaluation.seconds, known=practice.size)
        made = stacks(
            lambda *some: gradient.product(some, everything, everything, create_graph),
            lambda numbers: [vector[numbers.start : numbers.stop] for vector in vectors],
            count,
            chunks,
            told or Progress(False),
        )
        for numbers, parts in made:
            some = on_the_graph(list(parts), gradient.leaves) if create_graph else parts
            _add(sums, slice(numbers.start, numbers.stop), some, summand.weight, create_graph)
        practice.size = chunks.best

    evaluation = None if create_graph or strict else practice.evaluated(summand.problem)
    if evaluation is not None:
        add(gradient_of(evaluation))
        return
    with _differentiable(summand.problem, create_graph, strict, practice) as gradient:
        add(gradient)


def _add(sums: list[Tensor], rows: slice, parts: Sequence[Tensor], weight: float, graph: bool) -> None:
    """Add to rows of sums, in place unless they are on a graph."""
    for i, part in enumerate(parts):
        if graph:
            sums[i] = sums[i].clone()
        sums[i][rows].add_(part.to(sums[i].dtype), alpha=weight)


@contextmanager
def _differentiable(
    problem: Problem, create_graph: bool, strict: bool, practice: Practice
) -> Iterator[Gradient]:
    """The gradient for products."""
    with random_state_kept() as random_numbers:
        with evaluated(problem, strict, create_graph) as evaluation:
            gradient = gradient_of(evaluation)
            remark(evaluation)
            require_graph(problem, gradient, strict, once=True)
            if strict:
                require_influence(problem, gradient, curved=True)
            yield gradient
            practice.learn(evaluation)
        if random_numbers.used:  # they may be what the function depends on (dropout)
            require_deterministic(gradient.value, glanced(problem).value)


def _require_finite(problem: Problem, products: Sequence[Tensor]) -> None:
    """Warn of products of a sum that are not finite, and why."""
    if math.isfinite(total(products).item()) or all(map(is_finite, products)):
        return
    trouble = None
    for summand in problem.summands or [Summand(1.0, problem, None)]:
        with _differentiable(summand.problem, False, False, Practice()) as gradient:
            trouble = first_non_finite(summand.problem, gradient)
        if trouble:
            break
    warn(NonFiniteWarning, trouble or "the product holds a NaN or an infinity")


def _warn_of_non_finite(problem: Problem, gradient: Gradient, products: Sequence[Tensor]) -> None:
    """Warn of what is not finite."""
    # A sum is the cheapest test; if it overflows, the second test finds nothing.
    if not math.isfinite(total(products).item()) and not all(map(is_finite, products)):
        trouble = first_non_finite(problem, gradient)
        warn(NonFiniteWarning, trouble or "the product holds a NaN or an infinity")
