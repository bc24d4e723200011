"""What a sweep will take, from shapes alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from hesse.calls.facts import Site
from hesse.calls.weights import layer_call
from hesse.curvature.columns import crowded
from hesse.methods.sweep.carried.cost import Carrying, LiveSketch
from hesse.methods.sweep.route import Route, Step
from hesse.structure import NoStructure
from hesse.tape.record import Value

_ROOM = 0.4
"""Of the workspace, what chunks may take: memory that is free again lies in pieces."""


@dataclass(frozen=True)
class WalkCost:
    """What a sweep will take.

    Attributes:
        flops: multiplications and additions, roughly.
        pulls: how often a term is pulled through a call, that of every chunk counted.
        peak_bytes: the most memory that blocks and what is read from them take at a time.
        unknown: names of calls that are not in the table, which are differentiated by themselves.
        live: what the leaves that are kept alive take beside, by those that are so together.
        size: how many samples are taken at a time, at most.
        chunks: how many times that is done.
        calls: how many calls are taken out, those of every chunk counted, and penalties.
    """

    flops: int
    pulls: int
    peak_bytes: int
    unknown: tuple[str, ...]
    live: Mapping[tuple[int, ...], Carrying]
    size: int
    chunks: int
    calls: int


# A plan finds them, then the walk asks again.
_COSTS: WeakKeyDictionary[Route, dict[tuple[int, bool], WalkCost]] = WeakKeyDictionary()


def cost(route: Route, workspace: int | None = None, blocks: bool = False) -> WalkCost:
    """The cost for all samples at a time, or for as many as fit the workspace.

    Smooth calls are taken to add all that they may, so a function that happens to be flatter costs less.
    `blocks`: whole blocks are made, not their diagonals.

    Raises:
        NoStructure: all samples at a time do not fit, and they cannot be taken in chunks.
    """

    def of(size: int) -> WalkCost:
        known = _COSTS.setdefault(route, {})
        if (size, blocks) not in known:
            known[size, blocks] = _SketchedWalk(route, size, blocks).cost
        return known[size, blocks]

    whole = of(route.count)
    if workspace is None or whole.peak_bytes <= workspace or not route.tail:
        return whole
    room = int(_ROOM * workspace)
    size = max(1, bisect_right(range(1, route.count), room, key=lambda size: of(size).peak_bytes))
    found = of(size)
    if found.peak_bytes <= workspace:  # otherwise it hardly will be taken
        try:
            route.guesses(size)
        except NoStructure as error:
            raise NoStructure(f"the blocks of all samples do not fit, and {error}") from error
    return found


@dataclass(eq=False)
class _Sketch:
    """A term without its numbers.

    Attributes:
        values: what it knows of.
        width: their coordinates in one sample.
        rank: its columns.
        diagonal: it is one over values of one shape.
        dense: its core is.
        unit: its columns are coordinates, which take no memory.
    """

    values: set[Value]
    width: int
    rank: int
    diagonal: bool = False
    dense: bool = False
    unit: bool = False

    @property
    def held(self) -> int:
        """Numbers that it takes for one sample."""
        if self.diagonal:
            return self.width
        return (0 if self.unit else self.rank * self.width) + self.dense * self.rank**2


class _SketchedWalk:
    """The walk of `sweep.run`, so many samples at a time, with ranks in place of columns.

    Attributes:
        cost: what it takes.
    """

    def __init__(self, route: Route, size: int, blocks: bool) -> None:
        self._count, self._size, self._blocks = route.count, route.count, blocks
        self._flops = self._pulls = self._peak = self._kept = 0
        self._live = LiveSketch(route.depends, blocks)
        chunks = len(route.chunks(size))
        joined = self._take(route.head, [])
        before = self._pulls
        if chunks > 1:
            self._kept = self._held(joined)
            self._size = -(-route.count // chunks)
        self._take(route.tail, joined)
        width = route.loss.tensor.element_size()
        self.cost = WalkCost(
            self._flops,
            before + chunks * (self._pulls - before),
            width * self._peak,
            tuple(dict.fromkeys(step.site.call.name for step in route.steps if step.site.by_autograd)),
            self._live.work,
            self._size,
            chunks,
            len(route.head) + chunks * len(route.tail) + sum(len(step.penalties) for step in route.steps),
        )

    def _take(self, steps: Sequence[Step], waiting: list[_Sketch]) -> list[_Sketch]:
        """Take calls out; terms that are waiting join where they are met."""
        terms: list[_Sketch] = []
        for step in steps:
            site, outputs = step.site, set(step.site.outputs)
            terms += [term for term in waiting if term.values & outputs]
            waiting = [term for term in waiting if not term.values & outputs]
            if site.inputs:
                terms = self._condensed(terms, site)
            touched = [term for term in terms if term.values & outputs]
            self._read(step, terms, touched)
            self._live.pull(site, _work(site))
            self._pulls += len(touched)
            for term in touched:
                self._pull(term, site)
            terms = [term for term in terms if term.values]
            if site.inputs and not step.straight:
                added = site.second.forecast()
                terms += [
                    _Sketch(set(values), self._across(values), self._width(values[0]), diagonal=True)
                    for values in added.diagonals
                ]
                if added.rank:
                    terms.append(_Sketch(set(site.inputs), self._across(site.inputs), added.rank))
        return terms

    def _condensed(self, terms: list[_Sketch], site: Site) -> list[_Sketch]:
        """With columns for the diagonals that do not stay such, or one dense term of all."""
        growing = {
            term
            for term in terms
            if term.diagonal
            and not term.values.isdisjoint(site.outputs)
            and not site.first.keeps(term.values)
        }
        dense = [term.values for term in terms if term.dense and term.unit]
        absorbed = {term for term in growing if any(term.values <= values for values in dense)}
        terms = [term for term in terms if term not in absorbed]
        growing -= absorbed
        rank = sum(term.rank for term in terms if not term.diagonal or term in growing)
        alive = set().union(*(term.values for term in terms))
        if crowded(rank, [self._width(value) for value in alive]):
            whole = self._across(alive)
            self._flops += sum(
                2 * self._count * whole * t.rank * (t.rank * t.dense + whole) for t in terms if not t.diagonal
            )
            self._note(self._held(terms) + 2 * self._size * whole**2)
            return [_Sketch(alive, whole, whole, dense=True, unit=True)]
        for term in growing:
            term.diagonal, term.unit = False, True
        return terms

    def _pull(self, term: _Sketch, site: Site) -> None:
        """Take the call's results out of a term."""
        before = self._across(term.values.intersection(site.outputs))
        new = set(site.inputs) - term.values
        term.values = (term.values - set(site.outputs)) | new
        term.width += self._across(new) - before
        if term.diagonal:
            return
        self._flops += term.rank * _work(site)
        if term.dense and term.unit and len(site.inputs) == 1 and self._across(new) <= before:
            self._flops += self._across(site.inputs) * _work(site)
            self._note(self._size * term.width**2)
            term.rank = term.width
        else:
            term.unit = False

    def _read(self, step: Step, terms: Sequence[_Sketch], touched: Sequence[_Sketch]) -> None:
        """What is read where parameters enter, then pulled back."""
        width = self._across(step.site.inputs)
        columns = [term for term in touched if not term.diagonal]
        pulled = self._size * width * sum(term.rank for term in columns)
        for entry in step.entries:
            self._flops += sum(entry.work(term.rank) for term in columns)
            reading = max((entry.held(t.rank, t.dense, t.unit, self._size) for t in columns), default=0)
            if self._blocks:
                reading += entry.held_by_matrix(self._size)
            self._note(self._held(terms) + reading)
        for use in step.uses:
            self._live.enter(use, touched)
        self._note(self._held(terms) + self._live.held + pulled)

    def _note(self, held: int) -> None:
        """Numbers that are held at this time."""
        self._peak = max(self._peak, held + self._kept)

    def _held(self, terms: Iterable[_Sketch]) -> int:
        return self._size * sum(term.held for term in terms)

    def _across(self, values: Iterable[Value]) -> int:
        return sum(map(self._width, values))

    def _width(self, value: Value) -> int:
        return value.tensor.numel() // self._count


def _work(site: Site) -> int:
    """Of pulling one column back."""
    inputs = sum(value.tensor.numel() for value in site.inputs)
    layer = layer_call(site.call)
    if inputs and layer is not None:
        weight, results = layer.through.tensor, layer.output.tensor.numel()
        return 2 * results * weight.numel() // weight.shape[0]
    return 4 * inputs
