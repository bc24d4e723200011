r"""The kinds of curvature block: what a walk from the loss backwards knows of second derivatives.

The curvature over the values u, w, ... that the loss is still a function of is a sum of *terms*,

$$K_{uw} = \frac{\partial^2 L}{\partial u\,\partial w} = \sum_{\text{terms}} U_u^T\, C\, U_w,$$

each with columns $U_u$ for every value that it knows of, and a core $C$ that they share. To take a value
out of the sum is to pull its columns back to the inputs of the call that made it; a core never changes.
Samples do not touch, so they share a column: a stack of columns is [rank, *shape of u], and there is one
core for every sample. A term is low rank, or dense (`Unit` columns), or has columns of one element
each (`Diagonal`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hesse.tape.record import Value
from hesse.tape.samples import Samples


class CannotSweep(Exception):  # noqa: N818
    """A function without the structure that a walk with blocks needs; the message says what is missing."""


@dataclass(frozen=True)
class Unit:
    """The columns that are a value's own coordinates, the first of them column `start` of the term."""

    start: int = 0


@dataclass(eq=False)
class Factor:
    """A term with stacks of columns.

    Attributes:
        core: [N, rank, rank] and symmetric, or its diagonal [N, rank].
        columns: a stack [rank, *shape] for every value.
    """

    core: Tensor
    columns: dict[Value, Tensor | Unit]

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.core.shape[1]


@dataclass(eq=False)
class Diagonal:
    """A term with a column for every element of equally shaped values: `K_uw = diag(s_u c s_w)`.

    Attributes:
        core: c, of the values' shape.
        scales: s for every value; None is one.
    """

    core: Tensor
    scales: dict[Value, Tensor | None]

    def own(self, value: Value) -> Tensor:
        """The block of a value by itself."""
        scale = self.scales[value]
        return _times(_times(self.core, scale), scale)


@dataclass(eq=False)
class Block:
    """The curvature of one value by itself, read where it is needed.

    Attributes:
        samples: their place in the value.
        diagonal: a part that is diagonal, of the value's shape.
        dense: a part [N, f, f] over the value's f coordinates.
        factors: parts of low rank: a core, and a stack of columns.
    """

    samples: Samples
    diagonal: Tensor | None = None
    dense: Tensor | None = None
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)


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


