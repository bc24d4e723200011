"""The dense method: one product a coordinate, batched. Right for every function.

Row r of the Hessian is the derivative of the r-th gradient entry, so a chunk of rows is one backward
pass over the graph of the gradient with a batch of one-hot vectors. Batching is by `torch.vmap`
around plain `torch.autograd.grad` on a graph that is built once: no function transform meets the
caller's code.

Only what the question needs is differentiated. For the full Hessian, rows of a tensor are taken by
that tensor and those after it, and the rest follows by symmetry; for diagonals and blocks, by the
tensor itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hesse.look.gradient import Gradient
from hesse.look.meter import CHUNK, Cost, Meter
from hesse.probe import Probe, random_signs
from hesse.runtime.batches import batched, clock
from hesse.runtime.chunks import ChunkSize
from hesse.runtime.memory import bytes_per_column
from hesse.runtime.progress import Progress


@dataclass(frozen=True)
class Way:
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


def ways(question: str, gradient: Gradient) -> list[Way]:
    """The ways to take, the fastest first; each later one assumes less."""
    plain = [Way(symmetric=False, batched=True), Way(symmetric=False, batched=False)]
    if question == "hessian" and gradient.symmetric:
        return [Way(symmetric=True, batched=True), *plain]
    return plain


def costs(question: str, meter: Meter, workspace: int, joined: bool = False) -> dict[int, Cost]:
    """What the rows of every tensor take.

    `joined`: other tensors are answered by another method, so that rows of a full Hessian have all columns.
    """
    gradient = meter.gradient
    leaves = gradient.leaves
    first = {i: gradient.first_uses.get(i, 0) for i in gradient.curved}
    everything = sum(leaf.numel() * leaf.dtype.itemsize for leaf in leaves)
    found = {}
    for i in (i for i in first if leaves[i].numel()):
        rows, whole = leaves[i].numel(), question == "hessian"
        # For the full Hessian a row is taken by this tensor and those after it.
        since = min(use for j, use in first.items() if j >= i or joined) if whole else first[i]
        width = everything if whole else rows * leaves[i].dtype.itemsize
        held = meter.column + 2 * width
        limit = max(1, min(CHUNK, workspace // held))
        found[i] = meter.products(rows, since, gradient.made(i), held, limit) + meter.arithmetic(
            0, 6 * rows * width
        )
    return found


@dataclass(frozen=True)
class Outcome:
    """What a run computed: one entry per tensor (per pair of tensors), and what to check of it."""

    parts: list[Any]
    probes: list[Probe]


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


def run(
    question: str,
    meter: Meter,
    way: Way,
    progress: Progress,
    create_graph: bool = False,
    check: bool = True,
    known: Mapping[Any, Tensor] | None = None,
) -> Outcome:
    """Answer "hessian", "blocks" or "diagonal", with as many products at a time as are fast and fit.

    `known`: what another method has found for some tensors, joined here with the rest: diagonals by the
    tensor's index, or matrices by a pair of indices.
    """
    gradient, known = meter.gradient, known or {}
    found = {key if isinstance(key, int) else key[0] for key in known}
    rows = [i for i in gradient.curved_beside(found) if gradient.leaves[i].numel()]
    answer = _ANSWERS[question](gradient, way, create_graph, rows, known)
    _fill(answer, {i: _all(gradient, i) for i in rows}, _width(question, gradient), meter, way, progress)
    parts = answer.finish()
    return Outcome(parts, answer.probes() if check else [])


def rows(
    part: Numbers,
    columns: Numbers,
    meter: Meter,
    way: Way,
    progress: Progress,
    create_graph: bool = False,
) -> dict[tuple[int, int], Tensor]:
    """Some rows of the Hessian by some columns, as matrices by the tensors of both; none where it is zero.

    `part` and `columns`: numbers of coordinates, by their tensor.
    """
    gradient = meter.gradient
    answer = _Part(gradient, part, columns, create_graph)
    own = {i: numbers for i, numbers in part.items() if i in gradient.curved}
    width = sum(gradient.leaves[j].numel() * gradient.leaves[j].dtype.itemsize for j in columns)
    if own and answer.by:
        _fill(answer, own, width, meter, way, progress)
    return answer.finish()


Numbers = Mapping[int, Tensor]
"""Of coordinates, by their tensor."""


def turned(rows: Numbers, columns: Numbers, gradient: Gradient) -> tuple[Numbers, Numbers, bool]:
    """Rows and columns, exchanged where the Hessian is symmetric and that takes fewer products."""
    one, other = (sum(map(len, side.values())) for side in (rows, columns))
    return (columns, rows, True) if gradient.symmetric and other < one else (rows, columns, False)


def _all(gradient: Gradient, index: int) -> Tensor:
    return torch.arange(gradient.leaves[index].numel(), device=gradient.leaves[index].device)


def _fill(
    answer: _Rows,
    numbers: Mapping[int, Tensor],
    width: int,
    meter: Meter,
    way: Way,
    progress: Progress,
) -> None:
    """Give the answer rows of some tensors, in chunks.

    `numbers`: of the rows' coordinates, by their tensor; `width`: bytes of a row, at most.
    """
    gradient = meter.gradient
    sizes = {i: len(own) for i, own in numbers.items()}
    if not sizes:
        return
    # A row exists twice for a moment: as the pass returns it and in the answer's layout.
    room = meter.fit(_column(gradient) + 2 * width)
    if not way.batched:
        room.lower(1)
    chunks = ChunkSize(room, sum(sizes.values()), meter.product)
    pending = list(numbers)
    row = 0  # of the first pending tensor
    while pending:
        chunk = _next_chunk(pending, sizes, row, chunks.size)
        columns = answer.columns(chunk)
        last = chunk[-1]
        done = last.offset + last.count
        with room.watched(done):
            began = clock(gradient.value)
            found = _products(gradient, chunk, numbers, columns, chunks, answer.create_graph)
            if found is None:  # the chunk was too large, or cannot be batched: now it is smaller
                continue
            for j, block in zip(columns, found, strict=True):
                for piece in chunk:
                    answer.store(piece, j, block[piece.offset : piece.offset + piece.count])
            seconds = clock(gradient.value) - began
            del found
        room.keep(done * answer.kept)
        chunks.report(done, seconds, regime=chunk[0].tensor)
        progress.advance(done)
        row = last.stop if last.stop < sizes[last.tensor] else 0
        pending = pending[len(chunk) - (row > 0) :]


def _width(question: str, gradient: Gradient) -> int:
    """Bytes of a row of the answer, at most."""
    sizes = [leaf.numel() * leaf.dtype.itemsize for leaf in gradient.leaves]
    return sum(sizes) if question == "hessian" else max(sizes)


def _column(gradient: Gradient) -> int:
    """Bytes that a product holds at its peak, for every column of a batch."""
    return bytes_per_column([part for i in gradient.curved if (part := gradient.parts[i]) is not None])


def _next_chunk(pending: list[int], sizes: dict[int, int], row: int, limit: int) -> list[Piece]:
    """Rows of the first tensor from `row` on, then whole further tensors while they fit."""
    first = pending[0]
    chunk = [Piece(first, row, min(sizes[first], row + limit), 0)]
    filled = chunk[0].count
    if chunk[0].stop == sizes[first]:
        for i in pending[1:]:
            if filled + sizes[i] > limit:
                break
            chunk.append(Piece(i, 0, sizes[i], filled))
            filled += sizes[i]
    return chunk


def _products(
    gradient: Gradient,
    chunk: list[Piece],
    numbers: Mapping[int, Tensor],
    columns: list[int],
    chunks: ChunkSize,
    create_graph: bool,
) -> Sequence[Tensor] | None:
    """Rows of the chunk by the columns' tensors; None when the chunk has to be made smaller."""
    count = chunk[-1].offset + chunk[-1].count
    rows = [piece.tensor for piece in chunk]
    return batched(
        lambda *vectors: gradient.product(vectors, rows, columns, create_graph),
        [_one_hot(gradient.leaves[piece.tensor], piece, numbers[piece.tensor], count) for piece in chunk],
        chunks,
    )


