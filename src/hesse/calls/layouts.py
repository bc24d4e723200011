"""Linear maps of an input by a weight: how calls are read as layers, and how each is laid out.

Every layer is brought to one form: for sample n, position t (places of one sample that share the weight)
and group g,

    z[n, t, g, o] = sum_i W[g, o, i] a[n, t, g, i] + b[g, o]

with a the input, unfolded into patches for a convolution, one-hot for an embedding, multiplied out
for a bilinear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from hesse.tape.record import Value


class Layout(Protocol):
    """How a layer's tensors are laid out."""

    @property
    def own(self) -> tuple[int, int]:
        """How many trailing dimensions of input and output belong to the layer itself."""

    @property
    def fan_in(self) -> int:
        """I."""

    def unfold(self, inputs: Tensor) -> Tensor:
        """Inputs [B, *own] as [B, T, G, I]."""

    def layout(self, outputs: Tensor) -> Tensor:
        """Outputs [B, *own] as [B, T, G, O]."""

    def to_weight(self, values: Tensor) -> Tensor:
        """Values [..., G, O, I] as [..., *weight.shape]."""


@dataclass(frozen=True)
class LinearLayout:
    """`z = a Wᵀ`, or `z = a W` where the weight is stored transposed; `shape` is the weight's."""

    shape: torch.Size
    transposed: bool = False
    own = (1, 1)

    @property
    def fan_in(self) -> int:
        """See `Layout`."""
        return self.shape[0] if self.transposed else self.shape[1:].numel()

    def unfold(self, inputs: Tensor) -> Tensor:
        """See `Layout`."""
        return inputs[:, None, None, :]

    def layout(self, outputs: Tensor) -> Tensor:
        """See `Layout`."""
        return outputs[:, None, None, :]

    def to_weight(self, values: Tensor) -> Tensor:
        """See `Layout`."""
        values = values.squeeze(-3)
        values = values.transpose(-1, -2) if self.transposed else values
        return values.reshape(*values.shape[:-2], *self.shape)


@dataclass(frozen=True)
class ConvolutionLayout:
    """A convolution of any number of dimensions; transposed ones are one of the spread-out input."""

    shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    spread: tuple[int, ...] | None = None  # the stride of a transposed convolution

    @property
    def own(self) -> tuple[int, int]:
        """See `Layout`."""
        return len(self.stride) + 1, len(self.stride) + 1

    @property
    def fan_in(self) -> int:
        """See `Layout`."""
        channels = self.shape[1] if self.spread is None else self.shape[0] // self.groups
        return channels * self.shape[2:].numel()

    def unfold(self, inputs: Tensor) -> Tensor:
        """See `Layout`."""
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
        """See `Layout`."""
        grouped = outputs.reshape(len(outputs), self.groups, -1, outputs.shape[2:].numel())
        return grouped.permute(0, 3, 1, 2)

    def to_weight(self, values: Tensor) -> Tensor:
        """See `Layout`."""
        lead = values.shape[:-3]
        if self.spread is None:
            return values.reshape(*lead, *self.shape)
        kernel = self.shape[2:]
        values = values.reshape(*values.shape[:-1], -1, *kernel).transpose(-2 - len(kernel), -1 - len(kernel))
        return values.reshape(*lead, *self.shape)


@dataclass(frozen=True, eq=False)
class EmbeddingLayout:
    """Rows of a table: a linear layer of one-hot inputs over the `used` rows."""

    shape: torch.Size
    used: Tensor
    padding: int | None
    dtype: torch.dtype
    own = (0, 1)

    @property
    def fan_in(self) -> int:
        """See `Layout`."""
        return len(self.used)

    def unfold(self, inputs: Tensor) -> Tensor:
        """See `Layout`."""
        hot = inputs[:, None] == self.used
        if self.padding is not None:  # torch takes no derivative by this row
            hot &= (self.used != self.padding)[None]
        return hot.to(self.dtype)[:, None, None, :]

    def layout(self, outputs: Tensor) -> Tensor:
        """See `Layout`."""
        return outputs[:, None, None, :]

    def to_weight(self, values: Tensor) -> Tensor:
        """See `Layout`."""
        rows = values.squeeze(-3).transpose(-1, -2)
        table = rows.new_zeros(*rows.shape[:-2], *self.shape)
        table.index_copy_(-2, self.used, rows)
        return table


def leaf_of(weight: Value) -> tuple[int | None, bool]:
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


Read = tuple[Any, Any, Any, Layout] | None
"""Weight, bias and input, each a tensor or, if it requires grad, a value; and the layout."""


def read_linear(input: Any, weight: Any, bias: Any = None) -> Read:
    """As `torch.nn.functional.linear` has its arguments."""
    return _linear(weight, bias, input, rows_are_inputs=False)


def read_matmul(input: Any, other: Any) -> Read:
    """A product with a matrix."""
    return _linear(other, None, input, rows_are_inputs=True)


def read_addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Read:
    """A product with a matrix, and what is added to it."""
    return _linear(mat2, input, mat1, rows_are_inputs=True) if beta == alpha == 1 else None


def _linear(weight: Any, bias: Any, input: Any, rows_are_inputs: bool) -> Read:
    if not isinstance(weight, Value) or weight.tensor.dim() != 2:
        return None
    _, flipped = leaf_of(weight)
    shape = weight.tensor.shape[::-1] if flipped else weight.tensor.shape
    return weight, bias, input, LinearLayout(torch.Size(shape), rows_are_inputs != flipped)


def read_bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Read:
    """As `torch.nn.functional.bilinear`: a linear layer of the products of both inputs."""
    if not isinstance(weight, Value):
        return None
    one, two = (i.tensor if isinstance(i, Value) else i for i in (input1, input2))
    with torch.enable_grad():
        product = (one.unsqueeze(-1) * two.unsqueeze(-2)).flatten(-2)
    return weight, bias, product, LinearLayout(weight.tensor.shape)


def read_embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Read:
    """As `torch.nn.functional.embedding`, where it does nothing but look up."""
    if not isinstance(weight, Value) or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    shape = weight.tensor.shape
    if padding_idx is not None:
        padding_idx %= shape[0]
    return weight, None, input, EmbeddingLayout(shape, input.unique(), padding_idx, weight.tensor.dtype)


def read_convolution(places: int) -> Callable[..., Read]:
    """The reader of a convolution over so many dimensions."""

    def read(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Read:
        shape, gap = _shape(weight), _each(dilation, places)
        if padding == "valid":
            padding = 0
        if padding == "same":
            spans = [d * (k - 1) for d, k in zip(gap, shape[2:], strict=True)]
            sides = tuple((span // 2, span - span // 2) for span in spans)
        else:
            sides = tuple((p, p) for p in _each(padding, places))
        return weight, bias, input, ConvolutionLayout(shape, _each(stride, places), sides, gap, groups)

    return read


def read_transposed(places: int) -> Callable[..., Read]:
    """The reader of a transposed convolution."""

    def read(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Read:
        shape, gap = _shape(weight), _each(dilation, places)
        sides = tuple(
            (d * (k - 1) - p, d * (k - 1) - p + more)
            for d, k, p, more in zip(
                gap, shape[2:], _each(padding, places), _each(output_padding, places), strict=True
            )
        )
        ones = (1,) * places
        return weight, bias, input, ConvolutionLayout(shape, ones, sides, gap, groups, _each(stride, places))

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
