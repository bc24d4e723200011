r"""The sweep: curvature of all layers in one reverse walk over the tape, without Hessian-vector products.

The walk keeps, for the values u, w, ... that the loss L is still a function of, the adjoints
$g_u = \partial L/\partial u$ and the curvature $K_{uw} = \partial^2 L/\partial u\,\partial w$. To take out
the value $v = \varphi(u_1 \dots u_k)$ with Jacobians $J_i$ is to apply the chain rule twice:

$$g_{u_i} \mathrel{+}= J_i^T g_v, \qquad K_{u_i u_j} \mathrel{+}= J_i^T K_{vv} J_j
  + \sum_c g_v[c]\, \frac{\partial^2 \varphi_c}{\partial u_i\, \partial u_j}, \qquad
  K_{u_i w} \mathrel{+}= J_i^T K_{vw}.$$

The first and last part pull columns back (`curvature.terms`), the middle one adds terms (`calls.facts`).
Where a parameter enters, $K_{vv}$ is there and is read (`curvature.parameters`). This is exact on any graph.
It is edge pushing (Gower and Mello, 2012) in blocks of whole tensors; for a chain of layers it is the exact
Hessian of Bishop (1992), and what Dangel, Harmeling and Hennig (2020) call Hessian backpropagation.

Before the loss joins them, samples have nothing to do with each other, so that most of the walk can be
taken for one chunk of them after the other, where the curvature of all would not fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Set
from functools import singledispatch

import torch
from torch import Tensor

from hesse.calls.facts import Site
from hesse.calls.table import site_of
from hesse.curvature.columns import Columns, Unit
from hesse.curvature.entry import Entry
from hesse.curvature.terms import Block, Cross, Diagonal, LowRank, Term, terms_of
from hesse.curvature.total import Curvature
from hesse.methods.sweep.carried.leaves import LiveLeaves
from hesse.methods.sweep.chunks import Chunk, Guess, narrowed
from hesse.methods.sweep.route import Route, Step
from hesse.probe import Probe, random_signs
from hesse.runtime.progress import Progress
from hesse.tape.record import Value

Take = Callable[[Entry, Block], None]
"""What to do with the curvature of a call's result where parameters enter."""


def run(
    route: Route, take: Take, live: LiveLeaves, size: int | None = None, progress: Progress | None = None
) -> None:
    """Walk; at every place where parameters enter, `take` gets the curvature of the result.

    `live` is told of all that it needs to know about the leaves that are alive. `size`: how many samples to
    take at a time, if not all: `take` then gets their part of a sum.

    Raises:
        NoStructure: met a call that cannot be taken out exactly.
    """
    adjoints = {route.loss: torch.ones_like(route.loss.tensor.detach())}
    joined = _walk(route.head, adjoints, Curvature(route.samples), take, live)
    chunks = route.chunks(size or route.count)
    if len(chunks) == 1:
        _walk(route.tail, adjoints, joined, take, live)
        return
    guesses = route.guesses(size or route.count)
    for numbers in chunks:
        chunk = Chunk(numbers, route.samples)
        some = {chunk.value(value): chunk.narrow(value, adjoint) for value, adjoint in adjoints.items()}
        waiting = Curvature(chunk.samples)
        waiting.terms = [narrowed(term, chunk) for term in joined.terms]
        steps = (_narrowed(*pair, chunk) for pair in zip(route.tail, guesses, strict=True))
        _walk(steps, some, waiting, take, live)
        if progress is not None:
            progress.advance(chunks=1)


def _narrowed(step: Step, guesses: Mapping[int, Guess], chunk: Chunk) -> Step:
    call = chunk.call(step.site.call, guesses)
    inputs = [chunk.value(value) for value in step.site.inputs]
    entries = [entry.narrowed(chunk.numbers) for entry in step.entries]
    return Step(site_of(call, inputs, chunk.samples), entries, straight=step.straight)


def _walk(
    steps: Iterable[Step],
    adjoints: dict[Value, Tensor],
    waiting: Curvature,
    take: Take,
    live: LiveLeaves,
) -> Curvature:
    """Take calls out; terms that are `waiting` join where the walk comes to one of their values."""
    curvature = Curvature(waiting.frame.samples)
    for step in steps:
        for term in waiting.remove(step.site.outputs):
            curvature.add(term)
        site = step.site
        if site.inputs:
            # A diagonal has a column for every element of it where it cannot stay a diagonal.
            touched = [t for t in curvature.terms if isinstance(t, Diagonal) and _touches(t, site)]
            spread = [term for term in touched if not curvature.absorb(term)]
            curvature.condense(sum(curvature.frame.width(next(iter(t.scales))) for t in spread))
        for entry in step.entries:
            take(entry, curvature.at(site.outputs[0]))
        given = [adjoints.pop(value, None) for value in site.outputs]
        if step.straight:  # without adjoints there is no second-order part, here and before
            given = [None] * len(given)
        for use in step.uses:
            live.enter(use, curvature, given)
        for use in step.penalties:
            live.penalise(use, given)
        live.pull(site)
        _pull_curvature(site, curvature)
        if site.inputs and not step.straight:
            for piece in site.second.against(given):
                for term in terms_of(piece):
                    curvature.add(term)
        if site.inputs and any(g is not None for g in given):
            columns = [None if g is None else g.unsqueeze(0) for g in given]
            for value, stack in site.first.pull(columns).items():
                adjoints[value] = adjoints[value] + stack[0] if value in adjoints else stack[0]
        curvature.require_samples()
    return curvature


