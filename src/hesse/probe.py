"""What a method leaves behind for the check of its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """Signs times a computed block.

    Attributes:
        rows: the tensors (indices) whose rows the block has.
        columns: the tensors whose columns it has.
        signs: the vector, one tensor for each of `rows`.
        computed: signs times block, one tensor for each of `columns`.
        norm: Frobenius norm of the block; the product itself may cancel to almost nothing.
        among: the coordinates of each column tensor that the block has, if it has not all.
    """

    rows: Sequence[int]
    columns: Sequence[int]
    signs: Sequence[Tensor]
    computed: Sequence[Tensor]
    norm: float
    among: Sequence[Tensor] | None = None

    def own(self, products: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the block has of products by whole tensors."""
        if self.among is None:
            return products
        return [part.flatten()[numbers] for part, numbers in zip(products, self.among, strict=True)]


def random_signs(like: Sequence[Tensor]) -> list[Tensor]:
    """One tensor of +1 and -1 for each; torch's global random state is not touched."""
    generator = torch.Generator()
    generator.manual_seed(20_241_120)
    return [(torch.randint(0, 2, t.shape, generator=generator) * 2 - 1).to(t.device, t.dtype) for t in like]


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The norm of the difference of two vectors in parts."""
    return norm([a - b for a, b in zip(one, other, strict=True)])


def norm(tensors: Sequence[Tensor]) -> float:
    """The norm of a vector in parts, in float64."""
    return math.hypot(*(torch.linalg.vector_norm(t.detach().double()).item() for t in tensors))
