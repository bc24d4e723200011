"""The curvature on a sweep's way: a sum of terms (see `hesse.curvature.terms`), and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

from torch import Tensor

from hesse.calls.convolutions import contiguous
from hesse.curvature.columns import Frame, crowded
from hesse.curvature.terms import Block, Blocks, Diagonal, LowRank, Term, added
from hesse.structure import NoStructure
from hesse.tape.record import Value
from hesse.tape.samples import Samples, most

Apply = Callable[..., Tensor]


class Curvature:
    """The terms of the curvature over the values that are alive.

    Attributes:
        terms: all of them.
        frame: how columns of every value lie.
    """

    def __init__(self, samples: Mapping[Value, Samples]) -> None:
        self.frame = Frame(samples)
        self.terms: list[Term] = []
        self._count = most(samples)
        # Memory of an earlier block: to touch new pages takes as long as to multiply.
        self._spare: Tensor | None = None

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
        block = Block(self.frame.samples[value])
        for term in self.terms:
            term.read(self.frame, value, block)
        return block

    def along(self, stacks: Mapping[Value, Tensor], of: Callable[[Value], bool]) -> dict[Value, Tensor]:
        """The curvature times stacks of columns of some values: stacks of those values `of` which."""
        found: dict[Value, Tensor] = {}
        for term in self.terms:
            met = [value for value in stacks if value in term.values]
            wanted = [value for value in term.values if of(value)] if met else []
            for v in met:
                for w, part in term.along(self.frame, v, stacks[v], wanted):
                    found[w] = added(found.get(w), part)
        return found

    def congruence(self, term: LowRank, v: Value, u: Value, right: Apply, left: Apply) -> LowRank:
        """A dense term with the Jacobian J of v by u applied: `Jᵀ K_vv J`, and `K_wv J` for other values w.

        `right` multiplies a block by J, `left` by its transpose. The core is overwritten where it may be.
        """
        old = {w: self.frame.own(w, unit) for w, unit in term.columns.items()}
        own = old.pop(v)
        if old and u not in old and self.frame.width(u) == self.frame.width(v) and term.is_dense(self.frame):
            _put(term.core[:, :, own], right(term.core[:, :, own]))
            _put(term.core[:, own], left(term.core[:, own]))
            term.columns[u] = term.columns.pop(v)
            return term
        starts, width = self.frame.starts([*old, u])
        if not old:
            side = right(term.core, self._spare)
            square = contiguous(left(side, term.core))
            if side.data_ptr() != square.data_ptr():
                self._spare = side
            return LowRank(square, starts)
        side = right(term.core[:, :, own])
        core = side.new_empty(len(side), width, width)
        new = {w: self.frame.own(w, unit) for w, unit in starts.items()}
        for w in old:
            for x in old:
                core[:, new[w], new[x]] = term.core[:, old[w], old[x]]
        enter = Tensor.add_ if u in old else Tensor.copy_
        for w in old:
            enter(core[:, new[w], new[u]], side[:, old[w]])
            enter(core[:, new[u], new[w]], contiguous(side[:, old[w]].transpose(1, 2)))
        enter(core[:, new[u], new[u]], contiguous(left(side[:, own])))
        return LowRank(core, starts)

    def absorb(self, term: Diagonal) -> bool:
        """Add a diagonal to a dense term over all that it knows of, if there is one."""
        frame = self.frame
        for other in self.terms:
            if (
                isinstance(other, LowRank)
                and other.is_dense(frame)
                and other.columns.keys() >= term.scales.keys()
            ):
                for u, w in product(term.scales, repeat=2):
                    rows, columns = (frame.own(value, other.columns[value]) for value in (u, w))
                    own = frame.samples[u].flat(term.between(u, w))
                    other.core[:, rows, columns].diagonal(dim1=1, dim2=2).add_(own)
                self.terms.remove(term)
                return True
        return False

    def condense(self, growth: int) -> None:
        """Make one dense term of all where `growth` more columns would be too many."""
        rank = growth + sum(term.rank for term in self.terms)
        alive = list(dict.fromkeys(value for term in self.terms for value in term.values))
        if crowded(rank, [self.frame.width(value) for value in alive]):
            starts, width = self.frame.starts(alive)
            self.terms = [LowRank(self._dense(alive, width), starts)]

    def require_samples(self) -> None:
        """Raise where curvature has come to a value in which samples are joined."""
        for term in self.terms:
            for value in term.values:
                if self.frame.samples[value].count < self._count:
                    raise NoStructure("the loss is not a sum over samples")

    def _dense(self, values: Sequence[Value], width: int) -> Tensor:
        """All terms as one matrix per sample, over the values one after the other; may overwrite cores."""
        blocks: Blocks = {}
        # Dense ones first, whose memory is added to; diagonals last, which are added to what is there.
        for term in sorted(self.terms, key=lambda t: (not t.rank, not t.is_dense(self.frame))):
            known = [value for value in values if value in term.values]
            for i, u in enumerate(known):
                term.accumulate(self.frame, blocks, u, known[i:])
        if len(values) == 1:
            (total,) = blocks.values()
            return total
        some = next(iter(blocks.values()))
        total = some.new_zeros(len(some), width, width)
        starts, _ = self.frame.starts(values)
        own = {w: self.frame.own(w, unit) for w, unit in starts.items()}
        for (u, w), block in blocks.items():
            total[:, own[u], own[w]] = block
            total[:, own[w], own[u]] = block.transpose(1, 2)
        return total


def _put(part: Tensor, block: Tensor) -> None:
    """Write a block where it may lie already."""
    if part.data_ptr() != block.data_ptr() or part.stride() != block.stride():
        shared = part.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
        part.copy_(block.clone() if shared else block)
