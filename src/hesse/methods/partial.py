"""A partial Hessian, put together from matrices by the tensors of its rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.look.gradient import Gradient
from hesse.probe import Probe, norm, random_signs
from hesse.selection import Chosen, Part


@dataclass(frozen=True)
class Partial:
    """Some rows and columns.

    Attributes:
        gradient: what they were made of.
        part: which.
        matrices: by the tensors of rows and columns; none where they are zero.
    """

    gradient: Gradient
    part: Part
    matrices: Mapping[tuple[int, int], Tensor]

    def parts(self) -> list[list[Tensor]]:
        """Blocks, as the caller's indices shape them."""
        return [
            [
                self._matrix(row, column).reshape((*row.shape, *column.shape))
                for column in self.part.columns.chosen
            ]
            for row in self.part.rows.chosen
        ]

    def _matrix(self, row: Chosen, column: Chosen) -> Tensor:
        found = self.matrices.get((row.tensor, column.tensor))
        if found is None:
            like = self.gradient.leaves[column.tensor].detach()
            return like.new_zeros(row.numbers.numel(), column.numbers.numel())
        return found

    def probes(self) -> list[Probe]:
        """Random signs of the rows times the part, to be compared with a product."""
        rows = sorted({i for i, _ in self.matrices})
        columns = sorted({j for _, j in self.matrices})
        numbers = self.part.rows.numbers
        signs = dict(zip(rows, random_signs([numbers[i] for i in rows]), strict=True))
        computed = []
        for j in columns:
            among = [(signs[i], self.matrices[i, j].detach()) for i in rows if (i, j) in self.matrices]
            computed.append(torch.stack([s.to(m.dtype) @ m for s, m in among]).sum(0))
        vectors = [self._spread(i, signs[i]) for i in rows]
        among_columns = [self.part.columns.numbers[j] for j in columns]
        size = norm(list(self.matrices.values()))
        return [Probe(rows, columns, vectors, computed, size, among_columns)] if rows else []

    def _spread(self, index: int, signs: Tensor) -> Tensor:
        """Signs of some coordinates as a vector over their tensor."""
        leaf = self.gradient.leaves[index]
        vector = torch.zeros(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        vector.index_add_(0, self.part.rows.numbers[index], signs.to(leaf.dtype))
        return vector.view(leaf.shape)
