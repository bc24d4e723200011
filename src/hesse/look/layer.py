"""A layer of a function at its point: its call, where the samples are, and the gradient by its output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from hesse.calls.layouts import Layout
from hesse.calls.weights import LayerCall
from hesse.tape.samples import Samples

Form = tuple[int, Layout]


class Layer:
    """A layer call, its place in the function, and the gradient by its output.

    Attributes:
        call: the call.
        samples: where the samples are, in input and output.
        gradient: the gradient by z, which can be differentiated.
    """

    def __init__(self, call: LayerCall, samples: Samples, gradient: Tensor) -> None:
        own_in, own_out = call.layout.own
        self.call = call
        self.samples = samples
        self.gradient = gradient
        self._input_shape = samples.first(call.input).shape[1:]
        # not of the output itself, which may have been given another shape in place
        self._output_shape = samples.first(gradient).shape[1:]
        self._extra = self._output_shape[: len(self._output_shape) - own_out].numel()
        self._own_in = self._input_shape[len(self._input_shape) - own_in :]
        self._own_out = self._output_shape[len(self._output_shape) - own_out :]

    @property
    def tensors(self) -> list[int]:
        """Indices of the weight and, if there is one, the bias among the leaves."""
        return [self.call.weight] + ([] if self.call.bias is None else [self.call.bias])

    def shares(self, other: Layer) -> bool:
        """Do both outputs go into one sum alone? Then curvature by one is curvature by the other."""
        return (
            self.gradient is other.gradient
            and self.samples == other.samples
            and torch.equal(self._places, other._places)
        )

    @property
    def form(self) -> Form:
        """The weight and how it is laid out: uses of one form can be added up before they are split."""
        return self.call.weight, self.call.layout

    @property
    def fan_in(self) -> int:
        """I of `a`, the bias included."""
        return self.call.layout.fan_in + (self.call.bias is not None)

    @property
    def inputs(self) -> int:
        """Elements of one sample's input, before it is unfolded."""
        return self._input_shape.numel()

    @cached_property
    def a(self) -> Tensor:
        """The unfolded input, [N, T, G, I]; for a layer with a bias a last column of ones is joined."""
        return self.unfold(self.samples.first(self.call.input.detach()).unsqueeze(0), bias=1.0).squeeze(0)

    @cached_property
    def gamma(self) -> Tensor:
        """The gradient by z, [N, T, G, O]."""
        return self.layout(self.gradient.detach().unsqueeze(0)).squeeze(0)

    @cached_property
    def _places(self) -> Tensor:
        """The elements of one sample's z, numbered as they lie there, as [T, G, O]."""
        numbers = torch.arange(self._output_shape.numel(), device=self.gradient.device)
        return self.call.layout.layout(numbers.view(self._extra, *self._own_out)).flatten(0, 1)

    @property
    def positions(self) -> int:
        """T."""
        return self._places.shape[0]

    @property
    def columns(self) -> int:
        """How many columns M has: T G O."""
        return self._places.numel()

    @property
    def groups(self) -> int:
        """G."""
        return self._places.shape[1]

    def outputs(self, numbers: range) -> Iterator[tuple[int, slice, slice]]:
        """Columns run over positions first, then outputs: the outputs (of G O) that some columns have.

        With each, where its columns are among them, and which positions they have.
        """
        count = self.positions
        for output in range(numbers.start // count, -(-numbers.stop // count)):
            first, last = max(numbers.start, output * count), min(numbers.stop, (output + 1) * count)
            yield (
                output,
                slice(first - numbers.start, last - numbers.start),
                slice(first - output * count, last - output * count),
            )

    def numbered(self, numbers: range) -> tuple[Tensor, Tensor]:
        """Output and position of each of some columns."""
        every = torch.arange(numbers.start, numbers.stop, device=self.gradient.device)
        return every // self.positions, every % self.positions

    def seeds(self, numbers: Sequence[int]) -> Tensor:
        """One-hot columns for all samples, [c, *z.shape]."""
        places = self._places.permute(1, 2, 0).flatten()
        return self._one_hot(places[torch.tensor(numbers, device=places.device)], self._output_shape)

    def input_seeds(self, numbers: range) -> Tensor:
        """One-hot elements of the input for all samples, [c, *input.shape]."""
        places = torch.arange(numbers.start, numbers.stop, device=self.gradient.device)
        return self._one_hot(places, self._input_shape)

    def _one_hot(self, places: Tensor, shape: torch.Size) -> Tensor:
        seeds = self.gradient.new_zeros(len(places), self.samples.count, shape.numel())
        seeds[torch.arange(len(places), device=seeds.device), :, places] = 1
        return self.samples.back(seeds.unflatten(2, shape), lead=1)

    def layout(self, stack: Tensor) -> Tensor:
        """A stack [c, *z.shape] as [c, N, T, G, O]."""
        columns, count = len(stack), self.samples.count
        flat = self.samples.first(stack, lead=1).reshape(-1, *self._own_out)
        flat = self.call.layout.layout(flat)
        return flat.reshape(columns, count, -1, *flat.shape[2:])

    def unfold(self, stack: Tensor, bias: float = 0.0) -> Tensor:
        """A stack [c, N, *input of a sample] as [c, N, T, G, I], with a last column of `bias`."""
        columns, count = stack.shape[:2]
        flat = self.call.layout.unfold(stack.reshape(-1, *self._own_in))
        flat = flat.reshape(columns, count, -1, *flat.shape[2:])
        if self.call.bias is None:
            return flat
        return torch.cat([flat, flat.new_full((*flat.shape[:-1], 1), bias)], dim=-1)

    def jacobian(self, by: Layer, stack: Tensor) -> Tensor:
        """J by another layer, [columns, N, inputs], from a stack of rows [inputs, *z.shape]."""
        rows = by.layout(stack)  # inputs, N, T, G, O
        return rows.permute(3, 4, 2, 1, 0).reshape(by.columns, by.samples.count, -1)

    def jacobian_columns(self, jacobian: Tensor) -> Tensor:
        """Columns [c, N, inputs] of J, unfolded: [c, N, T, G, I]."""
        return self.unfold(jacobian.unflatten(2, self._input_shape))

    def split(self, values: Tensor) -> dict[int, Tensor]:
        """Values [..., G, O, I] of the joined weight and bias, as those of each tensor."""
        if self.call.bias is None:
            return {self.call.weight: self.call.layout.to_weight(values)}
        return {
            self.call.weight: self.call.layout.to_weight(values[..., :-1]),
            self.call.bias: values[..., -1].flatten(-2),
        }
