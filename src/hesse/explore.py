"""A first look at a function, before it is differentiated twice: its gradient, its time, its samples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from hesse.evaluation import Evaluation, Gradients, errors_explained, evaluate
from hesse.problem import Problem
from hesse.runtime.isolation import isolated
from hesse.tape.record import Call
from hesse.tape.samples import (
    ONE_SAMPLE,
    Exploration,
    Perturbing,
    Samples,
    everywhere,
    noticed,
)


def explore(problem: Problem, first: Evaluation) -> Exploration:
    """Take the gradient; where calls were recorded, evaluate once or twice more to find the samples.

    What the evaluations changed is put back. Random numbers go on from where they are.
    """
    changed = first.watch.changed
    if first.tape is None:
        first.watch.restore()
        return Exploration(seconds=first.seconds, changed=changed)
    began = time.perf_counter()
    outputs = [layer.output for layer in first.layers]
    gradient, by_outputs = first.gradients(outputs, create_graph=False)
    seconds = first.seconds + time.perf_counter() - began
    first.watch.restore()
    samples: Mapping[int, Samples] = dict.fromkeys((layer.order for layer in first.layers), ONE_SAMPLE)
    places: Sequence[Sequence[Samples | None]] = ()
    hopeless = not samples or first.tape.hidden or not first.value.requires_grad
    for dim in () if hopeless else (0, 1):
        look = _look(problem, first, first.tape.calls, by_outputs, dim)
        changed |= look.changed
        if _separate(look.samples) > _separate(samples):
            samples, places = look.samples, look.places
        if _separate(samples) == len(samples):
            break
    return Exploration(samples, places, gradient, seconds, changed)


def _separate(samples: Mapping[int, Samples]) -> int:
    return sum(places.count > 1 for places in samples.values())


def _look(
    problem: Problem, first: Evaluation, before: Sequence[Call], gradients: Gradients, dim: int
) -> Exploration:
    """Where the samples are if those that come in lie in dimension `dim`; one sample where they touch.

    `before` and `gradients`: the calls of the first evaluation, and its gradients by the outputs of layers.
    """
    layers = first.layers
    with isolated() as watch, errors_explained():
        leaves = problem.leaves()
        again = Perturbing(leaves, before, layers, dim)
        if again.count == 1:
            return Exploration()
        with again:
            value = evaluate(problem, leaves, watch)
        if again.hidden or len(again.calls) != len(before) or not value.requires_grad:
            return Exploration(changed=watch.changed)
        edges = [again.calls[layer.order].outputs[0].edge for layer in layers]
        found = torch.autograd.grad(value, edges, allow_unused=True)
    samples = {}
    for layer, gradient, other in zip(layers, gradients, found, strict=True):
        own = again.places[layer.order]
        if own.count > 1 and gradient is not None and other is not None:
            own = ONE_SAMPLE if noticed(gradient, other, own, again.which) else own
        samples[layer.order] = own
    return Exploration(samples, everywhere(before, again.calls, again.which), changed=watch.changed)
