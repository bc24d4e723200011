"""The layer calls of a tape: which calls are linear maps of their input by a leaf, and who else uses it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from hesse.calls.layouts import Layout, LinearLayout, Read, leaf_of
from hesse.calls.table import TABLE, canonical, row_of
from hesse.runtime.graph import nodes
from hesse.tape.record import Call, Value, name_of


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer.

    Attributes:
        weight: index of the weight among the leaves.
        bias: index of the bias, or None.
        input: the input, with its graph.
        output: the value z.
        layout: how it is laid out.
        order: number of the call on the tape.
        name: of the torch function.
        through: the value that held the weight: a view of it, or itself.
        moves: the input is a function of leaves.
    """

    weight: int
    bias: int | None
    input: Tensor
    output: Value
    layout: Layout
    order: int
    name: str
    through: Value
    moves: bool


def may_be_layer(func: Callable[..., Any]) -> bool:
    """Are there calls of this function that are layers?"""
    row = TABLE.get(canonical(name_of(func)))
    return row is not None and row.is_layer


def layer_call(call: Call) -> LayerCall | None:
    """What layer a call is; None where its weight is no leaf, or where it is no layer."""
    if layer_call not in call.memo:
        call.memo[layer_call] = _layer_call(call)
    found: LayerCall | None = call.memo[layer_call]
    return found


def _layer_call(call: Call) -> LayerCall | None:
    found = read_layer(call) if len(call.outputs) == 1 else None
    if found is None:
        return None
    weight, bias, input, layout = found
    if not isinstance(weight, Value):
        return None
    tensor = input.tensor if isinstance(input, Value) else input
    index, _ = leaf_of(weight)
    z = call.outputs[0].tensor
    dtypes = {z.dtype, weight.tensor.dtype} | ({tensor.dtype} if tensor.is_floating_point() else set())
    if index is None or len(dtypes) > 1 or not z.numel():  # autocast, for example
        return None
    place = bias.leaf if isinstance(bias, Value) else None
    if isinstance(bias, Value) and isinstance(layout, LinearLayout) and bias.tensor.shape != z.shape[-1:]:
        place = None  # what is added may have any shape that can be broadcast
    moves = isinstance(input, Value) or (tensor.requires_grad and not tensor.is_leaf)
    return LayerCall(index, place, tensor, call.outputs[0], layout, call.order, call.name, weight, moves)


def tappable(
    calls: Iterable[LayerCall], value: Tensor, leaves: Sequence[Tensor]
) -> tuple[list[LayerCall], dict[int, str]]:
    """The layers whose weights go into nothing but layers, by counting their uses on the graph of `value`.

    A bias with other uses is left out of its layers. What is left out is said, by index of the leaf.
    """
    by_weight: dict[int, list[LayerCall]] = defaultdict(list)
    by_bias: dict[int, list[LayerCall]] = defaultdict(list)
    for call in calls:
        by_weight[call.weight].append(call)
        if call.bias is not None:
            by_bias[call.bias].append(call)
    uses = _uses(value) if by_weight else Counter()
    biases = {
        bias
        for bias, those in by_bias.items()
        if uses[_place(get_gradient_edge(leaves[bias]))] == len(those) and those == by_weight[those[0].weight]
    }
    free = {w for w, those in by_weight.items() if _alone(those, uses, get_gradient_edge(leaves[w]))}
    apart = dict.fromkeys(by_weight.keys() - free | by_bias.keys() - biases, "used elsewhere too")
    kept = [
        call if call.bias in biases else replace(call, bias=None)
        for weight in free
        for call in by_weight[weight]
    ]
    return kept, apart


def _alone(calls: Sequence[LayerCall], uses: Counter[_Place], leaf: GradientEdge) -> bool:
    """Is the weight of these calls used by them alone, itself or through views of it?"""
    direct = sum(call.through.leaf is not None for call in calls)
    views = Counter(_place(call.through.edge) for call in calls if call.through.leaf is None)
    return uses[_place(leaf)] == direct + len(views) and all(uses[view] == n for view, n in views.items())


_Place = tuple[Node, int]


def _place(edge: GradientEdge) -> _Place:
    return edge.node, edge.output_nr


def _uses(value: Tensor) -> Counter[_Place]:
    """How many places of the graph of `value` each of its tensors goes into."""
    uses: Counter[_Place] = Counter()
    for node in nodes([value]):
        uses.update((after, output) for after, output in node.next_functions if after is not None)
    return uses


def read_layer(call: Call) -> Read:
    """What a call that may be a layer was called with, whatever its weight is; None for all others."""
    row = row_of(call)
    found: Read = call.read_by(row.read) if row and row.is_layer and row.read else None
    return found
