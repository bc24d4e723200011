"""Penalties: functions of parameters alone that are added to a loss over samples.

What is added has no curvature with the rest. So a weight with a penalty is read where it enters, as if it had
none, and the second derivative of the penalty alone is added.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from hesse.calls.table import row_of
from hesse.look.perturb import differs
from hesse.methods.sweep.carried.uses import Use
from hesse.tape.record import Call, Value
from hesse.tape.samples import Samples, most

HELD = 2**22
"""How many numbers of rows of a second derivative are held at once."""


def penal(calls: Sequence[Call], samples: Mapping[Value, Samples]) -> set[Call]:
    """The calls without samples that lead to nothing but sums with what has none any more."""
    count = most(samples)
    followers: dict[Value, list[Call]] = defaultdict(list)
    found: set[Call] = set()
    for call in reversed(calls):
        after = [follower for output in call.outputs for follower in followers[output]]
        if not any(output in samples for output in call.outputs) and all(
            follower in found or _adds(follower, samples, count) for follower in after
        ):
            found.add(call)
        for value in call.inputs.values():
            followers[value].append(call)
    return found


def _adds(call: Call, samples: Mapping[Value, Samples], count: int) -> bool:
    row = row_of(call)
    return (
        row is not None
        and row.linear
        and all(value in samples and samples[value].count < count for value in call.outputs)
    )


class Penalty:
    """The second derivative by one leaf of all that is added to the loss in one place."""

    def __init__(self, use: Use, adjoints: Sequence[Tensor | None]) -> None:
        self._leaf = use.leaf.tensor.detach()
        self._derivative = use.at(adjoints)

    def times(self, vector: Tensor) -> Tensor:
        """Its product with a vector like the leaf."""
        return self._rows(vector.reshape(1, -1)).view(vector.shape)

    def diagonal(self) -> Tensor:
        """Its diagonal, like the leaf."""
        if self._apart is not None:
            return self._apart
        parts = [self._rows(rows)[:, start:].diagonal() for start, rows in self._coordinates()]
        return torch.cat(parts).view(self._leaf.shape)

    def matrix(self) -> Tensor:
        """All of it, [size, size]."""
        if self._apart is not None:
            return self._apart.flatten().diag()
        return torch.cat([self._rows(rows) for _, rows in self._coordinates()])

    @cached_property
    def _apart(self) -> Tensor | None:
        """The diagonal, if no coordinates touch: to scale them by factors is to scale the product."""
        found = self.times(torch.ones_like(self._leaf))
        generator = torch.Generator().manual_seed(7)
        factors = torch.rand(self._leaf.shape, generator=generator).to(found) + 0.5
        return None if bool(differs(factors * found, self.times(factors)).any()) else found

    def _coordinates(self) -> Iterator[tuple[int, Tensor]]:
        """Some coordinates as rows, [rows, size], after the first of them."""
        size = self._leaf.numel()
        count = max(1, HELD // max(1, size))
        for start in range(0, size, count):
            rows = self._leaf.new_zeros(min(count, size - start), size)
            rows[:, start:].diagonal().fill_(1)
            yield start, rows

    def _rows(self, directions: Tensor) -> Tensor:
        own = self._derivative.rows(directions).own
        return torch.zeros_like(directions) if own is None else own
