"""Taps: one product a neuron, for layers that are linear in their weight.

A tap is a place in the graph where a layer's output z is made. A column of M, the Hessian by the taps, takes
one product for all samples at once, over the graph above the tap only; J, how the input of a layer follows
the outputs of those before it, takes one backward pass per element of that input. Second derivatives by the
weights are made of them in `hesse.curvature.layer_space`, as the Gauss-Newton blocks of linear layers are
(Botev, Ritter and Barber, 2017), but exactly and of the whole Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from hesse.curvature.layer_space import WeightBlocks, WeightDiagonals
from hesse.look.gradient import Gradient
from hesse.look.layer import Layer
from hesse.look.meter import CHUNK, Cost, Meter, total
from hesse.methods.base import Question
from hesse.methods.taps.part import LayerPart
from hesse.runtime.batches import stacks
from hesse.runtime.graph import made
from hesse.runtime.memory import bytes_per_column
from hesse.runtime.progress import Progress

Wants = Callable[[Layer, Layer], bool]


class LayerAnswer(Protocol):
    """What a question keeps of M and J."""

    def wants(self, rows: Layer, columns: Layer) -> bool:
        """Is the block between the weights of these layers needed?"""

    def add(
        self,
        rows: Sequence[Layer],
        columns: Layer,
        numbers: range,
        M: Sequence[Tensor],
        J: Sequence[Tensor | None],
    ) -> None:
        """Take in some columns by a layer, of it and of the later ones whose pair with it is wanted."""


def answer_to(
    question: Question, layers: Sequence[Layer], check: bool = True
) -> WeightDiagonals | WeightBlocks:
    """What keeps of M and J what the question, and its check, needs."""
    return (
        WeightDiagonals(layers, check)
        if question == "diagonal"
        else WeightBlocks(layers, within=question == "blocks")
    )


def usable(question: Question, gradient: Gradient) -> tuple[str | None, list[Layer]]:
    """The layers that can be tapped for a question, in the order of their calls; or why there are none."""
    layers = list(gradient.layers)
    if not gradient.symmetric:
        if question != "diagonal":  # half of a block is copied from the other
            return "the Hessian need not be symmetric: a custom Function or mixed dtypes", []
        layers = [layer for layer in layers if _uses(layers, layer) == 1]
    weights: dict[int, set[object]] = {}
    for layer in layers:
        # Uses of a weight are added up, which takes the same samples and for a diagonal the same layout.
        form = layer.form if question == "diagonal" else layer.call.weight
        weights.setdefault(layer.call.weight, set()).add((form, layer.samples.count))
    layers = [layer for layer in layers if len(weights[layer.call.weight]) == 1]
    if question == "hessian":  # samples of one layer meet those of another
        count = max((layer.samples.count for layer in layers), default=1)
        layers = [layer for layer in layers if layer.samples.count == count]
    return (None, layers) if layers else ("there is no layer whose weight is used by layers alone", [])


def cost(question: Question, layers: Sequence[Layer], meter: Meter, beside: Sequence[Layer] = ()) -> Cost:
    """What some layers take, when those of `beside` are tapped too (and counted elsewhere)."""
    every = sorted([*layers, *beside], key=lambda layer: layer.call.order)
    wants = answer_to(question, ()).wants
    charged = {tap[0] for tap in _shared(every)}
    costs = []
    for layer in layers:
        rows = [other for other in every if other.call.order >= layer.call.order and wants(other, layer)]
        before = _before(wants, every, layer)
        held = meter.column + sum(_bytes(row.gradient) for row in rows)
        if layer in charged:
            tap = made(layer.call.output.edge.node)
            costs.append(meter.products(layer.columns, tap, made(layer.gradient.grad_fn), held))
        costs += [_work(row, layer, question != "diagonal", meter) for row in rows]
        if before:
            first = min(made(other.call.output.edge.node) for other in before)
            costs.append(meter.backwards(layer.inputs, first, made(layer.call.input.grad_fn), held))
            costs += [
                _work(layer, other, question != "diagonal", meter) for other in before if other in beside
            ]
    return total(costs)


def _work(rows: Layer, columns: Layer, whole: bool, meter: Meter) -> Cost:
    """What it takes to bring M between two layers to the space of their weights."""
    count, width = columns.samples.count, columns.gradient.dtype.itemsize
    inputs, outputs = rows.fan_in, rows.columns // rows.positions
    elements = columns.columns * count * rows.columns  # of M
    sums = 2 * elements * inputs if rows.positions > 1 else 0
    if not whole:
        return meter.arithmetic(sums / outputs, 6 * width * elements)
    tall = outputs * inputs  # rows of the block
    products = columns.columns * count * tall  # elements of T
    operations = sums + 2 * products * columns.fan_in
    if rows is columns:
        operations, products = operations // 2, products // 2
    block = tall * columns.columns // columns.positions * columns.fan_in
    # T is written and read, new memory is slow the first time, every output of `columns` takes some calls.
    calls = 0 if rows is columns and rows.positions == 1 else 8 * columns.columns // columns.positions
    return meter.arithmetic(
        operations, width * (2 * products + 3 * elements + 8 * block), width * 2 * block, calls
    )


def _uses(layers: Sequence[Layer], layer: Layer) -> int:
    return sum(other.call.weight == layer.call.weight for other in layers)


def run(answer: LayerAnswer, layers: Sequence[Layer], meter: Meter, progress: Progress) -> None:
    """Give the answer all pairs of layers that it wants; `layers` in the order of their calls."""
    gradient = meter.gradient
    # The most that a pass holds, whatever it starts from.
    held = bytes_per_column([layer.gradient for layer in layers])
    jacobians = {layer: _jacobians(answer, layers, layer, meter, held, progress) for layer in layers}
    shared = _shared(layers)
    for batch in _batches(shared):
        columned = [layer for tap in batch.taps for layer in tap]
        wanted = {row for row in layers if any(_pair(answer.wants, row, own) for own in columned)}
        rows = [tap for tap in shared if not wanted.isdisjoint(tap)]
        # A product holds its pass, its seed, and its rows in two layouts.
        size = [tap[0].gradient for tap in (*batch.taps, *rows, *rows)]
        room = meter.fit(held + sum(map(_bytes, size)))
        products = partial(_tapped, gradient, batch.taps, rows)
        chunks = meter.sizes.search(room, batch.columns, meter.product)
        for numbers, found in stacks(products, batch.seeds, batch.columns, chunks, progress):
            M = {row: stack for tap, stack in zip(rows, found, strict=True) for row in tap}
            for tap, own, part in batch.members(numbers):
                for columns in tap:
                    pairs = [row for row in layers if _pair(answer.wants, row, columns)]
                    stacked = [row.layout(M[row][part]) for row in pairs]
                    moves = [_columns_of(jacobians[row].get(columns), row, own) for row in pairs]
                    answer.add(pairs, columns, own, stacked, moves)


def run_part(part: LayerPart, layers: Sequence[Layer], meter: Meter, progress: Progress) -> None:
    """Give a part of the Hessian what it needs of M and J; `layers` in the order of their calls."""
    held = bytes_per_column([layer.gradient for layer in layers])
    jacobians = {layer: _jacobians(part, layers, layer, meter, held, progress) for layer in layers}
    columns = list(part.columns)
    for row, owned in part.rows.items() if columns else ():
        numbers = owned.columns
        room = meter.fit(held + _bytes(row.gradient) + 2 * sum(_bytes(layer.gradient) for layer in columns))
        products = partial(_tapped, meter.gradient, [[row]], [[layer] for layer in columns])
        seeds = partial(_seeds_of, row, numbers)
        chunks = meter.sizes.search(room, len(numbers), meter.product)
        for some, found in stacks(products, seeds, len(numbers), chunks, progress):
            own = numbers[some.start : some.stop]
            for column, stack in zip(columns, found, strict=True):
                moved = _columns_of(jacobians[column].get(row), column, own)
                part.add(row, column, own, column.layout(stack), moved)
        for column in columns:
            moves = jacobians[row].get(column)
            if moves is not None:
                part.add_moves(row, column, row.jacobian_columns(moves))


def _seeds_of(layer: Layer, numbers: Sequence[int], some: range) -> list[Tensor]:
    """One-hot columns of one tap, [c, 1, *z.shape]."""
    return [layer.seeds(numbers[some.start : some.stop]).unsqueeze(1)]


def cost_of_part(part: LayerPart, layers: Sequence[Layer], meter: Meter) -> Cost:
    """What `run_part` takes."""
    costs = []
    for layer in layers:
        before = _before(part.wants, layers, layer)
        held = meter.column + sum(_bytes(other.gradient) for other in (layer, *part.columns))
        if layer in part.rows and part.columns:
            count = len(part.rows[layer].columns)
            tap = made(layer.call.output.edge.node)
            costs.append(meter.products(count, tap, made(layer.gradient.grad_fn), held))
            work = total(_work(column, layer, True, meter) for column in part.columns)
            costs.append(work.scaled(count / layer.columns))
        if before:
            first = min(made(other.call.output.edge.node) for other in before)
            costs.append(meter.backwards(layer.inputs, first, made(layer.call.input.grad_fn), held))
    return total(costs)


def _pair(wants: Wants, rows: Layer, columns: Layer) -> bool:
    """Is the block between two layers made by columns of this one?"""
    return rows.call.order >= columns.call.order and wants(rows, columns)


def _columns_of(jacobian: Tensor | None, row: Layer, numbers: Sequence[int]) -> Tensor | None:
    if jacobian is None:
        return None
    own = slice(numbers.start, numbers.stop) if isinstance(numbers, range) else list(numbers)
    return row.jacobian_columns(jacobian[own])


Tap = list[Layer]
"""Layers whose outputs go into one sum: curvature by one of them is curvature by the others."""


def _shared(layers: Iterable[Layer]) -> list[Tap]:
    """The taps of layers, in the order of their first calls."""
    taps: dict[int, list[Tap]] = {}
    for layer in layers:
        own = taps.setdefault(id(layer.gradient), [])
        tap = next((tap for tap in own if layer.shares(tap[0])), None)
        if tap is None:
            own.append([layer])
        else:
            tap.append(layer)
    return list(chain.from_iterable(taps.values()))


def together(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers in groups that are best tapped as a whole: uses of a weight, and layers that share a tap."""
    groups: list[list[Layer]] = []
    for tap in _shared(layers):
        weights = {layer.call.weight for layer in tap}
        own = [group for group in groups if any(layer.call.weight in weights for layer in group)]
        groups = [group for group in groups if group not in own]
        groups.append([*chain.from_iterable(own), *tap])
    return groups


