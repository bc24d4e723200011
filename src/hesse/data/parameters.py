"""Which parameters of a model are meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from hesse.errors import ArgumentError


def selected(model: nn.Module, params: Any) -> dict[str, nn.Parameter]:
    """Parameters by name, in the model's order.

    `params`: None for all that require grad; a name, a pattern of names, a module, a parameter, or several.

    Raises:
        ArgumentError: one of them matches nothing, or what does not require grad.
    """
    named = dict(model.named_parameters())
    if params is None:
        found = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        if not found:
            raise ArgumentError(
                "model has no parameter that requires grad; call requires_grad_() on those to differentiate "
                "by"
            )
        return found
    one = isinstance(params, (str, nn.Module, Tensor)) or not isinstance(params, Iterable)
    wanted = {
        name for selector in ([params] if one else params) for name in _matching(selector, model, named)
    }
    found = {name: parameter for name, parameter in named.items() if name in wanted}
    if not found:
        raise ArgumentError("params is empty; leave it out for all parameters that require grad")
    frozen = next((name for name, parameter in found.items() if not parameter.requires_grad), None)
    if frozen is not None:
        raise ArgumentError(
            f"params asks for {frozen}, which does not require grad; call requires_grad_() on it, or leave "
            f"it out"
        )
    return found


def _matching(selector: Any, model: nn.Module, named: dict[str, nn.Parameter]) -> list[str]:
    """The names that one selector means."""
    if isinstance(selector, str):
        names = [name for name in named if name == selector or fnmatchcase(name, selector)]
        close = difflib.get_close_matches(selector, named, 3, 0.4) or list(named)[:3]
        hint = f"; the model has {', '.join(close)}" + (", ..." if len(named) > len(close) else "")
    elif isinstance(selector, nn.Module):
        own = set(map(id, selector.parameters()))
        names = [name for name, parameter in named.items() if id(parameter) in own]
        hint = "; pass a module of the model that has parameters"
    elif isinstance(selector, Tensor):
        names = [name for name, parameter in named.items() if parameter is selector]
        hint = "; pass parameters of the model itself, not copies of them"
    else:
        raise ArgumentError(
            f"params must hold names, patterns such as 'layers.*.weight', modules or parameters, met "
            f"{type(selector).__name__}"
        )
    if not names:
        what = repr(selector) if isinstance(selector, str) else f"a {type(selector).__name__}"
        raise ArgumentError(f"params: {what} matches no parameter of the model{hint}")
    return names
