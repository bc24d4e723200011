r"""Where parameters enter a call linearly: from the curvature of its result to that of the parameters.

With $v = J w + \dots$ for every sample, the block of the parameters w is $\sum_n J^T K_{vv} J$. Its diagonal
needs the gradient by w for every column of $K_{vv}$ and every sample, and often less.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from hesse.curvature.columns import applied
from hesse.curvature.terms import Block
from hesse.tape.samples import Samples

HELD = 2**24
"""How many numbers of gradients by parameters are held at once."""


class Entry(ABC):
    """A place where parameters enter linearly.

    Attributes:
        leaves: indices of the parameters.
        batch_dim: the samples in the result.
        like: a tensor like the result.
        size: coordinates of the parameters.
        shape: of w.
        positions: elements of a sample's result that share a coordinate.
    """

    leaves: Sequence[int]
    batch_dim: Samples
    like: Tensor
    size: int
    shape: torch.Size
    positions: int

    @abstractmethod
    def gradients(self, columns: Tensor) -> Tensor:
        """Columns [r, *result] times J, sample by sample: [r, N, *w]."""

    @abstractmethod
    def squares(self, diagonal: Tensor) -> Tensor:
        """The diagonal of `Jᵀ diag(d) J`, for d of the result's shape."""

    @abstractmethod
    def dense(self, core: Tensor) -> Tensor:
        """The diagonal of `Jᵀ C J`, for blocks C [N, f, f]."""

    def work(self, rank: int) -> int:
        """Multiplications and additions of reading a term of this rank."""
        return 4 * rank * self.like.numel()

    def held(self, rank: int, dense: bool, unit: bool, count: int) -> int:
        """Numbers that reading a term holds for so many samples.

        `dense`: its core is; `unit`: its columns are coordinates.
        """
        width = self.like.numel() // self.batch_dim.count
        if dense and unit:
            return count * width * self.positions
        columns = min(rank, max(1, HELD // (count * self.size)))
        turned = dense * count * rank * (rank + width)
        return turned + columns * count * (self.size + width)

    def held_by_matrix(self, count: int) -> int:
        """Numbers that making a block holds for so many samples."""
        width = self.like.numel() // self.batch_dim.count
        return 6 * self.size**2 + count * width * (2 * width + 2 * self.shape[-1])

    @abstractmethod
    def layout(self, stack: Tensor) -> Tensor:
        """Columns [r, *result] in the order that `forward` gives: [r, N, f]."""

    @abstractmethod
    def forward(self, direction: Tensor) -> Tensor:
        """J times a direction like w: [N, f]."""

    @abstractmethod
    def backward(self, vectors: Tensor) -> Tensor:
        """`Jᵀ` times [N, f], summed over samples: like w."""

    @abstractmethod
    def split_stack(self, stack: Tensor) -> dict[int, Tensor]:
        """Stacks of values like w, [..., *w], as those of each parameter."""

    @abstractmethod
    def within(self, curvature: Tensor) -> Tensor:
        """`Jᵀ K J` for K of every sample in the order of `layout`, [N, f, f]: [size, size]."""

    @abstractmethod
    def within_diagonal(self, diagonal: Tensor) -> Tensor:
        """`Jᵀ diag(d) J`, for d of the result's shape: [size, size]."""

    @abstractmethod
    def narrowed(self, numbers: range) -> Entry:
        """For some of the samples."""

    def split(self, values: Tensor) -> dict[int, Tensor]:
        """Values like w as those of each parameter."""
        return {i: part.squeeze(0) for i, part in self.split_stack(values.unsqueeze(0)).items()}

    def factor(self, core: Tensor, columns: Tensor) -> Tensor:
        """The diagonal of `Jᵀ Uᵀ C U J`: squared gradients, weighted by the eigenvalues of C."""
        if core.dim() == 3 and self.size < 16 * len(columns):  # which would take longer than what they save
            return self.cross(columns, self._times(core, columns))
        return torch.stack([weights @ g.square_() for weights, g in self._weighted(core, columns)]).sum(0)

    def _times(self, core: Tensor, columns: Tensor) -> Tensor:
        """C U, as columns [r, *result]."""
        return self.batch_dim.back(applied(core, self.batch_dim.first(columns, 1)), 1)

    def cross(self, left: Tensor, right: Tensor) -> Tensor:
        """The diagonal of `Jᵀ Lᵀ R J`."""
        chunks = zip(left.split(self._chunk), right.split(self._chunk), strict=True)
        products = [(self.gradients(one) * self.gradients(other)).sum((0, 1)) for one, other in chunks]
        return sum(products[1:], products[0])

    def _weighted(self, core: Tensor, columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Gradients by w [m, size] for columns in which C is diagonal, each with what is on it."""
        if core.dim() == 3:
            core, turned = torch.linalg.eigh(core)
            first = self.batch_dim.first(columns, 1)
            columns = self.batch_dim.back(torch.einsum("qn...,nqr->rn...", first, turned), 1)
        for some, weights in zip(columns.split(self._chunk), core.T.split(self._chunk), strict=True):
            yield weights.flatten(), self.gradients(some).reshape(weights.numel(), -1)

    def matrix(self, block: Block) -> dict[int, Tensor]:
        """The diagonal block of `Jᵀ K J` for each parameter, as a matrix."""
        parts = []
        dense = None if block.dense is None else block.dense[:, self._order[:, None], self._order]
        for core, columns in block.factors:
            if len(columns) < self.positions:
                parts += [
                    (gradients.T * weights) @ gradients
                    for weights, gradients in self._weighted(core, columns)
                ]
            else:
                u = self.layout(columns)
                found = torch.einsum("rnf,rng->nfg", applied(core, u), u)
                dense = found if dense is None else dense.add_(found)
        for left, right in block.crosses:
            if len(left) < self.positions:
                one, other = (self.gradients(side).reshape(-1, self.size) for side in (left, right))
                parts.append(one.T @ other + other.T @ one)
            else:
                half = torch.einsum("rnf,rng->nfg", self.layout(left), self.layout(right))
                found = half + half.transpose(1, 2)
                dense = found if dense is None else dense.add_(found)
        if block.diagonal is not None:
            parts.append(self.within_diagonal(block.diagonal))
        if dense is not None:
            parts.append(self.within(dense))
        if not parts:
            parts.append(self.like.new_zeros(self.size, self.size))
        total = sum(parts[1:], parts[0])
        matrices = {}
        for i, columns in self.split_stack(total.T.reshape((-1, *self.shape))).items():  # it is symmetric
            count = columns[0].numel()
            rows = columns.movedim(0, -1).reshape((*columns.shape[1:], *self.shape))
            matrices[i] = self.split_stack(rows)[i].reshape(count, count)
        return matrices

    def product(self, block: Block, direction: Tensor) -> Tensor:
        """`Jᵀ K J` times a direction like w."""
        w = self.forward(direction)
        total = torch.zeros_like(w)
        for sides in block.crosses:
            left, right = map(self.layout, sides)
            for one, other in ((left, right), (right, left)):
                total += torch.einsum("rnf,rn->nf", one, torch.einsum("rnf,nf->rn", other, w))
        for core, columns in block.factors:
            u = self.layout(columns)
            along = applied(core, torch.einsum("rnf,nf->rn", u, w).unsqueeze(2)).squeeze(2)
            total += torch.einsum("rnf,rn->nf", u, along)
        if block.diagonal is not None:
            total += self.layout(block.diagonal.unsqueeze(0))[0] * w
        if block.dense is not None:
            ordered = torch.empty_like(w)
            ordered[:, self._order] = w
            total += (block.dense @ ordered.unsqueeze(2)).squeeze(2)[:, self._order]
        return self.backward(total)

    @cached_property
    def _order(self) -> Tensor:
        """Where the elements of one sample lie, in the order of `layout`."""
        shape = self.batch_dim.first(self.like).shape
        numbers = torch.arange(shape[1:].numel(), device=self.like.device).view(1, *shape[1:])
        return self.layout(self.batch_dim.back(numbers.expand(shape)).unsqueeze(0))[0, 0]

    @property
    def _chunk(self) -> int:
        """How many columns' gradients are held at once."""
        return max(1, HELD // (self.batch_dim.count * self.size))

    def diagonal(self, block: Block) -> Tensor:
        """The diagonal of `Jᵀ K J`, like w."""
        parts = [self.factor(core, columns).view(self.shape) for core, columns in block.factors]
        parts += [2 * self.cross(left, right).view(self.shape) for left, right in block.crosses]
        if block.diagonal is not None:
            parts.append(self.squares(block.diagonal))
        if block.dense is not None:
            parts.append(self.dense(block.dense))
        return (
            torch.stack(parts).sum(0)
            if parts
            else torch.zeros_like(self.backward(self.batch_dim.flat(self.like)))
        )
