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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesse.look.gradient import Gradient
from hesse.look.meter import Meter
from hesse.methods.base import Blocks, Numbers, Question
from hesse.methods.dense.answers import ANSWERS, PartOfHessian, Piece, Rows, Schedule, width_of
from hesse.probe import Probe
from hesse.runtime.batches import batched, clock
from hesse.runtime.chunks import ChunkSize
from hesse.runtime.progress import Progress


def schedules(question: Question, gradient: Gradient) -> list[Schedule]:
    """How products may be taken, the fastest first; each later one assumes less."""
    plain = [Schedule(symmetric=False, batched=True), Schedule(symmetric=False, batched=False)]
    if question == "hessian" and gradient.symmetric:
        return [Schedule(symmetric=True, batched=True), *plain]
    return plain


@dataclass(frozen=True)
class Outcome:
    """What a run computed: one entry per tensor (per pair of tensors), and what to check of it."""

    parts: list[Any]
    probes: list[Probe]


def run(
    question: Question,
    meter: Meter,
    schedule: Schedule,
    progress: Progress,
    create_graph: bool = False,
    check: bool = True,
    known: Blocks | None = None,
) -> Outcome:
    """Answer "hessian", "blocks" or "diagonal", with as many products at a time as are fast and fit.

    `known`: what another method has found for some tensors, joined here with the rest.
    """
    gradient, known = meter.gradient, known or {}
    found = {i for i, _ in known}
    rows = [i for i in gradient.curved_beside(found) if gradient.leaves[i].numel()]
    answer = ANSWERS[question](gradient, schedule, create_graph, rows, known)
    width, there = width_of(question, gradient), sum(block.nbytes for block in known.values())
    _fill(answer, {i: _all(gradient, i) for i in rows}, width, meter, schedule, progress, there)
    parts = answer.finish()
    return Outcome(parts, answer.probes() if check else [])


def rows(
    part: Numbers,
    columns: Numbers,
    meter: Meter,
    schedule: Schedule,
    progress: Progress,
    create_graph: bool = False,
) -> Blocks:
    """Some rows of the Hessian by some columns, as matrices by the tensors of both; none where it is zero.

    `part` and `columns`: numbers of coordinates, by their tensor.
    """
    gradient = meter.gradient
    answer = PartOfHessian(gradient, part, columns, create_graph)
    own = {i: numbers for i, numbers in part.items() if i in gradient.curved}
    width = sum(gradient.leaves[j].numel() * gradient.leaves[j].dtype.itemsize for j in columns)
    if own and answer.by:
        _fill(answer, own, width, meter, schedule, progress)
    return answer.finish()


def turned(rows: Numbers, columns: Numbers, gradient: Gradient) -> tuple[Numbers, Numbers, bool]:
    """Rows and columns, exchanged where the Hessian is symmetric and that takes fewer products."""
    one, other = (sum(map(len, side.values())) for side in (rows, columns))
    return (columns, rows, True) if gradient.symmetric and other < one else (rows, columns, False)


def _all(gradient: Gradient, index: int) -> Tensor:
    return torch.arange(gradient.leaves[index].numel(), device=gradient.leaves[index].device)


def _fill(
    answer: Rows,
    numbers: Mapping[int, Tensor],
    width: int,
    meter: Meter,
    schedule: Schedule,
    progress: Progress,
    there: int = 0,
) -> None:
    """Give the answer rows of some tensors, in chunks.

    `numbers`: of the rows' coordinates, by their tensor; `width`: bytes of a row, at most; `there`: of the
    answer, how much is known.
    """
    gradient = meter.gradient
    sizes = {i: len(own) for i, own in numbers.items()}
    if not sizes:
        return
    # A row exists twice for a moment: as the pass returns it and in the answer's layout.
    room = meter.fit(meter.column + 2 * width, there)
    if not schedule.batched:
        room.lower(1)
    chunks = meter.sizes.search(room, sum(sizes.values()), meter.product)
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
