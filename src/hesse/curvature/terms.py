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

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import singledispatch

import torch
from torch import Tensor

from hesse.calls.pieces import Across, OnElements, OnRows, Piece, Whole
from hesse.calls.slopes import times
from hesse.curvature.columns import Columns, Frame, Unit
from hesse.tape.record import Value
from hesse.tape.samples import Samples

Blocks = dict[tuple[Value, Value], Tensor]
"""Dense blocks [N, f, g] of pairs of values."""


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


class Term(ABC):
    """A part of the curvature.

    Attributes:
        rank: number of columns; none of a diagonal.
    """

    rank: int

    @property
    @abstractmethod
    def values(self) -> Collection[Value]:
        """What it knows of."""

    @abstractmethod
    def forget(self, values: Iterable[Value]) -> bool:
        """Leave values out; is anything left?"""

    @abstractmethod
    def read(self, frame: Frame, value: Value, block: Block) -> None:
        """Enter what there is of a value by itself into its block."""

    @abstractmethod
    def along(
        self, frame: Frame, value: Value, stack: Tensor, wanted: Sequence[Value]
    ) -> Iterator[tuple[Value, Tensor]]:
        """A stack of columns of a value times its blocks with others, as stacks of these."""

    @abstractmethod
    def accumulate(self, frame: Frame, blocks: Blocks, u: Value, others: Sequence[Value]) -> None:
        """Add the blocks of u with others; what is added may share memory with the term, if it is dense."""

    def is_dense(self, frame: Frame, repeated: bool = False) -> bool:
        """Is the term a dense block over all values that it knows of?

        `repeated`: also where several values have the same coordinates, as the terms of a sum have.
        """
        return False


class Columned(Term):
    """A term with columns."""

    @abstractmethod
    def rows(self, frame: Frame, value: Value) -> Iterator[tuple[Tensor, Columns]]:
        """What multiplies which columns from the left in the blocks of a value: [N, f, rank]."""

    def along(
        self, frame: Frame, value: Value, stack: Tensor, wanted: Sequence[Value]
    ) -> Iterator[tuple[Value, Tensor]]:
        """See `Term`."""
        for rows, columns in self.rows(frame, value):
            inner = frame.samples[value].flat(stack, 1).transpose(0, 1) @ rows  # N, columns, rank
            for w in (w for w in wanted if w in columns):
                part, batch_dim = frame.times_columns(inner, w, columns[w]), frame.samples[w]
                shape = batch_dim.first(w.tensor.detach()).shape
                yield w, batch_dim.back(part.transpose(0, 1).reshape(-1, *shape), 1)

    def accumulate(self, frame: Frame, blocks: Blocks, u: Value, others: Sequence[Value]) -> None:
        """See `Term`."""
        own = self.is_dense(frame)  # then its core may be overwritten later
        for rows, columns in self.rows(frame, u):
            for w in (w for w in others if w in columns):
                block, by = blocks.get((u, w)), columns[w]
                if isinstance(by, Unit):
                    part = frame.times_columns(rows, w, by)
                    blocks[u, w] = (part if own else part.clone()) if block is None else block.add_(part)
                    continue
                matrix = frame.samples[w].flat(by, 1).transpose(0, 1)
                blocks[u, w] = rows @ matrix if block is None else block.baddbmm_(rows, matrix)


