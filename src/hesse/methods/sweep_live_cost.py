"""What the leaves that a sweep keeps alive will take, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from hesse.live import HELD
from hesse.tape.flops import flops
from hesse.tape.local import Local
from hesse.tape.record import Value
from hesse.tape.uses import LayerUse, Use


@dataclass
class Work:
    """What it takes to keep a leaf alive, perhaps together with its bias.

    Attributes:
        operations: multiplications and additions.
        moved: numbers written and read.
        calls: of torch.
        held: the most numbers that are held at a time.
    """

    operations: int = 0
    moved: int = 0
    calls: int = 0
    held: int = 0


class Term(Protocol):
    """A term of the curvature without its numbers: the values that it knows of, and its columns."""

    values: set[Value]
    rank: int


@dataclass(eq=False)
class _Strand:
    """A strand without its numbers."""

    leaves: tuple[int, ...]
    rows: int
    values: set[Value]


class LiveSketch:
    """The steps of `sweep_live.LiveLeaves` with numbers of rows in place of rows.

    Attributes:
        work: by the leaves that are kept alive together.
    """

    def __init__(self, depends: Mapping[Value, Set[int]], matrices: bool) -> None:
        """`depends`: the live leaves that a value is a function of; `matrices`: not only diagonals."""
        self.work: dict[tuple[int, ...], Work] = {}
        self._depends, self._matrices = depends, matrices
        self._strands: list[_Strand] = []

    @property
    def held(self) -> int:
        """Numbers that are held."""
        return sum(strand.rows * _elements(strand.values) for strand in self._strands)

    def enter(self, use: Use, terms: Sequence[Term]) -> None:
        """A use is taken in, where the curvature by its results has these terms."""
        leaves, call = tuple(use.leaves), use.call
        work = self.work.setdefault(leaves, Work())
        results = _elements(call.outputs)
        beside = [self._ahead(leaves, term.values.difference(call.outputs)) for term in terms]
        ahead = self._ahead(leaves, call.inputs)
        by = set().union(*beside, ahead, call.outputs if ahead else ())
        strand = None
        if isinstance(use, LayerUse):
            self._meet(use, work, results)
            columns = results // use.samples.count
            rows = columns + (use.layer.input.numel() // use.samples.count if use.input in ahead else 0)
            work.calls += 150
        else:
            columns = rows = use.size
            strand = next((strand for strand in self._strands if strand.leaves == leaves), None)
            work.operations += 4 * rows * flops(call.call) + 6 * self._matrices * rows**2 * results
            work.moved += rows * (rows + 4 * results + 4 * _elements(call.inputs))
            work.calls += 100 + 60 * rows * (rows + results) // HELD
        for term, values in zip(terms, beside, strict=True):
            work.operations += 2 * columns * term.rank * (results + _elements(values))
            work.moved += columns * (results + _elements(values))
        if strand is None:
            self._strands.append(_Strand(leaves, rows, by))
        else:
            strand.values |= by
        work.held = max(
            work.held, sum(s.rows * _elements(s.values) for s in self._strands if s.leaves == leaves)
        )

    def _meet(self, use: LayerUse, work: Work, results: int) -> None:
        """Pairs of a layer with those that were met, and with itself."""
        (z,), outputs = use.call.outputs, use.call.outputs[0].tensor.shape[-1]
        met = sum(s.rows for s in self._strands if s.leaves == tuple(use.leaves) and z in s.values)
        if self._matrices:
            inputs = use.size // outputs
            work.operations += 2 * results * (met * max(inputs, outputs) + 2 * use.size * inputs)
            work.moved += results * (4 * met + 6 * use.size) + 4 * use.size**2
            work.calls += 16 * outputs
        else:
            uses = sum(s.leaves == tuple(use.leaves) and z in s.values for s in self._strands)
            work.moved += 3 * met * results
            work.calls += 60 * uses

    def pull(self, call: Local, operations: int) -> None:
        """A call is taken out; `operations` of doing so with one column."""
        elements = _elements(call.outputs) + _elements(call.inputs)
        for strand in self._strands:
            if strand.values.isdisjoint(call.outputs):
                continue
            strand.values.difference_update(call.outputs)
            ahead = self._ahead(strand.leaves, call.inputs)
            if ahead:
                work = self.work[strand.leaves]
                work.operations += strand.rows * operations
                work.moved += strand.rows * elements
                work.calls += 8
                strand.values |= ahead
        self._strands = [strand for strand in self._strands if strand.values]

    def _ahead(self, leaves: Sequence[int], values: Iterable[Value]) -> set[Value]:
        """Those that other uses of the leaves lead to."""
        return {value for value in values if not self._depends.get(value, set()).isdisjoint(leaves)}


def _elements(values: Iterable[Value]) -> int:
    return sum(value.tensor.numel() for value in values)
