"""Find the calls whose second derivative, as torch gives it, is not that of their gradient.

One call is run by itself, in float64, with the contents that it met: a product of the second derivative of a
random combination of its results is compared with differences of the gradient of that combination.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from hesse.probe import distance, norm
from hesse.runtime.watch import writes_to_first
from hesse.structure import NoStructure
from hesse.tape.record import Call
from hesse.tape.replay import contents, results_of

Results = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A call as a function of its differentiable arguments."""

TOLERANCE = 1e-3
"""Relative deviations up to this are those of differences near a kink or a pole."""

_STEPS = (1e-5, 1e-4, 1e-6)


def suspects(calls: Iterable[Call]) -> list[str]:
    """Names of the calls whose second derivative is not the derivative of their gradient, each once."""
    found: dict[str, None] = {}
    seen: set[Any] = set()
    for call in calls:
        key = call.func, tuple(a.shape if isinstance(a, Tensor) else None for a in call.arguments)
        if key not in seen:
            seen.add(key)
            with suppress(RuntimeError, NoStructure):  # what cannot be run again, or differentiated twice
                if not deviation(*_by_itself(call)) <= TOLERANCE:
                    found[call.name] = None
    return list(found)


def deviation(results: Results, inputs: Sequence[Tensor]) -> float:
    """How far a second derivative is from differences of the gradient, relative to its size.

    Raises:
        RuntimeError: torch's, where there is no second derivative.
    """
    leaves, slopes = _gradient(results, inputs, create_graph=True)
    generator = torch.Generator().manual_seed(8)
    # What has no influence is not moved: the label of a sample may be one of few numbers.
    sizes = [bool(s.any()) * (_rms(leaf) or 1.0) for s, leaf in zip(slopes, leaves, strict=True)]
    vectors = [_random(leaf, generator) * size for leaf, size in zip(leaves, sizes, strict=True)]
    exact = [torch.zeros_like(leaf) for leaf in leaves]
    pairs = [(s, v) for s, v in zip(slopes, vectors, strict=True) if s.requires_grad]
    if pairs:
        outputs, cotangents = zip(*pairs, strict=True)
        exact = list(torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True))
    found = []
    for step in _STEPS:
        up, down = (
            _gradient(results, [leaf + sign * step * v for leaf, v in zip(leaves, vectors, strict=True)])[1]
            for sign in (1, -1)
        )
        differences = [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]
        off, noise = distance(exact, differences), 1e-14 * (1 + norm(up)) / step
        found.append(0.0 if off <= noise else off / max(norm(exact), norm(differences)))
    return math.nan if any(map(math.isnan, found)) else min(found)


def _gradient(
    results: Results, inputs: Sequence[Tensor], create_graph: bool = False
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Leaves, and the gradient by them of a random combination of the results."""
    generator = torch.Generator().manual_seed(9)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        made = [torch.view_as_real(r) if r.is_complex() else r for r in results(leaves) if r.requires_grad]
        total = torch.stack([(r * _random(r, generator)).sum() for r in made]).sum()
        return leaves, torch.autograd.grad(total, leaves, create_graph=create_graph, materialize_grads=True)


def _rms(tensor: Tensor) -> float:
    return norm([tensor]) / math.sqrt(max(1, tensor.numel()))


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _by_itself(call: Call) -> tuple[Results, list[Tensor]]:
    """The call as a function of its differentiable arguments, and these, in float64."""
    arguments = [_wide(contents(call, i) if i in call.inputs else a) for i, a in enumerate(call.arguments)]

    def results(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        given = list(arguments)
        for position, tensor in zip(call.inputs, inputs, strict=True):
            given[position] = tensor
        if isinstance(given[0], Tensor) and writes_to_first(call.func):
            given[0] = given[0].clone()
        return results_of(call, given)

    return results, [arguments[position] for position in call.inputs]


def _wide(argument: Any) -> Any:
    if not isinstance(argument, Tensor) or not (argument.is_floating_point() or argument.is_complex()):
        return argument
    return argument.detach().to(torch.complex128 if argument.is_complex() else torch.float64)
