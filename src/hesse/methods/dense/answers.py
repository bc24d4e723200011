"""What questions keep of rows of the Hessian, which come in chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hesse.look.gradient import Gradient
from hesse.methods.base import Blocks, Question
from hesse.probe import Probe, random_signs


@dataclass(frozen=True)
class Schedule:
    """How the products are taken, and with that what is assumed.

    Attributes:
        symmetric: take one triangle and copy it to the other.
        batched: take several products in one pass.
    """

    symmetric: bool
    batched: bool

    def __str__(self) -> str:
        return ("by one triangle " if self.symmetric else "") + (
            "in batches" if self.batched else "product by product"
        )


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one tensor in a chunk: `start` to `stop`, found at `offset` in the chunk."""

    tensor: int
    start: int
    stop: int
    offset: int

    @property
    def count(self) -> int:
        return self.stop - self.start


def width_of(question: Question, gradient: Gradient) -> int:
    """Bytes of a row of the answer, at most."""
    sizes = [leaf.numel() * leaf.dtype.itemsize for leaf in gradient.leaves]
    return sum(sizes) if question == "hessian" else max(sizes)


class _Buffer:
    """Rows that arrive in order: copied into the answer's memory, or joined to keep their graph."""

    def __init__(self, shape: tuple[int, ...], like: Tensor, keep_graph: bool) -> None:
        self._memory = None if keep_graph else like.detach().new_empty(shape)
        self._pieces: list[Tensor] = []

    def put(self, start: int, rows: Tensor) -> None:
        if self._memory is None:
            self._pieces.append(rows)
        else:
            self._memory[start : start + len(rows)] = rows

    def result(self) -> Tensor:
        return torch.cat(self._pieces) if self._memory is None else self._memory


class Rows(Protocol):
    """What is kept of rows.

    Attributes:
        create_graph: keep the graph of the rows.
        kept: bytes of a row that are kept.
    """

    create_graph: bool
    kept: int

    def columns(self, chunk: list[Piece]) -> list[int]:
        """The tensors by which these rows are needed."""

    def store(self, piece: Piece, column: int, rows: Tensor) -> None:
        """Take rows [k, *shape of column]."""


class Answer(Rows, Protocol):
    """What a question keeps of the rows."""

    def __init__(
        self, gradient: Gradient, schedule: Schedule, create_graph: bool, rows: list[int], known: Blocks
    ) -> None: ...

    def finish(self) -> list[Any]:
        """The answer's parts."""

    def probes(self) -> list[Probe]:
        """What to certify; called after `finish`."""


class PartOfHessian:
    """Some columns of rows.

    Attributes:
        by: the tensors of the columns.
    """

    def __init__(
        self,
        gradient: Gradient,
        rows: Mapping[int, Tensor],
        columns: Mapping[int, Tensor],
        create_graph: bool,
    ) -> None:
        leaves = gradient.leaves
        self.create_graph, self._columns = create_graph, columns
        self.by = [j for j in columns if leaves[j].requires_grad]
        self.kept = sum(len(columns[j]) * leaves[j].dtype.itemsize for j in self.by)
        self._buffers = {
            (i, j): _Buffer((len(numbers), len(columns[j])), leaves[j], create_graph)
            for i, numbers in rows.items()
            if i in gradient.curved
            for j in self.by
        }

    def columns(self, chunk: list[Piece]) -> list[int]:
        return self.by

    def store(self, piece: Piece, column: int, rows: Tensor) -> None:
        self._buffers[piece.tensor, column].put(
            piece.start, rows.reshape(len(rows), -1)[:, self._columns[column]]
        )

    def finish(self) -> dict[tuple[int, int], Tensor]:
        return {pair: buffer.result() for pair, buffer in self._buffers.items()}


