"""What work costs: passes, operations, memory, and seconds scaled by the time of one gradient."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from hesse.gradient import Gradient
from hesse.runtime.graph import Spans, made
from hesse.runtime.memory import bytes_per_column
from hesse.tape.flops import flops


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


@dataclass(frozen=True)
class Rates:
    """How fast a machine works, before it is scaled by the time of one gradient.

    Attributes:
        start: seconds to get ready for an evaluation.
        call: seconds to record a call and make its nodes.
        node: seconds for a node of a backward pass, or a call, whatever its size.
        batch: likewise when several vectors are batched.
        move: bytes a second, of tensors that stay in the cache for the most part.
        multiply: operations a second of matrix products.
        step: seconds to take a call out of a sweep, whatever its size.
        pull: seconds to pull a term of the curvature through a call, whatever its size.
        carry: operations a second of a sweep, of which many are elementwise.
    """

    start: float = 3e-4
    call: float = 4.5e-5
    node: float = 6e-6
    batch: float = 2.5e-5
    move: float = 9e9
    multiply: float = 1.8e11
    step: float = 3.5e-4
    pull: float = 5e-5
    carry: float = 7e10

    def at(self, width: int) -> Rates:
        """The rates for numbers of so many bytes; as they stand they are for four."""
        return replace(self, multiply=self.multiply * 4 / width, carry=self.carry * 4 / width)


CPU = Rates()
CUDA = Rates(node=2e-5, batch=5e-5, call=1.5e-4, move=1e12, multiply=2e13, step=6e-4, pull=1e-4, carry=5e12)
_EVER = 1 << 61
CHUNK = 128  # columns in a batch, as they are found to be best for most functions


class Meter:
    """Costs of passes over the graph of a gradient."""

    def __init__(self, gradient: Gradient, seconds: float) -> None:
        """`seconds`: of one evaluation with its gradient; 0 where it was not timed."""
        self.gradient = gradient
        self._spans = Spans(gradient.outputs)
        done = sorted((made(call.outputs[0].edge.node), flops(call)) for call in gradient.calls)
        self._times = [time for time, _ in done]
        self._flops = [0, *accumulate(operations for _, operations in done)]
        self._forward = made(gradient.value.grad_fn)
        self.rates = (CUDA if gradient.value.is_cuda else CPU).at(gradient.value.dtype.itemsize)
        count, moved = self._spans.between(0, _EVER)
        predicted = (
            self.rates.start
            + len(done) * self.rates.call
            + count / 2 * self.rates.node  # half of the nodes belong to the gradient's own graph
            + moved / 2 / self.rates.move
            + 3 * self._flops[-1] / self.rates.multiply
        )
        # The square root: of a small function, the gradient's time says as much of Python as of the passes.
        self._seconds = seconds
        self._scale = min(2.0, max(0.5, math.sqrt(seconds / predicted))) if seconds else 1.0

    @cached_property
    def column(self) -> int:
        """Bytes that a pass holds at its peak, for every column of a batch."""
        return bytes_per_column(self.gradient.outputs)

    @property
    def preparation(self) -> Cost:
        """What comes before the first product, whatever the method: some evaluations with their gradients."""
        return Cost(seconds=4 * self._seconds)

    def products(self, columns: int, first: int, last: int, bytes_: int, limit: int = CHUNK) -> Cost:
        """Products with the derivative of a gradient made at `last` by a place made at `first`."""
        return self._passes(columns, first, last, 2, bytes_, limit)

    def backwards(self, columns: int, first: int, last: int, bytes_: int) -> Cost:
        """Passes over the graph of the function alone."""
        return self._passes(columns, first, last, 1, bytes_, CHUNK)

    def _passes(self, columns: int, first: int, last: int, times: int, bytes_: int, limit: int) -> Cost:
        count, moved = self._spans.between(first, last)
        start = bisect_left(self._times, first)
        stop = bisect_left(self._times, min(last, self._forward) + 1)
        operations = times * (self._flops[stop] - self._flops[start])
        batches = -(-columns // limit) + (columns > 32 < limit)  # the first ones are smaller
        each = self.rates.node if limit == 1 else self.rates.batch
        seconds = batches * count * each + columns * (
            moved / self.rates.move + operations / self.rates.multiply
        )
        return Cost(columns, columns * operations, min(columns, limit) * bytes_, self._scale * seconds)

    def walk(self, calls: int, pulls: int, operations: float, bytes_: int) -> Cost:
        """A walk over calls of the tape by itself, with so many terms pulled through one of them."""
        seconds = calls * self.rates.step + pulls * self.rates.pull + operations / self.rates.carry
        return Cost(0, operations, bytes_, self._scale * seconds)

    def arithmetic(self, operations: float, moved: float, bytes_: int = 0, calls: int = 0) -> Cost:
        """Work outside of the graph."""
        seconds = operations / self.rates.multiply + moved / self.rates.move + calls * self.rates.node
        return Cost(0, operations, bytes_, seconds)


def total(costs: Iterable[Cost]) -> Cost:
    """All of them, one after the other."""
    return sum(costs, Cost())