@dataclass(frozen=True)
class _Batch:
    """Taps of the same weights, with outputs of one shape, whose columns are taken together."""

    taps: list[Tap]

    @property
    def columns(self) -> int:
        """Of all of them."""
        return sum(tap[0].columns for tap in self.taps)

    def members(self, numbers: range) -> Iterator[tuple[Tap, range, slice]]:
        """The taps that some columns belong to; which of their own, and where they are in a stack."""
        each = self.taps[0][0].columns
        for k in range(numbers.start // each, -(-numbers.stop // each)):
            first, last = max(numbers.start, k * each), min(numbers.stop, (k + 1) * each)
            place = slice(first - numbers.start, last - numbers.start)
            yield self.taps[k], range(first - k * each, last - k * each), place

    def seeds(self, numbers: range) -> list[Tensor]:
        """One-hot columns, [c, taps, *z.shape]."""
        gradient = self.taps[0][0].gradient
        seeds = gradient.new_zeros(len(numbers), len(self.taps), *gradient.shape)
        for tap, own, place in self.members(numbers):
            seeds[place, self.taps.index(tap)] = tap[0].seeds(own)
        return [seeds]


def _batches(taps: Iterable[Tap]) -> list[_Batch]:
    """Taps of many outputs by themselves, uses of weights with few outputs together."""
    batches: dict[object, list[_Batch]] = {}
    for tap in taps:
        own = batches.setdefault((tap[0].form, tap[0].gradient.shape, tap[0].samples), [])
        if not own or own[-1].columns + tap[0].columns > CHUNK:
            own.append(_Batch([]))
        own[-1].taps.append(tap)
    return list(chain.from_iterable(batches.values()))


def _tapped(gradient: Gradient, columns: Sequence[Tap], rows: Sequence[Tap], seeds: Tensor) -> list[Tensor]:
    return gradient.tapped([tap[0] for tap in columns], seeds.unbind(), [tap[0] for tap in rows])


def _before(wants: Wants, layers: Sequence[Layer], layer: Layer) -> list[Layer]:
    """The layers that the input of a layer may depend on, of those whose pair with it is wanted."""
    if not layer.call.moves:
        return []
    return [other for other in layers[: layers.index(layer)] if wants(layer, other)]


def _jacobians(
    answer: LayerAnswer | LayerPart,
    layers: Sequence[Layer],
    layer: Layer,
    meter: Meter,
    held: int,
    progress: Progress,
) -> dict[Layer, Tensor]:
    """J of a layer by the outputs of those before it: [columns, N, inputs]."""
    before = _before(answer.wants, layers, layer)
    if not before:
        return {}
    input = layer.call.input
    held += _bytes(input) + sum(_bytes(other.gradient) for other in before)
    made_of = stacks(
        lambda seed: meter.gradient.moved(layer, seed, before),
        lambda numbers: [layer.input_seeds(numbers)],
        layer.inputs,
        meter.sizes.search(meter.fit(held), layer.inputs, meter.product),
        progress,
    )
    rows = zip(*(found for _, found in made_of), strict=True)
    return {other: layer.jacobian(other, torch.cat(parts)) for other, parts in zip(before, rows, strict=True)}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize
