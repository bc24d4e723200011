"""Taps: one product a neuron, for layers that are linear in their weight.

A tap is a place in the graph where a layer's output z is made. A column of M, the Hessian by the taps, takes
one product for all samples at once, over the graph above the tap only; J, how the input of a layer follows
the outputs of those before it, takes one backward pass per element of that input. `hesse.layers` makes
second derivatives by the weights of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hesse.gradient import Gradient
from hesse.layers import Layer
from hesse.runtime.batches import batched, clock
from hesse.runtime.chunks import ChunkSize
from hesse.runtime.memory import bytes_per_column
from hesse.runtime.progress import Progress


class Answer(Protocol):
    """What a question keeps of M and J."""

    def wants(self, rows: Layer, columns: Layer) -> bool:
        """Is the block between the weights of these layers needed?"""

    def add(self, rows: Layer, columns: Layer, numbers: range, M: Tensor, J: Tensor | None) -> None:
        """Take in some columns."""


def passes(answer: Answer, layers: Sequence[Layer]) -> int:
    """Products for M and backward passes for J."""
    return sum(layer.columns + (layer.inputs if _before(answer, layers, layer) else 0) for layer in layers)


def run(
    answer: Answer, layers: Sequence[Layer], gradient: Gradient, workspace: int, progress: Progress
) -> None:
    """Give the answer all pairs of layers that it wants; `layers` in the order of their calls."""
    jacobians = {layer: _jacobians(answer, layers, layer, gradient, workspace, progress) for layer in layers}
    for k, columns in enumerate(layers):
        rows = [layer for layer in layers[k:] if answer.wants(layer, columns)]
        held = bytes_per_column([columns.gradient])
        # A product holds its pass, its seed, and its rows in two layouts.
        size = [columns.gradient, *(2 * [row.gradient for row in rows])]
        chunks = ChunkSize(workspace // (held + sum(map(_bytes, size))), total=columns.columns)
        start = 0
        while start < columns.columns:
            began = clock(columns.gradient)
            numbers = range(start, min(start + chunks.size, columns.columns))
            stacks = batched(
                lambda seed, by=columns, to=rows: gradient.tapped(by, seed, to),
                [columns.seeds(numbers)],
                chunks,
            )
            if stacks is None:
                continue
            for row, stack in zip(rows, stacks, strict=True):
                jacobian = jacobians[row].get(columns)
                J = None if jacobian is None else row.jacobian_columns(jacobian[start : numbers.stop])
                answer.add(row, columns, numbers, row.layout(stack), J)
            start = numbers.stop
            chunks.report(len(numbers), clock(columns.gradient) - began, regime=columns)
            progress.advance(len(numbers))


def _before(answer: Answer, layers: Sequence[Layer], layer: Layer) -> list[Layer]:
    """The layers that the input of a layer may depend on, of those whose pair with it is wanted."""
    if not layer.call.input.requires_grad:
        return []
    return [other for other in layers[: layers.index(layer)] if answer.wants(layer, other)]


def _jacobians(
    answer: Answer,
    layers: Sequence[Layer],
    layer: Layer,
    gradient: Gradient,
    workspace: int,
    progress: Progress,
) -> dict[Layer, Tensor]:
    """J of a layer by the outputs of those before it: [columns, N, inputs]."""
    before = _before(answer, layers, layer)
    if not before:
        return {}
    input = layer.call.input
    held = bytes_per_column([input]) + _bytes(input) + sum(_bytes(other.gradient) for other in before)
    chunks, start = ChunkSize(workspace // held, total=layer.inputs), 0
    stacks: list[Sequence[Tensor]] = []
    while start < layer.inputs:
        began = clock(input)
        stop = min(start + chunks.size, layer.inputs)
        found = batched(
            lambda seed: gradient.moved(layer, seed, before), [layer.input_seeds(start, stop)], chunks
        )
        if found is None:
            continue
        stacks.append(found)
        chunks.report(stop - start, clock(input) - began, regime=layer)
        progress.advance(stop - start)
        start = stop
    return {
        other: layer.jacobian(other, torch.cat(parts))
        for other, parts in zip(before, zip(*stacks, strict=True), strict=True)
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize
