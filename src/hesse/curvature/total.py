"""The curvature on a sweep's way: a sum of terms (see `hesse.curvature.terms`), and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from hesse.calls.convolutions import contiguous
from hesse.calls.facts import times
from hesse.curvature.terms import (
    Block,
    Columns,
    Cross,
    Diagonal,
    LowRank,
    Term,
    Unit,
    crowded,
)
from hesse.structure import NoStructure
from hesse.tape.record import Value
from hesse.tape.samples import Samples, most

Apply = Callable[..., Tensor]


class Curvature:
    """The terms of the curvature over the values that are alive.

    Attributes:
        terms: all of them.
        samples: where the samples are in every value.
    """

    def __init__(self, samples: Mapping[Value, Samples]) -> None:
        self.samples = samples
        self.terms: list[Term] = []
        self._count = most(samples)
        # Memory of an earlier block: to touch new pages takes as long as to multiply.
        self._spare: Tensor | None = None

    def width(self, value: Value) -> int:
        """Coordinates of one sample."""
        return value.tensor.numel() // self.samples[value].count

    def add(self, term: Term) -> None:
        """Add a term; a diagonal joins one that is there at the same value."""
        if isinstance(term, Diagonal) and len(term.scales) == 1:
            (value,) = term.scales
            for other in self.terms:
                if isinstance(other, Diagonal) and other.scales.keys() == {value}:
                    other.core, other.scales = other.own(value) + term.own(value), {value: None}
                    return
        self.terms.append(term)

    def remove(self, values: Iterable[Value]) -> list[Term]:
        """Take away the terms that know of one of the values, and return them."""
        gone = [term for term in self.terms if any(value in term.values for value in values)]
        self.terms = [term for term in self.terms if not any(term is other for other in gone)]
        return gone

    def at(self, value: Value) -> Block:
        """The block of one value."""
        place = self.samples[value]
        block = Block(place)
        for term in self.terms:
            if isinstance(term, Diagonal):
                if value in term.scales:
                    block.diagonal = _sum(block.diagonal, term.own(value))
            elif isinstance(term, Cross):
                if value in term.left and value in term.right:
                    sides = term.left[value], term.right[value]
                    left, right = (self.stack(value, columns, term.rank) for columns in sides)
                    block.crosses.append((left, right))
            elif isinstance(columns := term.columns.get(value), Unit):
                own, scale = self._own(value, columns), columns.scale
                if term.core.dim() == 3:
                    dense = self._scaled(
                        self._scaled(term.core[:, own, own], value, scale, 1), value, scale, 2
                    )
                    block.dense = _sum(block.dense, dense)
                else:
                    diagonal = place.back(term.core[:, own].reshape(place.first(value.tensor).shape))
                    block.diagonal = _sum(block.diagonal, times(times(diagonal, scale), scale))
            elif columns is not None:
                block.factors.append((term.core, columns))
        return block

    def along(self, stacks: Mapping[Value, Tensor], of: Callable[[Value], bool]) -> dict[Value, Tensor]:
        """The curvature times stacks of columns of some values: stacks of those values `of` which."""
        found: dict[Value, Tensor] = {}
        for term in self.terms:
            met = [value for value in stacks if value in term.values]
            wanted = [value for value in term.values if of(value)] if met else []
            if isinstance(term, Diagonal):
                parts = ((w, stacks[v] * term.between(v, w)) for v in met for w in wanted)
            else:
                parts = ((w, part) for v in met for w, part in self._along(term, v, stacks[v], wanted))
            for value, part in parts:
                found[value] = _sum(found.get(value), part)
        return found

    def _along(
        self, term: LowRank | Cross, value: Value, stack: Tensor, wanted: Sequence[Value]
    ) -> Iterator[tuple[Value, Tensor]]:
        """A stack of columns of a value times its blocks with others, as stacks of these."""
        for rows, columns in self._rows(term, value):
            inner = self.samples[value].flat(stack, 1).transpose(0, 1) @ rows  # N, columns, rank
            for w in (w for w in wanted if w in columns):
                place, by = self.samples[w], columns[w]
                if isinstance(by, Unit):
                    part = self._scaled(inner[:, :, self._own(w, by)], w, by.scale, 2)
                else:
                    part = inner @ place.flat(by, 1).transpose(0, 1)
                shape = place.first(w.tensor.detach()).shape
                yield w, place.back(part.transpose(0, 1).reshape(-1, *shape), 1)

    def stack(self, value: Value, columns: Tensor | Unit, rank: int) -> Tensor:
        """Columns as a stack. Where they are the same for all samples, these share their memory."""
        if isinstance(columns, Tensor):
            return columns
        place, width, tensor = self.samples[value], self.width(value), value.tensor
        ones = torch.zeros(rank, width, dtype=tensor.dtype, device=tensor.device)
        ones[columns.start : columns.start + width].diagonal().fill_(1)
        shape = place.first(tensor.detach()).shape
        return times(place.back(ones.view(rank, 1, *shape[1:]).expand(rank, *shape), 1), columns.scale)

    def weights(self, value: Value, unit: Unit, rank: int) -> Tensor:
        """The scale of every column of a unit, [rank, N]; zero for columns that are no coordinate."""
        assert unit.scale is not None
        scale = self.samples[value].flat(unit.scale)
        whole = scale.new_zeros(rank, len(scale))
        whole[self._own(value, unit)] = scale.T
        return whole

    def weighted(self, value: Value, stack: Tensor, weights: Tensor) -> Tensor:
        """A stack with its columns weighted, [rank, N]."""
        place = self.samples[value]
        first = place.first(stack, 1)
        return place.back(first * weights.view(*weights.shape, *(1,) * (first.dim() - 2)), 1)

    def _scaled(self, block: Tensor, value: Value, scale: Tensor | None, dim: int) -> Tensor:
        """A block with the coordinates of a value along a dimension, times their scale."""
        return block if scale is None else block * self.samples[value].flat(scale).unsqueeze(3 - dim)

    def factor(self, term: Diagonal) -> LowRank:
        """A diagonal term as one with stacks."""
        place = self.samples[next(iter(term.scales))]
        return LowRank(place.flat(term.core), {value: Unit(0, scale) for value, scale in term.scales.items()})

    def is_dense(self, term: Term, repeated: bool = False) -> bool:
        """Is the term a dense block over all values that it knows of?

        `repeated`: also where several values have the same coordinates, as the terms of a sum have.
        """
        return (
            isinstance(term, LowRank)
            and term.core.dim() == 3
            and all(isinstance(columns, Unit) and columns.scale is None for columns in term.columns.values())
            and (repeated or sum(map(self.width, term.columns)) == term.rank)
        )

    def congruence(self, term: LowRank, v: Value, u: Value, right: Apply, left: Apply) -> LowRank:
        """A dense term with the Jacobian J of v by u applied: `Jᵀ K_vv J`, and `K_wv J` for other values w.

        `right` multiplies a block by J, `left` by its transpose. The core is overwritten where it may be.
        """
        old = {w: self._own(w, unit) for w, unit in term.columns.items()}
        own = old.pop(v)
        if old and u not in old and self.width(u) == self.width(v) and self.is_dense(term):
            _put(term.core[:, :, own], right(term.core[:, :, own]))
            _put(term.core[:, own], left(term.core[:, own]))
            term.columns[u] = term.columns.pop(v)
            return term
        starts, width = self._starts([*old, u])
        if not old:
            side = right(term.core, self._spare)
            square = contiguous(left(side, term.core))
            if side.data_ptr() != square.data_ptr():
                self._spare = side
            return LowRank(square, starts)
        side = right(term.core[:, :, own])
        square = contiguous(left(side[:, own]))
        new = {w: self._own(w, unit) for w, unit in starts.items()}
        core = side.new_empty(len(side), width, width)
        for w in old:
            for x in old:
                core[:, new[w], new[x]] = term.core[:, old[w], old[x]]
        enter = Tensor.add_ if u in old else Tensor.copy_
        for w in old:
            enter(core[:, new[w], new[u]], side[:, old[w]])
            enter(core[:, new[u], new[w]], contiguous(side[:, old[w]].transpose(1, 2)))
        enter(core[:, new[u], new[u]], square)
        return LowRank(core, starts)

    def absorb(self, term: Diagonal) -> bool:
        """Add a diagonal to a dense term over all that it knows of, if there is one."""
        for other in self.terms:
            if (
                isinstance(other, LowRank)
                and self.is_dense(other)
                and other.columns.keys() >= term.scales.keys()
            ):
                for u, w in product(term.scales, repeat=2):
                    rows, columns = (self._own(value, other.columns[value]) for value in (u, w))
                    bend = self.samples[u].flat(term.between(u, w))
                    other.core[:, rows, columns].diagonal(dim1=1, dim2=2).add_(bend)
                self.terms.remove(term)
                return True
        return False

    def condense(self, growth: int) -> None:
        """Make one dense term of all where `growth` more columns would be too many."""
        rank = growth + sum(term.rank for term in self.terms if not isinstance(term, Diagonal))
        alive = list(dict.fromkeys(value for term in self.terms for value in term.values))
        if crowded(rank, [self.width(value) for value in alive]):
            starts, width = self._starts(alive)
            self.terms = [LowRank(self._dense(alive, width), starts)]

    def require_samples(self) -> None:
        """Raise where curvature has come to a value in which samples are joined."""
        for term in self.terms:
            for value in term.values:
                if self.samples[value].count < self._count:
                    raise NoStructure("the loss is not a sum over samples")

    def _starts(self, values: Iterable[Value]) -> tuple[Columns, int]:
        """Values one after the other, each once; and how wide they are together."""
        starts: Columns = {}
        width = 0
        for value in dict.fromkeys(values):
            starts[value], width = Unit(width), width + self.width(value)
        return starts, width

    def _dense(self, values: Sequence[Value], width: int) -> Tensor:
        """All terms as one matrix per sample, over the values one after the other; may overwrite cores."""
        blocks: dict[tuple[Value, Value], Tensor] = {}
        for term in sorted(
            self.terms, key=lambda term: (isinstance(term, Diagonal), not self.is_dense(term))
        ):
            known = [value for value in values if value in term.values]
            for i, u in enumerate(known):
                if isinstance(term, Diagonal):
                    for w in known[i:]:
                        bend = self.samples[u].flat(term.between(u, w))
                        block = blocks.setdefault((u, w), torch.diag_embed(torch.zeros_like(bend)))
                        block.diagonal(dim1=1, dim2=2).add_(bend)
                    continue
                for rows, columns in self._rows(term, u):
                    for w in known[i:]:
                        if w in columns:
                            self._accumulate(blocks, (u, w), rows, columns[w], self.is_dense(term))
        if len(values) == 1:
            (total,) = blocks.values()
            return total
        some = next(iter(blocks.values()))
        total = some.new_zeros(len(some), width, width)
        starts, _ = self._starts(values)
        own = {w: self._own(w, unit) for w, unit in starts.items()}
        for (u, w), block in blocks.items():
            total[:, own[u], own[w]] = block
            total[:, own[w], own[u]] = block.transpose(1, 2)
        return total

    def _rows(self, term: LowRank | Cross, value: Value) -> Iterator[tuple[Tensor, Columns]]:
        """What multiplies which columns from the left in the blocks of a value: [N, f, rank]."""
        if isinstance(term, Cross):
            for one, other in ((term.left, term.right), (term.right, term.left)):
                if value in one:
                    yield self._by_sample(value, self.stack(value, one[value], term.rank)), other
            return
        columns = term.columns[value]
        if isinstance(columns, Unit):
            core = term.core if term.core.dim() == 3 else torch.diag_embed(term.core)
            yield self._scaled(core[:, self._own(value, columns)], value, columns.scale, 1), term.columns
        else:
            rows = self._by_sample(value, columns)
            yield rows * term.core.unsqueeze(1) if term.core.dim() == 2 else rows @ term.core, term.columns

    def _accumulate(
        self,
        blocks: dict[tuple[Value, Value], Tensor],
        pair: tuple[Value, Value],
        rows: Tensor,
        columns: Tensor | Unit,
        own: bool,
    ) -> None:
        """Add rows times columns to the block of a pair; `own`: a block of rows may be overwritten later."""
        value, block = pair[1], blocks.get(pair)
        if isinstance(columns, Unit):
            part = self._scaled(rows[:, :, self._own(value, columns)], value, columns.scale, 2)
            blocks[pair] = (part if own else part.clone()) if block is None else block.add_(part)
            return
        matrix = self.samples[value].flat(columns, 1).transpose(0, 1)
        blocks[pair] = rows @ matrix if block is None else block.baddbmm_(rows, matrix)

    def _by_sample(self, value: Value, stack: Tensor) -> Tensor:
        return self.samples[value].flat(stack, 1).permute(1, 2, 0)

    def _own(self, value: Value, unit: Tensor | Unit) -> slice:
        """Which columns are a value's own coordinates."""
        assert isinstance(unit, Unit)
        return slice(unit.start, unit.start + self.width(value))


def _sum(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one + other


def _put(part: Tensor, block: Tensor) -> None:
    """Write a block where it may lie already."""
    if part.data_ptr() != block.data_ptr() or part.stride() != block.stride():
        shared = part.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
        part.copy_(block.clone() if shared else block)
