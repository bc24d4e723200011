"""Calls whose results hold elements of their argument: what is pulled back is only moved."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from hesse.calls.local import Local
from hesse.curvature.terms import Unit
from hesse.structure import NoStructure
from hesse.tape.record import Value, leaves_of


class View(Local):
    """A view of one argument, or a copy of one: chunks and slices, transposed, reshaped, flipped."""

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Move every element to where it came from."""
        (value,) = self.inputs
        moved = [(c, places) for c, places in zip(columns, self._places, strict=True) if c is not None]
        shape = value.tensor.shape
        if self._order is not None:
            ((stack, _),) = moved
            permuted = stack.permute(0, *(1 + dim for dim in self._order))
            return {value: permuted.reshape(len(stack), *shape)}
        whole = moved[0][0].new_zeros(len(moved[0][0]), shape.numel())
        for stack, places in moved:
            whole.index_copy_(1, places.flatten(), stack.flatten(1))
        return {value: whole.view(-1, *shape)}

    def pull_unit(self, unit: Unit) -> dict[Value, Unit] | None:
        """As they are, where the elements of a sample keep their order."""
        if not self._keeps_order:
            return None
        (value,) = self.inputs
        scale = unit.scale
        return {value: Unit(unit.start, None if scale is None else self.pull([scale.unsqueeze(0)])[value][0])}

    @cached_property
    def _keeps_order(self) -> bool:
        (value,) = self.inputs
        if len(self.outputs) > 1 or self.samples[value].count != self.samples[self.outputs[0]].count:
            return False
        before = self.samples[value].flat(self._numbers)
        return torch.equal(before, self.samples[self.outputs[0]].flat(self._places[0]))

    @cached_property
    def _order(self) -> list[int] | None:
        """The dimensions of the only result as they lie in the argument, if they are all that has changed."""
        places = self._places[0]
        order = sorted(range(places.dim()), key=lambda dim: -places.stride()[dim])
        kept = torch.equal(places.permute(order).flatten(), self._numbers.flatten())
        return order if kept else None

    @cached_property
    def _places(self) -> list[Tensor]:
        """Where in the argument the elements of every result are."""
        results = leaves_of(self.call.again([self._numbers.double(), *self.call.arguments[1:]]))
        if [r.shape for r in results] != [v.tensor.shape for v in self.outputs]:
            raise NoStructure(f"{self.call.name} made other results when it was run again")
        return [result.long() for result in results]

    @cached_property
    def _numbers(self) -> Tensor:
        (value,) = self.inputs
        return torch.arange(value.tensor.numel(), device=value.tensor.device).view(value.tensor.shape)
