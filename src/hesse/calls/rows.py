"""Calls that take rows of a tensor by themselves: softmax and cross entropy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hesse.calls.facts import Bend, Forecast, Linear, Map, Point, squared_parameters
from hesse.calls.pieces import OnRows, Piece
from hesse.tape.record import Value
from hesse.tape.replay import contents
from hesse.tape.samples import ONE_SAMPLE, Samples


@dataclass
class RowHessian:
    """The second derivative of every row: `diag(d) + c x xᵀ + p qᵀ + q pᵀ`.

    Attributes:
        diagonal: d, [N, R, d].
        square: c, [N, R], and x, [N, R, d].
        mutual: p and q, [N, R, d].
    """

    diagonal: Tensor
    square: tuple[Tensor, Tensor] | None = None
    mutual: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class RowsAlong:
    """The dimension of an input that rows lie along, and whether the result has it too."""

    dim: int
    kept: bool = True

    def joins(self, place: Samples) -> bool:
        """Do rows lie along samples?"""
        return place.count > 1 and place.dim == self.dim

    def placed(self, place: Samples) -> Samples:
        """Where the samples are in a result with something of every row, from where they are in the input."""
        return place if self.kept else place.without(self.dim)


class RowMap(Map):
    """A call of one input whose rows do not touch: [N, R, d], R rows of d elements in every sample.

    Attributes:
        value: the input.
    """

    def __init__(self, point: Point, dim: int | None, size: int = 0) -> None:
        """Rows lie along dimension `dim` of the input, or are runs of `size` elements behind the samples."""
        super().__init__(point)
        self.value = value = point.call.inputs[0]
        self._batch_dim = batch_dim = point.samples[value]
        self.size = size if dim is None else value.tensor.shape[dim]
        rest = batch_dim.first(value.tensor.detach()).shape[1:]
        axis = len(rest) - 1
        if dim is not None:
            behind = batch_dim.count > 1 and dim > batch_dim.dim
            axis = dim + (1 if batch_dim.outer * batch_dim.inner > 1 else -1) * behind
        self._rows_last = torch.empty(rest, device="meta").movedim(axis, -1).shape
        self._axis = axis

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Where the input alone is live, and rows along the dimension that was read are no samples."""
        value = only_input(point)
        if value is None or point.read is None:
            return None
        return None if point.read.joins(point.samples[value]) else cls(point, point.read.dim)

    def placed(self) -> Sequence[Samples] | None:
        """As in the input."""
        return [self._batch_dim]

    def rows(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """A tensor like the input as [*lead, N, R, d]."""
        first = self._batch_dim.first(tensor, lead)
        return first.movedim(lead + 1 + self._axis, -1).reshape(*first.shape[: lead + 1], -1, self.size)

    def like_input(self, rows: Tensor, lead: int = 0) -> Tensor:
        """The inverse of `rows`."""
        last = rows.reshape(*rows.shape[: lead + 1], *self._rows_last)
        return self._batch_dim.back(last.movedim(-1, lead + 1 + self._axis), lead)


class ClosedRows(RowMap, ABC):
    """A call by rows whose Jacobian has a closed form."""

    def by_row(self, results: Tensor, lead: int = 0) -> Tensor:
        """A tensor like the result as [*lead, N, R, d]."""
        return self.rows(results, lead)

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """In closed form."""
        (stack,) = columns
        assert stack is not None
        return {self.value: self.like_input(self.pull_rows(self.by_row(stack, 1)), 1)}

    def squared(self, given: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Of the input, and of parameters that are broadcast over the result."""
        (k,) = given
        assert k is not None
        return {self.value: self.squares(k)} | squared_parameters(self, k)

    def squares(self, k: Tensor) -> Tensor:
        """A diagonal like the result times the squared Jacobian by the input."""
        return self.like_input(self.square_rows(self.by_row(k)))

    @abstractmethod
    def pull_rows(self, stack: Tensor) -> Tensor:
        """Cotangents [r, N, R, d] times the Jacobian."""

    @abstractmethod
    def square_rows(self, k: Tensor) -> Tensor:
        """Diagonals [N, R, d] times the squared Jacobian."""


class RowBend(Bend, ABC):
    """The second derivative of a call by rows.

    Attributes:
        outer: how many columns that of a row has beside its diagonal.
    """

    outer = 1
    within = True

    def forecast(self) -> Forecast:
        """A diagonal, and few columns for every row."""
        value = self.rows.value
        return Forecast([[value]], self.outer * self.point.width(value) // self.rows.size)

    @abstractmethod
    def of_rows(self, adjoint: Tensor) -> RowHessian:
        """For an adjoint like the result."""

    @property
    def rows(self) -> Any:
        """The map of the call, a `RowMap`."""
        return self.first

    def against(self, adjoints: Sequence[Tensor | None]) -> Iterator[Piece]:
        """A diagonal, and few columns for every row."""
        (adjoint,) = adjoints
        if adjoint is None:
            return
        found, like_input = self.of_rows(adjoint), self.rows.like_input
        square = None if found.square is None else (found.square[0], self._stack(found.square[1]))
        mutual = None
        if found.mutual is not None:
            one, other = found.mutual
            mutual = self._stack(one), self._stack(other)
        yield OnRows(self.rows.value, like_input(found.diagonal), square, mutual)

    def diagonal(self, adjoints: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """What lies on it of all parts."""
        (adjoint,) = adjoints
        if adjoint is None:
            return {}
        found = self.of_rows(adjoint)
        total = found.diagonal
        if found.square is not None:
            weight, column = found.square
            total = total + weight.unsqueeze(-1) * column.square()
        if found.mutual is not None:
            one, other = found.mutual
            total = total + 2 * one * other
        return {self.rows.value: self.rows.like_input(total)}

    def _stack(self, column: Tensor) -> Tensor:
        """A column [N, R, d] as a stack of R, each of which is zero in all rows but one."""
        stack: Tensor = self.rows.like_input(torch.diag_embed(column.transpose(1, 2)).permute(3, 0, 2, 1), 1)
        return stack


class Softmax(ClosedRows):
    r"""$y = \mathrm{softmax}(u)$."""

    @cached_property
    def y(self) -> Tensor:
        """The result, by rows."""
        return self.rows(contents(self.point.call, 0)).softmax(-1)

    def pull_rows(self, stack: Tensor) -> Tensor:
        r"""$y (g - \langle g, y \rangle)$."""
        along = torch.einsum("knrd,nrd->knr", stack, self.y)
        return (stack - along.unsqueeze(-1)).mul_(self.y)

    def square_rows(self, k: Tensor) -> Tensor:
        r"""Of $J_{ci} = y_c (\delta_{ci} - y_i)$."""
        weighted = k * self.y.square()
        return weighted * (1 - 2 * self.y) + self.y.square() * weighted.sum(-1, keepdim=True)


class SoftmaxBend(RowBend):
    r"""With $w = y (g - \langle g, y \rangle)$, it is `diag(w) - w yᵀ - y wᵀ`."""

    def of_rows(self, adjoint: Tensor) -> RowHessian:
        """See above."""
        (w,) = self.rows.pull_rows(self.rows.rows(adjoint).unsqueeze(0))
        return RowHessian(w, mutual=(self.rows.y, -w))


class LogSoftmax(Softmax):
    r"""The logarithm of the softmax y."""

    def pull_rows(self, stack: Tensor) -> Tensor:
        r"""$g - y \sum g$."""
        return stack - self.y * stack.sum(-1, keepdim=True)

    def square_rows(self, k: Tensor) -> Tensor:
        r"""Of $J_{ci} = \delta_{ci} - y_i$."""
        return k * (1 - 2 * self.y) + self.y.square() * k.sum(-1, keepdim=True)


class LogSoftmaxBend(RowBend):
    r"""It is $-\sum g$ times `diag(y) - y yᵀ`."""

    def of_rows(self, adjoint: Tensor) -> RowHessian:
        """See above."""
        y, total = self.rows.y, self.rows.rows(adjoint).sum(-1)
        return RowHessian(-total.unsqueeze(-1) * y, (total, y))


class Chosen(Linear):
    """The negative log likelihood: minus one element of every row, added up or not."""

    by_numbers = False

    def placed(self) -> Sequence[Samples] | None:
        """As those of `CrossEntropy`."""
        place, read = self.point.samples[self.point.inputs[0]], self.point.read
        apart = self.point.outputs[0].tensor.dim() and not read.joins(place)
        return [read.placed(place) if apart else ONE_SAMPLE]


class CrossEntropy(RowMap):
    r"""Cross entropy, $-\langle t, \log \mathrm{softmax}(u) \rangle$ with targets t for every row."""

    def placed(self) -> Sequence[Samples] | None:
        """Added up, or without the dimension of classes."""
        apart = self.point.outputs[0].tensor.dim()
        return [self.point.read.placed(self._batch_dim) if apart else ONE_SAMPLE]


class CrossEntropyBend(RowBend):
    r"""With y the softmax and $m = \sum t$, the gradient is $m y - t$ and this is m times `diag(y) - y yᵀ`.

    Weights, smoothing and what is ignored are all in t, so m is taken from the gradient here and where the
    least likely class of every row is a likely one.
    """

    def of_rows(self, adjoint: Tensor) -> RowHessian:
        """See above."""
        rows = self.rows
        y = rows.rows(contents(self.point.call, 0)).softmax(-1)
        lifted = torch.zeros_like(y).scatter_(-1, y.argmin(-1, keepdim=True), math.log(rows.size))
        (here,) = rows.pull([adjoint.unsqueeze(0)])[rows.value]
        step = self.gradient_at(lifted, adjoint) - rows.rows(here)
        change = lifted.softmax(-1) - y
        m = (step * change).sum(-1) / change.square().sum(-1).clamp_min(torch.finfo(change.dtype).tiny)
        return RowHessian(m.unsqueeze(-1) * y, (-m, y))

    def gradient_at(self, rows: Tensor, adjoint: Tensor) -> Tensor:
        """By the input, [N, R, d], where it is something else."""
        call = self.point.call
        with torch.enable_grad():
            leaf = self.rows.like_input(rows).detach().requires_grad_()
            result = call.again([leaf, *call.arguments[1:]])
        found: Tensor = self.rows.rows(torch.autograd.grad(result, leaf, adjoint)[0])
        return found


def only_input(point: Point) -> Value | None:
    """The first argument, where it alone has samples and all is of one precision."""
    value = point.call.inputs.get(0)
    others = [held for position, held in point.call.inputs.items() if position > 0]
    if value is None or value not in point.samples or any(held in point.samples for held in others):
        return None
    return value if len({v.tensor.dtype for v in (value, *others, *point.outputs)}) == 1 else None


def read_softmax(input: Any, dim: int | None = None, *_: Any, **__: Any) -> RowsAlong | None:
    """The dimension that rows lie along, if it is told."""
    return None if dim is None else RowsAlong(dim % dims_of(input))


def read_classes(input: Any, *_: Any, **__: Any) -> RowsAlong:
    """Cross entropy and the negative log likelihood: the dimension of classes, which results lack."""
    return RowsAlong(min(1, dims_of(input) - 1), kept=False)


def dims_of(input: Any) -> int:
    """How many dimensions an argument has, as a reader gets it."""
    return (input.tensor if isinstance(input, Value) else input).dim()
