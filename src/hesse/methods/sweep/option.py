"""What a sweep offers: which leaves it reads on the route, which it carries along, and what both take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor

from hesse.curvature.entry import Entry
from hesse.look.meter import Cost, Meter, total
from hesse.methods.base import Applicable, Ask, Found, Offer, Products, Refused, Run, counted
from hesse.methods.sweep import cost as costs
from hesse.methods.sweep import walk
from hesse.methods.sweep.route import Route, route_of
from hesse.runtime.progress import Progress
from hesse.structure import NoStructure


def offer(ask: Ask) -> Offer:
    """One walk back over the tape."""
    gradient = ask.gradient
    if ask.question == "hessian":
        return Refused("gives diagonals and blocks, not the full Hessian")
    if gradient.found.touching:
        return Refused(f"samples touch after {gradient.found.touching}")
    if gradient.tape is None:
        return Refused(gradient.found.why_not or "no call of a layer can be seen")
    if not gradient.batch_dims:
        return Refused(gradient.found.why_not or "no samples were found that do not touch")
    sweep = _best(ask)
    route = sweep.route
    covered = route.covered
    beside: Mapping[int, Cost] = {}
    if not covered.issuperset(gradient.reached):
        beside = {i: cost for i, cost in ask.products().items() if i not in covered}
    pieces = [
        *(entry.leaves[0] for entry in route.probed(covered)),
        *(leaves[0] for leaves in sweep.live),
        *beside,
    ]
    if ask.question == "blocks":
        pieces = [*covered, *beside]
    taken = sweep.taken
    ask = replace(ask, planned=frozenset(covered), chunk=taken.size)
    unknown = f", {', '.join(taken.unknown)} by autograd" if taken.unknown else ""
    chunks = f", in {taken.chunks} chunks of {taken.size} samples" if taken.chunks > 1 else ""
    return Applicable(
        sweep.cost + total(beside.values()),
        {
            i: "carried along the way" if i in route.live else "read from the curvature on the way"
            for i in covered
        },
        pieces,
        f"one walk back over {counted(len(route.steps), 'call')}{unknown}{chunks}, without products"
        f"{ask.others(beside, covered)}",
        dict.fromkeys(
            beside, "enters several times or not linearly; products take less than carrying it along"
        ),
        run_of(ask),
        taken.size,
    )


def run_of(ask: Ask) -> Run:
    """The walk for what is planned."""

    def run(progress: Progress, check: bool, products: Products) -> Found:
        tape, gradient, leaves = ask.gradient.tape, ask.gradient, frozenset(ask.planned)
        assert tape is not None
        route = route_of(tape, gradient.value, gradient.batch_dims, leaves, gradient.output)
        chunks = len(route.chunks(ask.chunk))
        if chunks > 1:
            progress.expect(chunks)
        if ask.question == "blocks":  # which are checked where they are joined with the others
            return walk.blocks(route, leaves, ask.chunk, progress), []
        diagonals, probes = walk.diagonal(route, leaves, check, ask.chunk, progress)
        return _twice(diagonals), probes

    return run


def _twice(diagonals: Mapping[int, Tensor]) -> dict[tuple[int, int], Tensor]:
    return {(i, i): part for i, part in diagonals.items()}


@dataclass(frozen=True)
class _Sweep:
    """A sweep, and what it takes: for the leaves that it keeps alive, and altogether."""

    route: Route
    taken: costs.WalkCost
    live: Mapping[tuple[int, ...], Cost]
    cost: Cost


def _best(ask: Ask) -> _Sweep:
    """The sweep that keeps those leaves alive for which that takes less than products, in what is left."""
    meter = ask.meter
    found = _keeping(ask, frozenset(meter.gradient.reached))
    while True:
        losing = [leaves for leaves, cost in found.live.items() if cost.seconds > _products(meter, leaves)]
        if not losing and found.live and found.cost.bytes > meter.room:
            losing = _too_large(found, meter)
        if not losing:
            break
        found = _keeping(ask, found.route.live.difference(*losing))
    if found.live:
        with suppress(NoStructure):
            short = _keeping(ask, frozenset())
            beside = sum(_products(meter, leaves) for leaves in found.live)
            found = min(found, short, key=lambda sweep: sweep.cost.seconds + beside * (sweep is short))
    return found


def _too_large(sweep: _Sweep, meter: Meter) -> list[tuple[int, ...]]:
    """The live leaves to do without, where they do not fit: the largest, or all, so that chunks may fit."""
    without = sweep.cost.bytes - sum(cost.bytes for cost in sweep.live.values())
    largest = max(sweep.live, key=lambda leaves: sweep.live[leaves].bytes)
    return [largest] if without <= meter.room else [*sweep.live]


def _keeping(ask: Ask, live: Set[int]) -> _Sweep:
    """The sweep that may keep these leaves alive."""
    gradient, meter = ask.gradient, ask.meter
    assert gradient.tape is not None
    route = route_of(gradient.tape, gradient.value, gradient.batch_dims, live, gradient.output)
    taken = costs.cost(route, meter.room, blocks=ask.question == "blocks")
    width = gradient.value.element_size()
    kept = {
        leaves: meter.arithmetic(work.operations, work.moved * width, work.held * width, work.calls)
        for leaves, work in taken.live.items()
    }
    cost = meter.walk(taken.calls, taken.pulls, taken.flops, taken.peak_bytes)
    if ask.question == "blocks":
        cost = cost + total(_matrix(entry, meter, taken.chunks) for entry in route.entries)
    return _Sweep(route, taken, kept, cost + total(kept.values()))


def _products(meter: Meter, leaves: Sequence[int]) -> float:
    """Seconds of one product per coordinate, which is about twice a pass over the function's graph."""
    gradient = meter.gradient
    return 2 * sum(
        meter.lower_bound(gradient.leaves[i].numel(), gradient.first_uses.get(i, 0)).seconds for i in leaves
    )


def _matrix(entry: Entry, meter: Meter, chunks: int) -> Cost:
    """What it takes to make a block of what was read on the route, with its parameters joined."""
    count, width = entry.batch_dim.count, entry.like.element_size()
    again = 8 * entry.like.numel() * entry.size * (entry.positions > 1)
    moved = width * (6 * chunks * entry.size**2 + again)
    calls = chunks * 8 * entry.like.numel() // count // entry.positions
    return meter.arithmetic(2 * count * entry.positions * entry.size**2, moved, calls=calls)
