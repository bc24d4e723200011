"""What a sweep will take, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hesse.blocks import crowded
from hesse.methods.sweep import Route
from hesse.parameters import HELD
from hesse.tape.elementwise import Elementwise
from hesse.tape.layers import layer_call
from hesse.tape.local import Local
from hesse.tape.record import Value
from hesse.tape.rules import Kind


@dataclass(frozen=True)
class Cost:
    """What a sweep will take.

    Attributes:
        flops: multiplications and additions, roughly.
        peak_bytes: the most memory that blocks and the gradients read from them take at a time.
        unknown: names of calls that are not in the table, which are differentiated by themselves.
    """

    flops: int
    peak_bytes: int
    unknown: tuple[str, ...]


@dataclass(eq=False)
class _Sketch:
    """A term without its numbers."""

    values: set[Value]
    rank: int
    dense: bool = False


def cost(way: Route) -> Cost:
    """The walk of `sweep.run` with ranks in place of columns.

    Smooth calls are taken to add all that they may, so a function that happens to be flatter costs less.
    """
    count = max(place.count for place in way.samples.values())

    def width(value: Value) -> int:
        return value.tensor.numel() // count

    def held(terms: Iterable[_Sketch]) -> int:
        columns = sum(term.rank * value.tensor.numel() for term in terms for value in term.values)
        return columns + sum(count * term.rank**2 for term in terms if term.dense)

    terms: list[_Sketch] = []
    bends: set[Value] = set()  # with a diagonal
    flops = peak = 0
    for step in way.steps:
        call, outputs = step.call, set(step.call.outputs)
        if call.inputs:
            growing = set() if isinstance(call, Elementwise) or call.kind is Kind.VIEW else bends & outputs
            alive = bends.union(*(term.values for term in terms))
            rank = sum(term.rank for term in terms) + sum(map(width, growing))
            if crowded(rank, [width(value) for value in alive]):
                whole = sum(map(width, alive))
                flops += sum(2 * count * whole * t.rank * (t.rank * t.dense + whole) for t in terms)
                peak = max(peak, held(terms) + 2 * count * whole**2)
                terms, bends = [_Sketch(alive, whole, True)], set()
            else:
                terms += [_Sketch({value}, width(value)) for value in growing]
                bends -= growing
        touched = [term for term in terms if term.values & outputs]
        reading = 0
        for entry in step.entries:
            flops += sum(entry.work(term.rank) for term in touched)
            reading = max(reading, count * entry.size * sum(term.rank for term in touched))
        flops += sum(term.rank for term in touched) * _work(call)
        peak = max(peak, held(terms) + held(touched) + min(HELD, reading))
        for term in touched:
            term.values = (term.values - outputs) | set(call.inputs)
        terms = [term for term in terms if term.values]
        if bends & outputs:
            bends = (bends - outputs) | set(call.inputs)
        if call.inputs:
            diagonal, rank = call.added()
            bends |= set(call.inputs) if diagonal else set()
            terms += [_Sketch(set(call.inputs), rank)] if rank else []
    unknown = tuple(dict.fromkeys(step.call.call.name for step in way.steps if step.call.unknown))
    return Cost(flops, peak * way.loss.tensor.element_size(), unknown)


def _work(call: Local) -> int:
    """Of pulling one column back."""
    inputs = sum(value.tensor.numel() for value in call.inputs)
    layer = layer_call(call.call)
    if inputs and layer is not None:
        weight, results = layer.through.tensor, layer.output.tensor.numel()
        return 2 * results * weight.numel() // weight.shape[0]
    return 4 * inputs
