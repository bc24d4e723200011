"""A call of the tape once more, with other contents."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from hesse.runtime.watch import writes_to_first
from hesse.structure import NoStructure
from hesse.tape.record import Call, Value, leaves_of


def rerun(
    call: Call,
    inputs: Sequence[Value],
    shape: torch.Size | None = None,
    attached: Collection[Value] = (),
) -> tuple[dict[Value, Tensor], list[Tensor]]:
    """The call once more, the inputs being leaves of their own, broadcast to `shape` where one is given.

    `attached`: the arguments that keep their graph.
    """
    with torch.enable_grad():
        leaves: dict[Value, Tensor] = {}
        arguments = list(call.arguments)
        if isinstance(arguments[0], Tensor) and writes_to_first(call.func):
            arguments[0] = arguments[0].clone()
        for position, value in call.inputs.items():
            content = contents(call, position)
            overwritten = call.arguments[position] is not value.tensor  # then the tape keeps a copy
            if value in inputs:
                if value not in leaves:
                    content = content.detach()
                    leaves[value] = (content if shape is None else content.expand(shape)).requires_grad_()
                content = leaves[value]
            elif value in attached:
                content = value.tensor
            arguments[position] = content.clone() if overwritten else content
        results = results_of(call, arguments)
    require_same(call, results)
    return leaves, results


def require_same(call: Call, results: Sequence[Tensor]) -> None:
    """Raise where results of another run are not what the call made, unless that is overwritten since."""
    if len(results) != len(call.outputs):
        raise NoStructure(f"{call.name} made other results when it was run again")
    for result, output in zip(results, call.outputs, strict=True):
        same = output.changed or torch.equal(result, output.tensor)
        if not same and not torch.allclose(result, output.tensor, 1e-4, 1e-6, equal_nan=True):
            raise NoStructure(f"{call.name} gave another result when it was run again")


def content(argument: Tensor | Value) -> Tensor:
    """What a reader was given, a tensor or a value, as the call met it."""
    if not isinstance(argument, Value):
        return argument.detach()
    if argument.changed:
        raise NoStructure(f"a value of shape {list(argument.tensor.shape)} has been overwritten since")
    return argument.tensor.detach()


def contents(call: Call, position: int) -> Tensor:
    """An argument as the call met it."""
    content: Tensor = call.arguments[position]
    value = call.inputs.get(position)
    if value is not None and value.changed and content is value.tensor:
        raise NoStructure(f"an input of {call.name} has been overwritten since")
    return content.detach()


def results_of(call: Call, arguments: Sequence[Any]) -> list[Tensor]:
    """What the call makes of other arguments, where it requires grad."""
    result = call.again(arguments)
    made = [arguments[0]] if call.func is Tensor.__setitem__ else leaves_of(result)
    return [t for t in made if isinstance(t, Tensor) and t.requires_grad]
