"""What a sweep will take, from shapes alone, and how many samples it should take at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hesse.blocks import CannotSweep, crowded
from hesse.methods.sweep import Route, Step
from hesse.tape.layers import layer_call
from hesse.tape.local import Elementwise, Local
from hesse.tape.record import Value
from hesse.tape.rules import Kind

_CACHED = 2**24
"""Bytes of a block up to which it stays in the caches, and in memory that is used again."""

_ROOM = 0.5
"""Of the workspace, what chunks may take: memory that is free again lies in pieces."""

_GAIN = 8
"""How many times larger a block has to be before chunks of that size are clearly faster."""

_WORTH = 2**28
"""Operations for every call of a chunk, from which on the number of calls does not count."""


@dataclass(frozen=True)
class Cost:
    """What a sweep will take.

    Attributes:
        flops: multiplications and additions, roughly.
        peak_bytes: the most memory that blocks and what is read from them take at a time.
        unknown: names of calls that are not in the table, which are differentiated by themselves.
        size: how many samples are taken at a time, at most.
        chunks: how many times that is done.
        calls: how many calls are taken out, those of every chunk counted.
    """

    flops: int
    peak_bytes: int
    unknown: tuple[str, ...]
    size: int
    chunks: int
    calls: int


def cost(way: Route, workspace: int | None = None, blocks: bool = False) -> Cost:
    """The cost for as many samples at a time as fit the workspace, or fewer where that is faster.

    Smooth calls are taken to add all that they may, so a function that happens to be flatter costs less.
    `blocks`: whole blocks are read from the curvature, not their diagonals.

    Raises:
        CannotSweep: all samples at a time do not fit, and they cannot be taken in chunks.
    """
    walk = _Walk(way, way.count, blocks)
    if workspace is None or not way.tail:
        return walk.cost
    fits, size = walk.cost.peak_bytes <= workspace, walk.fast
    if not fits:
        sizes, room = range(1, way.count), int(_ROOM * workspace)
        fitting = bisect_right(sizes, room, key=lambda size: _Walk(way, size, blocks).cost.peak_bytes)
        size = max(1, min(size, fitting))
    if size == way.count:
        return walk.cost
    cost = _Walk(way, size, blocks).cost
    if cost.peak_bytes <= workspace:  # otherwise it hardly will be taken
        try:
            way.guesses(size)
        except CannotSweep as error:
            if fits:
                return walk.cost
            raise CannotSweep(f"the blocks of all samples do not fit, and {error}") from error
    return cost


@dataclass(eq=False)
class _Sketch:
    """A term without its numbers."""

    values: set[Value]
    rank: int
    dense: bool = False
    unit: bool = False  # its columns are coordinates, which take no memory


class _Walk:
    """The walk of `sweep.run`, so many samples at a time, with ranks in place of columns.

    Attributes:
        cost: what it takes.
        fast: how many samples at a time would be fast.
    """

    def __init__(self, way: Route, size: int, blocks: bool) -> None:
        self._count, self._size, self._blocks = way.count, way.count, blocks
        self._flops = self._peak = self._largest = self._kept = 0
        chunks = len(way.chunks(size))
        joined = self._take(way.head, [], set())
        if chunks > 1:
            self._kept = self._held(joined[0])
            self._size = -(-way.count // chunks)
        self._take(way.tail, *joined)
        width = way.loss.tensor.element_size()
        unknown = tuple(dict.fromkeys(step.call.call.name for step in way.steps if step.call.unknown))
        calls = len(way.head) + chunks * len(way.tail)
        self.cost = Cost(self._flops, width * self._peak, unknown, self._size, chunks, calls)
        least = self._count * len(way.tail) * _WORTH // max(1, self._flops) + 1
        fast = max(least, _CACHED // max(1, width * self._largest))
        self.fast = fast if _GAIN * fast < self._count and not way.loss.tensor.is_cuda else self._count

    def _take(
        self, steps: Sequence[Step], waiting: list[_Sketch], bent: set[Value]
    ) -> tuple[list[_Sketch], set[Value]]:
        """Take calls out; terms, and diagonals of values that are `bent`, join where they are met."""
        terms: list[_Sketch] = []
        bends: set[Value] = set()
        for step in steps:
            call, outputs = step.call, set(step.call.outputs)
            terms += [term for term in waiting if term.values & outputs]
            waiting = [term for term in waiting if not term.values & outputs]
            bends |= bent & outputs
            if call.inputs:
                kept = isinstance(call, Elementwise) or call.kind is Kind.VIEW
                terms, bends = self._condensed(terms, bends, set() if kept else bends & outputs)
            touched = [term for term in terms if term.values & outputs]
            self._read(step, terms, touched)
            self._flops += sum(term.rank for term in touched) * _work(call)
            for term in touched:
                term.values, term.unit = (term.values - outputs) | set(call.inputs), False
            terms = [term for term in terms if term.values]
            if bends & outputs:
                bends = (bends - outputs) | set(call.inputs)
            if call.inputs:
                diagonal, rank = call.added()
                bends |= set(call.inputs) if diagonal else set()
                terms += [_Sketch(set(call.inputs), rank)] if rank else []
        return terms, bends

    def _condensed(
        self, terms: list[_Sketch], bends: set[Value], growing: set[Value]
    ) -> tuple[list[_Sketch], set[Value]]:
        """With columns for the diagonals that are `growing`, or one dense term of all."""
        alive = bends.union(*(term.values for term in terms))
        rank = sum(term.rank for term in terms) + sum(map(self._width, growing))
        if not crowded(rank, [self._width(value) for value in alive]):
            return terms + [_Sketch({v}, self._width(v), unit=True) for v in growing], bends - growing
        whole = sum(map(self._width, alive))
        self._flops += sum(2 * self._count * whole * t.rank * (t.rank * t.dense + whole) for t in terms)
        self._note(self._held(terms) + 2 * self._size * whole**2, whole**2)
        return [_Sketch(alive, whole, dense=True, unit=True)], set()

    def _read(self, step: Step, terms: Sequence[_Sketch], touched: Sequence[_Sketch]) -> None:
        """What is read where parameters enter, then pulled back."""
        beside = max((sum(map(self._width, step.call.inputs)) * term.rank for term in touched), default=0)
        pulled = sum(sum(map(self._width, step.call.inputs)) * term.rank for term in touched) * self._size
        self._note(self._held(terms) + pulled, beside)
        for entry in step.entries:
            self._flops += sum(entry.work(term.rank) for term in touched)
            reading = max((entry.held(t.rank, t.dense, t.unit, self._size) for t in touched), default=0)
            if self._blocks:
                reading += entry.held_by_matrix(self._size)
            self._note(self._held(terms) + reading)

    def _note(self, held: int, largest: int = 0) -> None:
        """`held`: numbers at this time; `largest`: of a tensor, for one sample."""
        self._peak = max(self._peak, held + self._kept)
        self._largest = max(self._largest, largest)

    def _held(self, terms: Iterable[_Sketch]) -> int:
        columns = sum(t.rank * self._width(value) for t in terms if not t.unit for value in t.values)
        return self._size * (columns + sum(term.rank**2 for term in terms if term.dense))

    def _width(self, value: Value) -> int:
        return value.tensor.numel() // self._count


def _work(call: Local) -> int:
    """Of pulling one column back."""
    inputs = sum(value.tensor.numel() for value in call.inputs)
    layer = layer_call(call.call)
    if inputs and layer is not None:
        weight, results = layer.through.tensor, layer.output.tensor.numel()
        return 2 * results * weight.numel() // weight.shape[0]
    return 4 * inputs
