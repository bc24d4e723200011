"""Convolutions as linear maps of their input: every column is an image of one large batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn import grad as gradients

from hesse.blocks import CannotSweep, Term, contiguous
from hesse.tape.local import Added, Local
from hesse.tape.record import Call, Value
from hesse.tape.rules import canonical


class Convolution(Local):
    """A convolution of images [B, channels, *places], with the samples in B."""

    thin = True

    def added(self) -> Added:
        """Nothing."""
        return (), 0

    def curvature(self, adjoints: Sequence[Tensor | None]) -> Iterator[Term]:
        """None."""
        return iter(())

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

    @cached_property
    def _transposed(self) -> Transposed:
        found = self.call.read_by(_SIGNATURES[canonical(self.call.name)])
        assert found is not None
        return found  # type: ignore[no-any-return]


Transposed = Callable[[Tensor, torch.Size], Tensor]
"""The transposed map, of a batch of results to inputs of a shape."""


def is_convolution(call: Call) -> bool:
    """Is the call a convolution of a batch, whose transposed map torch has?"""
    signature = _SIGNATURES.get(canonical(call.name))
    if signature is None or call.arguments[0].dim() != call.arguments[1].dim():
        return False
    return call.read_by(signature) is not None


def _forward(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Transposed | None:
    kernel = _contents(weight)
    places = kernel.dim() - 2
    if padding == "valid":
        padding = 0
    if padding == "same":
        gaps = dilation if isinstance(dilation, (tuple, list)) else [dilation] * places
        spans = [gap * (size - 1) for gap, size in zip(gaps, kernel.shape[2:], strict=True)]
        if any(span % 2 for span in spans):
            return None
        padding = [span // 2 for span in spans]
    back = getattr(gradients, f"conv{places}d_input")
    return lambda results, shape: back(
        (len(results), *shape), kernel, results, stride, padding, dilation, groups
    )


def _transposed(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Transposed:
    kernel = _contents(weight)
    convolved = getattr(functional, f"conv{kernel.dim() - 2}d")
    return lambda results, _: convolved(results, kernel, None, stride, padding, dilation, groups)


def _contents(weight: Tensor | Value) -> Tensor:
    if isinstance(weight, Value):
        if weight.changed:
            raise CannotSweep("the weight of a convolution has been overwritten since")
        weight = weight.tensor
    return weight.detach()


_SIGNATURES: dict[str, Callable[..., Transposed | None]] = {
    **{f"conv{places}d": _forward for places in (1, 2, 3)},
    **{f"conv_transpose{places}d": _transposed for places in (1, 2, 3)},
}
