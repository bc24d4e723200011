"""The tape: the calls that one evaluation of a function made, with their values.

A `TorchFunctionMode` around the evaluation sees every call of the torch API. It is recorded anew each
time, so it always is this function at this point: branches, loops and closures need no special care.
Calls that hide others (attention, recurrent layers) are taken apart: see `composites`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from hesse.runtime.watch import writes_to_first
from hesse.tape.composites import TakenApart


@dataclass(eq=False)
class Value:
    """A tensor that requires grad, as it was at one time: changed in place, it is another value.

    Attributes:
        tensor: its contents, unless `changed`.
        edge: the place in autograd's graph where it was made. To differentiate by it is to
            differentiate by a zero added to the tensor.
        version: of the tensor's contents when it was seen.
        source: the call that made it; None for what was there before or came from elsewhere.
        leaf: index among the problem's leaves, or None.
    """

    tensor: Tensor
    edge: GradientEdge
    version: int
    source: Call | None = None
    leaf: int | None = None

    @property
    def changed(self) -> bool:
        """Has the tensor been overwritten since?"""
        return self.tensor._version != self.version


@dataclass(eq=False)
class Call:
    """One call `func(*args, **kwargs)`.

    Attributes:
        func: the function of the torch API.
        arguments: `args` and `kwargs`, flat; an argument that the call overwrites is a copy.
        spec: how to nest them again; where nothing is nested, the names of the keywords do.
        inputs: the arguments that require grad, by their position in `arguments`.
        outputs: the results that require grad, in order.
        order: number of the call on the tape.
        memo: what was found out about it, by who asked.
    """

    func: Callable[..., Any]
    arguments: list[Any]
    spec: pytree.TreeSpec | tuple[str, ...]
    inputs: dict[int, Value]
    outputs: list[Value]
    order: int
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        """The function's own name; for a property such as `x.T`, the property's."""
        return name_of(self.func)

    def again(self, arguments: Sequence[Any]) -> Any:
        """The same call with other arguments."""
        args, kwargs = self.nested(arguments)
        return self.func(*args, **kwargs)

    def read_by(self, signature: Callable[..., Any]) -> Any:
        """What a signature makes of the arguments, with a `Value` for each that requires grad."""
        arguments = [self.inputs.get(i, argument) for i, argument in enumerate(self.arguments)]
        args, kwargs = self.nested(arguments)
        return signature(*args, **kwargs)

    def nested(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Flat arguments as positional ones and keywords."""
        if isinstance(self.spec, tuple):
            count = len(arguments) - len(self.spec)
            return arguments[:count], dict(zip(self.spec, arguments[count:], strict=True))
        args, kwargs = pytree.tree_unflatten(list(arguments), self.spec)
        return args, kwargs


def name_of(func: Callable[..., Any]) -> str:
    """A function's own name; for a property such as `x.T`, the property's."""
    name: str = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name  # type: ignore[attr-defined]


class Recorder(TakenApart):
    """Records the calls that have to do with the leaves.

    Attributes:
        calls: in the order they were made.
        hidden: why the tape is not the whole function, or None: the first active tensor that no
            recorded call produced, or that was changed where it cannot be seen.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.hidden: str | None = None
        self._values: dict[int, Value] = {}
        self._constants: set[int] = set()  # what requires grad, and has nothing to do with the leaves
        self._kept: list[Tensor] = []  # an id is a tensor's only while it lives
        for i, leaf in enumerate(leaves):
            if leaf.requires_grad:
                self._values[id(leaf)] = Value(leaf, get_gradient_edge(leaf), leaf._version, leaf=i)

    def value_of(self, tensor: Tensor) -> Value:
        """The value that a tensor has now."""
        value = self._values.get(id(tensor))
        if value is None:
            self._hide(f"a tensor of shape {list(tensor.shape)} was made by no call that can be seen")
        elif value.changed:
            self._hide(f"a tensor of shape {list(tensor.shape)} was changed in place through another one")
        else:
            return value
        return self.note(tensor, None)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():  # inside a custom Function, for one
            return func(*args, **kwargs)
        result = self.parts(func, args, kwargs)
        if result is not NotImplemented:
            return result
        if func in (torch.autograd.grad, Tensor.backward) and kwargs.get("create_graph"):
            self._hide("the function takes gradients itself")
        arguments: list[Any] = [*args, *kwargs.values()]
        spec: pytree.TreeSpec | tuple[str, ...] = tuple(kwargs)
        if any(isinstance(argument, (tuple, list, dict)) for argument in arguments):
            arguments, spec = pytree.tree_flatten((args, kwargs))
        inputs = {
            i: self.value_of(argument)
            for i, argument in enumerate(arguments)
            if isinstance(argument, Tensor) and argument.requires_grad and not self._is_constant(argument)
        }
        target = args[0] if args and (writes_to_first(func) or kwargs.get("inplace")) else None
        if isinstance(target, Tensor):
            arguments[0] = target.detach().clone()
        result = func(*args, **kwargs)
        made = [target] if func is Tensor.__setitem__ else leaves_of(result)
        active = [t for t in made if isinstance(t, Tensor) and t.requires_grad]
        if inputs and active:
            call = Call(func, arguments, spec, inputs, [], len(self.calls))
            self._record(call, active)
            if call.outputs:
                return self.seen(call, result)
        elif any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments):
            self._kept += active
            self._constants.update(map(id, active))
        return result

    def _is_constant(self, tensor: Tensor) -> bool:
        """Does it require grad for reasons of its own: a parameter that is not asked for, positions?"""
        return id(tensor) not in self._values and (tensor.is_leaf or id(tensor) in self._constants)

    def seen(self, call: Call, result: Any) -> Any:
        """What the function gets as the result of a recorded call."""
        return result

    def _record(self, call: Call, results: list[Tensor]) -> None:
        for tensor in results:
            known = self._values.get(id(tensor))
            if known is not None and not known.changed and known in call.inputs.values():
                continue  # given back as it is, `x.contiguous()` say
            call.outputs.append(self.note(tensor, call))
        for value in call.inputs.values():
            if value.changed and value.tensor is not results[0]:
                self._hide(f"{call.name} changed an argument in place")
        if call.outputs:
            self.calls.append(call)

    def note(self, tensor: Tensor, source: Call | None) -> Value:
        """Take a tensor into the tape as the result of a call."""
        value = Value(tensor, get_gradient_edge(tensor), tensor._version, source)
        self._values[id(tensor)] = value
        self._kept.append(tensor)
        return value

    def _hide(self, reason: str) -> None:
        self.hidden = self.hidden or reason


def leaves_of(result: Any) -> list[Any]:
    """The elements of a call's result, however nested."""
    return [result] if isinstance(result, Tensor) else pytree.tree_leaves(result)


def leading_to(loss: Value, calls: Sequence[Call]) -> list[Call]:
    """The calls that the loss depends on, in their order."""
    needed, found = {loss}, []
    for call in reversed(calls):
        if needed.intersection(call.outputs):
            found.append(call)
            needed.update(call.inputs.values())
    return found[::-1]
