"""Columns over values, and how they lie where samples do not touch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.calls.slopes import times
from hesse.tape.record import Value
from hesse.tape.samples import Samples


@dataclass(frozen=True, eq=False)
class Unit:
    """The columns that are a value's own coordinates.

    Attributes:
        start: number of the first in the term.
        scale: what each is multiplied by, of the value's shape; None is one.
    """

    start: int = 0
    scale: Tensor | None = None


Columns = dict[Value, Tensor | Unit]
"""A stack of columns [rank, *shape] for every value that is known of."""


class Frame:
    """Where the samples are in every value, and with it how columns lie.

    Attributes:
        samples: by value.
    """

    def __init__(self, samples: Mapping[Value, Samples]) -> None:
        self.samples = samples

    def width(self, value: Value) -> int:
        """Coordinates of one sample."""
        return value.tensor.numel() // self.samples[value].count

    def starts(self, values: Iterable[Value]) -> tuple[Columns, int]:
        """Values one after the other, each once; and how wide they are together."""
        starts: Columns = {}
        width = 0
        for value in dict.fromkeys(values):
            starts[value], width = Unit(width), width + self.width(value)
        return starts, width

    def own(self, value: Value, unit: Tensor | Unit) -> slice:
        """Which columns are a value's own coordinates."""
        assert isinstance(unit, Unit)
        return slice(unit.start, unit.start + self.width(value))

    def stack(self, value: Value, columns: Tensor | Unit, rank: int) -> Tensor:
        """Columns as a stack. Where they are the same for all samples, these share their memory."""
        if isinstance(columns, Tensor):
            return columns
        batch_dim, width, tensor = self.samples[value], self.width(value), value.tensor
        ones = torch.zeros(rank, width, dtype=tensor.dtype, device=tensor.device)
        ones[columns.start : columns.start + width].diagonal().fill_(1)
        shape = batch_dim.first(tensor.detach()).shape
        return times(batch_dim.back(ones.view(rank, 1, *shape[1:]).expand(rank, *shape), 1), columns.scale)

    def weights(self, value: Value, unit: Unit, rank: int) -> Tensor:
        """The scale of every column of a unit, [rank, N]; zero for columns that are no coordinate."""
        assert unit.scale is not None
        scale = self.samples[value].flat(unit.scale)
        whole = scale.new_zeros(rank, len(scale))
        whole[self.own(value, unit)] = scale.T
        return whole

    def weighted(self, value: Value, stack: Tensor, weights: Tensor) -> Tensor:
        """A stack with its columns weighted, [rank, N]."""
        batch_dim = self.samples[value]
        first = batch_dim.first(stack, 1)
        return batch_dim.back(first * weights.view(*weights.shape, *(1,) * (first.dim() - 2)), 1)

    def scaled(self, block: Tensor, value: Value, scale: Tensor | None, dim: int) -> Tensor:
        """A block with the coordinates of a value along a dimension, times their scale."""
        return block if scale is None else block * self.samples[value].flat(scale).unsqueeze(3 - dim)

    def by_sample(self, value: Value, stack: Tensor) -> Tensor:
        """A stack of columns as [N, f, rank]."""
        return self.samples[value].flat(stack, 1).permute(1, 2, 0)

    def times_columns(self, rows: Tensor, value: Value, columns: Tensor | Unit) -> Tensor:
        """Rows [N, k, rank] times columns of a value: [N, k, f]."""
        if isinstance(columns, Unit):
            return self.scaled(rows[:, :, self.own(value, columns)], value, columns.scale, 2)
        return rows @ self.samples[value].flat(columns, 1).transpose(0, 1)


def crowded(rank: int, widths: Sequence[int]) -> bool:
    """Are so many columns more than a dense block over values of these widths is worth?

    A block over several values is soon pulled to fewer of them, so these may have more columns.
    """
    return rank > sum(widths) * len(widths)


def applied(core: Tensor, columns: Tensor) -> Tensor:
    """Core times columns [rank, N, *rest]."""
    if core.dim() == 2:
        return columns * core.T.reshape(*core.T.shape, *(1,) * (columns.dim() - 2))
    return torch.einsum("nrq,qnf->rnf", core, columns.reshape(*columns.shape[:2], -1)).view_as(columns)
