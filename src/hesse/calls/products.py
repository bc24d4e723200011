"""Calls that are linear in each of two arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from hesse.calls.facts import Bend, Forecast, Map, Point
from hesse.calls.pieces import Across, Piece
from hesse.calls.slopes import grad, onto, slopes_against
from hesse.calls.trial import tried
from hesse.tape.record import Value
from hesse.tape.replay import contents
from hesse.tape.samples import ONE_SAMPLE, Samples


class Product(Map):
    """Linear in each of two arguments."""

    by_factors = True

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Of no more than two that are live."""
        return cls(point) if sum(v in point.inputs for v in point.call.inputs.values()) < 3 else None

    def placed(self) -> Sequence[Samples] | None:
        """By a trial, where they have them in common; what is added up over samples, only of one."""
        call, inputs = self.point.call, self.point.inputs
        degree = sum(value in inputs for value in call.inputs.values())
        places = tried(call, inputs, self.point.samples, degree)
        return places if degree == 1 or all(place.count > 1 for place in places) else None

    def squared(self, given: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """An entry of the Jacobian is one element of the other factor: the product with its squares."""
        call = self.point.call
        if len(self.point.inputs) < len(call.inputs):
            return super().squared(given)
        arguments = [
            a.detach().square() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in call.arguments
        ]
        leaves = {value: arguments[position] for position, value in call.inputs.items()}
        with torch.enable_grad():
            for leaf in leaves.values():
                leaf.requires_grad_()
            result = call.again(arguments)
        return dict(zip(leaves, torch.autograd.grad(result, list(leaves.values()), given), strict=True))

    def replaced(self, adjoint: Tensor, u: Value, stack: Tensor, w: Value) -> Tensor:
        """The gradients by w of `<adjoint, call>`, with a stack of others in place of u."""
        leaves, results = self.point.again
        slopes = slopes_against(leaves, results, [adjoint])
        if slopes is None:
            return stack.new_zeros(len(stack), *w.tensor.shape)
        slope, by = slopes[list(leaves).index(u)], leaves[w]
        (found,) = torch.vmap(lambda seed: grad([slope], [by], [seed]))(stack)
        return found


class MatrixProduct(Product):
    """`a @ b` of matrices or stacks of them."""

    by_factors = False

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Of two arguments as they stand, none of them a vector."""
        factors = point.call.arguments
        return cls(point) if point.call.spec == () and min(factor.dim() for factor in factors) > 1 else None

    def placed(self) -> Sequence[Samples] | None:
        """As in the factor that has them; one sample where products are added up over them."""
        live = [(i, v) for i, v in self.point.call.inputs.items() if v in self.point.inputs]
        (place, *others) = {self._kept(position, value) for position, value in live}
        told = not others and (place is not None or len(live) == 1)
        return [place or ONE_SAMPLE] if told else None

    def _kept(self, position: int, value: Value) -> Samples | None:
        """Where the samples of a factor are in the result; None where that is a sum over them."""
        summed = value.tensor.dim() - (2 if position else 1)
        return None if self.point.samples[value].dim == summed else self.point.broadcast(value)

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Products with the other matrix."""
        (stack,) = columns
        assert stack is not None
        found: dict[Value, Tensor] = {}
        for position, value in self.point.call.inputs.items():
            if value in self.point.inputs:
                part = onto(stack @ self._b.mT if position == 0 else self._a.mT @ stack, value)
                found[value] = found[value] + part if value in found else part
        return found

    def replaced(self, adjoint: Tensor, u: Value, stack: Tensor, w: Value) -> Tensor:
        """See `Product`."""
        return onto(stack.mT @ adjoint if self.point.call.inputs[0] is u else adjoint @ stack.mT, w)

    @cached_property
    def _a(self) -> Tensor:
        return contents(self.point.call, 0)

    @cached_property
    def _b(self) -> Tensor:
        return contents(self.point.call, 1)


class MatrixMap(Product):
    """A linear layer as a function of its input alone."""

    by_factors = False
    input = 0
    """Which argument the input is."""

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Where nothing else is live."""
        live = [position for position, value in point.call.inputs.items() if value in point.inputs]
        return cls(point) if live == [cls.input] else None

    def placed(self) -> Sequence[Samples] | None:
        """As in the input, unless features are samples."""
        (value,) = self.point.inputs
        place = self.point.samples[value]
        return [place if place.dim < value.tensor.dim() - 1 else ONE_SAMPLE]

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Multiply by the weight; columns that are the same for all samples only once."""
        (stack,), (value,) = columns, self.point.inputs
        assert stack is not None
        dim = 1 + self.point.samples[value].dim
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
        call = self.point.call
        args, kwargs = call.nested(range(len(call.arguments)))
        return contents(call, args[1] if len(args) > 1 else kwargs["weight"])


class AddedMatrixMap(MatrixMap):
    """A matrix times another one, and something added, as a function of the first."""

    input = 1

    @cached_property
    def _weight(self) -> Tensor:
        call = self.point.call
        args, kwargs = call.nested(range(len(call.arguments)))
        weight = contents(call, args[2] if len(args) > 2 else kwargs["mat2"]).T
        alpha = call.arguments[kwargs["alpha"]] if "alpha" in kwargs else 1
        return weight if alpha == 1 else alpha * weight


class Crossed(Bend):
    """The second derivative of a product: by both factors, and by none alone."""

    @property
    def vanishes(self) -> bool:
        """With one live factor."""
        return len(self._live) == 1

    def forecast(self) -> Forecast:
        """A column for each coordinate of the narrower factor."""
        if self.vanishes:
            return Forecast()
        return Forecast(rank=min(map(self.point.width, self._live))) if self._is_cross else super().forecast()

    def against(self, adjoints: Sequence[Tensor | None]) -> Iterator[Piece]:
        """For every coordinate of the narrower factor, by the other one."""
        (adjoint,), first = adjoints, self.first
        assert isinstance(first, Product)
        if adjoint is None or self.vanishes:
            return
        if not self._is_cross:
            yield from super().against(adjoints)
            return
        u, w = sorted(self._live, key=self.point.width)
        yield Across(u, w, first.replaced(adjoint, u, self.point.one_hot(u, u.tensor.dtype), w))

    def diagonal(self, adjoints: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Zero, unless both factors are one value."""
        repeated = len(self.point.inputs) < len(self.point.call.inputs)
        return super().diagonal(adjoints) if repeated else {}

    @cached_property
    def _live(self) -> list[Value]:
        """The inputs as often as they are arguments."""
        return [value for value in self.point.call.inputs.values() if value in self.point.inputs]

    @property
    def _is_cross(self) -> bool:
        return len(self._live) == len(self.point.inputs) == 2
