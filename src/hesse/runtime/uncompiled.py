"""Questions that are asked inside of what torch.compile compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

_Question = TypeVar("_Question", bound=Callable[..., Any])


def uncompiled(question: _Question) -> _Question:
    """The question, which a compiled function asks by a break in its graph."""

    @wraps(question)
    def asked(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return torch.compiler.disable(question)(*args, **kwargs)
        return question(*args, **kwargs)

    # What torch.compiler.disable does: it would import the compiler, which takes seconds.
    asked._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(_Question, asked)
