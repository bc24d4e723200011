"""Sums: of all elements of tensors, and of containers of tensors one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Total:
    """Adds up in float32 at least, in the order of what comes."""

    def __init__(self, graph: bool = False) -> None:
        """`graph`: what is added stays on its graph."""
        self._graph = graph
        self._sums: list[Tensor] = []

    def add(self, weight: float, container: Any) -> None:
        """Add a container, each time of the same structure."""
        self._like, spec = pytree.tree_flatten(container)
        if not self._sums:
            self._spec = spec
            wide = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in self._like)
            self._sums = [part * weight for part in wide]
        elif self._graph:
            self._sums = [one + weight * part for one, part in zip(self._sums, self._like, strict=True)]
        else:
            for one, part in zip(self._sums, self._like, strict=True):
                one.add_(part.to(one.dtype), alpha=weight)

    @property
    def value(self) -> Any:
        """The sum, in the dtypes of what was added."""
        parts = [one.to(part.dtype) for one, part in zip(self._sums, self._like, strict=True)]
        return pytree.tree_unflatten(parts, self._spec)


def total(tensors: Sequence[Tensor]) -> Tensor:
    """The sum over all elements of all tensors, in float32 at least."""
    sums = (t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors)
    return reduce(torch.add, sums, torch.zeros(()))
