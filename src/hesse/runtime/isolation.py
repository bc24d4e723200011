"""Evaluate the caller's function so that it can be differentiated twice and nothing of theirs changes.

`isolated()` is entered around one evaluation and everything that is done with its graph; the `Watch`
it yields is entered around the caller's code alone. Between them

- kernels without a double backward are replaced by ones that have it (fused attention, fused RNNs),
  and functions compiled by torch.compile run uncompiled, since compiled graphs have none;
- what the function changes in place (running statistics, counters, a renormed embedding) and what
  its modules rebind in their buffers is put back at the end, also after an error;
- gradients are on, whatever mode the caller is in.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from hesse.runtime.norms import COMPOSITE, weight_norm

# Kernel choices and hooks are the process's, and threads may share a model: one at a time.
_LOCK = threading.RLock()


@contextmanager
def isolated(third_order: bool = False) -> Iterator[Watch]:
    """Enter the isolation; run the caller's function inside the `Watch` that it yields.

    `third_order`: the second derivatives will be differentiated once more.
    """
    watch = Watch(third_order)
    with _LOCK, ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # without it nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(watch.restore)
        hook = module_hooks.register_module_buffer_registration_hook(watch.note_rebound)
        stack.callback(hook.remove)
        yield watch


@contextmanager
def random_state_kept() -> Iterator[Callable[[], bool]]:
    """Give torch's global random generators back as they were; yields a test whether they were used."""
    before = _random_state()

    def used() -> bool:
        # strict=False: CUDA may have been initialised since
        return not all(torch.equal(b, a) for b, a in zip(before, _random_state(), strict=False))

    try:
        yield used
    finally:
        if used():
            torch.set_rng_state(before[0])
            if len(before) > 1:
                torch.cuda.set_rng_state_all(before[1:])


def _random_state() -> list[Tensor]:
    """The states of torch's global generators: the CPU's, then those of the devices in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *devices]


class Watch(TorchFunctionMode):
    """Sees every call of the torch API by the function, and remembers what has to be undone.

    Attributes:
        ungraphed: name of the first call that took a differentiable tensor while gradients were off.
        third_order: take norms from elementary operations.
        fused_norm: a fused norm was called.
        nested_gradient: the function takes gradients itself.
    """

    def __init__(self, third_order: bool = False) -> None:
        super().__init__()
        self.third_order = third_order
        self.fused_norm = False
        self.nested_gradient = False
        self.ungraphed: str | None = None
        self._contents: list[tuple[Tensor, Tensor]] = []
        self._kept: set[int] = set()
        self._made: set[int] = set()
        self._rebound: dict[tuple[int, str], _Rebinding] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() and self.ungraphed is None:
            self._note_ungraphed(func, args)
        if "out" in kwargs:
            self._keep(kwargs["out"])
        if kwargs.get("inplace") and args:
            self._keep(args[0])
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs)
        if writes_to_first(func):
            self._keep(args[0])
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not result.requires_grad:
            self._note_made(func, args, result)
        return result

    def note_rebound(self, module: torch.nn.Module, name: str, new: Tensor | None) -> None:
        """Hook of every `module.name = new` where `name` is a buffer."""
        old = module._buffers.get(name)
        first = self._rebound.get((id(module), name))
        self._rebound[id(module), name] = _Rebinding(module, name, first.old if first else old, new)

    @property
    def changed(self) -> bool:
        """Was there anything to undo?"""
        return bool(self._contents or self._rebound)

    def restore(self) -> None:
        """Undo what was seen, last change first."""
        with torch.no_grad():
            for tensor, content in reversed(self._contents):
                tensor.copy_(content)
        for change in self._rebound.values():
            # functional_call has swapped its own tensors out again: then there is nothing to undo.
            if change.module._buffers.get(change.name) is change.new:
                change.module._buffers[change.name] = change.old

    def _keep(self, target: Any) -> None:
        """Remember the contents of tensors that are about to change, unless the function made them."""
        targets = target if isinstance(target, (tuple, list)) else (target,)
        for tensor in targets:
            if (
                isinstance(tensor, Tensor)
                and tensor.grad_fn is None
                and id(tensor) not in self._kept
                and not _is_wrapped(tensor)
                and _memory(tensor) not in self._made
            ):
                self._kept.add(id(tensor))
                self._contents.append((tensor, tensor.detach().clone()))

    def _note_made(self, func: Callable[..., Any], args: tuple[Any, ...], result: Tensor) -> None:
        # What a property gives (tensor.grad, say) may be older than this evaluation.
        if _is_wrapped(result) or getattr(func, "__name__", "") == "__get__":
            return
        memory = _memory(result)
        if not any(
            isinstance(arg, Tensor) and not _is_wrapped(arg) and _memory(arg) == memory for arg in args
        ):
            self._made.add(memory)

    def _note_ungraphed(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        name = getattr(func, "__name__", str(func))
        if any(isinstance(a, Tensor) and a.requires_grad for a in args) and name not in _HARMLESS:
            self.ungraphed = name


class _Rebinding:
    """A module's buffer that its forward replaced by another tensor."""

    def __init__(self, module: torch.nn.Module, name: str, old: Tensor | None, new: Tensor | None) -> None:
        self.module, self.name, self.old, self.new = module, name, old, new


def _is_wrapped(tensor: Any) -> bool:
    """Is this a tensor inside one of torch.func's transforms?"""
    return isinstance(tensor, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


_HARMLESS = {"__get__", "__set__", "detach", "size", "dim", "numel", "clone", "item", "__repr__"}

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


def _normalise(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
                watch._keep(buffer)
                buffer.copy_(copies[id(buffer)])
    return result


def _fused_or_not(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A norm by torch's kernel, or from elementary operations for third derivatives: see `norms`."""
    watch.fused_norm = True
    if func not in COMPOSITE or not (watch.third_order or _is_wrapped(args[0])):
        return func(*args, **kwargs)
    if func is not functional.layer_norm:  # for what it refuses, and for the statistics it writes
        with torch.no_grad():
            func(args[0].detach(), *args[1:], **kwargs)
    return COMPOSITE[func](*args, **kwargs)


def _differentiate(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A gradient inside the function: its second derivative is a third one."""
    watch.nested_gradient = True
    return func(*args, **kwargs)


def _embed(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Embeddings with `max_norm` renorm their table in place."""
    if kwargs.get("max_norm", args[3] if len(args) > 3 else None) is not None:
        watch._keep(args[1] if len(args) > 1 else kwargs["weight"])
    return func(*args, **kwargs)


def _normalise_weight(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Weight norm: the second derivative of torch's own is wrong."""
    return weight_norm(*args, **kwargs)


def _recur(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Recurrent layers: the fused kernels of cuDNN and oneDNN are left aside."""
    fused = torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags warns about TF32
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            return func(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(fused)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((functional.batch_norm, torch.batch_norm), _normalise),
    **dict.fromkeys((functional.instance_norm, torch.instance_norm), _normalise),
    functional.layer_norm: _fused_or_not,
    torch._weight_norm: _normalise_weight,
    torch.autograd.grad: _differentiate,
    **dict.fromkeys((functional.embedding, functional.embedding_bag), _embed),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recur),
}
