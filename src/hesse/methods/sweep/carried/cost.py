"""What the leaves that a sweep keeps alive will take, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from hesse.calls.facts import Site
from hesse.calls.table import flops
from hesse.methods.sweep.carried.live import HELD
from hesse.methods.sweep.carried.uses import LayerUse, Use
from hesse.tape.record import Value


@dataclass
class Carrying:
    """What it takes to keep a leaf alive, perhaps together with its bias.

    Attributes:
        operations: multiplications and additions.
        moved: numbers written and read.
        calls: of torch.
        held: the most numbers that are held at a time.
        matrix: of these, for the making of a block.
    """

    matrix: int
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
        self.work: dict[tuple[int, ...], Carrying] = {}
        self._depends, self._matrices = depends, matrices
        self._strands: list[_Strand] = []

    @property
    def held(self) -> int:
        """Numbers that are held."""
        return sum(map(self._held, self.work))

    def enter(self, use: Use, terms: Sequence[Term]) -> None:
        """A use is taken in, where the curvature by its results has these terms."""
        leaves, results = tuple(use.leaves), _elements(use.site.outputs)
        work = self.work.setdefault(leaves, Carrying(matrix=3 * self._matrices * use.size**2))
        ahead = self._ahead(leaves, use.site.inputs)
        beside = [self._ahead(leaves, term.values.difference(use.site.outputs)) for term in terms]
        columns, strand = self._strand(use, ahead)
        self._read(use, work, results)
        for term, values in zip(terms, beside, strict=True):
            elements = results + _elements(values)
            work.operations += 2 * columns * term.rank * elements
            work.moved += columns * elements
        strand.values.update(ahead, use.site.outputs if ahead else (), *beside)
        work.held = max(work.held, self._held(leaves))

    def _strand(self, use: Use, ahead: Set[Value]) -> tuple[int, _Strand]:
        """How many directions a use has, and the strand that they go into."""
        leaves, columns = tuple(use.leaves), use.size
        known = [strand for strand in self._strands if strand.leaves == leaves]
        rows = columns
        if isinstance(use, LayerUse):
            columns = _elements(use.site.outputs) // use.samples.count
            rows = columns + (use.layer.input.numel() // use.samples.count if use.input in ahead else 0)
            known = []
        if not known:
            known = [_Strand(leaves, rows, set())]
            self._strands += known
        return columns, known[0]

    def _read(self, use: Use, work: Carrying, results: int) -> None:
        """What a use adds to the curvature by the leaf itself."""
        size = use.size
        if not isinstance(use, LayerUse):
            work.operations += 4 * size * flops(use.site.call) + 6 * self._matrices * size**2 * results
            work.moved += size * (size + 4 * results + 4 * _elements(use.site.inputs))
            work.calls += 100 + 60 * size * (size + results) // HELD
            return
        (z,), outputs = use.site.outputs, use.site.outputs[0].tensor.shape[-1]
        met = [s.rows for s in self._strands if s.leaves == tuple(use.leaves) and z in s.values]
        if self._matrices:
            inputs = size // outputs
            work.operations += 2 * results * (sum(met) * max(inputs, outputs) + 2 * size * inputs)
            work.moved += results * (4 * sum(met) + 10 * size) + 8 * size**2
            work.calls += 150 + 16 * outputs
        else:
            work.moved += 3 * sum(met) * results
            work.calls += 150 + 60 * len(met)

    def pull(self, site: Site, operations: int) -> None:
        """A call is taken out; `operations` of doing so with one column."""
        elements = _elements(site.outputs) + _elements(site.inputs)
        for strand in self._strands:
            if strand.values.isdisjoint(site.outputs):
                continue
            strand.values.difference_update(site.outputs)
            ahead = self._ahead(strand.leaves, site.inputs)
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

    def _held(self, leaves: tuple[int, ...]) -> int:
        own = (strand for strand in self._strands if strand.leaves == leaves)
        # Half as much again, as the memory that strands leave behind lies in pieces.
        rows = sum(strand.rows * _elements(strand.values) for strand in own) * 3 // 2
        return self.work[leaves].matrix + rows


def _elements(values: Iterable[Value]) -> int:
    return sum(value.tensor.numel() for value in values)
