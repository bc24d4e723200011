"""Questions that are asked inside of what torch.compile compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


def uncompiled(question: Callable[_Arguments, _Answer]) -> Callable[_Arguments, _Answer]:
    """The question, which a compiled function asks by a break in its graph."""

    @wraps(question)
    def asked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Answer:
        if "torch._dynamo" in sys.modules:
            answer: _Answer = torch.compiler.disable(question)(*args, **kwargs)
            return answer
        return question(*args, **kwargs)

    # What torch.compiler.disable does: it would import the compiler, which takes seconds.
    asked._torchdynamo_disable = True  # type: ignore[attr-defined]
    return asked
