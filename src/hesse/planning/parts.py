"""What methods offer for a part of the Hessian."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from hesse.curvature.layer_space import Layer
from hesse.look.meter import CHUNK, Cost, Meter, total
from hesse.methods import dense
from hesse.methods.base import Option
from hesse.methods.partial import split
from hesse.methods.taps import run as taps
from hesse.methods.taps.part import LayerPart
from hesse.problem import Problem
from hesse.selection import Part

Numbers = Mapping[int, Tensor]


def dense_part(part: Part, meter: Meter) -> Option:
    """One product for every row, or for every column where these are fewer."""
    rows, columns, turned = dense.turned(part.rows.numbers, part.columns.numbers, meter.gradient)
    reason = f"one product per {'column' if turned else 'row'}, right for any function"
    return Option("dense", _products(rows, columns, meter), {}, list(rows)[:1], reason)


def taps_part(part: Part, problem: Problem, meter: Meter, planned: Collection[int] | None) -> Option | str:
    """Rows of layers by their outputs, those of all other tensors by products."""
    why_not, layers = taps.usable("hessian", meter.gradient)
    if why_not:
        return meter.gradient.found.why_not or why_not
    usable = {i for layer in layers for i in layer.tensors}
    tapped = usable & part.rows.numbers.keys() if planned is None else usable & set(planned)
    option = _tapped(part, problem, meter, tapped, usable, layers)
    while planned is None and len(tapped) > 1:  # leave out what takes less by products
        others = [_tapped(part, problem, meter, tapped - {i}, usable, layers) for i in tapped]
        best = min(others, key=lambda other: other.cost.seconds)
        if best.cost.seconds >= option.cost.seconds:
            break
        option, tapped = best, set(best.shares) & part.rows.numbers.keys()
    return option if tapped else "no rows are asked for of layers that can be tapped"


def _tapped(
    part: Part, problem: Problem, meter: Meter, tapped: set[int], usable: set[int], layers: list[Layer]
) -> Option:
    rows, columns, rest, beside = split(part, tapped, usable)
    own = LayerPart(layers, rows, columns)
    cost = total(
        [
            taps.cost_of_part(own, layers, meter),
            _products(rest, part.columns.numbers, meter),
            _products(beside, rows, meter),
        ]
    )
    outputs = sum(len(owned.outputs) for owned in own.rows.values())
    count = sum(map(len, rows.values()))
    others = sum(map(len, rest.values())) + sum(map(len, beside.values()))
    return Option(
        "taps",
        cost,
        dict.fromkeys(columns, "columns come with the rows of layers")
        | dict.fromkeys(rows, "rows take one product per output and position"),
        list(rows)[:1],
        f"{count:,} rows by layers take one product per output ({outputs:,}) and position"
        + (f"; the other {others:,} coordinates take one product each" if others else ""),
    )


def _products(rows: Numbers, columns: Numbers, meter: Meter) -> Cost:
    """One product for every row."""
    gradient = meter.gradient
    leaves, first = gradient.leaves, gradient.first_uses
    width = sum(leaves[j].numel() * leaves[j].dtype.itemsize for j in columns)
    held = meter.column + 2 * width
    limit = max(1, min(CHUNK, meter.workspace // held))
    since = min((first.get(j, 0) for j in columns), default=0)
    return total(
        meter.products(len(numbers), since, gradient.made(i), held, limit)
        for i, numbers in rows.items()
        if i in gradient.curved and columns
    )
