"""What a batch of data is: moved, handed to a model, counted, told from others and cut in two.

A batch is a pair of inputs and targets, or anything else as a whole: a dict or an object like one (what the
tokenisers of transformers give), a tensor, a batch of graphs.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hesse.errors import ArgumentError

Count = Callable[[Any], int]
"""How many samples are in a batch."""


def is_pair(batch: Any) -> bool:
    """Is it inputs and targets?"""
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def is_batch(data: Any) -> bool:
    """Is it one batch, and not several? Of two things in a row, it is one if either is a tensor."""
    if isinstance(data, (tuple, list)):
        return is_pair(data) and any(isinstance(part, Tensor) for part in data)
    return isinstance(data, (Tensor, Mapping, UserDict)) or hasattr(data, "to")


def moved(batch: Any, device: torch.device) -> Any:
    """The batch on a device."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device)
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, (Mapping, UserDict)):
        return {key: moved(part, device) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [moved(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def called(model: nn.Module, batch: Any) -> Any:
    """What the model gives of a batch's inputs: spread over its arguments where they are several."""
    inputs = batch[0] if is_pair(batch) else batch
    if isinstance(inputs, (Mapping, UserDict)):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def targets(batch: Any) -> Any:
    """What a loss takes beside the model's output: the targets of a pair, or the whole batch."""
    return batch[1] if is_pair(batch) else batch


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors in a batch, as far as they can be seen."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from tensors(part)
    else:
        yield from (leaf for leaf in pytree.tree_leaves(_plain(batch)) if isinstance(leaf, Tensor))


def counted(batch: Any, samples: Count | None) -> int:
    """How many samples it has: by a rule, or the leading dimension of its targets, else its first tensor."""
    if samples is not None:
        return int(samples(batch))
    graphs = getattr(batch, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    for part in (targets(batch), batch):
        first = next((tensor for tensor in tensors(part) if tensor.dim()), None)
        if first is not None:
            return len(first)
    raise ArgumentError(
        f"how many samples a batch of data has cannot be told of a {type(batch).__name__}; pass "
        f"samples=, a function of a batch that gives their number"
    )


def form(batch: Any) -> Hashable:
    """What batches of the same form have in common."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors(batch))


def cut(batch: Any, count: int) -> tuple[Any, Any] | None:
    """The first samples, and the others; None where the batch has parts that are not cut by samples."""
    plain = _plain(batch)
    leaves = pytree.tree_leaves(plain)
    if not leaves or not all(
        isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count for leaf in leaves
    ):
        return None
    half = count // 2
    first, second = (
        pytree.tree_map(lambda t, s=some: t[s], plain) for some in (slice(half), slice(half, None))
    )
    return first, second


def traits(batch: Any) -> Tensor:
    """Numbers that add up to the same for the same samples, however they lie in batches."""
    found = torch.zeros(3, dtype=torch.float64)
    for tensor in tensors(batch):
        plain = tensor.detach()
        found[0] += tensor.numel()
        found[1] += plain.sum(dtype=torch.float64).cpu()
        if plain.is_floating_point() and plain.numel():
            found[2] += torch.linalg.vector_norm(plain, dtype=torch.float64).square().cpu()
    return found


def _plain(batch: Any) -> Any:
    """Dict-like objects as dicts."""
    if isinstance(batch, (Mapping, UserDict)):
        return {key: _plain(part) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_plain(part) for part in batch]
    if not isinstance(batch, Tensor) and hasattr(batch, "to_dict"):  # a batch of graphs
        return batch.to_dict()
    return batch
