"""Calls that make one number of every row (log-sum-exp, norms), or take rows by themselves in other ways."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hesse.calls.facts import Bend, Map, Point
from hesse.calls.rows import ClosedRows, RowBend, RowHessian, RowsAlong, dims_of
from hesse.tape.replay import contents
from hesse.tape.samples import Samples


class Reduced(ClosedRows):
    """One number of every row, whose derivative is a slope by every element."""

    @property
    @abstractmethod
    def slope(self) -> Tensor:
        """By rows, [N, R, d]."""

    def placed(self) -> Sequence[Samples] | None:
        """As in the input, with one dimension less."""
        return [self.point.read.placed(self._batch_dim)]

    def by_row(self, results: Tensor, lead: int = 0) -> Tensor:
        """The same along a row."""
        dim = lead + self.point.read.dim
        results = results if self.point.read.kept else results.unsqueeze(dim)
        sizes = [-1] * results.dim()
        sizes[dim] = self.size
        return self.rows(results.expand(sizes), lead)

    def pull_rows(self, stack: Tensor) -> Tensor:
        """The slope times what comes for a row."""
        return stack * self.slope

    def square_rows(self, k: Tensor) -> Tensor:
        """Its square."""
        return k * self.slope.square()


class LogSumExp(Reduced):
    r"""$\log \sum_i e^{u_i}$, whose slope is the softmax."""

    @cached_property
    def slope(self) -> Tensor:
        """The softmax."""
        return self.rows(contents(self.point.call, 0)).softmax(-1)


class LogSumExpBend(RowBend):
    """It is the adjoint times `diag(y) - y yᵀ`."""

    def of_rows(self, adjoint: Tensor) -> RowHessian:
        """See above."""
        y, g = self.rows.slope, self.rows.by_row(adjoint)
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
    def slope(self) -> Tensor:
        """The rows, normalised."""
        return self.rows(contents(self.point.call, 0)) / self.length


class LengthBend(RowBend):
    """With x the normalised row and n its norm, it is the adjoint times `(1 - x xᵀ) / n`."""

    def of_rows(self, adjoint: Tensor) -> RowHessian:
        """See above."""
        x, g = self.rows.slope, self.rows.by_row(adjoint) / self.rows.length
        return RowHessian(g, (-g[..., 0], x))


class Along(Map):
    """A call that takes every row by itself, by autograd."""

    def placed(self) -> Sequence[Samples] | None:
        """As in the input, if rows do not lie along samples."""
        read, place = self.point.read, self.point.samples[self.point.inputs[0]]
        alone = self.point.inputs == list(self.point.call.inputs.values())
        return None if read is None or not alone or read.joins(place) else [read.placed(place)]


class AlongBend(Bend):
    """By autograd, row by row."""

    within = True


def read_reduction(input: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> RowsAlong | None:
    """As `torch.logsumexp` has its arguments; one dimension, if it is told."""
    dims = dim if isinstance(dim, (tuple, list)) else [dim]
    return RowsAlong(dims[0] % dims_of(input), keepdim) if len(dims) == 1 and type(dims[0]) is int else None


def read_norm(
    input: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None, **_: Any
) -> RowsAlong | None:
    """As `torch.norm`: the Euclidean one."""
    return read_reduction(input, dim, keepdim) if p in ("fro", 2) and dtype is None else None


def read_vector_norm(
    x: Any = None, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **named: Any
) -> RowsAlong | None:
    """As `torch.linalg.vector_norm`."""
    return read_norm(named.get("input", x), ord, dim, keepdim, dtype)


def read_cumulative(input: Any, dim: Any = None, **_: Any) -> RowsAlong | None:
    """As `torch.cumprod`, which keeps all elements of a row."""
    return read_reduction(input, dim, keepdim=True)
