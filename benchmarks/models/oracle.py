"""The independent route: plain double backward on drawn coordinates, and differences of the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.models.model import Problem

Coordinate = tuple[int, int]
"""The number of a tensor, and that of a coordinate in it."""

_STEPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True)
class Difference:
    """A central difference of the gradient.

    Attributes:
        value: the entry of the diagonal.
        error: how far it is from that of another step.
    """

    value: float
    error: float


@dataclass
class Oracle:
    """A problem with its gradient, by torch alone.

    Attributes:
        problem: the problem.
        leaves: what it is differentiated by.
        refusal: what torch says where the function cannot be differentiated twice.
    """

    problem: Problem
    leaves: list[Tensor] = field(default_factory=list)
    refusal: str | None = None

    def __post_init__(self) -> None:
        self.leaves = self.problem.leaves()

    def gradient(self, graph: bool = False) -> list[Tensor | None]:
        """The gradient by every leaf; with a graph, by calls that have a second derivative."""
        with _elementary(graph):
            value = self.problem.value(self.leaves)
            grads = torch.autograd.grad(value, self.leaves, create_graph=graph, allow_unused=True)
        return list(grads)

    def columns(self, coordinates: Sequence[Coordinate], whole: bool) -> Iterator[list[Tensor]]:
        """Of each coordinate its column of the Hessian: by all leaves, or by its own leaf alone.

        Stops at what torch refuses.
        """
        gradient = self.gradient(graph=True)
        for tensor, place in coordinates:
            by = self.leaves if whole else [self.leaves[tensor]]
            slope = gradient[tensor]
            if slope is None or not slope.requires_grad:
                yield [torch.zeros_like(leaf).flatten() for leaf in by]
                continue
            try:
                column = torch.autograd.grad(
                    slope.flatten()[place], by, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            except RuntimeError as error:
                self.refusal = str(error)
                return
            yield [part.flatten() for part in column]

    def difference(self, coordinate: Coordinate) -> Difference:
        """An entry of the diagonal by differences: of several steps the one nearest to the next."""
        found = [self._difference(coordinate, step) for step in _STEPS]
        errors = [abs(a - b) for a, b in pairwise(found)]
        best = min(range(len(errors)), key=errors.__getitem__)
        return Difference(found[best + 1], errors[best])

    def _difference(self, coordinate: Coordinate, step: float) -> float:
        tensor, place = coordinate
        leaf = self.leaves[tensor].detach()
        before = leaf.clone()
        spread = before.square().mean().sqrt().item()
        h = step * max(abs(before.flatten()[place].item()), spread, 1e-2)
        slopes = []
        for sign in (1, -1):
            moved = before.clone()
            moved.view(-1)[place] += sign * h
            leaf.copy_(moved)
            slope = self.gradient()[tensor]
            slopes.append(0.0 if slope is None else slope.flatten()[place].item())
        leaf.copy_(before)
        return (slopes[0] - slopes[1]) / (2 * h)


def drawn(problem: Problem, count: int) -> list[Coordinate]:
    """Coordinates drawn at random, of every tensor as many as of others."""
    generator = torch.Generator().manual_seed(0)
    sizes = [tensor.numel() for tensor in problem.tensors]
    each = max(1, -(-count // len(sizes)))
    places = [torch.randperm(size, generator=generator)[:each].tolist() for size in sizes]
    pairs = [(tensor, place) for tensor, found in enumerate(places) for place in found]
    if len(pairs) <= 2 * count:
        return pairs
    order = torch.randperm(len(pairs), generator=generator)[: 2 * count].tolist()
    return [pairs[i] for i in sorted(order)]


@contextmanager
def _elementary(wanted: bool) -> Iterator[None]:
    """Fused attention has no second derivative, and that of group norm in channels_last crashes torch.

    Its kernel writes the gradient by the input even where it was not asked for.
    """
    if not wanted:
        yield
        return

    def group_norm(images: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return normalised(images.contiguous(), *arguments, **options)

    normalised = functional.group_norm
    with sdpa_kernel(SDPBackend.MATH), patch.object(functional, "group_norm", group_norm):
        yield
