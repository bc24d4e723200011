"""What taps offer: which layers they pay for, and what they take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from hesse.look.layer import Layer
from hesse.look.meter import Cost, total
from hesse.methods.base import Applicable, Ask, Found, Offer, Products, Refused, Run, counted, transposed
from hesse.methods.taps import run as taps
from hesse.methods.taps.part import LayerPart
from hesse.runtime.progress import Progress
from hesse.selection import Part


def offer(ask: Ask) -> Offer:
    """One product per output and position of layers."""
    why_not, layers = taps.usable(ask.question, ask.gradient)
    if why_not:
        return Refused(ask.gradient.found.why_not or why_not)
    return _of_all(ask, layers) if ask.part is None else _of_part(ask, ask.part, layers)


def _of_all(ask: Ask, layers: list[Layer]) -> Offer:
    question = ask.question
    beside = ask.products(joined=True)
    layers = _paying(ask, layers, beside)
    if not layers:
        return Refused("one product per coordinate is as fast for every layer")
    uses: dict[int, list[Layer]] = {}
    for layer in layers:
        for i in layer.tensors:
            uses.setdefault(i, []).append(layer)
    joined = {layer.call.weight for layer in layers} if question == "diagonal" else set(uses)
    sizes = ask.problem.sizes
    return Applicable(
        taps.cost(question, layers, ask.meter) + total(cost for i, cost in beside.items() if i not in uses),
        {i: _how(i, those, sizes[i]) for i, those in uses.items()},
        [*joined, *(i for i in beside if i not in uses)],
        f"{counted(len(layers), 'layer')} with {sum(sizes[i] for i in uses):,} coordinates take one "
        f"product per output and position{ask.others(beside, uses)}",
        {i: "a product per coordinate is as fast" for layer in ask.gradient.layers for i in layer.tensors},
        _run_all(ask, layers),
    )


def run_of(ask: Ask) -> Run:
    """Taps for what is planned."""
    _, layers = taps.usable(ask.question, ask.gradient)
    if ask.part is None:
        return _run_all(ask, [layer for layer in layers if layer.call.weight in ask.planned])
    usable = {i for layer in layers for i in layer.tensors}
    return _run_part(ask, layers, _split(ask.part, usable & set(ask.planned), usable), ask.part)


def _run_all(ask: Ask, layers: Sequence[Layer]) -> Run:
    def run(progress: Progress, check: bool, products: Products) -> Found:
        answer = taps.answer_to(ask.question, layers, check)
        taps.run(answer, layers, ask.meter, progress)
        return answer.blocks(), answer.probes()

    return run


def _run_part(ask: Ask, layers: Sequence[Layer], split: Sequence[Mapping[int, Tensor]], part: Part) -> Run:
    rows, columns, rest, beside = split

    def run(progress: Progress, check: bool, products: Products) -> Found:
        taken = LayerPart(layers, rows, columns)
        taps.run_part(taken, layers, ask.meter, progress)
        beside_them = transposed(products(beside, rows))
        return taken.blocks() | dict(products(rest, part.columns.numbers)) | beside_them, []

    return run


def _how(index: int, uses: Sequence[Layer], size: int) -> str:
    call, columns = uses[0].call, sum(layer.columns for layer in uses)
    times = f" used {len(uses)} times" if len(uses) > 1 else ""
    role = "weight" if index == call.weight else "bias"
    return f"{role} of {call.name}{times}: {counted(columns, 'column')} instead of {size:,}"


def _paying(ask: Ask, layers: Sequence[Layer], beside: Mapping[int, Cost]) -> list[Layer]:
    """The layers for whose weights taps take less time than one product per coordinate."""
    kept = list(layers)
    for own in taps.together(layers):
        others = [layer for layer in kept if layer not in own]
        rows = {i for layer in own for i in layer.tensors} & beside.keys()
        cost = taps.cost(ask.question, own, ask.meter, beside=others)
        if cost.seconds > total(beside[i] for i in rows).seconds:
            kept = others
    return kept


def _of_part(ask: Ask, part: Part, layers: list[Layer]) -> Offer:
    """Rows of layers by their outputs, those of all other tensors by products."""
    usable = {i for layer in layers for i in layer.tensors}
    tapped = usable & part.rows.numbers.keys()
    found = _tapped(ask, part, tapped, usable, layers)
    while len(tapped) > 1:  # leave out what takes less by products
        others = [_tapped(ask, part, tapped - {i}, usable, layers) for i in tapped]
        best = min(others, key=lambda other: other.cost.seconds)
        if best.cost.seconds >= found.cost.seconds:
            break
        found, tapped = best, set(best.shares) & part.rows.numbers.keys()
    return found if tapped else Refused("no rows are asked for of layers that can be tapped")


def _tapped(ask: Ask, part: Part, tapped: set[int], usable: set[int], layers: list[Layer]) -> Applicable:
    split = _split(part, tapped, usable)
    rows, columns, rest, beside = split
    own = LayerPart(layers, rows, columns)
    cost = total(
        [
            taps.cost_of_part(own, layers, ask.meter),
            ask.products_of(rest, part.columns.numbers),
            ask.products_of(beside, rows),
        ]
    )
    outputs = sum(len(owned.outputs) for owned in own.rows.values())
    count = sum(map(len, rows.values()))
    others = sum(map(len, rest.values())) + sum(map(len, beside.values()))
    return Applicable(
        cost,
        dict.fromkeys(columns, "columns come with the rows of layers")
        | dict.fromkeys(rows, "rows take one product per output and position"),
        list(rows)[:1],
        f"{count:,} rows by layers take one product per output ({outputs:,}) and position"
        + (f"; the other {others:,} coordinates take one product each" if others else ""),
        run=_run_part(ask, layers, split, part),
    )


def _split(part: Part, tapped: Collection[int], usable: Collection[int]) -> tuple[dict[int, Tensor], ...]:
    """Numbers of rows and columns by tensors, for layer space and for products.

    `tapped`: the tensors whose rows are taken from layer space; `usable`: all whose columns can be. Gives
    rows and columns of layer space, then the rows that are left, then the columns left of the first rows.
    """
    rows, columns = part.rows.numbers, part.columns.numbers
    from_layers = {i: numbers for i, numbers in rows.items() if i in tapped}
    to_layers = {j: numbers for j, numbers in columns.items() if j in usable and from_layers}
    rest = {i: numbers for i, numbers in rows.items() if i not in tapped}
    beside = {j: numbers for j, numbers in columns.items() if j not in to_layers and from_layers}
    return from_layers, to_layers, rest, beside
