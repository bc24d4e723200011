"""Some coordinates of a problem: the rows or columns of a partial Hessian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hesse.errors import ArgumentError, StructureMismatchError
from hesse.problem import Problem


@dataclass(frozen=True)
class Chosen:
    """Some coordinates of one tensor.

    Attributes:
        tensor: its index among those of the problem.
        numbers: of the coordinates, as the tensor lies when it is flat; one may be there twice.
        shape: of the tensor, indexed by the caller's index.
    """

    tensor: int
    numbers: Tensor
    shape: torch.Size


@dataclass(frozen=True)
class Selection:
    """Coordinates, and the container that the caller named them in.

    Attributes:
        chosen: those of each tensor, in the container's order.
        spec: the container.
        order: where each coordinate that the caller named is among these, one tensor behind the other; None
            where they are in order.
    """

    chosen: Sequence[Chosen]
    spec: pytree.TreeSpec
    order: Tensor | None = None

    @cached_property
    def numbers(self) -> dict[int, Tensor]:
        """The coordinates of every tensor that has some."""
        return {c.tensor: c.numbers for c in self.chosen if c.numbers.numel()}

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(c.numbers.numel() for c in self.chosen)


@dataclass(frozen=True)
class Part:
    """Rows and columns of a partial Hessian."""

    rows: Selection
    columns: Selection

    @property
    def size(self) -> tuple[int, int]:
        """How many rows and columns."""
        return self.rows.count, self.columns.count

    @property
    def tensors(self) -> set[int]:
        """The tensors that have some of either."""
        return self.rows.numbers.keys() | self.columns.numbers.keys()


def part_of(problem: Problem, rows: Any, columns: Any, square: bool, flat: bool) -> Part | None:
    """The part that a caller asks for; None for the whole Hessian.

    Raises:
        ArgumentError: an index that does not fit, or `square` without rows, or beside columns.
    """
    if square and (rows is None or columns is not None):
        raise ArgumentError("square=True takes the same columns as rows: pass rows, and no columns")
    if rows is None and columns is None:
        return None
    chosen = _selection(problem, "rows", rows, flat)
    return Part(chosen, chosen if square else _selection(problem, "columns", columns, flat))


@dataclass(frozen=True)
class _Pair:
    """A tensor's index among the problem's, and the caller's index into it."""

    tensor: int
    index: Any


def _selection(problem: Problem, argument: str, index: Any, flat: bool) -> Selection:
    """What an index, or a container of some, chooses of the problem's tensors; None is all of them."""
    tensors = pytree.tree_unflatten(list(range(len(problem.tensors))), problem.spec)
    if index is None:
        held = pytree.tree_map(lambda i: _Pair(i, ...), tensors)
    elif flat and not isinstance(tensors, int) and not _is_container(index):
        return _by_number(problem, argument, index)
    else:
        held = _matched(argument, index, tensors)
    pairs, spec = pytree.tree_flatten(held)
    return Selection([_chosen(problem, argument, pair) for pair in pairs], spec)


def _is_container(index: Any) -> bool:
    """Is it one of indices, and not an index itself?"""
    if isinstance(index, Mapping):
        return True
    return isinstance(index, (tuple, list)) and not all(isinstance(i, int) for i in index)


def _matched(argument: str, index: Any, tensors: Any) -> Any:
    """Every index beside its tensor, in a container like the caller's."""
    if isinstance(tensors, int):
        return _Pair(tensors, index)
    named = isinstance(tensors, Mapping)
    if isinstance(index, Mapping):
        for key in index:
            if not (key in tensors if named else isinstance(key, int) and 0 <= key < len(tensors)):
                raise ArgumentError(f"{argument} names {key!r}, which the inputs do not have")
        return {key: _matched(argument, value, tensors[key]) for key, value in index.items()}
    if named or not isinstance(index, (tuple, list)) or len(index) != len(tensors):
        met = type(index).__name__ + (f" of {len(index)}" if isinstance(index, (tuple, list)) else "")
        raise StructureMismatchError(
            f"{argument} must be a container like the inputs, with an index for every tensor, or a dict with "
            f"one for some of them by {'name' if named else 'position'}; met {met}"
        )
    found = [_matched(argument, one, other) for one, other in zip(index, tensors, strict=True)]
    return type(tensors)(*found) if hasattr(tensors, "_fields") else type(tensors)(found)


def _chosen(problem: Problem, argument: str, pair: _Pair) -> Chosen:
    tensor, name = problem.tensors[pair.tensor], problem.names[pair.tensor]
    whole = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    picked = _indexed(argument, whole, pair.index, name)
    return Chosen(pair.tensor, picked.flatten(), picked.shape)


def _by_number(problem: Problem, argument: str, index: Any) -> Selection:
    """An index into all coordinates, one tensor behind the other."""
    whole = torch.arange(problem.parameters, device=problem.tensors[0].device)
    picked = _indexed(argument, whole, index, "the inputs as one vector").flatten()
    ascending, order = picked.sort(stable=True)
    found, start = [], 0
    for i, size in enumerate(problem.sizes):
        own = ascending[(ascending >= start) & (ascending < start + size)] - start
        found.append(Chosen(i, own, own.shape))
        start += size
    return Selection(found, problem.spec, order.argsort())


def _indexed(argument: str, numbers: Tensor, index: Any, name: str) -> Tensor:
    if index is None:
        raise ArgumentError(
            f"{argument} holds None, which is no index: slice(None) takes all of a tensor, [] nothing"
        )
    if numbers.dim() == 0 and index == []:
        return numbers.new_zeros(0)
    if numbers.dim() == 0 and index == slice(None):
        return numbers
    if isinstance(index, (list, range)):
        truth = len(index) > 0 and isinstance(index[0], bool)
        index = torch.tensor(list(index), dtype=torch.bool if truth else torch.long)
    if isinstance(index, Tensor):
        if index.is_floating_point() or index.is_complex():
            raise ArgumentError(
                f"{argument} must hold integers, booleans or slices, met a tensor of {index.dtype}"
            )
        index = index.to(numbers.device)
    try:
        return numbers[index]
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"{argument} does not fit {name} of shape {list(numbers.shape)}: {error}; it is used as in "
            f"tensor[index], for every tensor by itself or, with flat=True, for all as one vector"
        ) from error
