"""Take several products in one pass, and what to do where that does not work."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hesse.runtime.chunks import ChunkSize
from hesse.runtime.progress import Progress


def batched(
    product: Callable[..., Sequence[Tensor]], vectors: Sequence[Tensor], chunks: ChunkSize
) -> Sequence[Tensor] | None:
    """`product` for every entry of the vectors' first dimension, results stacked by it too.

    Returns:
        None when the chunk has to be made smaller, which `chunks` then knows.
    """
    count = len(vectors[0])
    try:
        if count == 1:
            return [result.unsqueeze(0) for result in product(*(vector[0] for vector in vectors))]
        with loops_allowed():  # `chunks` finds out whether they pay
            return torch.vmap(lambda *vectors: tuple(product(*vectors)))(*vectors)
    except torch.OutOfMemoryError:
        if not chunks.halve():
            raise
        torch.cuda.empty_cache()
    except Exception as error:
        if count == 1:
            raise
        if "can't allocate memory" in str(error):  # what the CPU's allocator raises
            chunks.halve()
        else:  # an operation refuses batching; product by product it has no say
            chunks.forbid()
    return None


def stacks(
    product: Callable[..., Sequence[Tensor]],
    seeds: Callable[[range], Sequence[Tensor]],
    total: int,
    chunks: ChunkSize,
    progress: Progress,
) -> Iterator[tuple[range, Sequence[Tensor]]]:
    """`product` for `total` seeds (some tensors each), in chunks; what is done with one is in its time."""
    start = 0
    while start < total:
        numbers = range(start, min(start + chunks.size, total))
        with chunks.room.watched(len(numbers)):
            some = seeds(numbers)
            began = clock(some[0])
            found = batched(product, some, chunks)
        if found is None:
            continue
        yield numbers, found
        start = numbers.stop
        chunks.report(len(numbers), clock(some[0]) - began, regime=None)
        progress.advance(len(numbers))


@contextmanager
def loops_allowed() -> Iterator[None]:
    """Leave out torch's warning of operations that `torch.vmap` batches by a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def clock(tensor: Tensor) -> float:
    """Seconds, after all that is queued on the tensor's device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
