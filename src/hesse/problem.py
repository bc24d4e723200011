"""The problem: a scalar function and the tensors it is differentiated by.

Callers have three forms of it (`func(*inputs)`, a closure `func()` over leaf tensors, a model with
its loss); all become one `Problem` here, and the rest of the code never asks which it was.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hesse.errors import (
    ArgumentError,
    DtypeError,
    NotATensorError,
    OutputError,
    PrecisionWarning,
    warn,
)


@dataclass(frozen=True)
class Problem:
    """A scalar function of a flat list of tensors, and how to give answers back.

    Attributes:
        tensors: the caller's tensors, flat.
        spec: the caller's container.
        evaluate_at: the function, of the tensors to differentiate by.
        closure: the function takes nothing and reads `tensors` themselves.
    """

    tensors: tuple[Tensor, ...]
    spec: pytree.TreeSpec
    evaluate_at: Callable[[Sequence[Tensor]], Tensor]
    closure: bool
    _make_names: Callable[[], Sequence[str]]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What to call each tensor in messages and tables."""
        return tuple(self._make_names())

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(tensor.numel() for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """Number of coordinates, P."""
        return sum(self.sizes)

    def leaves(self, connected: bool = False) -> tuple[Tensor, ...]:
        """The tensors to differentiate by.

        A closure reads the caller's own tensors, so it is differentiated by those; a function of its
        inputs gets fresh ones, which still lead back to the caller's when `connected`.
        """
        if self.closure:
            return self.tensors
        if connected:
            return tuple(
                t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in self.tensors
            )
        return tuple(tensor.detach().requires_grad_() for tensor in self.tensors)

    def pack(self, values: Sequence[Any]) -> Any:
        """Put one value per tensor into the caller's container."""
        return pytree.tree_unflatten(list(values), self.spec)

    def unpack(self, argument: str, container: Any) -> list[Tensor]:
        """Flatten a container shaped like the inputs (`v`, say), with its shapes checked."""
        if isinstance(container, Iterator):
            container = list(container)
        flat, spec = pytree.tree_flatten(container)
        if len(flat) != len(self.tensors) or (spec != self.spec and not _both_sequences(spec, self.spec)):
            raise ArgumentError(
                f"{argument} must have the same structure as the inputs: {len(self.tensors)} "
                f"tensor(s) in {_container(self.spec)}, met {len(flat)} in {_container(spec)}"
            )
        for i, (value, tensor) in enumerate(zip(flat, self.tensors, strict=True)):
            if not isinstance(value, Tensor) or value.is_complex():
                _require_tensors(argument, container)
                raise DtypeError(f"{_names(argument, container)[i]} is complex; pass a real tensor")
            if value.shape != tensor.shape:
                raise ArgumentError(
                    f"{_names(argument, container)[i]} has shape {list(value.shape)}, but "
                    f"{self.names[i]} has shape {list(tensor.shape)}; they must be equal"
                )
            if value.device != tensor.device:
                raise ArgumentError(
                    f"{_names(argument, container)[i]} is on {value.device}, but {self.names[i]} is "
                    f"on {tensor.device}; move it there"
                )
        return [value.to(its.dtype) for value, its in zip(flat, self.tensors, strict=True)]


def from_function(func: Callable[..., Tensor], inputs: Any, argument: str = "inputs") -> Problem:
    """The functional form `func(*inputs)`, or the closure form `func()`.

    The closure form is taken when `func` cannot be called with the inputs but can with nothing.
    """
    if not callable(func):
        raise NotATensorError(f"func must be callable, met {type(func).__name__}")
    if isinstance(inputs, Iterator):  # model.parameters()
        inputs = list(inputs)
    tensors, spec = pytree.tree_flatten(inputs)
    _require_tensors(argument, inputs)
    _require_usable(argument, tensors, lambda: _names(argument, inputs))
    unpacked = isinstance(inputs, (tuple, list))
    positional = inputs if unpacked else (inputs,)
    closure = not _accepts(func, len(positional)) and _accepts(func, 0)

    def evaluate_at(leaves: Sequence[Tensor]) -> Tensor:
        if closure:
            return _scalar(func())
        arguments = pytree.tree_unflatten(list(leaves), spec)
        return _scalar(func(*arguments) if unpacked else func(arguments))

    return Problem(tuple(tensors), spec, evaluate_at, closure, lambda: _names(argument, inputs))


def from_model(
    model: torch.nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any
) -> Problem:
    """The model form: `loss_fn(model(inputs), targets)`, by the model's parameters in their order."""
    if not isinstance(model, torch.nn.Module):
        raise NotATensorError(f"model must be a torch.nn.Module, met {type(model).__name__}")
    if not callable(loss_fn):
        raise NotATensorError(f"loss_fn must be callable, met {type(loss_fn).__name__}")
    named = dict(model.named_parameters())
    if not named:
        raise ArgumentError("model has no parameters; there is nothing to differentiate by")
    tensors, names = list(named.values()), list(named)
    _require_usable("model", tensors, lambda: names)

    def evaluate_at(leaves: Sequence[Tensor]) -> Tensor:
        return _scalar(loss_fn(model(inputs), targets))

    spec = pytree.tree_flatten(tensors)[1]
    return Problem(tuple(tensors), spec, evaluate_at, True, lambda: names)


def _names(argument: str, container: Any) -> list[str]:
    return [argument + pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(container)[0]]


def _require_tensors(argument: str, container: Any) -> None:
    for i, leaf in enumerate(pytree.tree_leaves(container)):
        if not isinstance(leaf, Tensor):
            raise NotATensorError(
                f"{_names(argument, container)[i]} must be a tensor (or a tuple, list or dict of "
                f"tensors), met {type(leaf).__name__}"
            )


def _require_usable(argument: str, tensors: Sequence[Tensor], names: Callable[[], Sequence[str]]) -> None:
    if not tensors:
        raise ArgumentError(f"{argument} holds no tensor; pass at least one to differentiate by")
    for i, tensor in enumerate(tensors):
        if tensor.is_complex():
            raise DtypeError(
                f"{names()[i]} is complex ({tensor.dtype}); write the function in its real and "
                f"imaginary parts (torch.view_as_real) and pass those"
            )
        if not tensor.is_floating_point():
            raise DtypeError(
                f"{names()[i]} has dtype {tensor.dtype}, which has no derivative; pass a "
                f"floating-point tensor (.float()), or leave it out and let the function capture it"
            )
        if tensor.layout != torch.strided:
            raise NotATensorError(
                f"{names()[i]} has layout {tensor.layout}; only strided tensors are supported, "
                f"so pass its values and build the sparse tensor inside the function"
            )
        if tensor.is_inference():
            raise ArgumentError(
                f"{names()[i]} was made under torch.inference_mode() and cannot be differentiated "
                f"by; pass its .clone() made outside of it"
            )
    devices = {tensor.device: i for i, tensor in enumerate(tensors)}
    if len(devices) > 1:
        where = ", ".join(f"{names()[i]} on {device}" for device, i in devices.items())
        raise ArgumentError(f"all of {argument} must be on one device, met {where}; move them")
    half = [i for i, t in enumerate(tensors) if t.dtype in (torch.float16, torch.bfloat16)]
    if half:
        dtype = tensors[half[0]].dtype
        warn(
            PrecisionWarning,
            f"{names()[half[0]]} is {dtype}: its second derivatives carry about "
            f"{-math.log10(torch.finfo(dtype).eps):.0f} digits (sums over coordinates are accumulated "
            f"in float32); pass float32 for more",
        )


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise OutputError(
            f"func must return a tensor with a single element, met {type(value).__name__}"
            + ("; .item() and float() cut the graph" if isinstance(value, (int, float)) else "")
        )
    if value.numel() != 1:
        raise OutputError(
            f"func must return a scalar, met a tensor of shape {list(value.shape)}; reduce it "
            f"(.sum() or .mean()), or ask for one output at a time"
        )
    if not value.is_floating_point():
        raise OutputError(f"func must return a real floating-point tensor, met {value.dtype}")
    return value.reshape(())


def _accepts(func: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(func).bind(*(None,) * count)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature: take it at the caller's word
        return count > 0
    return True


def _both_sequences(one: pytree.TreeSpec, other: pytree.TreeSpec) -> bool:
    # A list of vectors for a tuple of tensors is no mistake worth an error.
    flat = all(spec.num_nodes == spec.num_leaves + 1 for spec in (one, other))
    return flat and {one.type, other.type} <= {list, tuple}


def _container(spec: pytree.TreeSpec) -> str:
    return "a tensor" if spec.is_leaf() else f"a {spec.type.__name__}"