class AllBlocks:
    """All blocks [i][j]."""

    def __init__(
        self, gradient: Gradient, schedule: Schedule, create_graph: bool, rows: list[int], known: Blocks
    ) -> None:
        self._leaves, self._symmetric, self.create_graph = gradient.leaves, schedule.symmetric, create_graph
        self.kept = width_of("hessian", gradient)
        active = [j for j, leaf in enumerate(gradient.leaves) if leaf.requires_grad and leaf.numel()]
        self._found = sorted({i for i, _ in known})  # answered by another method
        self._columns = sorted([*rows, *self._found]) if schedule.symmetric else active
        self._blocks = {
            (i, j): _Buffer((self._leaves[i].numel(), self._leaves[j].numel()), self._leaves[j], create_graph)
            for i in rows
            for j in self._columns
            if i <= j or j in self._found or not (schedule.symmetric and create_graph)
        }
        self._matrices: dict[tuple[int, int], Tensor] = dict(known)

    def columns(self, chunk: list[Piece]) -> list[int]:
        first = chunk[0].tensor
        return [j for j in self._columns if j >= first or j in self._found or not self._symmetric]

    def store(self, piece: Piece, column: int, rows: Tensor) -> None:
        if piece.tensor <= column or column in self._found or not self._symmetric:
            self._blocks[piece.tensor, column].put(piece.start, rows.reshape(len(rows), -1))

    def finish(self) -> list[list[Tensor]]:
        for (i, j), buffer in self._blocks.items():
            if self._symmetric and i > j and j not in self._found:
                buffer.put(0, self._matrices[j, i].T)
            self._matrices[i, j] = buffer.result()
        if self._symmetric:
            for i, j in list(self._matrices):
                self._matrices.setdefault((j, i), self._matrices[i, j].T)
        return [
            [
                self._matrices[i, j].reshape((*row.shape, *column.shape))
                if (i, j) in self._matrices
                else column.detach().new_zeros((*row.shape, *column.shape))
                for j, column in enumerate(self._leaves)
            ]
            for i, row in enumerate(self._leaves)
        ]

    def probes(self) -> list[Probe]:
        rows = sorted({i for i, _ in self._matrices})
        signs = random_signs([self._leaves[i] for i in rows])
        columns = sorted({j for _, j in self._matrices})
        computed = []
        for j in columns:
            total = torch.zeros_like(self._leaves[j].detach().flatten())
            for i, sign in zip(rows, signs, strict=True):
                if (i, j) in self._matrices:
                    total += sign.flatten().to(total.dtype) @ self._matrices[i, j].detach()
            computed.append(total.view_as(self._leaves[j]))
        norm = math.hypot(*(_norm(matrix) for matrix in self._matrices.values()))
        return [Probe(rows, columns, signs, computed, norm)] if rows else []


class DiagonalBlocks:
    """The blocks [i][i]."""

    def __init__(
        self, gradient: Gradient, schedule: Schedule, create_graph: bool, rows: list[int], known: Blocks
    ) -> None:
        self._leaves, self.create_graph = gradient.leaves, create_graph
        self.kept = width_of("blocks", gradient)
        self._buffers = {
            i: _Buffer((self._leaves[i].numel(),) * 2, self._leaves[i], create_graph) for i in rows
        }
        self._matrices = {i: matrix for (i, _), matrix in known.items()}

    def columns(self, chunk: list[Piece]) -> list[int]:
        return [piece.tensor for piece in chunk]

    def store(self, piece: Piece, column: int, rows: Tensor) -> None:
        if column == piece.tensor:
            self._buffers[column].put(piece.start, rows.reshape(len(rows), -1))

    def finish(self) -> list[Tensor]:
        self._matrices.update({i: buffer.result() for i, buffer in self._buffers.items()})
        return [
            self._matrices[i].reshape((*leaf.shape, *leaf.shape))
            if i in self._matrices
            else leaf.detach().new_zeros((*leaf.shape, *leaf.shape))
            for i, leaf in enumerate(self._leaves)
        ]

    def probes(self) -> list[Probe]:
        signs = random_signs([self._leaves[i] for i in self._matrices])
        return [
            Probe(
                [i],
                [i],
                [sign],
                [(sign.flatten() @ matrix.detach()).view_as(sign)],
                _norm(matrix),
            )
            for sign, (i, matrix) in zip(signs, self._matrices.items(), strict=True)
        ]


class Diagonals:
    """The diagonals of the blocks [i][i]; of all other entries only what the check needs is kept."""

    def __init__(
        self, gradient: Gradient, schedule: Schedule, create_graph: bool, rows: list[int], known: Blocks
    ) -> None:
        self._leaves, self.create_graph, self.kept = gradient.leaves, create_graph, 0
        self._buffers = {i: _Buffer((self._leaves[i].numel(),), self._leaves[i], create_graph) for i in rows}
        signs = random_signs([self._leaves[i] for i in rows])
        self._signs = dict(zip(rows, signs, strict=True))
        self._computed = {i: torch.zeros_like(sign).flatten() for i, sign in self._signs.items()}
        self._norms = dict.fromkeys(rows, 0.0)
        self._known = {i: part for (i, _), part in known.items()}

    def columns(self, chunk: list[Piece]) -> list[int]:
        return [piece.tensor for piece in chunk]

    def store(self, piece: Piece, column: int, rows: Tensor) -> None:
        if column != piece.tensor:
            return
        rows = rows.reshape(len(rows), -1)
        self._buffers[column].put(piece.start, rows.diagonal(piece.start))
        rows = rows.detach()
        self._computed[column] += self._signs[column].flatten()[piece.start : piece.stop] @ rows
        self._norms[column] = math.hypot(self._norms[column], _norm(rows))

    def finish(self) -> list[Tensor]:
        found = {**self._known, **{i: buffer.result() for i, buffer in self._buffers.items()}}
        return [
            found[i].view(leaf.shape) if i in found else torch.zeros_like(leaf.detach())
            for i, leaf in enumerate(self._leaves)
        ]

    def probes(self) -> list[Probe]:
        return [
            Probe([i], [i], [sign], [self._computed[i].view_as(sign)], self._norms[i])
            for i, sign in self._signs.items()
        ]


ANSWERS: dict[Question, type[Answer]] = {
    "hessian": AllBlocks,
    "blocks": DiagonalBlocks,
    "diagonal": Diagonals,
}


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix.detach()))
