"""What work costs: passes, operations, memory, and seconds scaled by the time of one gradient."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from hesse.calls.table import convolves, flops
from hesse.errors import BudgetWarning, warn
from hesse.look.gradient import Gradient
from hesse.look.learned import Learned
from hesse.runtime.chunks import Sizes
from hesse.runtime.graph import Spans, made
from hesse.runtime.memory import Budget, bytes_per_column, show
from hesse.runtime.room import Room
from hesse.structure import NoStructure, sought
from hesse.tape.record import Call
from hesse.tape.samples import ONE_SAMPLE


@dataclass(frozen=True)
class Cost:
    """What some work takes.

    Attributes:
        passes: Hessian-vector products, or what costs as much.
        flops: floating-point operations.
        bytes: peak memory beside the answer and the graph of the gradient.
        seconds: predicted time.
    """

    passes: int = 0
    flops: float = 0.0
    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Both, one after the other."""
        return Cost(
            self.passes + other.passes,
            self.flops + other.flops,
            max(self.bytes, other.bytes),
            self.seconds + other.seconds,
        )

    def scaled(self, share: float) -> Cost:
        """A share of the work, in as much memory."""
        return Cost(int(self.passes * share), self.flops * share, self.bytes, self.seconds * share)


@dataclass(frozen=True)
class Rates:
    """How fast a machine works, before it is scaled by the time of one gradient.

    Attributes:
        start: seconds to get ready for an evaluation.
        call: seconds to make a call and its nodes.
        node: seconds for a node of a backward pass, or a call, whatever its size.
        batch: seconds of a node when several vectors are batched.
        launch: seconds to begin a batch.
        move: bytes a second, of tensors that stay in the cache for the most part.
        multiply: operations a second of matrix products.
        convolve: operations a second of batched convolutions.
        step: seconds to take a call out of a sweep, whatever its size.
        pull: seconds to pull a term of the curvature through a call, whatever its size.
        carry: operations a second of a sweep, of which many are elementwise.
        prepare: seconds for what comes before, whatever the function.
        plan: seconds to record and look into a call.
    """

    start: float = 3e-4
    call: float = 4.5e-5
    node: float = 6e-6
    batch: float = 1e-5
    launch: float = 7e-4
    move: float = 1.5e10
    multiply: float = 1.8e11
    convolve: float = 1e10
    step: float = 1.3e-4
    pull: float = 8e-5
    carry: float = 7e10
    prepare: float = 1e-3
    plan: float = 1e-4

    def at(self, width: int) -> Rates:
        """The rates for numbers of so many bytes; as they stand they are for four."""
        rates = {name: getattr(self, name) * 4 / width for name in ("multiply", "convolve", "carry")}
        return replace(self, **rates)


CPU = Rates()
CUDA = Rates(
    node=2e-5,
    batch=5e-5,
    call=1.5e-4,
    move=1e12,
    multiply=2e13,
    convolve=2e12,
    step=3e-4,
    pull=3e-4,
    carry=5e12,
)
CHUNK = 128  # columns in a batch, as they are found to be best for most functions


