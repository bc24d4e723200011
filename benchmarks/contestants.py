"""The questions, and who answers them: for every case a callable for each contestant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hesse
from benchmarks.cases import DIAGONAL_CASES, HESSIAN_CASES, HVP_CASES, MLPS, RESIDUAL_CNNS, Case
from benchmarks.measure import Extrapolated
from benchmarks.peers import (
    backpack_diagonal,
    double_backward,
    matrix_products,
    per_sample_gradients,
    product_by_product,
    sampled_coordinates,
    some_products,
)

Contestants = dict[str, Callable[..., Any]]
Seconds = dict[str, float]
Derived = dict[str, float | str]

_FLOOR = "matrix-product floor"
_PER_SAMPLE = "10 batched per-sample gradients"
_GRADIENT = "one gradient"
_BACKPACK = "BackPACK DiagHessian"
_BATCHED = "one product per coordinate, batched"
_LOOP = "one product per coordinate, the loop of torch_secorder"
_TORCH_SECORDER = "torch_secorder hessian_diagonal"

# Whose time divided by that of hesse is derived, under which name.
_RATIOS = {
    "torch.func.hessian": "ratio_to_torch_func_hessian",
    _BACKPACK: "ratio_to_backpack",
}
# By whose time that of hesse is divided: they show what work of that size costs, and answer nothing.
YARDSTICKS = {
    _FLOOR: "seconds_over_floor",
    _PER_SAMPLE: "seconds_over_per_sample_gradients",
    _GRADIENT: "seconds_over_gradient",
}

_CHUNK = 128  # products in a batch, where plain autograd batches them
_DENSE_UP_TO = 10_000  # coordinates
_SWEEP_ALONE_FROM = 1_000_000  # coordinates; one product for each, or each output of a layer, takes hours


@dataclass(frozen=True)
class Question:
    """What is asked of the contestants.

    Attributes:
        contestants: the callables for a case on a device; the first is hesse's with its defaults
            (for the largest case with the one method that can answer it).
        reference: the contestant that the others' results are compared with: plain double backward,
            one product at a time, without function transforms. Sampled cases are compared with the
            same in float64.
        derived: what to say of a case beyond the times, from the times of those who answered rightly
            and of the yardsticks.
        repeats: how often each contestant is timed, unless told otherwise.
        cases: the functions it is asked of.
        planned: does hesse plan, so that `full_output=True` tells its method?
    """

    contestants: Callable[[Case, str], Contestants]
    reference: str
    derived: Callable[[Seconds], Derived]
    repeats: int
    cases: tuple[Case, ...]
    planned: bool = True


def hessian(case: Case, device: str) -> Contestants:
    func, tensors = case.problem(device)
    helped, every = case.for_peers(func), tuple(range(len(tensors)))
    rows = partial(torch.func.jacrev, argnums=every)
    functional = partial(torch.autograd.functional.hessian, helped, tensors)
    ours = partial(hesse.hessian, func, tensors)
    contestants: Contestants = {
        "hesse.hessian": ours,
        "hesse.hessian(check=False)": partial(ours, check=False),
        "hesse.hessian(method=plan, check=False)": given_back(partial(ours, check=False)),
        "torch.func.hessian": lambda: torch.func.hessian(helped, every)(*tensors),
        "torch.func.jacrev(jacrev), chunks of 256": lambda: rows(rows(helped), chunk_size=256)(*tensors),
        "torch.autograd.functional.hessian": functional,
        "torch.autograd.functional.hessian, vectorize": partial(functional, vectorize=True),
        "torch.autograd.functional.hessian, vectorize, forward-mode": partial(
            functional, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
    }
    classifier = case.classifier(device)
    if classifier and case in MLPS:
        coordinates = sum(tensor.numel() for tensor in tensors)
        # The outer products of every sample's gradient, half of them for symmetry.
        contestants[_FLOOR] = matrix_products(len(classifier.inputs) * coordinates**2, device)
    return contestants


def diagonal(case: Case, device: str) -> Contestants:
    from torch_secorder.core.hessian_diagonal import hessian_diagonal

    func, tensors = case.problem(device)
    helped, leaves = case.for_peers(func), [tensor.requires_grad_() for tensor in tensors]
    coordinates = sum(leaf.numel() for leaf in leaves)
    ours = partial(hesse.hessian_diagonal, lambda: func(*leaves), leaves)
    sweep = partial(ours, method="sweep")
    unchecked = {'hesse.hessian_diagonal(method="sweep", check=False)': partial(sweep, check=False)}
    if coordinates > _SWEEP_ALONE_FROM:
        given = given_back(partial(ours, check=False))
        return {
            "hesse.hessian_diagonal": ours,
            **unchecked,
            "hesse.hessian_diagonal(method=plan, check=False)": given,
            _GRADIENT: lambda: torch.autograd.grad(func(*leaves), leaves),
        }
    contestants: Contestants = {
        "hesse.hessian_diagonal": ours,
        "hesse.hessian_diagonal(check=False)": partial(ours, check=False),
        "hesse.hessian_diagonal(method=plan, check=False)": given_back(partial(ours, check=False)),
        'hesse.hessian_diagonal(method="taps")': partial(ours, method="taps"),
        **unchecked,
    }
    if coordinates <= _DENSE_UP_TO:
        contestants['hesse.hessian_diagonal(method="dense")'] = partial(ours, method="dense")
    if classifier := case.classifier(device):
        contestants[_BACKPACK] = case.for_peers(backpack_diagonal(classifier))
    if case.sample:
        contestants[_BATCHED] = partial(some_products, helped, leaves, _CHUNK, _CHUNK)
        contestants[_LOOP] = partial(some_products, helped, leaves, 1, case.sample)
    else:
        contestants[_BATCHED] = partial(product_by_product, helped, leaves, _CHUNK)
        contestants[_TORCH_SECORDER] = lambda: hessian_diagonal(lambda: helped(*leaves), leaves)
    if case in RESIDUAL_CNNS and (classifier := case.classifier(device)):
        contestants[_PER_SAMPLE] = per_sample_gradients(classifier)
    return contestants


def hvp(case: Case, device: str) -> Contestants:
    func, tensors = case.problem(device)
    helped, v = case.for_peers(func), tuple(torch.randn_like(tensor) for tensor in tensors)
    plan = hesse.plan("hvp", func, tensors)
    return {
        "hesse.hvp": lambda: hesse.hvp(func, tensors, v),
        "hesse.hvp(method=plan)": lambda: hesse.hvp(func, tensors, v, method=plan),
        "by hand": lambda: double_backward(helped, tensors, v),
    }


def given_back(ask: Callable[..., Any]) -> Callable[..., Any]:
    """A question with the plan of its first answer."""
    made: list[Any] = []

    def again(**options: Any) -> Any:
        if not made:
            made.append(ask(full_output=True).plan)
        return ask(method=made[0], **options)

    return again


def beside(ours: str, seconds: Seconds) -> Derived:
    """How many times longer than hesse the fastest peer takes, and others; hesse beside the yardsticks."""
    if ours not in seconds:
        return {}
    own, derived = seconds[ours], dict[str, float | str]()
    peers = {
        name: taken
        for name, taken in seconds.items()
        if name not in YARDSTICKS and not name.startswith("hesse")
    }
    if peers:
        fastest = min(peers, key=peers.__getitem__)
        derived |= {"fastest_peer": fastest, "ratio_to_fastest_peer": peers[fastest] / own}
    derived |= {key: peers[name] / own for name, key in _RATIOS.items() if name in peers}
    derived |= {key: own / seconds[name] for name, key in YARDSTICKS.items() if name in seconds}
    given = next((taken for name, taken in seconds.items() if "method=plan" in name), None)
    if given and peers:
        derived["ratio_of_plan_to_fastest_peer"] = peers[fastest] / given
    return derived


def beside_hand(seconds: Seconds) -> Derived:
    """How many times longer than the hand-written product hesse takes."""
    if len(seconds) < 2:
        return {}
    given = seconds.get("hesse.hvp(method=plan)", math.nan)
    return {
        "hesse_over_by_hand": seconds["hesse.hvp"] / seconds["by hand"],
        "plan_over_by_hand": given / seconds["by hand"],
    }


QUESTIONS = {
    "hessian": Question(
        hessian,
        "torch.autograd.functional.hessian",
        partial(beside, "hesse.hessian"),
        repeats=7,
        cases=HESSIAN_CASES,
    ),
    "diagonal": Question(
        diagonal, _TORCH_SECORDER, partial(beside, "hesse.hessian_diagonal"), repeats=5, cases=DIAGONAL_CASES
    ),
    "hvp": Question(hvp, "by hand", beside_hand, repeats=50, cases=HVP_CASES, planned=False),
}


def contestant(question: str, name: str, device: str, case: str) -> Callable[[], Any]:
    """One contestant by name: unlike its callable, this can be sent to another process."""
    asked = QUESTIONS[question]
    (found,) = (known for known in asked.cases if known.name == case)
    return asked.contestants(found, device)[name]


def sampled(answer: Any, count: int) -> list[Tensor]:
    """A diagonal at the sampled coordinates of each tensor."""
    if isinstance(answer, Extrapolated):
        return [entries[:count] for entries in answer.entries]
    rows = sampled_coordinates(answer, count)
    return [entries.flatten()[where] for entries, where in zip(answer, rows, strict=True)]


def sampled_reference(case: Case, device: str) -> list[Tensor]:
    """The diagonal at the sampled coordinates, by plain double backward in float64."""
    classifier = case.classifier(device)
    assert classifier
    func, tensors = classifier.double().problem()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    return some_products(case.for_peers(func), leaves, 1, case.sample).entries
