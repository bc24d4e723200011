"""The plan: which method answers a question, and what it will take."""

from __future__ import annotations

from dataclasses import dataclass

from hesse.errors import ArgumentError
from hesse.problem import Problem

METHODS = ("dense",)


@dataclass(frozen=True)
class Plan:
    """The method chosen for a problem.

    Attributes:
        question: "hessian", "blocks" or "diagonal" (a trace is the sum of a diagonal).
        method: the method's name.
        passes: Hessian-vector products it takes at most, without the check.
        answer_bytes: memory of the answer.
        reason: why this method.
    """

    question: str
    method: str
    passes: int
    answer_bytes: int
    reason: str


def choose(question: str, problem: Problem, method: str | Plan) -> Plan:
    """Choose the method; `method` is "auto", a method's name or a plan to follow."""
    name = method.method if isinstance(method, Plan) else method
    if name != "auto" and name not in METHODS:
        raise ArgumentError(
            f'method must be "auto", a Plan or one of {", ".join(map(repr, METHODS))}, met {method!r}'
        )
    return Plan(
        question=question,
        method="dense",
        passes=problem.parameters,
        answer_bytes=_answer_bytes(question, problem),
        reason="one product per coordinate: the only method so far, and right for any function",
    )


def _answer_bytes(question: str, problem: Problem) -> int:
    widths = [tensor.dtype.itemsize for tensor in problem.tensors]
    sizes = problem.sizes
    row = sum(size * width for size, width in zip(sizes, widths, strict=True))
    if question == "hessian":
        return sum(sizes) * row
    if question == "blocks":
        return sum(size * size * width for size, width in zip(sizes, widths, strict=True))
    return row
