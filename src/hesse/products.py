"""Products of the Hessian with vectors, of a function or of a sum over data, by one pass each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.checks.differences import require_graph
from hesse.errors import BudgetError, NonFiniteWarning, warn
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
from hesse.problem import Problem, Summand
from hesse.runtime import random_state
from hesse.runtime.batches import stacks
from hesse.runtime.chunks import ChunkSize
from hesse.runtime.memory import Budget, bytes_per_column, show
from hesse.runtime.plain import plain_calls
from hesse.runtime.progress import Progress, ProgressOption
from hesse.runtime.random_state import random_state_kept
from hesse.runtime.room import Room
from hesse.runtime.total import total


@dataclass
class Practice:
    """What products with a function have taught, for those that follow.

    Attributes:
        learned: what it calls, where none of that needs isolation; None before the first one.
        size: of chunks of many vectors, the one that paid.
        deterministic: it draws random numbers, and was seen not to depend on them.
    """

    learned: Learned | None = None
    size: int = 0
    deterministic: bool = False

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
    with many are added to; they and the vectors then were made for this, and count against the budget.
    """
    practice = practice or Practice()
    if not problem.tensors:
        return []
    if count is None and problem.summands is None:
        return _product(problem, vectors, create_graph, strict, practice)
    budget, size = Budget(memory, problem.tensors[0].device), sum(vector.nbytes for vector in vectors)
    held = size + sum(one.nbytes for one in into) if into else 0
    if count is not None and max(size, held) > budget.total:
        raise BudgetError(
            f"the products with {count:,} vectors take {show(max(size, held))}, the memory budget is "
            f"{show(budget.total)}; take fewer vectors at a time, or raise memory="
        )
    budget.total -= held
    whole = problem.summands is None
    wide = [v.dtype if whole else torch.promote_types(v.dtype, torch.float32) for v in vectors]
    sums = list(into) or [torch.empty_like(v, dtype=d).zero_() for v, d in zip(vectors, wide, strict=True)]
    summands = [Summand(1.0, problem, None)] if problem.summands is None else problem.summands
    # Of a sum the functions are told, of one function the vectors.
    with (
        random_state_kept(),  # data may be shuffled
        Progress(False if whole else progress) as told,
        Progress(progress if whole else False) as within,
    ):
        columns = None if count is None else _Columns(vectors, sums, budget, practice, len(summands))
        told.expect(len(summands))
        within.expect(count or 0)
        for summand in summands:
            if columns is None:
                parts = _product(summand.problem, vectors, create_graph, strict, practice, check=False)
                _add(sums, parts, summand.weight, create_graph)
            else:
                with _either(summand.problem, create_graph, strict, practice) as gradient:
                    columns.add(gradient, summand.weight, create_graph, within)
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
    with differentiable(problem, create_graph, strict, practice) as gradient:
        products = gradient.product(vectors, everything, everything, create_graph, last=True)
        if check:
            _warn_of_non_finite(problem, gradient, products)
        return on_the_graph(products, gradient.leaves) if create_graph else products


class _Columns:
    """Products with many vectors, as many at a time as are fast and fit."""

    def __init__(
        self,
        vectors: Sequence[Tensor],
        sums: list[Tensor],
        budget: Budget,
        practice: Practice,
        functions: int,
    ) -> None:
        """`sums`: what the products are added to; `functions`: how many they are taken with."""
        self._vectors, self._sums, self._budget, self._practice = vectors, sums, budget, practice
        self._total, self._room = functions * len(vectors[0]), Room(0, 1, budget.in_use)
        self._chunks: ChunkSize | None = None

    def add(self, gradient: Gradient, weight: float, create_graph: bool, told: Progress) -> None:
        """Those with one function."""
        everything, count = range(len(self._vectors)), len(self._vectors[0])
        made = stacks(
            lambda *some: gradient.product(some, everything, everything, create_graph),
            lambda numbers: [vector[numbers.start : numbers.stop] for vector in self._vectors],
            count,
            self._sized(gradient),
            told,
        )
        for numbers, parts in made:
            some = on_the_graph(list(parts), gradient.leaves) if create_graph else parts
            _add(self._sums, some, weight, create_graph, slice(numbers.start, numbers.stop))
        assert self._chunks is not None
        self._practice.size = self._chunks.best

    def _sized(self, gradient: Gradient) -> ChunkSize:
        """The search for how many, which goes on from function to function as long as none is larger."""
        width = sum(vector.nbytes for vector in self._vectors) // max(1, len(self._vectors[0]))
        column = width + bytes_per_column([part for part in gradient.parts if part is not None])
        if self._chunks is None or column > self._room.column:
            seconds = gradient.evaluation.seconds
            self._room = Room(self._budget.left(), column, self._budget.in_use)
            start = _FEW if seconds > _QUICK or self._total > len(self._vectors[0]) else 0
            self._chunks = ChunkSize(self._room, self._total, seconds, self._practice.size, start)
        return self._chunks


_QUICK = 1e-3  # seconds of an evaluation, up to which more vectors at a time always pay
_FEW = 8  # to begin with, otherwise


def _add(
    sums: list[Tensor], parts: Sequence[Tensor], weight: float, graph: bool, rows: slice | None = None
) -> None:
    """Add to all, or to some rows of sums, in place unless they are on a graph."""
    for i, part in enumerate(parts):
        if graph:
            sums[i] = sums[i].clone()
        to = sums[i] if rows is None else sums[i][rows]
        to.add_(part if part.dtype == to.dtype else part.to(to.dtype), alpha=weight)


@contextmanager
def _either(problem: Problem, create_graph: bool, strict: bool, practice: Practice) -> Iterator[Gradient]:
    """The gradient for products, without isolation if that is known not to be needed."""
    evaluation = None if create_graph or strict else practice.evaluated(problem)
    if evaluation is not None:
        yield gradient_of(evaluation)
        return
    with differentiable(problem, create_graph, strict, practice) as gradient:
        yield gradient


@contextmanager
def differentiable(
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
        if random_numbers.used and not practice.deterministic:  # they may be what it depends on (dropout)
            require_deterministic(gradient.value, glanced(problem).value)
            practice.deterministic = True


def _require_finite(problem: Problem, products: Sequence[Tensor]) -> None:
    """Warn of products of a sum that are not finite, and why."""
    if _finite(products):
        return
    trouble = None
    for summand in problem.summands or [Summand(1.0, problem, None)]:
        with differentiable(summand.problem, False, False, Practice()) as gradient:
            trouble = first_non_finite(summand.problem, gradient)
        if trouble:
            break
    warn(NonFiniteWarning, trouble or "the product holds a NaN or an infinity")


def _warn_of_non_finite(problem: Problem, gradient: Gradient, products: Sequence[Tensor]) -> None:
    """Warn of what is not finite."""
    if not _finite(products):
        trouble = first_non_finite(problem, gradient)
        warn(NonFiniteWarning, trouble or "the product holds a NaN or an infinity")


def _finite(products: Sequence[Tensor]) -> bool:
    """Is all of them finite? A sum is the cheapest test; where it overflows, each is looked at."""
    return math.isfinite(total(products).item()) or all(map(is_finite, products))
