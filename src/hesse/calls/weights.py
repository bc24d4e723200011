"""The layer calls of a tape: linear maps of their input by a weight, and how each is laid out.

Every layer is brought to one form: for sample n, position t (places of one sample that share the weight)
and group g,

    z[n, t, g, o] = sum_i W[g, o, i] a[n, t, g, i] + b[g, o]

with a the input, unfolded into patches for a convolution, one-hot for an embedding, multiplied out
for a bilinear layer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional

from hesse.runtime.graph import nodes
from hesse.tape.record import Call, Value


class Kind(Protocol):
    """How a layer's tensors are laid out."""

    @property
    def own(self) -> tuple[int, int]:
        """How many trailing dimensions of input and output belong to the layer itself."""

    def unfold(self, inputs: Tensor) -> Tensor:
        """Inputs [B, *own] as [B, T, G, I]."""

    def layout(self, outputs: Tensor) -> Tensor:
        """Outputs [B, *own] as [B, T, G, O]."""

    def to_weight(self, values: Tensor) -> Tensor:
        """Values [..., G, O, I] as [..., *weight.shape]."""


@dataclass(frozen=True)
class Linear:
    """`z = a Wᵀ`, or `z = a W` where the weight is stored transposed; `shape` is the weight's."""

    shape: torch.Size
    transposed: bool = False
    own = (1, 1)

    def unfold(self, inputs: Tensor) -> Tensor:
        """See `Kind`."""
        return inputs[:, None, None, :]

    def layout(self, outputs: Tensor) -> Tensor:
        """See `Kind`."""
        return outputs[:, None, None, :]

    def to_weight(self, values: Tensor) -> Tensor:
        """See `Kind`."""
        values = values.squeeze(-3)
        values = values.transpose(-1, -2) if self.transposed else values
        return values.reshape(*values.shape[:-2], *self.shape)


@dataclass(frozen=True)
class Convolution:
    """A convolution of any number of dimensions; transposed ones are one of the spread-out input."""

    shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    spread: tuple[int, ...] | None = None  # the stride of a transposed convolution

    @property
    def own(self) -> tuple[int, int]:
        """See `Kind`."""
        return len(self.stride) + 1, len(self.stride) + 1

    def unfold(self, inputs: Tensor) -> Tensor:
        """See `Kind`."""
        places = len(self.stride)
        if self.spread is not None:
            for dim, step in enumerate(self.spread, start=2):
                inputs = _spread(inputs, dim, step)
        # functional.pad counts dimensions from the last
        inputs = functional.pad(inputs, list(chain.from_iterable(reversed(self.padding))))
        for d in range(places):
            span = (self.shape[2 + d] - 1) * self.dilation[d] + 1
            inputs = inputs.unfold(2 + d, span, self.stride[d])[..., :: self.dilation[d]]
        if self.spread is not None:
            inputs = inputs.flip(tuple(range(-places, 0)))
        inputs = inputs.unflatten(1, (self.groups, -1))  # B, G, C, *places, *kernel
        order = (0, *range(3, 3 + places), 1, 2, *range(3 + places, 3 + 2 * places))
        patches: Tensor = inputs.permute(order).flatten(2 + places).flatten(1, places)
        return patches

    def layout(self, outputs: Tensor) -> Tensor:
        """See `Kind`."""
        grouped = outputs.reshape(len(outputs), self.groups, -1, outputs.shape[2:].numel())
        return grouped.permute(0, 3, 1, 2)

    def to_weight(self, values: Tensor) -> Tensor:
        """See `Kind`."""
        lead = values.shape[:-3]
        if self.spread is None:
            return values.reshape(*lead, *self.shape)
        kernel = self.shape[2:]
        values = values.reshape(*values.shape[:-1], -1, *kernel).transpose(-2 - len(kernel), -1 - len(kernel))
        return values.reshape(*lead, *self.shape)


