"""What a look at a function found, as plain data: true of every evaluation that looks the same.

Two evaluations look the same where they make the same calls: by function, shapes, dtypes, constants, and
where every argument comes from. Numbers may be others, but for those of indices, which may join samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hesse.look.evaluation import Evaluation
from hesse.look.perturb import Exploration
from hesse.look.placing import PLACED_BY, in_layers
from hesse.tape.record import Call, Value
from hesse.tape.samples import Samples

CallLook = tuple[Any, ...]
"""What a call looks like."""


@dataclass(frozen=True)
class Learned:
    """What a look found.

    Attributes:
        seconds: what an evaluation takes.
        recorded: the function has a layer, so that its calls are worth recording.
        calls: what they look like; None where they were not recorded.
        places: where the samples are in the results of every call; None where that depends on numbers.
        sizes: of chunks, those that paid, in the order in which they were looked for.
        column: bytes that a product holds; zero where none was taken.
        plain: of a product, what the function calls, where none of that needs isolation.
    """

    seconds: float
    recorded: bool
    calls: tuple[CallLook, ...] | None = None
    places: tuple[tuple[Samples | None, ...], ...] | None = None
    sizes: tuple[int, ...] = ()
    column: int = 0
    plain: frozenset[str] | None = None

    def differs(self, evaluation: Evaluation) -> str | None:
        """What looks different now, if anything."""
        if evaluation.tape is None:
            return evaluation.untaped
        now = evaluation.tape.calls
        for call, before in zip(now, self.calls or (), strict=False):
            if look_of(call, _as_before(before)) != before:
                return f"call {call.order + 1} of func, {call.name}, is another one or has other constants"
        if len(now) != len(self.calls or ()):
            return f"func makes {len(now):,} calls where it made {len(self.calls or ()):,}"
        return None

    def found(self, evaluation: Evaluation) -> Exploration:
        """The same of this evaluation, which looks the same."""
        assert self.places is not None
        assert evaluation.tape is not None
        places = {
            value: place
            for call, those in zip(evaluation.tape.calls, self.places, strict=True)
            for value, place in zip(call.outputs, those, strict=True)
            if place is not None
        }
        return Exploration(in_layers(evaluation.layers, places), self.places)


def learned(evaluation: Evaluation, found: Exploration) -> Learned:
    """What is to be kept of a look."""
    if evaluation.tape is None:
        return Learned(evaluation.seconds, evaluation.untaped is not None)
    places = tuple(map(tuple, found.batch_dims)) if found.told else None
    calls = tuple(look_of(call, _joining(call)) for call in evaluation.tape.calls)
    return Learned(evaluation.seconds, True, calls, places)


def look_of(call: Call, compared: Callable[[int, Tensor], bool]) -> CallLook:
    """What a call looks like; `compared`: the numbers of which tensors, by place among the arguments, too."""
    spec = call.spec if isinstance(call.spec, tuple) else str(call.spec)
    return (
        call.name,
        spec,
        *(
            _place(call.inputs[i]) if i in call.inputs else _constant(argument, partial(compared, i))
            for i, argument in enumerate(call.arguments)
        ),
    )


def _joining(call: Call) -> Callable[[int, Tensor], bool]:
    """Whose numbers had a say in where samples are: those of indices, or of the factors of products."""
    kind = call.memo.get(PLACED_BY)
    indices, all_ = kind is not None and kind.by_numbers, kind is not None and kind.by_factors
    return lambda _, tensor: all_ or (indices and not tensor.is_floating_point())


def _as_before(before: CallLook) -> Callable[[int, Tensor], bool]:
    """Those that had one before."""
    return lambda i, _: i + 2 < len(before) and before[i + 2][:1] == (_NUMBERS,)


_NUMBERS = "numbers"


def _place(value: Value) -> CallLook:
    """Where a value comes from."""
    source = value.source
    number = None if source is None else source.outputs.index(value)
    return value.leaf, source and source.order, number, *_form(value.tensor)


def _constant(argument: Any, compared: Callable[[Tensor], bool]) -> CallLook:
    """An argument that is no value."""
    if isinstance(argument, Tensor):
        numbers = (_NUMBERS, hash(tuple(argument.flatten().tolist()))) if compared(argument) else ()
        return *numbers, *_form(argument)
    if isinstance(argument, slice):
        return "slice", argument.start, argument.stop, argument.step
    plain = argument is None or isinstance(argument, (bool, int, float, complex, str, tuple))
    return type(argument).__name__, argument if plain else str(argument)


def _form(tensor: Tensor) -> tuple[Sequence[int], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
