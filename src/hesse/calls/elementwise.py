"""Calls of single elements: their second derivative is diagonal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from hesse.calls.facts import Bend, Forecast, Map, Point, Scales
from hesse.calls.pieces import Across, OnElements, Piece
from hesse.calls.slopes import fitted, grad, onto, slopes_against, slopes_of, times
from hesse.tape.record import Value
from hesse.tape.replay import rerun
from hesse.tape.samples import ONE_SAMPLE, Samples


class Separable(Map):
    """A sum of elements, each of which depends on one element of every input."""

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Unless arguments are broadcast, so that elements meet several others."""
        shapes = {value.tensor.shape for value in point.call.inputs.values()}
        return cls(point) if len(shapes) == 1 else None

    def placed(self) -> Sequence[Samples] | None:
        """As in the inputs, or added up."""
        (output,), place = self.point.outputs, self.point.place
        same = output.tensor.shape == self.point.inputs[0].tensor.shape
        return None if place is None else [place if same else ONE_SAMPLE]

    @property
    def leaves(self) -> Mapping[Value, Tensor]:
        """The inputs, as what `bending` is a function of."""
        return self.point.again[0]

    def bending(self, adjoint: Tensor) -> tuple[Mapping[Value, Tensor], Tensor]:
        """First derivatives with a graph, and what to differentiate them with."""
        slopes = slopes_against(*self.point.again, [adjoint]) or []
        some = next(iter(self.leaves.values()))
        return dict(zip(self.leaves, slopes, strict=False)), torch.ones_like(some)

    def squared(self, given: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Squared slopes."""
        (k,) = given
        assert k is not None
        return {v: fitted(slope.detach().square() * k, v) for v, slope in self.slopes_by_one.items()}

    @cached_property
    def slopes_by_one(self) -> Mapping[Value, Tensor]:
        """The derivative by each element, with a graph."""
        return slopes_of(*self.point.again)


class Scaling(Separable):
    """Every element of the result depends on one element of every input: columns are multiplied by slopes."""

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Whatever is broadcast."""
        return cls(point)

    def placed(self) -> Sequence[Samples] | None:
        """As in the inputs, which may be broadcast along other dimensions."""
        places = {self.point.broadcast(value) for value in self.point.inputs}
        place = places.pop()
        return None if places or place is None else [place]

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Multiply by the slopes."""
        (stack,) = columns
        assert stack is not None
        return {value: onto(times(stack, slope), value) for value, slope in self.slopes.items()}

    def pull_right(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply by the slopes, in place."""
        (value,) = self.point.inputs
        slope = self.slopes[value]
        if not self._fits:
            return super().pull_right(rows)
        return rows if slope is None else rows.mul_(self.point.samples[value].flat(slope).unsqueeze(1))

    def keeps(self, values: Collection[Value]) -> bool:
        """Unless an input is broadcast."""
        return self._fits

    def pull_diagonal(self, core: Tensor, scales: Scales) -> tuple[Tensor, Scales]:
        """Multiply the scales by the slopes."""
        scales = dict(scales)
        own = scales.pop(self.point.outputs[0])
        for value, slope in self.slopes.items():
            pulled = slope if own is None else times(own, slope)
            if value in scales:
                one = torch.ones_like(core)
                old = scales[value]
                pulled = (one if pulled is None else pulled) + (one if old is None else old)
            scales[value] = pulled
        return core, scales

    def pull_coordinates(self, scale: Tensor | None) -> Scales | None:
        """Multiply the scale by the slopes, unless an input is broadcast."""
        if not self._fits:
            return None
        return {v: slope if scale is None else times(scale, slope) for v, slope in self.slopes.items()}

    def spread(self) -> Iterator[tuple[Value, Tensor, int]]:
        """The arguments without samples that the result is linear in."""
        for value in self.leaves:
            if value not in self.point.samples and self._is_linear_in(value):
                yield value, self.slopes_by_one[value].detach(), 0

    @property
    def _fits(self) -> bool:
        """Is no input broadcast?"""
        return all(value.tensor.shape == self.point.outputs[0].tensor.shape for value in self.point.inputs)

    @cached_property
    def slopes(self) -> dict[Value, Tensor | None]:
        """The derivative by every input, of the result's shape; None is one."""
        return {value: self.slopes_by_one[value].detach() for value in self.point.inputs}

    def bending(self, adjoint: Tensor) -> tuple[Mapping[Value, Tensor], Tensor]:
        """See `Separable`."""
        return self.slopes_by_one, adjoint

    @property
    def leaves(self) -> Mapping[Value, Tensor]:
        """All differentiable arguments, broadcast to the result."""
        return self._broadcast[0]

    @cached_property
    def slopes_by_one(self) -> Mapping[Value, Tensor]:
        """The derivative by each element, broadcast, with a graph."""
        return slopes_of(*self._broadcast)

    @cached_property
    def _broadcast(self) -> tuple[dict[Value, Tensor], list[Tensor]]:
        arguments = dict.fromkeys(self.point.call.inputs.values())
        return rerun(self.point.call, list(arguments), self.point.outputs[0].tensor.shape)

    def _is_linear_in(self, value: Value) -> bool:
        slope = self.slopes_by_one[value]
        if not slope.requires_grad:
            return True
        by = torch.autograd.grad(slope.sum(), self.leaves[value], retain_graph=True, allow_unused=True)
        return by[0] is None


class Plus(Scaling):
    """Sums and differences, weighted or not."""

    linear = True


class Sum(Plus):
    """`a + b` of two values, neither of them weighted: columns stay as they are."""

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Without `alpha`, and of each value once."""
        live = [value for value in point.call.inputs.values() if value in point.inputs]
        return cls(point) if len(point.call.arguments) == 2 and len(live) == len(point.inputs) else None

    @cached_property
    def slopes(self) -> dict[Value, Tensor | None]:
        """One."""
        return dict.fromkeys(self.point.inputs)


class Elements(Bend):
    """The second derivative of calls of single elements, `Separable` or `Scaling`."""

    within = True

    def forecast(self) -> Forecast:
        """Diagonals; the block of a pair is made of two squares."""
        alone = [(value,) for value in self.point.inputs]
        return Forecast([*alone, *2 * list(combinations(self.point.inputs, 2))])

    def against(self, adjoints: Sequence[Tensor | None]) -> Iterator[Piece]:
        """One for every input, and for every pair of inputs."""
        (adjoint,), first = adjoints, self.first
        assert isinstance(first, Separable)
        if adjoint is None:
            return
        slopes, seed = first.bending(adjoint)
        for i, u in enumerate(self.point.inputs):
            if u in slopes and slopes[u].requires_grad:
                others = self.point.inputs[: i + 1]
                found = grad([slopes[u]], [first.leaves[w] for w in others], [seed])
                for w, core in zip(others, found, strict=True):
                    if bool(core.any()):
                        yield self._pair(u, w, core)

    def _pair(self, u: Value, w: Value, core: Tensor) -> Piece:
        """Second derivatives by u and w, whose elements meet in those of `core`."""
        if u is w:
            return OnElements(u, u, onto(core.unsqueeze(0), u).squeeze(0))
        if u.tensor.shape == w.tensor.shape == core.shape:
            return OnElements(u, w, core)
        u, w = sorted((u, w), key=lambda value: value.tensor.numel())
        stack = self.point.one_hot(u, core.dtype)
        by_u = stack.view(len(stack), *(1,) * (core.dim() - u.tensor.dim()), *u.tensor.shape)
        return Across(u, w, onto(by_u * core, w))

    def diagonal(self, adjoints: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """By every input itself."""
        (adjoint,), first = adjoints, self.first
        assert isinstance(first, Separable)
        if adjoint is None:
            return {}
        return {
            value: fitted(self._by_itself(slope, first.leaves[value], adjoint), value)
            for value, slope in first.slopes_by_one.items()
            if slope.requires_grad
        }

    def _by_itself(self, slope: Tensor, leaf: Tensor, adjoint: Tensor) -> Tensor:
        seed = adjoint.expand_as(slope)
        return torch.autograd.grad(slope, leaf, seed, retain_graph=True, materialize_grads=True)[0]


class OfFactors(Elements):
    """The second derivative of a product of elements."""

    @property
    def vanishes(self) -> bool:
        """Of one live factor."""
        return sum(value in self.point.inputs for value in self.point.call.inputs.values()) == 1

    def forecast(self) -> Forecast:
        """Nothing by a factor alone, unless it is there twice."""
        factors = self.point.call.inputs.values()
        whole = super().forecast()
        distinct = len(set(factors)) == len(factors)
        return Forecast([values for values in whole.diagonals if len(values) > 1]) if distinct else whole
