"""Calls of single elements: their curvature is diagonal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from hesse.calls.local import Added, Local, grad, onto, rerun, slopes_of
from hesse.calls.table import Kind, canonical
from hesse.curvature.terms import Cross, Diagonal, Term, Unit, times
from hesse.tape.record import Value


class Separable(Local):
    """A sum of elements, each of which depends on one element of every input."""

    def added(self) -> Added:
        """Diagonals, if the pieces are not straight; the block of a pair is made of two squares."""
        if self.kind is Kind.PIECEWISE:
            return (), 0
        factors = self.call.inputs.values()
        product = canonical(self.call.name) == "mul" and len(set(factors)) == len(factors)
        alone = [] if product else [(value,) for value in self.inputs]
        return [*alone, *2 * list(combinations(self.inputs, 2))], 0

    def curvature(self, adjoints: Sequence[Tensor | None]) -> Iterator[Term]:
        """A diagonal for every input, and for every pair of inputs."""
        (adjoint,) = adjoints
        if adjoint is None:
            return
        slopes, seed = self._bending(adjoint)
        leaves, _ = self._again
        for i, u in enumerate(self.inputs):
            if u in slopes and slopes[u].requires_grad:
                others = self.inputs[: i + 1]
                bends = grad([slopes[u]], [leaves[w] for w in others], [seed])
                for w, bend in zip(others, bends, strict=True):
                    if bool(bend.any()):
                        yield from self._pair(u, w, bend)

    def _bending(self, adjoint: Tensor) -> tuple[Mapping[Value, Tensor], Tensor]:
        """First derivatives, and what to differentiate them with."""
        leaves, results = self._again
        slopes = self._slopes(leaves, results, [adjoint]) or []
        some = next(iter(leaves.values()))
        return dict(zip(leaves, slopes, strict=False)), torch.ones_like(some)

    def _pair(self, u: Value, w: Value, bend: Tensor) -> Iterator[Term]:
        """The blocks `K_uw = K_wu`, whose elements meet in those of `bend`."""
        if u is w:
            yield Diagonal(onto(bend.unsqueeze(0), u).squeeze(0), {u: None})
        elif u.tensor.shape == w.tensor.shape == bend.shape:  # 4 u w = (u + w)² - (u - w)²
            yield Diagonal(bend / 2, {u: None, w: None})
            yield Diagonal(-bend / 2, {u: None, w: torch.full_like(bend, -1)})
        else:
            u, w = sorted((u, w), key=lambda value: value.tensor.numel())
            ones = torch.eye(self._width(u), dtype=bend.dtype, device=bend.device)
            stack = self._everywhere(u, ones.view(-1, *self._shape(u)))
            by_u = stack.view(len(stack), *(1,) * (bend.dim() - u.tensor.dim()), *u.tensor.shape)
            yield Cross(len(ones), {u: Unit()}, {w: onto(by_u * bend, w)})


class Elementwise(Separable):
    """Every element of the result depends on one element of every input."""

    def keeps(self, values: Collection[Value]) -> bool:
        """Unless an input is broadcast."""
        return all(value.tensor.shape == self.outputs[0].tensor.shape for value in self.inputs)

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Multiply by the slopes."""
        (stack,) = columns
        assert stack is not None
        return {value: onto(times(stack, slope), value) for value, slope in self.slopes.items()}

    def pull_unit(self, unit: Unit) -> dict[Value, Unit] | None:
        """Multiply the scale by the slopes, unless an input is broadcast."""
        if any(value.tensor.shape != self.outputs[0].tensor.shape for value in self.inputs):
            return None
        return {
            value: Unit(unit.start, slope if unit.scale is None else times(unit.scale, slope))
            for value, slope in self.slopes.items()
        }

    def pull_right(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply by the slopes, in place."""
        (value,) = self.inputs
        slope = self.slopes[value]
        if value.tensor.shape != self.outputs[0].tensor.shape:
            return super().pull_right(rows)
        return rows if slope is None else rows.mul_(self.samples[value].flat(slope).unsqueeze(1))

    def pull_diagonal(self, term: Diagonal) -> Diagonal:
        """Multiply the scales by the slopes."""
        scales = dict(term.scales)
        own = scales.pop(self.outputs[0])
        for value, slope in self.slopes.items():
            pulled = slope if own is None else times(own, slope)
            if value in scales:
                one = torch.ones_like(term.core)
                old = scales[value]
                pulled = (one if pulled is None else pulled) + (one if old is None else old)
            scales[value] = pulled
        return Diagonal(term.core, scales)

    @cached_property
    def slopes(self) -> dict[Value, Tensor | None]:
        """The derivative by every input, of the result's shape; None is one."""
        if self._is_sum:
            return dict.fromkeys(self.inputs)
        return {value: self._tracked[value].detach() for value in self.inputs}

    def spread(self) -> Iterator[tuple[Value, Tensor, int]]:
        """The arguments without samples that the result is linear in."""
        leaves, _ = self._again
        for value in leaves:
            if value not in self.samples and self._is_linear_in(value):
                yield value, self._tracked[value].detach(), 0

    def _is_linear_in(self, value: Value) -> bool:
        slope = self._tracked[value]
        if not slope.requires_grad:
            return True
        leaf = self._again[0][value]
        return torch.autograd.grad(slope.sum(), leaf, retain_graph=True, allow_unused=True)[0] is None

    @property
    def _is_sum(self) -> bool:
        live = [value for value in self.call.inputs.values() if value in self.inputs]
        plain = canonical(self.call.name) == "add" and len(self.call.arguments) == 2
        return plain and len(live) == len(self.inputs)

    @cached_property
    def _tracked(self) -> dict[Value, Tensor]:
        return slopes_of(*self._again)

    def _bending(self, adjoint: Tensor) -> tuple[Mapping[Value, Tensor], Tensor]:
        return {} if self._is_sum else self._tracked, adjoint

    @cached_property
    def _again(self) -> tuple[dict[Value, Tensor], list[Tensor]]:
        arguments = dict.fromkeys(self.call.inputs.values())
        return rerun(self.call, list(arguments), self.outputs[0].tensor.shape)
