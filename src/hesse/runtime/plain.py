"""A function that needs no isolation: nothing it calls draws random numbers, writes, or is taken another way.

A plan for products remembers what such a function calls. As long as it calls nothing else, it is evaluated as
it is; otherwise it is stopped at once, and evaluated in isolation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hesse.runtime import autocast
from hesse.runtime.kernels import REPLACED
from hesse.runtime.random_state import DRAWING
from hesse.runtime.uncompiled import eager
from hesse.runtime.watch import Watch, writes_to_first


def plain_calls(watch: Watch) -> frozenset[str] | None:
    """What a function calls that was watched; None where one of these calls needs isolation."""
    careful = watch.changed or watch.cut or watch.third_order or watch.ungraphed or watch.coarse
    if careful or any(f in REPLACED or f in DRAWING or writes_to_first(f) for f in watch.called):
        return None
    return frozenset(map(_name, watch.called))


def called_plainly(function: Callable[[], Tensor], calls: frozenset[str]) -> Tensor | None:
    """The function's value, as long as it calls nothing but these; None otherwise."""
    if torch.is_inference_mode_enabled() or autocast.callers():
        return None
    calling = _Calling(calls)
    try:
        with torch.enable_grad(), eager(), calling:
            value = function()
    except _Other:
        return None
    return None if calling.other else value


class _Other(BaseException):
    """Another call; no `Exception`, which the function itself may catch."""


class _Calling(TorchFunctionMode):
    """Lets nothing pass but calls of these names.

    Attributes:
        other: was there another one?
    """

    def __init__(self, calls: frozenset[str]) -> None:
        super().__init__()
        self._calls, self.other = calls, False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _name(func) not in self._calls or (kwargs and ("out" in kwargs or kwargs.get("inplace"))):
            self.other = True
            raise _Other
        return func(*args, **kwargs) if kwargs else func(*args)


_NAMES: dict[Any, str] = {}


def _name(func: Callable[..., Any]) -> str:
    """A name by which a function is told from others, in another process too."""
    known = _NAMES.get(func)
    if known is None:
        owner = getattr(func, "__self__", None)
        name = getattr(func, "__name__", str(func))
        known = _NAMES[func] = f"{getattr(owner, '__name__', '')}.{name}" if name == "__get__" else name
    return known
