"""Where the samples are in a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """The place of `count` samples in a tensor: dimension `dim`, of size `outer * count * inner`.

    Without a dimension the whole tensor is one sample.
    """

    count: int = 1
    dim: int = -1
    outer: int = 1
    inner: int = 1

    def first(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """The tensor as [*lead, count, *rest], after `lead` leading dimensions that are not its own."""
        if self.count == 1:
            return tensor.unsqueeze(lead)
        at = lead + self.dim
        if self.outer == self.inner == 1:
            return tensor.movedim(at, lead)
        split = (*tensor.shape[:at], self.outer, self.count, self.inner, *tensor.shape[at + 1 :])
        return tensor.reshape(split).movedim(at + 1, lead)

    def some(self, tensor: Tensor, numbers: Tensor) -> Tensor:
        """Only the samples of these numbers, as [len(numbers), *rest]."""
        return self.first(tensor).index_select(0, numbers)

    def flat(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """The tensor as [*lead, count, f], with a row for every sample."""
        first = self.first(tensor, lead)
        return first.reshape(*first.shape[: lead + 1], -1)

    def back(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """The inverse of `first`."""
        if self.count == 1:
            return tensor.squeeze(lead)
        at = lead + self.dim
        if self.outer == self.inner == 1:
            return tensor.movedim(lead, at)
        return tensor.movedim(lead, at + 1).flatten(at, at + 2)

    def narrow(self, tensor: Tensor, numbers: range, lead: int = 0) -> Tensor:
        """Some of the samples of a tensor, as they lie there."""
        at = lead + self.dim
        if self.outer > 1:
            tensor = tensor.unflatten(at, (self.outer, -1))
            return self._run_of(tensor, numbers, at + 1).flatten(at, at + 1)
        return self._run_of(tensor, numbers, at)

    def _run_of(self, tensor: Tensor, numbers: range, dim: int) -> Tensor:
        return tensor.narrow(dim, numbers.start * self.inner, len(numbers) * self.inner)

    def without(self, dim: int) -> Samples:
        """In a tensor that lacks a dimension, which is not theirs."""
        return replace(self, dim=self.dim - (self.dim > dim))

    def times(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """Every sample times a factor of its own, [count]."""
        first = self.first(tensor)
        return self.back(first * factors.to(first).view(-1, *(1,) * (first.dim() - 1)))

    def numbered(self, shape: torch.Size) -> Tensor:
        """A tensor of this shape that holds the number of the sample everywhere."""
        first = self.first(torch.empty(shape, device="meta"))
        numbers = torch.arange(self.count, dtype=torch.float64)
        return self.back(numbers.view(-1, *(1,) * (first.dim() - 1)).expand(first.shape)).contiguous()

    def narrowed(self, numbers: range) -> Samples:
        """Where these samples are once a tensor holds only them."""
        return replace(self, count=len(numbers)) if len(numbers) > 1 else ONE_SAMPLE


ONE_SAMPLE = Samples()


def possible(shape: torch.Size, count: int) -> Iterator[Samples]:
    """The places that a tensor has for samples: flattened with others, they are in front or behind."""
    for dim, size in enumerate(shape):
        if size and size % count == 0:
            others = size // count
            yield Samples(count, dim, 1, others)
            if others > 1:
                yield Samples(count, dim, others, 1)


def place_of(numbers: Tensor, count: int) -> Samples:
    """Where samples are in a tensor that holds their numbers; one sample, if not apart or not all there."""
    for place in possible(numbers.shape, count):
        if torch.equal(place.numbered(numbers.shape).to(numbers), numbers):
            return place
    return ONE_SAMPLE


def most(places: Mapping[Any, Samples]) -> int:
    """How many samples there are, where they have not been joined."""
    return max((place.count for place in places.values()), default=1)
