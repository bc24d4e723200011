"""Convolutions as linear maps of their input: every column is an image of one large batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn import grad as gradients

from hesse.calls import weights as layers
from hesse.calls.products import Bilinear
from hesse.curvature.terms import contiguous
from hesse.structure import NoStructure
from hesse.tape.record import Call, Value


class Convolution(Bilinear):
    """A convolution of images [B, channels, *places], with the samples in B."""

    thin = True

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Columns that are the same for all samples only once."""
        (stack,), (value,) = columns, self.inputs
        assert stack is not None
        once = stack[:, :1] if stack.stride(1) == 0 else stack
        return {value: self._pulled(once).expand(*stack.shape[:2], *value.tensor.shape[1:])}

    def pull_right(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """As they lie, where every image is a sample."""
        (output,) = self.outputs
        if len(rows) < len(output.tensor):
            return super().pull_right(rows)
        return self._pulled(contiguous(rows).unflatten(2, output.tensor.shape[1:])).flatten(2)

    def _pulled(self, images: Tensor) -> Tensor:
        """Images [*, *, channels, *places]."""
        (value,) = self.inputs
        pulled = self._transposed(images.flatten(0, 1), value.tensor.shape[1:])
        restored: Tensor = pulled.unflatten(0, images.shape[:2])
        return restored

    def _transposed(self, results: Tensor, shape: torch.Size) -> Tensor:
        """A batch of results, pulled back to inputs of a shape."""
        weight, kind = self._read
        places = len(kind.stride)
        if kind.spread is not None:  # the other way round, it is a plain convolution
            spans = [gap * (size - 1) for gap, size in zip(kind.dilation, kind.shape[2:], strict=True)]
            padding = [span - sides[0] for span, sides in zip(spans, kind.padding, strict=True)]
            found: Tensor = getattr(functional, f"conv{places}d")(
                results, weight, None, kind.spread, padding, kind.dilation, kind.groups
            )
            return found
        padding = [sides[0] for sides in kind.padding]
        found = getattr(gradients, f"conv{places}d_input")(
            (len(results), *shape), weight, results, kind.stride, padding, kind.dilation, kind.groups
        )
        return found

    @cached_property
    def _read(self) -> tuple[Tensor, layers.Convolution]:
        read = _read_convolution(self.call)
        assert read is not None
        return read


def is_convolution(call: Call) -> bool:
    """Is the call a convolution of a batch, whose transposed map torch has?"""
    read = _read_convolution(call)
    if read is None or call.arguments[0].dim() != call.arguments[1].dim():
        return False
    _, kind = read
    return kind.spread is not None or all(before == after for before, after in kind.padding)


def _read_convolution(call: Call) -> tuple[Tensor, layers.Convolution] | None:
    """The weight as the call met it, and how it is laid over the input."""
    read = layers.read_layer(call)
    if read is None:
        return None
    weight, _, _, kind = read
    if not isinstance(kind, layers.Convolution):
        return None
    if not isinstance(weight, Value):
        return weight, kind
    if weight.changed:
        raise NoStructure("the weight of a convolution has been overwritten since")
    return weight.tensor.detach(), kind