def _one_hot(leaf: Tensor, piece: Piece, numbers: Tensor, count: int) -> Tensor:
    vectors = torch.zeros(count, leaf.numel(), dtype=leaf.dtype, device=leaf.device)
    places = torch.arange(piece.offset, piece.offset + piece.count, device=leaf.device)
    vectors[places, numbers[piece.start : piece.stop]] = 1
    return vectors.view((count, *leaf.shape))


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


class _Rows(Protocol):
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


class _Answer(_Rows, Protocol):
    """What a question keeps of the rows."""

    def __init__(
        self, gradient: Gradient, way: Way, create_graph: bool, rows: list[int], known: Mapping[Any, Tensor]
    ) -> None: ...

    def finish(self) -> list[Any]:
        """The answer's parts."""

    def probes(self) -> list[Probe]:
        """What to certify; called after `finish`."""


class _Part:
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


class _Hessian:
    """All blocks [i][j]."""

    def __init__(
        self, gradient: Gradient, way: Way, create_graph: bool, rows: list[int], known: Mapping[Any, Tensor]
    ) -> None:
        self._leaves, self._symmetric, self.create_graph = gradient.leaves, way.symmetric, create_graph
        self.kept = _width("hessian", gradient)
        active = [j for j, leaf in enumerate(gradient.leaves) if leaf.requires_grad and leaf.numel()]
        self._found = sorted({i for i, _ in known})  # answered by another method
        self._columns = sorted([*rows, *self._found]) if way.symmetric else active
        self._blocks = {
            (i, j): _Buffer((self._leaves[i].numel(), self._leaves[j].numel()), self._leaves[j], create_graph)
            for i in rows
            for j in self._columns
            if i <= j or j in self._found or not (way.symmetric and create_graph)
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


class _Blocks:
    """The blocks [i][i]."""

    def __init__(
        self, gradient: Gradient, way: Way, create_graph: bool, rows: list[int], known: Mapping[Any, Tensor]
    ) -> None:
        self._leaves, self.create_graph = gradient.leaves, create_graph
        self.kept = _width("blocks", gradient)
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


class _Diagonal:
    """The diagonals of the blocks [i][i]; of all other entries only what the check needs is kept."""

    def __init__(
        self, gradient: Gradient, way: Way, create_graph: bool, rows: list[int], known: Mapping[Any, Tensor]
    ) -> None:
        self._leaves, self.create_graph, self.kept = gradient.leaves, create_graph, 0
        self._buffers = {i: _Buffer((self._leaves[i].numel(),), self._leaves[i], create_graph) for i in rows}
        signs = random_signs([self._leaves[i] for i in rows])
        self._signs = dict(zip(rows, signs, strict=True))
        self._computed = {i: torch.zeros_like(sign).flatten() for i, sign in self._signs.items()}
        self._norms = dict.fromkeys(rows, 0.0)
        self._known = known

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


_ANSWERS: dict[str, type[_Answer]] = {
    "hessian": _Hessian,
    "blocks": _Blocks,
    "diagonal": _Diagonal,
}


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix.detach()))
