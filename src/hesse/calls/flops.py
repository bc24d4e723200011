"""Floating-point operations of a call, from its shapes."""

from __future__ import annotations

from torch import Tensor

from hesse.calls.table import canonical
from hesse.tape.record import Call

_CONTRACTIONS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "dot"}


def flops(call: Call) -> int:
    """Multiplications and additions; an elementwise call counts one for each element."""
    result = sum(value.tensor.numel() for value in call.outputs)
    tensors = [argument for argument in call.arguments if isinstance(argument, Tensor)]
    name = canonical(call.name)
    if name in _CONTRACTIONS:
        first = tensors[1] if name in ("addmm", "baddbmm") else tensors[0]
        return 2 * result * first.shape[-1]
    if name.startswith("conv_transpose"):
        return 2 * tensors[0].numel() * _kernel(tensors[1])
    if name.startswith("conv"):
        return 2 * result * _kernel(tensors[1])
    if name == "scaled_dot_product_attention":
        query, key = tensors[:2]
        return 4 * query.numel() * key.shape[-2]
    if name in ("einsum", "bilinear"):
        return 2 * result * max(tensor[:1].numel() if tensor.dim() else 1 for tensor in tensors)
    return result


def _kernel(weight: Tensor) -> int:
    return weight.numel() // weight.shape[0]
