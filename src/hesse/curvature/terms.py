r"""The kinds of curvature block: what a walk from the loss backwards knows of second derivatives.

The curvature over the values u, w, ... that the loss is still a function of is a sum of *terms*,

$$K_{uw} = \frac{\partial^2 L}{\partial u\,\partial w} = \sum_{\text{terms}} U_u^T\, C\, U_w,$$

each with columns $U_u$ for every value that it knows of, and a core $C$ that they share. To take a value
out of the sum is to pull its columns back to the inputs of the call that made it. Samples do not touch, so
they share a column: a stack of columns is [rank, *shape of u], and there is one core for every sample. A term
is low rank (`LowRank`), or dense (a `LowRank` whose columns are `Unit`), has columns of one element each
(`Diagonal`), or is a product of two arguments' columns, $L_u^T R_w + R_u^T L_w$ (`Cross`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import singledispatch

import torch
from torch import Tensor

from hesse.calls.facts import times
from hesse.calls.pieces import Across, OnElements, OnRows, Piece, Whole
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


@dataclass(eq=False)
class LowRank:
    """A term `K_uw = U_uᵀ C U_w`.

    Attributes:
        core: C, [N, rank, rank] and symmetric, or its diagonal [N, rank].
        columns: U.
    """

    core: Tensor
    columns: Columns

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.core.shape[1]

    @property
    def values(self) -> Collection[Value]:
        """What it knows of."""
        return self.columns

    def forget(self, values: Iterable[Value]) -> bool:
        """Leave values out; is anything left?"""
        for value in values:
            self.columns.pop(value, None)
        return bool(self.columns)


@dataclass(eq=False)
class Cross:
    """A term `K_uw = L_uᵀ R_w + R_uᵀ L_w`.

    Attributes:
        rank: number of columns on either side.
        left: L; `right`: R.
    """

    rank: int
    left: Columns
    right: Columns

    @property
    def values(self) -> Collection[Value]:
        """What it knows of."""
        return self.left | self.right

    def forget(self, values: Iterable[Value]) -> bool:
        """Leave values out; is anything left?"""
        for value in values:
            self.left.pop(value, None)
            self.right.pop(value, None)
        return bool(self.left and self.right)


@dataclass(eq=False)
class Diagonal:
    """A term with a column for every element of equally shaped values: `K_uw = diag(s_u c s_w)`.

    Attributes:
        core: c, of the values' shape.
        scales: s for every value; None is one.
    """

    core: Tensor
    scales: dict[Value, Tensor | None]

    @property
    def values(self) -> Collection[Value]:
        """What it knows of."""
        return self.scales

    def forget(self, values: Iterable[Value]) -> bool:
        """Leave values out; is anything left?"""
        for value in values:
            self.scales.pop(value, None)
        return bool(self.scales)

    def between(self, u: Value, w: Value) -> Tensor:
        """What is on the diagonal of the block of two values."""
        return times(times(self.core, self.scales[u]), self.scales[w])

    def own(self, value: Value) -> Tensor:
        """What is on the diagonal of the block of a value by itself."""
        return self.between(value, value)


Term = LowRank | Cross | Diagonal


@dataclass(eq=False)
class Block:
    """The curvature of one value by itself, read where it is needed.

    Attributes:
        samples: their place in the value.
        diagonal: a part that is diagonal, of the value's shape.
        dense: a part [N, f, f] over the value's f coordinates.
        factors: parts of low rank: a core, and a stack of columns.
        crosses: parts `LᵀR + RᵀL`: stacks L and R.
    """

    samples: Samples
    diagonal: Tensor | None = None
    dense: Tensor | None = None
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    crosses: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@singledispatch
def terms_of(piece: Piece) -> Iterator[Term]:
    """A piece of a call's second derivative as terms."""
    raise NotImplementedError


@terms_of.register
def _(piece: OnElements) -> Iterator[Term]:
    if piece.u is piece.w:
        yield Diagonal(piece.core, {piece.u: None})
    else:  # 4 u w = (u + w)² - (u - w)²
        yield Diagonal(piece.core / 2, {piece.u: None, piece.w: None})
        yield Diagonal(-piece.core / 2, {piece.u: None, piece.w: torch.full_like(piece.core, -1)})


@terms_of.register
def _(piece: OnRows) -> Iterator[Term]:
    yield Diagonal(piece.diagonal, {piece.u: None})
    if piece.square is not None:
        core, stack = piece.square
        yield LowRank(core, {piece.u: stack})
    if piece.mutual is not None:
        one, other = piece.mutual
        yield Cross(len(one), {piece.u: one}, {piece.u: other})


@terms_of.register
def _(piece: Across) -> Iterator[Term]:
    yield Cross(len(piece.rows), {piece.u: Unit()}, {piece.w: piece.rows})


@terms_of.register
def _(piece: Whole) -> Iterator[Term]:
    columns: Columns = {}
    start = 0
    for value, width in piece.widths.items():
        columns[value] = Unit(start)
        start += width
    yield LowRank(piece.core, columns)


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
