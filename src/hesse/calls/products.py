"""Calls that are linear in each of two arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from hesse.calls.local import Added, Local, contents, grad, onto
from hesse.curvature.terms import Cross, Term, Unit
from hesse.tape.record import Value


class Bilinear(Local):
    """Linear in each of two arguments: only the cross block."""

    def added(self) -> Added:
        """A column for each of the narrower input."""
        if len(self._live) == 1:
            return (), 0
        return ((), min(map(self._width, self._live))) if self._is_cross else super().added()

    def curvature(self, adjoints: Sequence[Tensor | None]) -> Iterator[Term]:
        """Columns of the narrower input, and what they are for the other one."""
        (adjoint,) = adjoints
        if adjoint is None or len(self._live) == 1:
            return
        if not self._is_cross:
            yield from super().curvature(adjoints)
            return
        u, w = sorted(self._live, key=self._width)
        ones = torch.eye(self._width(u), dtype=u.tensor.dtype, device=u.tensor.device)
        stack = self._everywhere(u, ones.view(-1, *self._shape(u)))
        yield Cross(len(ones), {u: Unit()}, {w: self._replaced(adjoint, u, stack, w)})

    @cached_property
    def _live(self) -> list[Value]:
        """The inputs as often as they are arguments."""
        return [value for value in self.call.inputs.values() if value in self.inputs]

    @property
    def _is_cross(self) -> bool:
        return len(self._live) == len(self.inputs) == 2

    def _replaced(self, adjoint: Tensor, u: Value, stack: Tensor, w: Value) -> Tensor:
        """The gradients by w of `<adjoint, call>`, with a stack of others in place of u."""
        leaves, results = self._again
        slopes = self._slopes(leaves, results, [adjoint])
        if slopes is None:
            return stack.new_zeros(len(stack), *w.tensor.shape)
        slope, by = slopes[list(leaves).index(u)], leaves[w]
        (found,) = torch.vmap(lambda seed: grad([slope], [by], [seed]))(stack)
        return found


class MatrixProduct(Bilinear):
    """`a @ b` of matrices or stacks of them."""

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Products with the other matrix."""
        (stack,) = columns
        assert stack is not None
        found: dict[Value, Tensor] = {}
        for position, value in self.call.inputs.items():
            if value in self.inputs:
                part = onto(stack @ self._b.mT if position == 0 else self._a.mT @ stack, value)
                found[value] = found[value] + part if value in found else part
        return found

    def _replaced(self, adjoint: Tensor, u: Value, stack: Tensor, w: Value) -> Tensor:
        """See `Bilinear`."""
        return onto(stack.mT @ adjoint if self.call.inputs[0] is u else adjoint @ stack.mT, w)

    @cached_property
    def _a(self) -> Tensor:
        return contents(self.call, 0)

    @cached_property
    def _b(self) -> Tensor:
        return contents(self.call, 1)


class LinearMap(Bilinear):
    """A linear layer as a function of its input."""

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Multiply by the weight; columns that are the same for all samples only once."""
        (stack,), (value,) = columns, self.inputs
        assert stack is not None
        dim = 1 + self.samples[value].dim
        once = stack.narrow(dim, 0, 1) if dim and stack.stride(dim) == 0 else stack
        return {value: functional.linear(once, self._weight.T).expand(*stack.shape[:-1], -1)}

    def pull_right(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Of every position by itself: features come last in a sample."""
        parts = rows.unflatten(2, (-1, len(self._weight)))
        out = self._fitting(out, (*parts.shape[:3], self._weight.shape[1]))
        return torch.matmul(parts, self._weight, out=out).flatten(2)

    def pull_left(self, columns: Tensor, out: Tensor | None = None) -> Tensor:
        """From the left, which saves to transpose."""
        parts = columns.unflatten(1, (-1, len(self._weight)))
        out = self._fitting(out, (*parts.shape[:2], self._weight.shape[1], parts.shape[3]))
        return torch.matmul(self._weight.T, parts, out=out).flatten(1, 2)

    def _fitting(self, out: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        """Memory for a result, if it is of the right size."""
        fits = out is not None and out.is_contiguous() and out.numel() == torch.Size(shape).numel()
        return out.view(shape) if out is not None and fits else None

    @cached_property
    def _weight(self) -> Tensor:
        args, kwargs = self.call.nested(range(len(self.call.arguments)))
        return contents(self.call, args[1] if len(args) > 1 else kwargs["weight"])
