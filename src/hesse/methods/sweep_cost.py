"""What a sweep will take, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from hesse.blocks import crowded
from hesse.methods.sweep import Route
from hesse.methods.sweep_live_cost import LiveSketch, Work
from hesse.parameters import HELD
from hesse.tape.layers import layer_call
from hesse.tape.local import Local
from hesse.tape.record import Value


@dataclass(frozen=True)
class Cost:
    """What a sweep will take.

    Attributes:
        flops: multiplications and additions, roughly.
        pulls: how often a term is pulled through a call.
        peak_bytes: the most memory that blocks and the gradients read from them take at a time.
        unknown: names of calls that are not in the table, which are differentiated by themselves.
        live: what the leaves that are kept alive take beside, by those that are so together.
    """

    flops: int
    pulls: int
    peak_bytes: int
    unknown: tuple[str, ...]
    live: Mapping[tuple[int, ...], Work]


@dataclass(eq=False)
class _Sketch:
    """A term without its numbers: the values that it knows of, with their elements, and its columns."""

    values: set[Value]
    elements: int
    rank: int
    diagonal: bool = False
    dense: bool = False

    def pull(self, call: Local) -> None:
        """Take the call's results out."""
        for value in self.values.intersection(call.outputs):
            self.values.remove(value)
            self.elements -= value.tensor.numel()
        for value in set(call.inputs) - self.values:
            self.values.add(value)
            self.elements += value.tensor.numel()

    def held(self, count: int) -> int:
        """Numbers that it takes, of so many samples."""
        if self.diagonal:
            return self.elements
        return self.rank * self.elements + self.dense * count * self.rank**2


def cost(way: Route, matrices: bool = False) -> Cost:
    """The walk of `sweep.run` with ranks in place of columns.

    Smooth calls are taken to add all that they may, so a function that happens to be flatter costs less.
    `matrices`: of leaves that are kept alive, not only diagonals are made.
    """
    count = max(place.count for place in way.samples.values())

    def width(value: Value) -> int:
        return value.tensor.numel() // count

    def sketch(values: Iterable[Value], rank: int, **kind: bool) -> _Sketch:
        known = set(values)
        return _Sketch(known, sum(value.tensor.numel() for value in known), rank, **kind)

    live = LiveSketch(way.depends, matrices)
    terms: list[_Sketch] = []
    alive: set[Value] = set()
    flops = pulls = peak = 0
    for step in way.steps:
        call, outputs = step.call, set(step.call.outputs)
        touched = [term for term in terms if not term.values.isdisjoint(outputs)]
        if call.inputs:
            growing = [term for term in touched if term.diagonal and not call.keeps(term.values)]
            rank = sum(term.rank for term in (*(t for t in terms if not t.diagonal), *growing))
            widths = [width(value) for value in alive]
            if crowded(rank, widths):
                whole = sum(widths)
                flops += sum(
                    2 * count * whole * t.rank * (t.rank * t.dense + whole) for t in terms if not t.diagonal
                )
                peak = max(peak, sum(term.held(count) for term in terms) + 2 * count * whole**2)
                terms = [sketch(alive, whole, dense=True)]
                touched = terms if alive & outputs else []
            else:
                for term in growing:
                    term.diagonal = False
        columns = [term for term in touched if not term.diagonal]
        pulls += len(touched)
        reading = 0
        for entry in step.entries:
            flops += sum(entry.work(term.rank) for term in columns)
            reading = max(reading, count * entry.size * sum(term.rank for term in columns))
        flops += sum(term.rank for term in columns) * _work(call)
        pulled = max((term.held(count) for term in touched), default=0)
        for use in step.uses:
            live.enter(use, touched)
        peak = max(peak, sum(term.held(count) for term in terms) + live.held + pulled + min(HELD, reading))
        live.pull(call, _work(call))
        for term in touched:
            term.pull(call)
        terms = [term for term in terms if term.values]
        alive = (alive - outputs).union(call.inputs if touched else ())
        if call.inputs:
            diagonals, rank = call.added()
            terms += [sketch(values, width(values[0]), diagonal=True) for values in diagonals]
            terms += [sketch(call.inputs, rank)] if rank else []
            alive.update(call.inputs if rank else chain(*diagonals))
    unknown = tuple(dict.fromkeys(step.call.call.name for step in way.steps if step.call.unknown))
    return Cost(flops, pulls, peak * way.loss.tensor.element_size(), unknown, live.work)


def _work(call: Local) -> int:
    """Of pulling one column back."""
    inputs = sum(value.tensor.numel() for value in call.inputs)
    layer = layer_call(call.call)
    if inputs and layer is not None:
        weight, results = layer.through.tensor, layer.output.tensor.numel()
        return 2 * results * weight.numel() // weight.shape[0]
    return 4 * inputs
