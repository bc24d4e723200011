"""An answer by the names of its tensors: what tables, figures and files are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hesse.answer import Result
from hesse.runtime.total import total


@dataclass(frozen=True)
class NamedResult:
    """A result and the names of the tensors it was asked for.

    Attributes:
        question: "diagonal", "hessian" or "trace"; the result of a trace is the diagonal it sums.
        names: what to call each tensor.
        shapes: the shape of each tensor.
        result: what a question answered with `full_output=True`.
    """

    question: str
    names: Sequence[str]
    shapes: Sequence[torch.Size]
    result: Result

    @cached_property
    def parts(self) -> list[Tensor]:
        """The answer's tensors: one for each tensor; of a Hessian its blocks, row by row."""
        parts = [part.detach() for part in pytree.tree_leaves(self.result.value)]
        return [total([part]) for part in parts] if self.question == "trace" else parts

    @property
    def own(self) -> list[Tensor]:
        """What belongs to one tensor alone: its part, or its diagonal block of a Hessian."""
        return self.parts[:: len(self.names) + 1] if self.question == "hessian" else self.parts

    @property
    def by_name(self) -> dict[str, Tensor]:
        """The parts by their tensor's name; the blocks of a Hessian by "row|column"."""
        names = self.names
        if self.question == "hessian":
            names = [f"{row}|{column}" for row in names for column in names]
        return dict(zip(names, self.parts, strict=True))

    @property
    def sizes(self) -> list[int]:
        """Number of coordinates of each tensor."""
        return [shape.numel() for shape in self.shapes]

    @cached_property
    def matrix(self) -> Tensor:
        """A Hessian's blocks joined to one matrix."""
        blocks = iter(self.parts)
        return torch.cat(
            [
                torch.cat([next(blocks).reshape(rows, columns) for columns in self.sizes], dim=1)
                for rows in self.sizes
            ]
        )

    @cached_property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues of a Hessian in ascending order, in float64; none where it is not finite."""
        matrix = self.matrix.double()
        if not torch.isfinite(matrix).all():
            return matrix.new_empty(0)
        # A custom backward may be no derivative; v'Hv sees the symmetric half of any matrix.
        values: Tensor = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        return values