def _touches(term: Diagonal, site: Site) -> bool:
    """Is it a term of the call's result that does not stay a diagonal?"""
    return any(value in term.scales for value in site.outputs) and not site.first.keeps(term.scales)


def _pull_curvature(site: Site, curvature: Curvature) -> None:
    """Take the call's results out of all terms."""
    for term in curvature.remove(site.outputs):
        if site.inputs:
            curvature.add(_pulled(term, site, curvature))
        elif term.forget(site.outputs):  # it may go on elsewhere
            curvature.add(term)


@singledispatch
def _pulled(term: Term, site: Site, curvature: Curvature) -> Term:
    """A term with the inputs of a call in place of its results."""
    raise NotImplementedError


@_pulled.register
def _(term: Diagonal, site: Site, curvature: Curvature) -> Term:
    if site.first.keeps(term.scales):
        return Diagonal(*site.first.pull_diagonal(term.core, term.scales))
    return _pulled(term.as_columns(curvature.frame), site, curvature)


@_pulled.register
def _(term: Cross, site: Site, curvature: Curvature) -> Term:
    for columns in (term.left, term.right):
        _pull_columns(columns, term.rank, site, curvature)
    return term


@_pulled.register
def _(term: LowRank, site: Site, curvature: Curvature) -> Term:
    frame, first = curvature.frame, site.first
    if term.is_dense(frame, repeated=first.thin) and len(site.inputs) == len(site.outputs) == 1:
        (u,), (v,) = site.inputs, site.outputs
        if u in term.columns or frame.width(u) <= frame.width(v):
            return curvature.congruence(term, v, u, first.pull_right, first.pull_left)
    _pull_columns(term.columns, term.rank, site, curvature)
    return term


def _pull_columns(columns: Columns, rank: int, site: Site, curvature: Curvature) -> None:
    """Columns over the results of a call, with those over its inputs in their place."""
    given = [columns.pop(value, None) for value in site.outputs]
    if all(c is None for c in given):
        return
    weights = None
    first = given[0]
    if isinstance(first, Unit) and len(given) == 1:
        scales = site.first.pull_coordinates(first.scale)
        if scales is not None and columns.keys().isdisjoint(scales):
            columns |= {value: Unit(first.start, scale) for value, scale in scales.items()}
            return
        if first.scale is not None:  # columns that all samples share are weighted when they are pulled
            weights = curvature.frame.weights(site.outputs[0], first, rank)
            given = [Unit(first.start)]
    stacks = [
        None if c is None else curvature.frame.stack(value, c, rank)
        for value, c in zip(site.outputs, given, strict=True)
    ]
    for value, stack in site.first.pull(stacks).items():
        known = columns.get(value)
        stack = stack if weights is None else curvature.frame.weighted(value, stack, weights)
        columns[value] = stack if known is None else stack + curvature.frame.stack(value, known, rank)


def diagonal(
    route: Route,
    leaves: Set[int],
    check: bool = True,
    size: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[int, Tensor], list[Probe]]:
    """The Hessian's diagonal for some of the leaves that are covered, and what to check of it.

    The check of an entry is its whole block, as it was read, times random signs.
    """
    probed = {entry.leaves[0] for entry in route.probed(leaves)} if check else set()
    found: dict[int, Tensor] = {}
    vectors: dict[int, dict[int, Tensor]] = {}
    products: dict[int, dict[int, Tensor]] = {}

    def take(entry: Entry, block: Block) -> None:
        if leaves.isdisjoint(entry.leaves):
            return
        diagonal = entry.diagonal(block)
        _add(found, entry.split(diagonal))
        first = entry.leaves[0]
        if first in probed:
            (signs,) = random_signs([diagonal])  # the same for every chunk
            vectors[first] = entry.split(signs)
            _add(products.setdefault(first, {}), entry.split(entry.product(block, signs)))

    live = LiveLeaves(route.depends, "diagonal", check)
    run(route, take, live, size, progress)
    for i in live.penalties.keys() & leaves:
        for penalty in live.penalties[i]:
            _add(found, {i: penalty.diagonal()})
    probes = live.probes()
    for first, vector in vectors.items():
        for i in live.penalties.keys() & vector:
            for penalty in live.penalties[i]:
                _add(products[first], {i: penalty.times(vector[i])})
        rows, norm = list(vector), math.hypot(*(float(found[i].norm()) for i in vector))
        probes.append(Probe(rows, rows, list(vector.values()), [products[first][i] for i in rows], norm))
    return {i: part for i, part in found.items() if i in leaves} | live.parts(), probes


def blocks(
    route: Route, leaves: Set[int], size: int | None = None, progress: Progress | None = None
) -> dict[tuple[int, int], Tensor]:
    """The Hessian's block, as a matrix, of each of some leaves that are covered, by twice its index."""
    found: dict[int, Tensor] = {}

    def take(entry: Entry, block: Block) -> None:
        if not leaves.isdisjoint(entry.leaves):
            _add(found, {i: part for i, part in entry.matrix(block).items() if i in leaves})

    live = LiveLeaves(route.depends, "blocks")
    run(route, take, live, size, progress)
    for i in live.penalties.keys() & leaves:
        for penalty in live.penalties[i]:
            _add(found, {i: penalty.matrix()})
    return {(i, i): part for i, part in (found | live.parts()).items()}


def _add(found: dict[int, Tensor], parts: Mapping[int, Tensor]) -> None:
    """Add up what the chunks of samples give."""
    for i, part in parts.items():
        found[i] = found[i].add_(part) if i in found else part
