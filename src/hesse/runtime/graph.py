"""Walk autograd's graph."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate

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


def variables(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that the outputs were computed from."""
    return [node.variable for node in nodes(outputs) if hasattr(node, "variable")]


def size(node: Node) -> int:
    """Bytes of the gradients that come into a node."""
    return sum(math.prod(meta.shape) * meta.dtype.itemsize for meta in getattr(node, "_input_metadata", ()))


class Spans:
    """Number and bytes of the nodes of a graph by the time they were made.

    A backward pass from one place of the graph to another runs the nodes made between the two.
    """

    def __init__(self, outputs: Iterable[Tensor]) -> None:
        found = sorted((made(node), size(node)) for node in nodes(outputs) if made(node) < _LEAF)
        self._times = [time for time, _ in found]
        self._bytes = [0, *accumulate(bytes_ for _, bytes_ in found)]

    def between(self, first: int, last: int) -> tuple[int, int]:
        """Number and bytes of the nodes made from `first` to `last`."""
        start, stop = bisect_left(self._times, first), bisect_left(self._times, last + 1)
        return stop - start, self._bytes[stop] - self._bytes[start]


def made(node: Node | None) -> int:
    """When a node was made: later ones have higher numbers."""
    return 0 if node is None else node._sequence_nr()


_LEAF = 1 << 62  # leaves have the highest number
