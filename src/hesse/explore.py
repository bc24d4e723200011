"""A first look at a function, before it is differentiated twice: its value, its time, its samples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from hesse.gradient import errors_explained, evaluate
from hesse.problem import Problem
from hesse.runtime.isolation import isolated
from hesse.tape.layers import LayerCall, layer_call
from hesse.tape.record import Call, Recorder, Value
from hesse.tape.samples import ONE_SAMPLE, Exploration, Perturbing, Samples, everywhere, noticed


def explore(problem: Problem, layers: bool) -> Exploration:
    """Evaluate once; where `layers` are of interest, once or twice more to find the samples.

    Random numbers go on from where they are.
    """
    with isolated() as watch, errors_explained():
        leaves = problem.leaves()
        recorder = Recorder(leaves)
        began = time.perf_counter()
        with recorder if layers else nullcontext():
            value = evaluate(problem, leaves, watch)
        calls = [layer for call in recorder.calls if (layer := layer_call(call)) is not None]
        gradients: Sequence[Tensor | None] = ()
        if value.requires_grad and layers:
            gradients = _gradients(value, [call.output for call in calls])
    seconds = time.perf_counter() - began
    samples = dict.fromkeys((call.order for call in calls), ONE_SAMPLE)
    places: Sequence[Sequence[Samples | None]] = ()
    for dim in (0, 1) if gradients else ():
        found, results = _places(problem, recorder.calls, calls, gradients, dim)
        if _separate(found) > _separate(samples):
            samples, places = found, results
        if _separate(samples) == len(calls):
            break
    return Exploration(value.detach(), samples, places, seconds)


def _gradients(value: Tensor, outputs: Sequence[Value]) -> Sequence[Tensor | None]:
    """By the outputs of layers; None for those without influence."""
    edges = [output.edge for output in outputs]
    return torch.autograd.grad(value, edges, allow_unused=True) if edges else ()


def _separate(samples: Mapping[int, Samples]) -> int:
    return sum(places.count > 1 for places in samples.values())


def _places(
    problem: Problem,
    before: Sequence[Call],
    calls: Sequence[LayerCall],
    gradients: Sequence[Tensor | None],
    dim: int,
) -> tuple[dict[int, Samples], list[list[Samples | None]]]:
    """Where the samples are if those that come in lie in dimension `dim`; one sample where they touch.

    In the layers, and in the results of every call.
    """
    with isolated() as watch:
        leaves = problem.leaves()
        again = Perturbing(leaves, before, calls, dim)
        if again.count == 1:
            return {}, []
        with again:
            value = evaluate(problem, leaves, watch)
        if again.hidden or len(again.calls) != len(before) or not value.requires_grad:
            return {}, []
        found = _gradients(value, [again.calls[call.order].outputs[0] for call in calls])
    places = {}
    for call, gradient, other in zip(calls, gradients, found, strict=True):
        own = again.places[call.order]
        if own.count > 1 and gradient is not None and other is not None:
            own = ONE_SAMPLE if noticed(gradient, other, own, again.which) else own
        places[call.order] = own
    return places, everywhere(before, again.calls, again.which)
