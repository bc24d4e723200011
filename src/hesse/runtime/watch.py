"""See what the caller's function does beside giving a value, and undo it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter  # type: ignore[attr-defined]
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from hesse.runtime import autocast, random_state
from hesse.runtime.autocast import Autocasts
from hesse.runtime.graph import nodes
from hesse.runtime.kernels import REPLACED

_COARSER = {
    torch.float64: {torch.float32, torch.complex64},
    torch.float32: {torch.float16, torch.bfloat16},
}


@dataclass(frozen=True)
class Coarse:
    """A call with a result of fewer digits than the tensors that are differentiated by."""

    name: str
    dtype: torch.dtype
    node: Node


class Watch(TorchFunctionMode):
    """Sees every call of the torch API by the function, and remembers what has to be undone.

    Attributes:
        ungraphed: name of the first call that took a differentiable tensor while gradients were off.
        cut: a tensor without a graph, made of differentiable ones, was made to require grad.
        third_order: take norms from elementary operations.
        fused_norm: a fused norm was called.
        nested_gradient: the function differentiates, and uses the result in a differentiable way.
        called: the functions of the torch API that were.
    """

    def __init__(self, third_order: bool, autocasts: Autocasts) -> None:
        """`autocasts`: the caller's, which are on for the function alone."""
        super().__init__()
        self.third_order = third_order
        self.fused_norm = self.nested_gradient = self.cut = False
        self.ungraphed: str | None = None
        self.random = random_state.current()
        self._autocasts = autocasts
        self.called: set[Callable[..., Any]] = set()
        self._entered = ExitStack()
        self._coarser: set[torch.dtype] = set()
        self._coarse: list[Coarse] = []
        self._contents: list[_Contents] = []
        self._kept: set[int] = set()
        self._made: set[int] = set()
        self._gradients: list[_Gradient] = []
        self._ungraphed: dict[int, Tensor] = {}  # an id is a tensor's only while it lives
        self._rebound: dict[tuple[int, str], _Rebinding] = {}
        self._thread = threading.get_ident()

    def __enter__(self) -> Any:
        self._entered.enter_context(autocast.on(self._autocasts))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered.close()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.called.add(func)
        if not torch.is_grad_enabled() and self.ungraphed is None:
            self._note_ungraphed(func, args)
        if "out" in kwargs:
            self.keep(kwargs["out"])
        if kwargs.get("inplace") and args:
            self.keep(args[0])
        if writes_to_first(func):
            self.keep(args[0])
        with self.random.drawing() if func in random_state.DRAWING else nullcontext():
            handler = REPLACED.get(func)
            result = func(*args, **kwargs) if handler is None else handler(self, func, args, kwargs)
        # To read an attribute of a tensor is a call, which a recorder around this would be asked to record.
        with torch._C.DisableTorchFunction():
            if isinstance(result, Tensor):
                if not result.requires_grad:
                    self._note_made(func, args, result)
                elif result.dtype in self._coarser and result.grad_fn is not None:
                    self._coarse.append(Coarse(func.__name__, result.dtype, result.grad_fn))
            if self._ungraphed or func in _UNGRAPHING or not torch.is_grad_enabled():
                self._follow_ungraphed(func, args, result)
        return result

    def expect(self, leaves: Iterable[Tensor]) -> None:
        """The function is about to be evaluated at these leaves."""
        dtypes = {leaf.dtype for leaf in leaves}
        self._coarser = set().union(*(_COARSER.get(dtype, set()) for dtype in dtypes)) - dtypes
        self.keep_gradients(leaf for leaf in leaves if leaf.is_leaf and leaf.grad is None)

    @property
    def coarse(self) -> bool:
        """Was anything computed in fewer digits?"""
        return bool(self._coarse)

    def coarse_on_the_way_to(self, value: Tensor) -> Coarse | None:
        """The first call of fewer digits that the value depends on."""
        if not self._coarse:
            return None
        reached = set(nodes([value]))
        return next((coarse for coarse in self._coarse if coarse.node in reached), None)

    def note_rebound(self, module: torch.nn.Module, name: str, new: Tensor | None) -> None:
        """Hook of every `module.name = new` where `name` is a buffer."""
        if threading.get_ident() == self._thread:
            old = module._buffers.get(name)
            first = self._rebound.get((id(module), name))
            self._rebound[id(module), name] = _Rebinding(module, name, first.old if first else old, new)

    @property
    def changed(self) -> bool:
        """Was there anything to undo?"""
        return bool(self._contents or self._rebound)

    def restore(self) -> None:
        """Undo what was seen, last change first."""
        for contents in reversed(self._contents):
            contents.restore()
        for gradient in self._gradients:
            gradient.restore()
        for change in self._rebound.values():
            # functional_call has swapped its own tensors out again: then there is nothing to undo.
            if change.module._buffers.get(change.name) is change.new:
                change.module._buffers[change.name] = change.old

    def keep(self, target: Any) -> None:
        """Remember the contents of tensors that are about to change, unless the function made them."""
        targets = target if isinstance(target, (tuple, list)) else (target,)
        for tensor in targets:
            if (
                isinstance(tensor, Tensor)
                and tensor.grad_fn is None
                and id(tensor) not in self._kept
                and not is_wrapped(tensor)
                and _memory(tensor) not in self._made
            ):
                self._kept.add(id(tensor))
                self._contents.append(_Contents(tensor))

    def keep_gradients(self, leaves: Iterable[Tensor]) -> None:
        """Remember the `.grad` of leaves."""
        known = {id(gradient.leaf) for gradient in self._gradients}
        self._gradients += [_Gradient(leaf) for leaf in leaves if id(leaf) not in known and leaf.is_leaf]

    def _note_made(self, func: Callable[..., Any], args: tuple[Any, ...], result: Tensor) -> None:
        # What a property gives (tensor.grad, say) may be older than this evaluation.
        if is_wrapped(result) or getattr(func, "__name__", "") == "__get__":
            return
        memory = _memory(result)
        if not any(
            isinstance(arg, Tensor) and not is_wrapped(arg) and _memory(arg) == memory for arg in args
        ):
            self._made.add(memory)

    def _note_ungraphed(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        name = getattr(func, "__name__", str(func))
        if any(isinstance(a, Tensor) and a.requires_grad for a in args) and name not in _HARMLESS:
            self.ungraphed = name

    def _follow_ungraphed(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        """Follow tensors without a graph that were made of differentiable ones."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if func in _REQUIRING and tensors and id(tensors[0]) in self._ungraphed:
            self.cut = True
        elif any(id(arg) in self._ungraphed or arg.requires_grad for arg in tensors):
            for made in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(made, Tensor) and not made.requires_grad:
                    self._ungraphed[id(made)] = made


class _Contents:
    """What a tensor held, and the version of it, which backward passes that are still to come compare."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._content = tensor, tensor.detach().clone()
        self._version: AbstractContextManager[None] = nullcontext()
        if not tensor.is_inference():
            self._version = _unsafe_preserve_version_counter(tensor)

    def restore(self) -> None:
        """Put it back."""
        with torch.no_grad(), self._version:
            self._tensor.copy_(self._content)


class _Gradient:
    """The `.grad` of a leaf."""

    def __init__(self, leaf: Tensor) -> None:
        self.leaf, self._grad = leaf, leaf.grad
        self._contents = None if self._grad is None else _Contents(self._grad)

    def restore(self) -> None:
        """Put it back."""
        if self.leaf.grad is not self._grad:
            self.leaf.grad = self._grad
        if self._contents is not None:
            self._contents.restore()


@dataclass(frozen=True)
class _Rebinding:
    """A module's buffer that its forward replaced by another tensor."""

    module: torch.nn.Module
    name: str
    old: Tensor | None
    new: Tensor | None


def is_wrapped(tensor: Any) -> bool:
    """Is this a tensor inside one of torch.func's transforms?"""
    return isinstance(tensor, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _memory(tensor: Tensor) -> int:
    """Where a tensor's contents are; for what has no memory of its own (a sparse one, a wrapper), itself."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


_HARMLESS = {"__get__", "__set__", "detach", "size", "dim", "numel", "clone", "item", "__repr__"}
_UNGRAPHING = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
_REQUIRING = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]

_WRITES: dict[Any, bool] = {}


def writes_to_first(func: Callable[..., Any]) -> bool:
    """Does this call change its first argument? By torch's own naming: `add_`, `__iadd__`."""
    known = _WRITES.get(func)
    if known is None:
        name = getattr(func, "__name__", "")
        dunder = name.startswith("__")
        known = name in _IN_PLACE_DUNDERS if dunder else name.endswith("_") and name != "_"
        _WRITES[func] = known and name != "requires_grad_"
    return _WRITES[func]


_IN_PLACE_DUNDERS = {
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__idiv__",
    "__itruediv__",
    "__ifloordiv__",
    "__imod__",
    "__ipow__",
    "__iand__",
    "__ior__",
    "__ixor__",
    "__ilshift__",
    "__irshift__",
}