@dataclass(frozen=True, eq=False)
class Embedding:
    """Rows of a table: a linear layer of one-hot inputs over the `used` rows."""

    shape: torch.Size
    used: Tensor
    padding: int | None
    dtype: torch.dtype
    own = (0, 1)

    def unfold(self, inputs: Tensor) -> Tensor:
        """See `Kind`."""
        hot = inputs[:, None] == self.used
        if self.padding is not None:  # torch takes no derivative by this row
            hot &= (self.used != self.padding)[None]
        return hot.to(self.dtype)[:, None, None, :]

    def layout(self, outputs: Tensor) -> Tensor:
        """See `Kind`."""
        return outputs[:, None, None, :]

    def to_weight(self, values: Tensor) -> Tensor:
        """See `Kind`."""
        rows = values.squeeze(-3).transpose(-1, -2)
        table = rows.new_zeros(*rows.shape[:-2], *self.shape)
        table.index_copy_(-2, self.used, rows)
        return table


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer.

    Attributes:
        weight: index of the weight among the leaves.
        bias: index of the bias, or None.
        input: the input, with its graph.
        output: the value z.
        kind: the layout.
        order: number of the call on the tape.
        name: of the torch function.
        through: the value that held the weight: a view of it, or itself.
        moves: the input is a function of leaves.
    """

    weight: int
    bias: int | None
    input: Tensor
    output: Value
    kind: Kind
    order: int
    name: str
    through: Value
    moves: bool


def layer_call(call: Call) -> LayerCall | None:
    """What layer a call is; None where its weight is no leaf, or where it is no layer."""
    if layer_call not in call.known:
        call.known[layer_call] = _layer_call(call)
    found: LayerCall | None = call.known[layer_call]
    return found


def _layer_call(call: Call) -> LayerCall | None:
    found = read_layer(call) if len(call.outputs) == 1 else None
    if found is None:
        return None
    weight, bias, input, kind = found
    if not isinstance(weight, Value):
        return None
    tensor = input.tensor if isinstance(input, Value) else input
    index, _ = _leaf(weight)
    z = call.outputs[0].tensor
    dtypes = {z.dtype, weight.tensor.dtype} | ({tensor.dtype} if tensor.is_floating_point() else set())
    if index is None or len(dtypes) > 1 or not z.numel():  # autocast, for example
        return None
    place = bias.leaf if isinstance(bias, Value) else None
    if isinstance(bias, Value) and isinstance(kind, Linear) and bias.tensor.shape != z.shape[-1:]:
        place = None  # what is added may have any shape that can be broadcast
    moves = isinstance(input, Value) or (tensor.requires_grad and not tensor.is_leaf)
    return LayerCall(index, place, tensor, call.outputs[0], kind, call.order, call.name, weight, moves)


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


def _leaf(weight: Value) -> tuple[int | None, bool]:
    """The leaf that a value is, and whether it is its transpose."""
    if weight.leaf is not None or weight.source is None:
        return weight.leaf, False
    held = weight.source.inputs.get(0)
    if (
        held is not None
        and held.leaf is not None
        and weight.source.name in ("T", "mT", "t", "transpose")
        and weight.tensor.dim() == 2
        and weight.tensor.stride() == held.tensor.stride()[::-1]
        and weight.tensor.shape == held.tensor.shape[::-1]
    ):
        return held.leaf, True
    return None, False


_Read = tuple[Any, Any, Any, Kind] | None
"""Weight, bias and input, each a tensor or, if it requires grad, a value; and the kind."""


def read_layer(call: Call) -> _Read:
    """What a call that may be a layer was called with, whatever its weight is; None for all others."""
    reader = _READERS.get(call.func)
    found: _Read = None if reader is None else call.read_by(reader)
    return found


def _read_linear(input: Any, weight: Any, bias: Any = None) -> _Read:
    return _linear(weight, bias, input, rows_are_inputs=False)


def _read_matmul(input: Any, other: Any) -> _Read:
    return _linear(other, None, input, rows_are_inputs=True)


def _read_addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> _Read:
    return _linear(mat2, input, mat1, rows_are_inputs=True) if beta == alpha == 1 else None


def _linear(weight: Any, bias: Any, input: Any, rows_are_inputs: bool) -> _Read:
    if not isinstance(weight, Value) or weight.tensor.dim() != 2:
        return None
    _, flipped = _leaf(weight)
    shape = weight.tensor.shape[::-1] if flipped else weight.tensor.shape
    return weight, bias, input, Linear(torch.Size(shape), rows_are_inputs != flipped)


def _read_bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> _Read:
    if not isinstance(weight, Value):
        return None
    one, two = (i.tensor if isinstance(i, Value) else i for i in (input1, input2))
    with torch.enable_grad():
        product = (one.unsqueeze(-1) * two.unsqueeze(-2)).flatten(-2)
    return weight, bias, product, Linear(weight.tensor.shape)


def _read_embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> _Read:
    if not isinstance(weight, Value) or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    shape = weight.tensor.shape
    if padding_idx is not None:
        padding_idx %= shape[0]
    return weight, None, input, Embedding(shape, input.unique(), padding_idx, weight.tensor.dtype)


def _read_convolution(places: int) -> Callable[..., _Read]:
    def read(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> _Read:
        shape, gap = _shape(weight), _each(dilation, places)
        if padding == "valid":
            padding = 0
        if padding == "same":
            spans = [d * (k - 1) for d, k in zip(gap, shape[2:], strict=True)]
            sides = tuple((span // 2, span - span // 2) for span in spans)
        else:
            sides = tuple((p, p) for p in _each(padding, places))
        return weight, bias, input, Convolution(shape, _each(stride, places), sides, gap, groups)

    return read


def _read_transposed(places: int) -> Callable[..., _Read]:
    def read(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> _Read:
        shape, gap = _shape(weight), _each(dilation, places)
        sides = tuple(
            (d * (k - 1) - p, d * (k - 1) - p + more)
            for d, k, p, more in zip(
                gap, shape[2:], _each(padding, places), _each(output_padding, places), strict=True
            )
        )
        ones = (1,) * places
        return weight, bias, input, Convolution(shape, ones, sides, gap, groups, _each(stride, places))

    return read


def _shape(weight: Tensor | Value) -> torch.Size:
    return (weight.tensor if isinstance(weight, Value) else weight).shape


def _each(value: Any, places: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * places if len(values) == 1 else values


def _spread(inputs: Tensor, dim: int, step: int) -> Tensor:
    """Zeros put between the entries along a dimension."""
    if step == 1:
        return inputs
    apart = inputs.unsqueeze(dim + 1)
    zeros = apart.new_zeros(*apart.shape[: dim + 1], step - 1, *apart.shape[dim + 2 :])
    spread = torch.cat([apart, zeros], dim + 1).flatten(dim, dim + 1)
    return spread.narrow(dim, 0, (inputs.shape[dim] - 1) * step + 1)


_READERS: dict[Any, Callable[..., _Read]] = {
    functional.linear: _read_linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _read_matmul),
    torch.addmm: _read_addmm,
    torch.bilinear: _read_bilinear,
    functional.embedding: _read_embedding,
    functional.conv1d: _read_convolution(1),
    functional.conv2d: _read_convolution(2),
    functional.conv3d: _read_convolution(3),
    functional.conv_transpose1d: _read_transposed(1),
    functional.conv_transpose2d: _read_transposed(2),
    functional.conv_transpose3d: _read_transposed(3),
}
