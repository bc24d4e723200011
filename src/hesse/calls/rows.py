"""Calls that take rows of a tensor by themselves, in closed form: softmax and cross entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
        batch_dim = point.samples[value]
        return None if batch_dim.count > 1 and point.read == batch_dim.dim else cls(point, point.read)

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

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """In closed form."""
        (stack,) = columns
        assert stack is not None
        return {self.value: self.like_input(self.pull_rows(self.rows(stack, 1)), 1)}

    def squared(self, given: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Of the input, and of parameters that are broadcast over the result."""
        (k,) = given
        assert k is not None
        return {self.value: self.squares(k)} | squared_parameters(self, k)

    def squares(self, k: Tensor) -> Tensor:
        """A diagonal like the result times the squared Jacobian by the input."""
        return self.like_input(self.square_rows(self.rows(k)))

    def pull_rows(self, stack: Tensor) -> Tensor:
        """Cotangents [r, N, R, d] times the Jacobian."""
        raise NotImplementedError

    def square_rows(self, k: Tensor) -> Tensor:
        """Diagonals [N, R, d] times the squared Jacobian."""
        raise NotImplementedError


class RowBend(Bend):
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

    def of_rows(self, adjoint: Tensor) -> RowHessian:
        """For an adjoint like the result."""
        raise NotImplementedError

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


class Softmax(RowMap):
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


@dataclass(frozen=True)
class Reduction:
    """A call that makes one number of every row: the dimension of rows, and whether that is kept."""

    dim: int
    kept: bool


class Reduced(RowMap):
    """One number of every row.

    Its derivative is that number's slope by every element, `slope`.
    """

    slope: Tensor

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Where the input alone is live, and rows lie along one dimension that has no samples."""
        value = only_input(point)
        if value is None or point.read is None:
            return None
        place = point.samples[value]
        return None if place.count > 1 and point.read.dim == place.dim else cls(point, point.read.dim)

    def placed(self) -> Sequence[Samples] | None:
        """As in the input, with one dimension less."""
        place, read = self._batch_dim, self.point.read
        return [replace(place, dim=place.dim - (place.dim > read.dim and not read.kept))]

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """The slope times what comes for a row."""
        (stack,) = columns
        assert stack is not None
        return {self.value: self.like_input(self.repeated(stack, 1) * self.slope, 1)}

    def squares(self, k: Tensor) -> Tensor:
        """See `RowMap`."""
        return self.like_input(self.repeated(k) * self.slope.square())

    def repeated(self, results: Tensor, lead: int = 0) -> Tensor:
        """A tensor like the result as [*lead, N, R, d], the same along a row."""
        dim = lead + self.point.read.dim
        results = results if self.point.read.kept else results.unsqueeze(dim)
        sizes = [-1] * results.dim()
        sizes[dim] = self.size
        return self.rows(results.expand(sizes), lead)


class LogSumExp(Reduced):
    r"""$\log \sum_i e^{u_i}$, whose slope is the softmax."""

    @cached_property
    def slope(self) -> Tensor:  # type: ignore[override]
        """The softmax."""
        return self.rows(contents(self.point.call, 0)).softmax(-1)


class LogSumExpBend(RowBend):
    """It is the adjoint times `diag(y) - y yᵀ`."""

    def of_rows(self, adjoint: Tensor) -> RowHessian:
        """See above."""
        y, g = self.rows.slope, self.rows.repeated(adjoint)
        return RowHessian(g * y, (-g[..., 0], y))


class Length(Reduced):
    r"""The Euclidean norm of every row, of which none is zero."""

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Of rows that are not zero, where it has no derivative."""
        found = super().of(point)
        return None if isinstance(found, Length) and bool((found.length == 0).any()) else found

    @cached_property
    def length(self) -> Tensor:
        """The norms, [N, R, 1]."""
        rows = self.rows(contents(self.point.call, 0))
        length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return length

    @cached_property
    def slope(self) -> Tensor:  # type: ignore[override]
        """The rows, normalised."""
        return self.rows(contents(self.point.call, 0)) / self.length


class LengthBend(RowBend):
    """With x the normalised row and n its norm, it is the adjoint times `(1 - x xᵀ) / n`."""

    def of_rows(self, adjoint: Tensor) -> RowHessian:
        """See above."""
        x, g = self.rows.slope, self.rows.repeated(adjoint) / self.rows.length
        return RowHessian(g, (-g[..., 0], x))


class Along(Map):
    """A call that takes every row by itself, by autograd."""

    def placed(self) -> Sequence[Samples] | None:
        """As in the input, if rows do not lie along samples."""
        read, place = self.point.read, self.point.samples[self.point.inputs[0]]
        alone = self.point.inputs == list(self.point.call.inputs.values())
        if read is None or not alone or place.dim == read.dim:
            return None
        return [replace(place, dim=place.dim - (place.dim > read.dim and not read.kept))]


class AlongBend(Bend):
    """By autograd, row by row."""

    within = True


class Chosen(Linear):
    """The negative log likelihood: minus one element of every row, added up or not."""

    by_numbers = False

    def placed(self) -> Sequence[Samples] | None:
        """As those of `CrossEntropy`."""
        value, output = self.point.inputs[0], self.point.outputs[0]
        place, classes = self.point.samples[value], min(1, value.tensor.dim() - 1)
        apart = output.tensor.dim() and place.dim != classes
        return [replace(place, dim=place.dim - (place.dim > classes)) if apart else ONE_SAMPLE]


class CrossEntropy(RowMap):
    r"""Cross entropy, $-\langle t, \log \mathrm{softmax}(u) \rangle$ with targets t for every row."""

    def placed(self) -> Sequence[Samples] | None:
        """Added up, or without the dimension of classes."""
        place, dims = self._batch_dim, self.point.outputs[0].tensor.dim()
        return [replace(place, dim=place.dim - (place.dim > self.point.read)) if dims else ONE_SAMPLE]

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """By autograd."""
        return Map.pull(self, columns)

    def squared(self, given: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """By autograd."""
        return Map.squared(self, given)


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


def read_reduction(input: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Reduction | None:
    """As `torch.logsumexp` has its arguments; one dimension, if it is told."""
    dims = dim if isinstance(dim, (tuple, list)) else [dim]
    return Reduction(dims[0] % _dims(input), keepdim) if len(dims) == 1 and type(dims[0]) is int else None


def read_norm(
    input: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None, **_: Any
) -> Reduction | None:
    """As `torch.norm`: the Euclidean one."""
    return read_reduction(input, dim, keepdim) if p in ("fro", 2) and dtype is None else None


def read_vector_norm(
    x: Any = None, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **named: Any
) -> Reduction | None:
    """As `torch.linalg.vector_norm`."""
    return read_norm(named.get("input", x), ord, dim, keepdim, dtype)


def read_cumulative(input: Any, dim: Any = None, **_: Any) -> Reduction | None:
    """As `torch.cumprod`, which keeps all elements of a row."""
    return read_reduction(input, dim, keepdim=True)


def read_softmax(input: Any, dim: int | None = None, *_: Any, **__: Any) -> int | None:
    """The dimension that rows lie along, if it is told."""
    return dim if dim is None else dim % _dims(input)


def read_cross_entropy(input: Any, *_: Any, **__: Any) -> int:
    """The dimension of classes."""
    return min(1, _dims(input) - 1)


def _dims(input: Any) -> int:
    return (input.tensor if isinstance(input, Value) else input).dim()
