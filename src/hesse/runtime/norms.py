"""Normalisations from elementary operations, where the derivatives of torch's fused ones are wrong.

The fused weight norm drops a term of its double backward, so its second derivative is wrong.
torch's fused layer, batch and instance norms treat the saved mean and deviation as constants in the
derivative of their double backward: the second derivative is right, the third is silently wrong
(measured with torch 2.13 against finite differences). A third derivative is met when a result of
`create_graph=True` is differentiated again, and when the function takes gradients itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.layer_norm`."""
    return _affine(_standardised(input, range(-len(normalized_shape), 0), eps), weight, bias)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.batch_norm` in training, without the running statistics."""
    dims = [d for d in range(input.dim()) if d != 1]
    return _per_channel(_standardised(input, dims, eps), weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.instance_norm` with the input's own statistics."""
    return _per_channel(_standardised(input, range(2, input.dim()), eps), weight, bias)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """As `torch._weight_norm`, whose second derivative is wrong already."""
    dims = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
    norm: Tensor = torch.linalg.vector_norm(v, dim=dims, keepdim=True)
    return v * (g / norm)


COMPOSITE: dict[Any, Any] = {
    functional.layer_norm: layer_norm,
    functional.batch_norm: batch_norm,
    functional.instance_norm: instance_norm,
}


def _standardised(input: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    centred = input - input.mean(tuple(dims), keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(tuple(dims), keepdim=True) + eps)


def _per_channel(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1) + (1,) * (value.dim() - 2)
    return _affine(
        value,
        None if weight is None else weight.view(shape),
        None if bias is None else bias.view(shape),
    )


def _affine(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    value = value if weight is None else value * weight
    return value if bias is None else value + bias