class Meter:
    """What work on a gradient costs, and the memory it may use.

    What passes over the gradient's graph cost is found where they are asked for, and with it the graph.
    """

    def __init__(self, gradient: Gradient, budget: Budget, answer: int, known: Learned | None = None) -> None:
        """`answer`: bytes of the budget set aside; `known`: of an evaluation that looked the same."""
        self.gradient = gradient
        self.rates = (CUDA if gradient.value.is_cuda else CPU).at(gradient.value.dtype.itemsize)
        self._budget, self._answer = budget, answer
        self._taken, self._warned = 0, False
        self.sizes = Sizes(known.sizes if known else ())
        self._column = known.column if known else 0

    @property
    def left(self) -> int:
        """Bytes that are left beside the answer."""
        return max(0, self._budget.left() - self._answer)

    @cached_property
    def room(self) -> int:
        """The same before there is more than the function's own graph."""
        return self.left

    @cached_property
    def workspace(self) -> int:
        """Bytes that are left beside the answer and the gradient's graph."""
        _ = self.gradient.parts
        self._taken = self._budget.taken
        return self.left

    def fit(self, column: int, there: int = 0) -> Room:
        """Room for batches of columns that are predicted to take so many bytes.

        `there`: bytes of the answer that another method has made, which may have left more behind.
        """
        if self.workspace < column and not self._warned:
            self._warned = True
            warn(
                BudgetWarning,
                f"the gradient with its graph takes {show(self._taken)} and each product {show(column)}, "
                f"which the memory budget of {show(self._budget.total)} does not hold beside the answer: "
                f"it is exceeded; raise memory=, or checkpoint parts of func (use_reentrant=False)",
            )
        workspace = min(self.workspace, self.left + there) if there else self.workspace
        return Room(workspace, column, self._budget.in_use)

    @property
    def product(self) -> float:
        """Seconds of one plain product, at least: what an evaluation and a gradient take."""
        return 3 * self.gradient.evaluation.seconds

    @cached_property
    def _spans(self) -> Spans:
        """The graph of the gradient, that of the function included."""
        return Spans(self.gradient.outputs)

    @cached_property
    def _own_spans(self) -> Spans:
        """The graph of the function alone."""
        return Spans([self.gradient.value])

    @cached_property
    def _forward(self) -> int:
        return made(self.gradient.value.grad_fn)

    @cached_property
    def _done(self) -> tuple[Sequence[int], Sequence[int], Sequence[float]]:
        """When the calls were made, and the operations of those before each, with the seconds they take."""
        calls = sorted(self.gradient.calls, key=lambda call: made(call.outputs[0].edge.node))
        done = [_operations(call) for call in calls]
        rates = [self.rates.convolve if convolves(call) else self.rates.multiply for call in calls]
        seconds = (operations / rate for operations, rate in zip(done, rates, strict=True))
        times = [made(call.outputs[0].edge.node) for call in calls]
        return times, [0, *accumulate(done)], [0.0, *accumulate(seconds)]

    @cached_property
    def _scale(self) -> float:
        """How much slower this machine is at this function."""
        count, moved = self._own_spans.between(0, self._forward)
        _, operations, _ = self._done
        predicted = (
            self.rates.start
            + count * self.rates.call
            + moved / self.rates.move
            + operations[-1] / self.rates.multiply
        )
        # The square root: of a small function, its time says as much of Python as of the passes.
        return min(1.4, max(0.7, math.sqrt(self.gradient.evaluation.seconds / predicted)))

    @cached_property
    def column(self) -> int:
        """Bytes that a pass holds at its peak, for every column of a batch."""
        return self._column or bytes_per_column(self.gradient.outputs)

    @property
    def learned_column(self) -> int:
        """The same, if anybody asked; else zero."""
        return self.column if "column" in vars(self) else self._column

    @property
    def preparation(self) -> Cost:
        """What comes before the first product, whatever the method: evaluations, a gradient, the plan."""
        evaluations = 4 * self.gradient.evaluation.seconds
        calls = len(self.gradient.calls) * self.rates.plan
        return Cost(seconds=evaluations + self._scale * (self.rates.prepare + calls))

    def products(self, columns: int, first: int, last: int, bytes_: int, limit: int = CHUNK) -> Cost:
        """Products with the derivative of a gradient made at `last` by a place made at `first`."""
        return self._passes(columns, first, last, self._spans, 2, bytes_, limit)

    def backwards(self, columns: int, first: int, last: int, bytes_: int) -> Cost:
        """Passes over the graph of the function alone."""
        return self._passes(columns, first, last, self._own_spans, 1, bytes_, CHUNK)

    def lower_bound(self, columns: int, first: int) -> Cost:
        """What products with the derivative by a place made at `first` take at least."""
        return self.backwards(columns, first, self._forward, 0)

    @property
    def product_at_least(self) -> Cost:
        """What a product takes, as far as the function's own graph tells: it goes back and forth over it."""
        once = self.lower_bound(1, 0)
        return Cost(1, 2 * once.flops, 0, 2 * once.seconds)

    @property
    def products_lower_bound(self) -> Cost:
        """What products take in any case: by outputs and positions of layers, or by coordinates if fewer."""
        gradient, costs = self.gradient, []
        for call in gradient.evaluation.layers:
            samples = gradient.found.samples.get(call.order, ONE_SAMPLE)
            columns = min(call.output.tensor.numel() // samples.count, gradient.leaves[call.weight].numel())
            costs.append(self.lower_bound(columns, made(call.output.edge.node)))
        return total(costs)

    def _passes(
        self, columns: int, first: int, last: int, spans: Spans, times: int, bytes_: int, limit: int
    ) -> Cost:
        count, moved = spans.between(first, last)
        calls, done, taken = self._done
        start, stop = bisect_left(calls, first), bisect_left(calls, min(last, self._forward) + 1)
        operations = times * (done[stop] - done[start])
        batches = -(-columns // limit) + (columns > 32 < limit)  # the first ones are smaller
        each, begin = (self.rates.node, 0.0) if limit == 1 else (self.rates.batch, self.rates.launch)
        multiplied = times * (taken[stop] - taken[start])
        seconds = batches * (begin + count * each) + columns * (moved / self.rates.move + multiplied)
        return Cost(columns, columns * operations, min(columns, limit) * bytes_, self._scale * seconds)

    def walk(self, calls: int, pulls: int, operations: float, bytes_: int) -> Cost:
        """A walk over calls of the tape by itself, with so many terms pulled through one of them."""
        seconds = calls * self.rates.step + pulls * self.rates.pull + operations / self.rates.carry
        return Cost(0, operations, bytes_, self._scale * seconds)

    def arithmetic(self, operations: float, moved: float, bytes_: int = 0, calls: int = 0) -> Cost:
        """Work outside of the graph."""
        seconds = operations / self.rates.multiply + moved / self.rates.move + calls * self.rates.node
        return Cost(0, operations, bytes_, seconds)


def _operations(call: Call) -> int:
    """Floating-point operations of a call; where they cannot be counted, one for each element."""
    try:
        with sought():
            return flops(call)
    except NoStructure:
        return sum(value.tensor.numel() for value in call.outputs)


def total(costs: Iterable[Cost]) -> Cost:
    """All of them, one after the other."""
    return sum(costs, Cost())
