"""Calls for some of the samples only: what a walk over the tape takes where all do not fit.

Where the samples are in a live value is known. Of the other arguments it is not: targets, masks and the
inputs of a first layer have samples, constants have none, and the size in `view(len(x), -1)` counts them. So
a call is narrowed by guesses, likely ones first, and none is believed: the call is run with other contents,
for all samples and for every chunk of them, and the results must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, singledispatch
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from hesse.curvature.columns import Columns, Unit
from hesse.curvature.terms import Cross, Diagonal, LowRank, Term
from hesse.structure import NoStructure
from hesse.tape.record import Call, Value
from hesse.tape.replay import results_of
from hesse.tape.samples import ONE_SAMPLE, Samples

Guess = Callable[[Any, range], Any]
"""From an argument to what it is for some of the samples."""

_TRIED = 256  # combinations of guesses about one call


class Chunk:
    """Some of the samples: the values, calls and curvature of a function, narrowed to them.

    Attributes:
        numbers: of these samples.
        samples: where they are in the narrowed values.
    """

    def __init__(self, numbers: range, batch_dims: Mapping[Value, Samples]) -> None:
        """`batch_dims`: where all samples are in the values."""
        self.numbers = numbers
        self.samples: dict[Value, Samples] = {}
        self._batch_dims = batch_dims
        self._values: dict[Value, Value] = {}

    def value(self, value: Value) -> Value:
        """A value; one without samples is kept."""
        if value not in self._values:
            batch_dim, found = self._batch_dims.get(value), value
            if batch_dim is not None and batch_dim.count > 1:
                tensor = self.narrow(value, value.tensor.detach()).contiguous().requires_grad_()
                found = replace(value, tensor=tensor, version=-1 if value.changed else tensor._version)
                batch_dim = batch_dim.narrowed(self.numbers)
            if batch_dim is not None:
                self.samples[found] = batch_dim
            self._values[value] = found
        return self._values[value]

    def narrow(self, value: Value, tensor: Tensor, lead: int = 0) -> Tensor:
        """A tensor that lies like a value with samples, after `lead` other dimensions."""
        return self._batch_dims[value].narrow(tensor, self.numbers, lead)

    def call(self, call: Call, guesses: Mapping[int, Guess]) -> Call:
        """A call, with guesses about the arguments at some positions."""
        arguments, inputs = list(call.arguments), {}
        for i, value in call.inputs.items():
            inputs[i] = own = self.value(value)
            if arguments[i] is value.tensor:
                arguments[i] = own.tensor
            elif own is not value:  # a copy of what the call overwrote
                arguments[i] = self.narrow(value, arguments[i])
        for i, guess in guesses.items():
            arguments[i] = guess(call.arguments[i], self.numbers)
            if i in inputs and arguments[i] is not call.arguments[i]:
                inputs[i] = replace(inputs[i], tensor=arguments[i], leaf=None, source=None)
        outputs = [self.value(value) for value in call.outputs]
        return replace(call, arguments=arguments, inputs=inputs, outputs=outputs)

    def columns(self, columns: Columns) -> Columns:
        """Columns over values with samples."""
        return {
            self.value(v): Unit(c.start, self.scale(v, c.scale))
            if isinstance(c, Unit)
            else self.narrow(v, c, 1)
            for v, c in columns.items()
        }

    def scale(self, value: Value, scale: Tensor | None) -> Tensor | None:
        """What elements of a value are multiplied by; None is one."""
        return None if scale is None else self.narrow(value, scale)


@singledispatch
def narrowed(term: Term, chunk: Chunk) -> Term:
    """A term of the curvature over values with samples, for some of these."""
    raise NotImplementedError


@narrowed.register
def _(term: Diagonal, chunk: Chunk) -> Term:
    core = chunk.narrow(next(iter(term.scales)), term.core)
    return Diagonal(core, {chunk.value(v): chunk.scale(v, s) for v, s in term.scales.items()})


@narrowed.register
def _(term: Cross, chunk: Chunk) -> Term:
    return Cross(term.rank, chunk.columns(term.left), chunk.columns(term.right))


@narrowed.register
def _(term: LowRank, chunk: Chunk) -> Term:
    return LowRank(term.core[chunk.numbers.start : chunk.numbers.stop], chunk.columns(term.columns))


def guessed(call: Call, batch_dims: Mapping[Value, Samples], chunks: Sequence[range]) -> dict[int, Guess]:
    """How to narrow those arguments of a call that are no values with samples.

    Raises:
        NoStructure: no guesses give, for every chunk, what comes out for all samples.
    """
    if any(v.changed and call.arguments[i] is v.tensor for i, v in call.inputs.items()):
        raise NoStructure(f"an input of {call.name} has been overwritten since")
    known = [batch_dims.get(value, ONE_SAMPLE) for value in (*call.outputs, *call.inputs.values())]
    likely = list(dict.fromkeys(batch_dim for batch_dim in known if batch_dim.count > 1))
    options = {
        i: list(_guesses(argument, likely))
        for i, argument in enumerate(call.arguments)
        if i not in call.inputs or batch_dims.get(call.inputs[i], ONE_SAMPLE).count == 1
    }
    choices = {i: guesses for i, guesses in options.items() if len(guesses) > 1}
    with torch.enable_grad():
        other, others = _with_other_contents(call, batch_dims)
        for some in islice(product(*choices.values()), _TRIED):
            found = dict(zip(choices, some, strict=True))
            if all(_holds(other, others, found, numbers) for numbers in chunks):
                return found
    raise NoStructure(f"{call.name} cannot be taken for some of the samples")


def _guesses(argument: Any, likely: Sequence[Samples]) -> Iterator[Guess]:
    """What an argument may be for some samples; `likely`: where these are in other tensors."""
    count = likely[0].count
    if not isinstance(argument, Tensor):
        yield _keep
        bounds = (argument.start, argument.stop) if isinstance(argument, slice) else (argument,)
        if any(_counts(bound, count) for bound in bounds):
            yield partial(_scaled, count)
        return
    fitting = [batch_dim for batch_dim in likely if _fits(argument, batch_dim)]
    others = [
        Samples(count, dim, outer, size // count // outer)
        for dim, size in enumerate(argument.shape)
        if size and size % count == 0
        for outer in dict.fromkeys((1, size // count))
    ]
    first = 0 if argument.requires_grad else len(fitting)  # a parameter mostly is the same for all samples
    narrowed: list[Guess] = [
        partial(_narrowed, batch_dim) for batch_dim in dict.fromkeys([*fitting, *others])
    ]
    yield from [*narrowed[:first], _keep, *narrowed[first:]]
    if not argument.is_floating_point():
        yield from (partial(_numbered, batch_dim) for batch_dim in others if batch_dim.outer == 1)


def _keep(argument: Any, numbers: range) -> Any:
    """The same for all samples."""
    return argument


def _narrowed(batch_dim: Samples, argument: Tensor, numbers: range) -> Tensor:
    """It has samples."""
    found = batch_dim.narrow(argument.detach(), numbers).contiguous()
    return found.requires_grad_(argument.requires_grad)


def _numbered(batch_dim: Samples, argument: Tensor, numbers: range) -> Tensor:
    """It numbers the samples, as `arange(len(x))` does."""
    return batch_dim.narrow(argument, numbers) - numbers.start * batch_dim.inner


def _scaled(count: int, argument: Any, numbers: range) -> Any:
    """It is a size, or a slice, that includes all samples."""
    if isinstance(argument, slice):
        start, stop = (_scaled(count, bound, numbers) for bound in (argument.start, argument.stop))
        return slice(start, stop, argument.step)
    return argument // count * len(numbers) if _counts(argument, count) else argument


def _counts(size: Any, count: int) -> bool:
    """May it be a size that includes all samples?"""
    return isinstance(size, int) and not isinstance(size, bool) and size > 0 and size % count == 0


def _fits(tensor: Tensor, batch_dim: Samples) -> bool:
    size = batch_dim.outer * batch_dim.count * batch_dim.inner
    return batch_dim.dim < tensor.dim() and tensor.shape[batch_dim.dim] == size


def _with_other_contents(
    call: Call, batch_dims: Mapping[Value, Samples]
) -> tuple[Call, dict[Value, Samples]]:
    """The call with its live inputs changed at random, and where the samples are in its values.

    What agrees there does not agree by chance: a factor of zeros tells nothing of the other factor.
    """
    generator = torch.Generator().manual_seed(7)
    values: dict[Value, Value] = {}
    for i, value in call.inputs.items():
        content = call.arguments[i].detach()
        noise = torch.rand(content.shape, generator=generator, dtype=torch.float32).to(content) / 8
        # Smaller, which stays where a call is defined; zeros become positive.
        changed = content.lerp((content == 0).to(content), noise).requires_grad_()
        values.setdefault(value, replace(value, tensor=changed, version=changed._version))
    inputs = {i: values[value] for i, value in call.inputs.items()}
    arguments = [inputs[i].tensor if i in inputs else a for i, a in enumerate(call.arguments)]
    try:
        results = results_of(call, _with_own_first(arguments))
    except RuntimeError as error:
        raise NoStructure(f"{call.name} cannot be run with other contents") from error
    if len(results) != len(call.outputs):
        raise NoStructure(f"{call.name} makes other results of other contents")
    for value, result in zip(call.outputs, results, strict=True):
        values[value] = replace(value, tensor=result, version=result._version)
    other = replace(call, arguments=arguments, inputs=inputs, outputs=[values[v] for v in call.outputs])
    return other, {made: batch_dims[value] for value, made in values.items() if value in batch_dims}


def _with_own_first(arguments: Sequence[Any]) -> list[Any]:
    """The arguments for a call that may overwrite the first."""
    first = arguments[0]
    return [first.clone() if isinstance(first, Tensor) else first, *arguments[1:]]


def _holds(
    call: Call, batch_dims: Mapping[Value, Samples], guesses: Mapping[int, Guess], numbers: range
) -> bool:
    """Does the narrowed call give the narrowed results?"""
    try:
        narrowed = Chunk(numbers, batch_dims).call(call, guesses)
        results = results_of(narrowed, _with_own_first(narrowed.arguments))
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False
    expected = [value.tensor for value in narrowed.outputs]
    return len(results) == len(expected) and all(map(_agree, results, expected))


def _agree(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach(), other.detach()
    if torch.equal(one, other):
        return True
    eps = 100 * torch.finfo(other.dtype).eps
    size = float(other.nan_to_num(0, 0, 0).square().mean().sqrt())
    return one.shape == other.shape and torch.allclose(one, other, eps, eps * size, equal_nan=True)