class Curvature:
    """The terms of the curvature over the values that are alive.

    Attributes:
        terms: all of them.
        samples: where the samples are in every value.
    """

    def __init__(self, samples: Mapping[Value, Samples]) -> None:
        self.samples = samples
        self.terms: list[Factor | Diagonal] = []

    def width(self, value: Value) -> int:
        """Coordinates of one sample."""
        return value.tensor.numel() // self.samples[value].count

    def add(self, term: Factor | Diagonal) -> None:
        """Add a term; a diagonal joins one that is there at the same value."""
        if isinstance(term, Diagonal) and len(term.scales) == 1:
            (value,) = term.scales
            for other in self.terms:
                if isinstance(other, Diagonal) and other.scales.keys() == {value}:
                    other.core, other.scales = other.own(value) + term.own(value), {value: None}
                    return
        self.terms.append(term)

    def remove(self, values: Iterable[Value]) -> list[Factor | Diagonal]:
        """Take away the terms that know of one of the values, and return them."""
        gone = [t for t in self.terms if any(v in _known(t) for v in values)]
        self.terms = [t for t in self.terms if not any(t is other for other in gone)]
        return gone

    def at(self, value: Value) -> Block:
        """The block of one value."""
        place = self.samples[value]
        block = Block(place)
        for term in self.terms:
            if isinstance(term, Diagonal):
                if value in term.scales:
                    block.diagonal = _sum(block.diagonal, term.own(value))
                continue
            columns = term.columns.get(value)
            if isinstance(columns, Unit):
                own = self._own(value, columns)
                if term.core.dim() == 3:
                    block.dense = _sum(block.dense, term.core[:, own, own])
                else:
                    diagonal = place.back(term.core[:, own].reshape(place.first(value.tensor).shape))
                    block.diagonal = _sum(block.diagonal, diagonal)
            elif columns is not None:
                block.factors.append((term.core, columns))
        return block

    def stack(self, value: Value, columns: Tensor | Unit, rank: int) -> Tensor:
        """Columns as a stack. Where they are the same for all samples, these share their memory."""
        if isinstance(columns, Tensor):
            return columns
        place, width, tensor = self.samples[value], self.width(value), value.tensor
        ones = torch.zeros(rank, width, dtype=tensor.dtype, device=tensor.device)
        ones[columns.start : columns.start + width].diagonal().fill_(1)
        shape = place.first(tensor.detach()).shape
        return place.back(ones.view(rank, 1, *shape[1:]).expand(rank, *shape), 1)

    def factor(self, term: Diagonal) -> Factor:
        """A diagonal term as one with stacks."""
        place = self.samples[next(iter(term.scales))]
        core = place.flat(term.core)
        columns: dict[Value, Tensor | Unit] = {}
        for value, scale in term.scales.items():
            columns[value] = Unit()
            if scale is not None:
                columns[value] = self.stack(value, Unit(), core.shape[1]) * scale
        return Factor(core, columns)

    def whole(self, term: Factor | Diagonal) -> bool:
        """Is the term a dense block over all values that it knows of?"""
        return (
            isinstance(term, Factor)
            and term.core.dim() == 3
            and all(isinstance(columns, Unit) for columns in term.columns.values())
            and sum(map(self.width, term.columns)) == term.rank
        )

    def moved(
        self, term: Factor, v: Value, u: Value, right: Callable[[Tensor], Tensor], left: Callable[[Tensor], Tensor]
    ) -> Factor:
        """A dense term with the Jacobian J of v by u applied: `Jᵀ K_vv J`, and `K_wv J` for other values w.

        `right` multiplies a block by J, `left` by its transpose.
        """
        old = {w: self._own(w, start) for w, start in term.columns.items() if isinstance(start, Unit)}
        pulled = right(term.core[:, :, old[v]])
        square = left(pulled[:, old[v]])
        del old[v]
        if not old:
            return Factor(square, {u: Unit()})
        starts, start = {}, 0
        for w in dict.fromkeys((*old, u)):
            starts[w], start = Unit(start), start + self.width(w)
        core = pulled.new_zeros(len(pulled), start, start)
        new = {w: self._own(w, unit) for w, unit in starts.items()}
        for w in old:
            for x in old:
                core[:, new[w], new[x]] = term.core[:, old[w], old[x]]
        for w in old:
            core[:, new[w], new[u]] += pulled[:, old[w]]
            core[:, new[u], new[w]] += pulled[:, old[w]].transpose(1, 2)
        core[:, new[u], new[u]] += square
        return Factor(core, dict(starts))

    def condense(self, growth: int) -> None:
        """Make one dense term of all where `growth` more columns would be too many."""
        rank = growth + sum(t.rank for t in self.terms if isinstance(t, Factor))
        alive = list(dict.fromkeys(value for term in self.terms for value in _known(term)))
        width = sum(self.width(value) for value in alive)
        if crowded(rank, [self.width(value) for value in alive]):
            starts, start = {}, 0
            for value in alive:
                starts[value], start = Unit(start), start + self.width(value)
            core = self._dense(starts, width)
            self.terms = [Factor(core, dict(starts))]

    def require_samples(self) -> None:
        """Raise where curvature has come to a value in which samples are joined."""
        count = max((place.count for place in self.samples.values()), default=1)
        for term in self.terms:
            for value in _known(term):
                if self.samples[value].count < count:
                    raise CannotSweep("the loss is not a sum over samples")

    def _dense(self, starts: Mapping[Value, Unit], width: int) -> Tensor:
        """All terms as one matrix per sample, over the values from their starts on."""
        blocks: dict[tuple[Value, Value], Tensor] = {}
        for term in sorted(self.terms, key=lambda term: isinstance(term, Diagonal)):
            values = sorted(_known(term), key=lambda value: starts[value].start)
            for i, u in enumerate(values):
                if isinstance(term, Factor):
                    left = self._left(term, u)
                    for w in values[i:]:
                        blocks[u, w] = _sum(blocks.get((u, w)), self._right(left, term, w))
                    continue
                for w in values[i:]:
                    block = blocks.get((u, w))
                    bend = _times(_times(term.core, term.scales[u]), term.scales[w])
                    bend = self.samples[u].flat(bend)
                    if block is None:
                        blocks[u, w] = torch.diag_embed(bend)
                    else:
                        block.diagonal(dim1=1, dim2=2).add_(bend)
        if len(starts) == 1:
            (total,) = blocks.values()
            return total
        some = next(iter(blocks.values()))
        total = some.new_zeros(len(some), width, width)
        for (u, w), block in blocks.items():
            rows, columns = self._own(u, starts[u]), self._own(w, starts[w])
            total[:, rows, columns] = block
            total[:, columns, rows] = block.transpose(1, 2)
        return total

    def _left(self, term: Factor, value: Value) -> Tensor:
        """Columns of a value times the core, [N, f, rank]."""
        columns = term.columns[value]
        if isinstance(columns, Unit):
            core = term.core if term.core.dim() == 3 else torch.diag_embed(term.core)
            return core[:, self._own(value, columns)]
        by_sample = self.samples[value].flat(columns, 1).permute(1, 2, 0)
        return by_sample * term.core.unsqueeze(1) if term.core.dim() == 2 else by_sample @ term.core

    def _right(self, left: Tensor, term: Factor, value: Value) -> Tensor:
        """What `_left` gave times the columns of a value."""
        columns = term.columns[value]
        if isinstance(columns, Unit):
            return left[:, :, self._own(value, columns)]
        return left @ self.samples[value].flat(columns, 1).transpose(0, 1)

    def _own(self, value: Value, unit: Unit) -> slice:
        return slice(unit.start, unit.start + self.width(value))


def _known(term: Factor | Diagonal) -> Mapping[Value, object]:
    return term.columns if isinstance(term, Factor) else term.scales


def _sum(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one + other


def _times(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one * other