@dataclass(eq=False)
class LowRank(Columned):
    """A term `K_uw = U_uᵀ C U_w`.

    Attributes:
        core: C, [N, rank, rank] and symmetric, or its diagonal [N, rank].
        columns: U.
    """

    core: Tensor
    columns: Columns

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Number of columns."""
        return self.core.shape[1]

    @property
    def values(self) -> Collection[Value]:
        """See `Term`."""
        return self.columns

    def forget(self, values: Iterable[Value]) -> bool:
        """See `Term`."""
        for value in values:
            self.columns.pop(value, None)
        return bool(self.columns)

    def is_dense(self, frame: Frame, repeated: bool = False) -> bool:
        """See `Term`."""
        return (
            self.core.dim() == 3
            and all(isinstance(columns, Unit) and columns.scale is None for columns in self.columns.values())
            and (repeated or sum(map(frame.width, self.columns)) == self.rank)
        )

    def read(self, frame: Frame, value: Value, block: Block) -> None:
        """See `Term`."""
        columns = self.columns.get(value)
        if not isinstance(columns, Unit):
            block.factors += [] if columns is None else [(self.core, columns)]
            return
        own, scale = frame.own(value, columns), columns.scale
        if self.core.dim() == 3:
            dense = frame.scaled(self.core[:, own, own], value, scale, 1)
            block.dense = added(block.dense, frame.scaled(dense, value, scale, 2))
        else:
            batch_dim = frame.samples[value]
            diagonal = batch_dim.back(self.core[:, own].reshape(batch_dim.first(value.tensor).shape))
            block.diagonal = added(block.diagonal, times(times(diagonal, scale), scale))

    def rows(self, frame: Frame, value: Value) -> Iterator[tuple[Tensor, Columns]]:
        """See `Columned`."""
        columns = self.columns[value]
        if isinstance(columns, Unit):
            core = self.core if self.core.dim() == 3 else torch.diag_embed(self.core)
            yield frame.scaled(core[:, frame.own(value, columns)], value, columns.scale, 1), self.columns
        else:
            rows = frame.by_sample(value, columns)
            yield rows * self.core.unsqueeze(1) if self.core.dim() == 2 else rows @ self.core, self.columns


@dataclass(eq=False)
class Cross(Columned):
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
        """See `Term`."""
        return self.left | self.right

    def forget(self, values: Iterable[Value]) -> bool:
        """See `Term`."""
        for value in values:
            self.left.pop(value, None)
            self.right.pop(value, None)
        return bool(self.left and self.right)

    def read(self, frame: Frame, value: Value, block: Block) -> None:
        """See `Term`."""
        if value in self.left and value in self.right:
            left, right = (frame.stack(value, side[value], self.rank) for side in (self.left, self.right))
            block.crosses.append((left, right))

    def rows(self, frame: Frame, value: Value) -> Iterator[tuple[Tensor, Columns]]:
        """See `Columned`."""
        for one, other in ((self.left, self.right), (self.right, self.left)):
            if value in one:
                yield frame.by_sample(value, frame.stack(value, one[value], self.rank)), other


@dataclass(eq=False)
class Diagonal(Term):
    """A term with a column for every element of equally shaped values: `K_uw = diag(s_u c s_w)`.

    Attributes:
        core: c, of the values' shape.
        scales: s for every value; None is one.
    """

    core: Tensor
    scales: dict[Value, Tensor | None]
    rank = 0

    @property
    def values(self) -> Collection[Value]:
        """See `Term`."""
        return self.scales

    def forget(self, values: Iterable[Value]) -> bool:
        """See `Term`."""
        for value in values:
            self.scales.pop(value, None)
        return bool(self.scales)

    def between(self, u: Value, w: Value) -> Tensor:
        """What is on the diagonal of the block of two values."""
        return times(times(self.core, self.scales[u]), self.scales[w])

    def own(self, value: Value) -> Tensor:
        """What is on the diagonal of the block of a value by itself."""
        return self.between(value, value)

    def read(self, frame: Frame, value: Value, block: Block) -> None:
        """See `Term`."""
        if value in self.scales:
            block.diagonal = added(block.diagonal, self.own(value))

    def along(
        self, frame: Frame, value: Value, stack: Tensor, wanted: Sequence[Value]
    ) -> Iterator[tuple[Value, Tensor]]:
        """See `Term`."""
        return ((w, stack * self.between(value, w)) for w in wanted)

    def accumulate(self, frame: Frame, blocks: Blocks, u: Value, others: Sequence[Value]) -> None:
        """See `Term`."""
        for w in others:
            core = frame.samples[u].flat(self.between(u, w))
            block = blocks.setdefault((u, w), torch.diag_embed(torch.zeros_like(core)))
            block.diagonal(dim1=1, dim2=2).add_(core)

    def as_columns(self, frame: Frame) -> LowRank:
        """The same with a column for every coordinate."""
        batch_dim = frame.samples[next(iter(self.scales))]
        units: Columns = {value: Unit(0, scale) for value, scale in self.scales.items()}
        return LowRank(batch_dim.flat(self.core), units)


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


def added(one: Tensor | None, other: Tensor) -> Tensor:
    """The sum, where None is zero."""
    return other if one is None else one + other
