"""A first look at a function, before it is differentiated twice: where its samples are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from hesse.look.evaluation import Evaluation, Gradients, errors_explained, evaluate
from hesse.look.perturb import (
    Exploration,
    Noise,
    Perturbing,
    everywhere,
    met_by_parameters,
    noticed,
    nudged,
    pushed,
)
from hesse.look.placing import apart, contradicted, in_layers, placed
from hesse.problem import Problem
from hesse.runtime.isolation import isolated
from hesse.runtime.memory import Budget
from hesse.structure import NoStructure, refusing, sought
from hesse.tape.record import Call
from hesse.tape.samples import ONE_SAMPLE, Samples


def explore(problem: Problem, first: Evaluation, budget: Budget, changes: bool = True) -> Exploration:
    """Find the samples: by the table or, where that does not tell, by an evaluation or two with some changed.

    `changes`: it may be evaluated so; what the first evaluation changed is put back for that. Random numbers
    go on from where they are.
    """
    known = Exploration(why_not=first.untaped)
    if first.tape is None:
        return known
    known = replace(known, samples={layer.order: ONE_SAMPLE for layer in first.layers})
    if not first.layers or first.tape.hidden or not first.value.requires_grad:
        return known
    with suppress(NoStructure), sought():
        places = placed(first)
        if places is not None:
            samples = in_layers(first.layers, places)
            batch_dims = [[places.get(value) for value in call.outputs] for call in first.tape.calls]
            return replace(known, samples=samples, batch_dims=batch_dims, told=True)
    if not changes:
        return replace(known, why_not="for so few coordinates samples are not looked for by changing them")
    if budget.left() < 2 * budget.taken:  # a look is an evaluation and a gradient
        return replace(known, why_not="the memory budget holds no second evaluation")
    return _by_changes(problem, first, known)


def _by_changes(problem: Problem, first: Evaluation, known: Exploration) -> Exploration:
    """What evaluations with some samples changed tell."""
    assert first.tape is not None
    met = [call for call in first.tape.calls if call.order in known.samples or met_by_parameters(call)]
    gradient, by_met = first.gradients([call.outputs[0] for call in met], create_graph=False)
    changed = first.watch.changed
    first.watch.restore()
    best, reasons = known, []
    for dim in (0, 1):
        try:
            look = _looked(problem, first, met, by_met, dim)
        except NoStructure as error:
            reasons.append(str(error))
            continue
        if apart(look.samples) > apart(best.samples):
            best = look
        if apart(best.samples) == len(known.samples):
            break
    why_not = None if best is not known else next(iter(reasons), None)
    return Exploration(best.samples, best.batch_dims, best.touching, gradient, changed, why_not)


def _looked(
    problem: Problem, first: Evaluation, met: Sequence[Call], gradients: Gradients, dim: int
) -> Exploration:
    """What a look finds; where other values lead elsewhere, by smaller changes that keep all signs.

    Raises:
        NoStructure: neither could be done.
    """
    try:
        with sought():
            return _look(problem, first, met, gradients, dim, pushed)
    except NoStructure as refusal:
        try:
            with sought():
                return _look(problem, first, met, gradients, dim, nudged)
        except NoStructure:
            raise refusal from None


def _look(
    problem: Problem, first: Evaluation, met: Sequence[Call], gradients: Gradients, dim: int, noise: Noise
) -> Exploration:
    """Where the samples are if those that come in lie in dimension `dim`; one sample where they touch.

    `met` and `gradients`: the calls where samples come in, and the first evaluation's gradients by these.
    """
    assert first.tape is not None
    before = first.tape.calls
    with isolated() as watch, errors_explained():
        leaves = problem.leaves()
        again = Perturbing(leaves, before, first.layers, dim, noise)
        if again.count == 1:
            return Exploration()
        with refusing("func could not be evaluated with some of its samples changed"):
            with again:
                value = evaluate(problem, leaves, watch)
            if again.hidden or len(again.calls) != len(before):
                raise NoStructure(again.hidden or "other values lead to other calls")
            edges = [again.calls[call.order].outputs[0].edge for call in met]
            found = torch.autograd.grad(value, edges, allow_unused=True)
    samples: dict[int, Samples] = {}
    touching = None
    for call, gradient, other in zip(met, gradients, found, strict=True):
        own = again.batch_dims.get(call.order, ONE_SAMPLE)
        if own.count > 1 and noticed(gradient, other, own, again.which):
            own, touching = ONE_SAMPLE, touching or call.name
        samples[call.order] = own
    batch_dims = everywhere(before, again.calls, again.which)
    wrong = contradicted(before, batch_dims)
    if wrong is not None:
        raise NoStructure(f"{wrong.name} joins samples, or changes their order")
    by_layer = {layer.order: samples[layer.order] for layer in first.layers}
    return Exploration(by_layer, batch_dims, touching=touching)
