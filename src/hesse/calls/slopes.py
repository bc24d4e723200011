"""Slopes of a call that was run again, by autograd; and derivatives as they fit its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hesse.tape.record import Value


def slopes_against(
    leaves: Mapping[Value, Tensor], results: Sequence[Tensor], adjoints: Sequence[Tensor | None]
) -> Sequence[Tensor] | None:
    """`<adjoints, call>` differentiated by the inputs, with a graph; None if it is linear."""
    made, given = both(results, adjoints)
    if not made:
        return None
    with torch.enable_grad():
        slopes = torch.autograd.grad(
            made, list(leaves.values()), given, create_graph=True, materialize_grads=True
        )
    return slopes if any(slope.requires_grad for slope in slopes) else None


def slopes_of(leaves: Mapping[Value, Tensor], results: Sequence[Tensor]) -> dict[Value, Tensor]:
    """Of a call of single elements that was run again: the derivative by each input, with a graph."""
    (result,) = results
    with torch.enable_grad():
        slopes = torch.autograd.grad(
            result,
            list(leaves.values()),
            torch.ones_like(result),
            create_graph=True,
            materialize_grads=True,
        )
    return dict(zip(leaves, slopes, strict=True))


def grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Vectors times the derivative of outputs, of those that have one."""
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    tracked, given = zip(*pairs, strict=True)
    return torch.autograd.grad(tracked, inputs, given, retain_graph=True, materialize_grads=True)


def both(
    results: Sequence[Tensor], vectors: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results with their vectors, without those that have none."""
    pairs = [(r, v) for r, v in zip(results, vectors, strict=True) if v is not None]
    return tuple(r for r, _ in pairs), tuple(v for _, v in pairs)


def onto(stack: Tensor, value: Value) -> Tensor:
    """Undo broadcasting: sum over what the value does not have."""
    shape = value.tensor.shape
    if stack.shape[1:] == shape:
        return stack
    padded = (1,) * (stack.dim() - 1 - len(shape))
    return stack.sum_to_size(len(stack), *padded, *shape).view(len(stack), *shape)


def fitted(part: Tensor, value: Value) -> Tensor:
    """A derivative by a value, broadcasting and a change of precision undone."""
    return part.sum_to_size(value.tensor.shape).to(value.tensor.dtype)


def times(one: Tensor, other: Tensor | None) -> Tensor:
    """The product, where None is one."""
    return one if other is None else one * other
