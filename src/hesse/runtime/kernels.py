"""Calls that are taken another way, because torch's own cannot be differentiated twice, or not rightly.

A handler gets the watch over the function, the call and its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hesse.runtime.graph import variables
from hesse.runtime.norms import COMPOSITE, weight_norm

if TYPE_CHECKING:
    from hesse.runtime.watch import Watch

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


def _normalise(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Batch and instance norm: in training, their statistics are written.

    The kernels get copies of the statistics, which the graph may keep, and the caller's own are
    written after them.
    """
    positional = args[5] if len(args) > 5 else func is functional.instance_norm
    if not kwargs.get("training", kwargs.get("use_input_stats", positional)):
        return func(*args, **kwargs)
    first = 3 if func in (torch.batch_norm, torch.instance_norm) else 1
    own = [*args[first : first + 2], kwargs.get("running_mean"), kwargs.get("running_var")]
    copies = {id(buffer): buffer.clone() for buffer in own if buffer is not None}
    result = _fused_or_not(
        watch,
        func,
        tuple(copies.get(id(arg), arg) for arg in args),
        {name: copies.get(id(arg), arg) for name, arg in kwargs.items()},
    )
    with torch.no_grad():
        for buffer in own:
            if buffer is not None:
                watch.keep(buffer)
                buffer.copy_(copies[id(buffer)])
    return result


def _normalise_layer(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Layer norm: with a bias and no weight, the double backward of torch's own ends in an error."""
    named = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
    bias = named.get("bias")
    if bias is None or named.get("weight") is not None:
        return _fused_or_not(watch, func, args, kwargs)
    named |= {"bias": None}
    return _fused_or_not(watch, func, (named.pop("input"), named.pop("normalized_shape")), named) + bias


def _fused_or_not(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """A norm by torch's kernel, or from elementary operations for third derivatives: see `norms`."""
    watch.fused_norm = True
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(args[0])
    if func not in COMPOSITE or not (watch.third_order or wrapped):
        return func(*args, **kwargs)
    if func is not functional.layer_norm:  # for what it refuses, and for the statistics it writes
        with torch.no_grad():
            func(args[0].detach(), *args[1:], **kwargs)
    return COMPOSITE[func](*args, **kwargs)


def _in_order(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Group norm: with channels last, products by a single argument end the process."""
    if args:
        return func(args[0].contiguous(), *args[1:], **kwargs)
    return func(**{**kwargs, "input": kwargs["input"].contiguous()})


def _differentiate(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """A gradient inside the function: the graph stays, for the value may be a function of it."""
    later = "retain_graph", "create_graph", "only_inputs", "allow_unused", "is_grads_batched"
    kwargs = {**dict(zip(later, args[3:], strict=False)), **kwargs, "retain_graph": True}
    if kwargs.get("create_graph"):  # then a second derivative of the function is a third one
        watch.nested_gradient = True
    return func(*args[:3], **kwargs)


def _backward(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """A backward inside the function: the graph stays; what is written into leaves is taken away again."""
    watch.keep_gradients(variables([args[0]]))
    later = "retain_graph", "create_graph", "inputs"
    kwargs = {**dict(zip(later, args[2:], strict=False)), **kwargs, "retain_graph": True}
    return func(*args[:2], **kwargs)


def _embed(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Embeddings with `max_norm` renorm their table in place."""
    if kwargs.get("max_norm", args[3] if len(args) > 3 else None) is not None:
        watch.keep(args[1] if len(args) > 1 else kwargs["weight"])
    return func(*args, **kwargs)


def _normalise_weight(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Weight norm: the second derivative of torch's own is wrong."""
    return weight_norm(*args, **kwargs)


def _add_exponents(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Sums of two exponentials: where they are far apart, the second derivative of torch's own is NaN.

    With `out=`, which is not differentiated, and of complex numbers they are left as they are.
    """
    given = [*args, *(kwargs[name] for name in ("input", "other") if name in kwargs)]
    if len(given) != 2 or kwargs.get("out") is not None or any(g.is_complex() for g in given):
        return func(*args, **kwargs)
    scale = math.log(2) if func in (torch.logaddexp2, Tensor.logaddexp2) else 1.0
    return torch.logsumexp(scale * torch.stack(torch.broadcast_tensors(*given)), 0) / scale


def _scatter_strided(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """A copy with some elements overwritten: torch's own lets the gradient of the others go."""
    named = dict(zip(("input", "src", "size", "stride", "storage_offset"), args, strict=False)) | kwargs
    input, offset = named["input"], named.get("storage_offset")
    offset = input.storage_offset() if offset is None else offset
    size = input.untyped_storage().nbytes() // input.element_size()
    whole = input.as_strided((size,), (1,), 0).clone()
    whole.as_strided(named["size"], named["stride"], offset).copy_(named["src"])
    return whole.as_strided(input.shape, input.stride(), input.storage_offset())


def _whole_logits(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Cross entropy of a linear layer in chunks: its backward scales a gradient saved by the forward."""
    return func(*args, **{**kwargs, "options": None})


def _recur(watch: Watch, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Recurrent layers: the fused kernels of cuDNN and oneDNN are left aside."""
    fused = torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags warns about TF32
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            return func(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(fused)


REPLACED: dict[Any, Callable[[Watch, Any, Arguments, Keywords], Any]] = {
    **dict.fromkeys((functional.batch_norm, torch.batch_norm), _normalise),
    **dict.fromkeys((functional.instance_norm, torch.instance_norm), _normalise),
    functional.layer_norm: _normalise_layer,
    **dict.fromkeys((functional.group_norm, torch.group_norm), _in_order),
    torch._weight_norm: _normalise_weight,
    **{getattr(of, name): _add_exponents for of in (torch, Tensor) for name in ("logaddexp", "logaddexp2")},
    **dict.fromkeys((torch.as_strided_scatter, Tensor.as_strided_scatter), _scatter_strided),
    torch.autograd.grad: _differentiate,
    Tensor.backward: _backward,
    **dict.fromkeys((functional.embedding, functional.embedding_bag), _embed),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recur),
}
if hasattr(functional, "linear_cross_entropy"):  # since torch 2.12
    REPLACED[functional.linear_cross_entropy] = _whole_logits
