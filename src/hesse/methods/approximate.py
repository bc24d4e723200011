r"""Approximate diagonals: the sweep with a diagonal in place of every block.

A walk back over the tape that keeps of the curvature at each value its diagonal $k$ and nothing between two
values. Parameters are values like others, so each has its own in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hesse.calls.facts import Site
from hesse.calls.rows import CrossEntropy, CrossEntropyBend, LogSoftmax, Softmax
from hesse.calls.table import site_of
from hesse.structure import NoStructure
from hesse.tape.record import Call, Recorder, Value, leading_to
from hesse.tape.samples import ONE_SAMPLE

KINDS = ("becker-lecun", "hesscale")


def diagonal(tape: Recorder, value: Tensor, kind: str) -> dict[int, Tensor]:
    """The approximate diagonal for every leaf that the value is a function of.

    Raises:
        NoStructure: the tape is not the whole function, or a call is not what it was when run again.
    """
    loss = tape.value_of(value)
    if tape.hidden:
        raise NoStructure(tape.hidden)
    calls = leading_to(loss, tape.calls)
    for call in calls:
        if any(value.tensor.is_complex() for value in (*call.outputs, *call.inputs.values())):
            raise NoStructure(f"torch's {call.name} computes complex numbers")
    adjoints = _adjoints(value, dict.fromkeys(v for c in calls for v in (*c.outputs, *c.inputs.values())))
    found: dict[Value, Tensor] = {}
    for call in reversed(calls):
        given = [found.pop(output, None) for output in call.outputs]
        step = _Unitwise(_site(call)) if kind == "becker-lecun" else _Step(_site(call))
        parts = [step.bends([adjoints[output] for output in call.outputs])]
        if any(k is not None for k in given):
            parts.append(step.squares(given))
        for part in parts:
            for u, k in part.items():
                found[u] = found[u] + k if u in found else k
    return {u.leaf: k for u, k in found.items() if u.leaf is not None}


def _adjoints(value: Tensor, values: dict[Value, None]) -> dict[Value, Tensor | None]:
    """The gradient by every value."""
    by: list[Any] = [v.tensor if v.leaf is not None else v.edge for v in values]
    return dict(zip(values, torch.autograd.grad(value, by, allow_unused=True), strict=True))


def _site(call: Call) -> Site:
    """The call as a function of all its arguments, the first one having one sample, parameters none."""
    inputs = list(dict.fromkeys(call.inputs.values()))
    return site_of(
        call, inputs, {value: ONE_SAMPLE for value in (call.inputs.get(0), *call.outputs) if value}
    )


class _Step:
    """A call, taken out."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def squares(self, given: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Diagonals of the results by squared Jacobians; None is zero."""
        return self.site.first.squared(given)

    def bends(self, adjoints: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """The second derivatives of `<adjoints, call>` by single elements of the inputs."""
        return self.site.second.diagonal(adjoints)


class _Unitwise(_Step):
    """A softmax is one function for every unit by itself, as Becker and LeCun have it."""

    def squares(self, given: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        first = self.site.first
        if not isinstance(first, Softmax):
            return super().squares(given)
        (k,) = given
        assert k is not None
        y = first.like_input(first.y)
        slope = 1 - y if isinstance(first, LogSoftmax) else y * (1 - y)
        return {first.value: k * slope.square()}

    def bends(self, adjoints: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        first, second = self.site.first, self.site.second
        adjoint = adjoints[0]
        if adjoint is None or not isinstance(first, (Softmax, CrossEntropy)):
            return super().bends(adjoints)
        if isinstance(first, Softmax):
            y = first.like_input(first.y)
            bend = -y * (1 - y) if isinstance(first, LogSoftmax) else y * (1 - y) * (1 - 2 * y)
            return {first.value: adjoint * bend}
        assert isinstance(second, CrossEntropyBend)
        found = second.of_rows(adjoint)
        assert found.square is not None
        y, gradient = found.square[1], first.rows(first.pull([adjoint.unsqueeze(0)])[first.value].squeeze(0))
        t = found.diagonal - gradient  # the diagonal is m y, the gradient m y - t
        return {first.value: first.like_input(t * y * (1 - y))}
