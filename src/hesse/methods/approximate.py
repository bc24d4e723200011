r"""Approximate diagonals: the sweep with a diagonal in place of every block.

A walk back over the tape that keeps of the curvature at each value its diagonal $k$ and nothing between two
values. Parameters are values like others, so each has its own in the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesse.calls.diagonals import with_diagonals
from hesse.methods.sweep.route import leading_to
from hesse.structure import NoStructure
from hesse.tape.record import Recorder, Value

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
        step = with_diagonals(call, units=kind == "becker-lecun")
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
