"""The plan: which method answers a question, and what it will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hesse.errors import ArgumentError
from hesse.gradient import Gradient
from hesse.layers import Layer, Diagonal, Matrix
from hesse.methods import taps
from hesse.problem import Problem

METHODS = ("dense", "taps")


@dataclass(frozen=True)
class Plan:
    """The method chosen for a problem.

    Attributes:
        question: "hessian", "blocks" or "diagonal" (a trace is the sum of a diagonal).
        method: the method's name.
        passes: Hessian-vector products it takes, without the check.
        answer_bytes: memory of the answer.
        reason: why this method.
    """

    question: str
    method: str
    passes: int
    answer_bytes: int
    reason: str


def may_tap(question: str, method: str | Plan) -> bool:
    """Are taps allowed? `method` is "auto", a method's name or a plan to follow."""
    name = method.method if isinstance(method, Plan) else method
    if name != "auto" and name not in METHODS:
        raise ArgumentError(
            f'method must be "auto", a Plan or one of {", ".join(map(repr, METHODS))}, met {method!r}'
        )
    return name != "dense"


def choose(question: str, problem: Problem, gradient: Gradient, layers: Sequence[Layer]) -> Plan:
    """The plan that takes these layers by taps and all else by one product per coordinate."""
    tapped = {i for layer in layers for i in (layer.call.weight, layer.call.bias) if i is not None}
    rest = sum(problem.sizes[i] for i in gradient.curved if i not in tapped)
    if layers:
        reason = (
            f"{len(layers)} linear layers with {sum(problem.sizes[i] for i in tapped):,} coordinates take "
            f"one product per output and position; the other {rest:,} coordinates one each"
        )
    else:
        reason = "one product per coordinate, right for any function"
    return Plan(
        question=question,
        method="taps" if layers else "dense",
        passes=(taps.passes(Diagonal(layers) if question=='diagonal' else Matrix(layers, question=='blocks'), layers) if layers else 0) + rest,
        answer_bytes=answer_bytes(question, problem),
        reason=reason,
    )


def answer_bytes(question: str, problem: Problem) -> int:
    """Memory of the answer."""
    widths = [tensor.dtype.itemsize for tensor in problem.tensors]
    sizes = problem.sizes
    row = sum(size * width for size, width in zip(sizes, widths, strict=True))
    if question == "hessian":
        return sum(sizes) * row
    if question == "blocks":
        return sum(size * size * width for size, width in zip(sizes, widths, strict=True))
    return row
