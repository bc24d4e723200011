"""What the estimators of trace and diagonal have in common: values of which the mean is taken.

For a matrix B that is close to A, and random signs ω, `base + deviation` with

    trace:      base = tr B,    deviation = ω'(A - B)ω
    diagonal:   base = diag B,  deviation = ω ⊙ (A - B)ω

has the right mean, and a spread that only what B lacks makes. B is made of products too; a vector that it was
made of is compared with the B made of all others.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

Kind = Literal["trace", "diagonal"]


class Moments:
    """Mean and standard error of values [..., count] that come in parts, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> Moments:
        """With more values; this one stays as it is."""
        both, new = Moments(), values.shape[-1]
        values = values.double()
        mean = values.mean(-1) if new else self.mean
        squares = (values - mean.unsqueeze(-1)).square().sum(-1) if new else self._squares
        both.count = self.count + new
        if self.count and new:
            step = mean - self.mean
            squares = self._squares + squares + step.square() * (self.count * new / both.count)
            mean = self.mean + step * (new / both.count)
        both.mean, both._squares = mean, squares
        return both

    @property
    def standard_error(self) -> Tensor:
        """Of the mean; infinite for a single value."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.inf)
        return (self._squares / (self.count * (self.count - 1))).sqrt()


class Samples(Protocol):
    """Base and deviations, from products that grow in number."""

    @property
    def method(self) -> str:
        """The name of what was done."""

    def grow(self, products: int) -> None:
        """Take products until there are so many in all."""

    def result(self) -> tuple[Tensor, Tensor]:
        """Value and standard error, in float64."""
