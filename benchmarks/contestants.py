"""The questions, and who answers them: for every case a callable for each contestant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hesse
from benchmarks.cases import CASES, LARGE_MLP, WIDE_MLP, Case, Function

Contestants = dict[str, Callable[[], Any]]
Seconds = dict[str, float]
Derived = dict[str, float | str]


@dataclass(frozen=True)
class Question:
    """What is asked of the contestants.

    Attributes:
        contestants: the callables for a case on a device; the first is hesse's with its defaults.
        reference: the contestant that the others' results are compared with: plain double backward,
            one product at a time, without function transforms.
        derived: what to say of a case beyond the times, from the times of those who answered rightly.
        repeats: how often each contestant is timed, unless told otherwise.
        cases: the functions it is asked of.
    """

    contestants: Callable[[Case, str], Contestants]
    reference: str
    derived: Callable[[Seconds], Derived]
    repeats: int
    cases: tuple[Case, ...] = CASES


def hessian(case: Case, device: str) -> Contestants:
    func, tensors = case.problem(device)
    helped, every = case.for_peers(func), tuple(range(len(tensors)))
    rows = partial(torch.func.jacrev, argnums=every)
    functional = partial(torch.autograd.functional.hessian, helped, tensors)
    return {
        "hesse.hessian": lambda: hesse.hessian(func, tensors),
        "hesse.hessian(check=False)": lambda: hesse.hessian(func, tensors, check=False),
        "torch.func.hessian": lambda: torch.func.hessian(helped, every)(*tensors),
        "torch.func.jacrev(jacrev), chunks of 256": lambda: rows(rows(helped), chunk_size=256)(*tensors),
        "torch.autograd.functional.hessian": functional,
        "torch.autograd.functional.hessian, vectorize": partial(functional, vectorize=True),
        "torch.autograd.functional.hessian, vectorize, forward-mode": partial(
            functional, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
    }


def diagonal(case: Case, device: str) -> Contestants:
    from torch_secorder.core.hessian_diagonal import hessian_diagonal

    func, tensors = case.problem(device)
    helped, leaves = case.for_peers(func), [tensor.requires_grad_() for tensor in tensors]
    return {
        "hesse.hessian_diagonal": lambda: hesse.hessian_diagonal(lambda: func(*leaves), leaves),
        'hesse.hessian_diagonal(method="dense")': lambda: hesse.hessian_diagonal(
            lambda: func(*leaves), leaves, method="dense"
        ),
        "torch_secorder hessian_diagonal": lambda: hessian_diagonal(lambda: helped(*leaves), leaves),
    }


def hvp(case: Case, device: str) -> Contestants:
    func, tensors = case.problem(device)
    helped, v = case.for_peers(func), tuple(torch.randn_like(tensor) for tensor in tensors)
    return {
        "hesse.hvp": lambda: hesse.hvp(func, tensors, v),
        "by hand": lambda: double_backward(helped, tensors, v),
    }


def double_backward(func: Function, tensors: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The product that everybody writes by hand."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradient = torch.autograd.grad(func(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(gradient, leaves, v)


def beside_peers(ours: str, seconds: Seconds) -> Derived:
    """How many times longer than hesse the fastest peer takes, and torch.func where it is one."""
    peers = {name: value for name, value in seconds.items() if not name.startswith("hesse")}
    if ours not in seconds or not peers:
        return {}
    fastest = min(peers, key=peers.__getitem__)
    derived: Derived = {"fastest_peer": fastest, "ratio_to_fastest_peer": peers[fastest] / seconds[ours]}
    if "torch.func.hessian" in peers:
        derived["ratio_to_torch_func_hessian"] = peers["torch.func.hessian"] / seconds[ours]
    return derived


def beside_hand(seconds: Seconds) -> Derived:
    """How many times longer than the hand-written product hesse takes."""
    if len(seconds) < 2:
        return {}
    return {"hesse_over_by_hand": seconds["hesse.hvp"] / seconds["by hand"]}


QUESTIONS = {
    "hessian": Question(
        hessian, "torch.autograd.functional.hessian", partial(beside_peers, "hesse.hessian"), repeats=7
    ),
    "diagonal": Question(
        diagonal,
        "torch_secorder hessian_diagonal",
        partial(beside_peers, "hesse.hessian_diagonal"),
        repeats=5,
        cases=(*CASES, WIDE_MLP),
    ),
    "hvp": Question(hvp, "by hand", beside_hand, repeats=50, cases=(*CASES, LARGE_MLP)),
}


def contestant(question: str, name: str, device: str, case: Case) -> Callable[[], Any]:
    """One contestant by name: unlike its callable, this can be sent to another process."""
    return QUESTIONS[question].contestants(case, device)[name]
