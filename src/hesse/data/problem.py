"""The forms of a problem that questions take."""

from __future__ import annotations

from typing import Any

from hesse.data.loss import Loss
from hesse.errors import ArgumentError
from hesse.problem import Problem, from_function


def problem_of(func: Any, inputs: Any, argument: str = "inputs", as_secorder: bool = False) -> Problem:
    """A function and its inputs, or a loss over data, which knows its own."""
    if not isinstance(func, Loss):
        return from_function(func, inputs, argument, as_secorder)
    if inputs is not None:
        raise ArgumentError(
            f"{argument} must be left out with a Loss, which is differentiated by its params; choose those "
            f"with Loss(..., params=)"
        )
    return func.problem()
