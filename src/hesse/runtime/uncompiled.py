"""What torch.compile compiles: run as it is written, and with questions inside of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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


def eager() -> AbstractContextManager[Any]:
    """A context in which compiled functions run uncompiled; without the compiler there are none."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
