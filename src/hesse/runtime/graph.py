"""Walk autograd's graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.autograd.graph import Node


def nodes(outputs: Iterable[Tensor]) -> Iterator[Node]:
    """Every node that the outputs were computed by, once, in no particular order."""
    seen: set[Node] = set()
    stack = [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(after for after, _ in node.next_functions)
