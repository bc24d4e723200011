"""What a method leaves behind for the check of its answer."""

from __future__ import annotations

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
    """

    rows: Sequence[int]
    columns: Sequence[int]
    signs: Sequence[Tensor]
    computed: Sequence[Tensor]
    norm: float


def random_signs(like: Sequence[Tensor]) -> list[Tensor]:
    """One tensor of +1 and -1 for each; torch's global random state is not touched."""
    generator = torch.Generator()
    generator.manual_seed(20_241_120)
    return [(torch.randint(0, 2, t.shape, generator=generator) * 2 - 1).to(t.device, t.dtype) for t in like]
