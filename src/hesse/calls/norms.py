"""Norms in closed form: of rows, and by running statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hesse.calls.elementwise import Scaling
from hesse.calls.facts import Map, Point, squared_parameters
from hesse.calls.rows import ClosedRows, RowBend, RowHessian, only_input
from hesse.tape.record import Value
from hesse.tape.replay import content


@dataclass
class Norm:
    """What a norm was called with.

    Attributes:
        input: its contents.
        size: elements of a row.
        weight: a tensor, a value that requires grad, or None; likewise `bias`.
        lead: dimensions of the input that rows do not extend over.
        trailing: dimensions of the input behind those of weight and bias.
    """

    input: Tensor
    size: int
    weight: Tensor | Value | None
    bias: Tensor | Value | None
    eps: float
    lead: int
    trailing: int = 0
    centred: bool = True

    def scaled(self, stack: Tensor) -> Tensor:
        """Times the weight."""
        if self.weight is None:
            return stack
        weight = content(self.weight)
        return stack * weight.view(*weight.shape, *(1,) * self.trailing)

    def spread(self, normalised: Tensor) -> Iterator[tuple[Value, Tensor, int]]:
        """Weight and bias with their slopes."""
        for parameter, slope in ((self.weight, normalised), (self.bias, torch.ones_like(normalised))):
            if isinstance(parameter, Value):
                yield parameter, slope, self.trailing


class Normalised(ClosedRows):
    r"""Rows, centred or not, divided by their size, then scaled and shifted by parameters.

    With P the centring (or nothing), s the size, $x = P u / s$, $q = P g$ and $m = \langle q, x \rangle / d$,

    $$J^T g = (q - m x) / s, \qquad H = \bigl(3 m\, x x^T / d - (q x^T + x q^T) / d - m P \bigr) / s^2.$$
    """

    def __init__(self, point: Point, norm: Norm) -> None:
        super().__init__(point, None, norm.size)
        self.norm = norm

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Where the input alone is live, and rows do not extend over samples."""
        value = only_input(point)
        if value is None:
            return None
        place, norm = point.samples[value], point.read
        return None if place.count > 1 and place.dim >= norm.lead else cls(point, norm)

    @cached_property
    def _centred(self) -> Tensor:
        return self.projected(self.rows(self.norm.input))

    @cached_property
    def s(self) -> Tensor:
        """The size of every row."""
        return (self._centred.square().mean(-1, keepdim=True) + self.norm.eps).sqrt()

    @cached_property
    def x(self) -> Tensor:
        """The rows, normalised."""
        return self._centred / self.s

    def projected(self, rows: Tensor) -> Tensor:
        """P times rows."""
        return rows - rows.mean(-1, keepdim=True) if self.norm.centred else rows

    def spread(self) -> Iterator[tuple[Value, Tensor, int]]:
        """Weight and bias."""
        return self.norm.spread(self.like_input(self.x))

    def pull_rows(self, stack: Tensor) -> Tensor:
        """See above; in place of P, what it takes out of a row."""
        scaled = stack * self._slope
        along = torch.einsum("knrd,nrdb->knrb", scaled, self._basis)
        return scaled.sub_(torch.einsum("knrb,nrdb->knrd", along, self._basis))

    @cached_property
    def _slope(self) -> Tensor:
        """The weight over the size of a row."""
        return self.rows(self.norm.scaled(torch.ones_like(self.norm.input))) / self.s

    @cached_property
    def _basis(self) -> Tensor:
        """What J takes out of a row: [N, R, d, 1 or 2]."""
        out = [self.x, torch.ones_like(self.x)] if self.norm.centred else [self.x]
        return torch.stack(out, -1) / math.sqrt(self.size)

    def squares(self, k: Tensor) -> Tensor:
        """Through the scale first."""
        return super().squares(self.norm.scaled(self.norm.scaled(k)))

    def square_rows(self, k: Tensor) -> Tensor:
        r"""Of $J_{ci} = (\delta_{ci} - (a + x_c x_i) / d) / s$, where a is one if rows are centred."""
        x, a = self.x, float(self.norm.centred)
        total, first, second = (part.sum(-1, keepdim=True) for part in (k, k * x, k * x.square()))
        squared = (a * (total + 2 * x * first) + x.square() * second) / self.size**2
        return (k - 2 * k * (a + x.square()) / self.size + squared) / self.s.square()


class NormalisedBend(RowBend):
    """The second derivative of `Normalised`; its scale is linear."""

    outer = 2

    def of_rows(self, adjoint: Tensor) -> RowHessian:
        """See `Normalised`; the first part is `x pᵀ + p xᵀ` with `p = 3/2 m x - q`."""
        first = self.rows
        x, q, square = first.x, first.projected(first.rows(first.norm.scaled(adjoint))), first.s.square()
        m = (q * x).mean(-1, keepdim=True)
        mutual = x, (1.5 * m * x - q) / (first.size * square)
        mean = (m / (first.size * square)).squeeze(-1), torch.ones_like(x)
        return RowHessian((-m / square).expand_as(x), mean if first.norm.centred else None, mutual)


@dataclass
class Statistics:
    """The running statistics of a batch norm, to be broadcast over its input."""

    norm: Norm
    mean: Tensor
    deviation: Tensor


class Standardised(Scaling):
    """Batch norm by running statistics: every channel is scaled and shifted."""

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self._norm, self._deviation = point.read.norm, point.read.deviation

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Where the input alone is live, and the statistics are not its own."""
        return None if only_input(point) is None or point.read is None else cls(point)

    @cached_property
    def _normalised(self) -> Tensor:
        normalised: Tensor = (self._norm.input - self.point.read.mean) / self._deviation
        return normalised

    @cached_property
    def slopes(self) -> dict[Value, Tensor | None]:
        """The same for all samples."""
        return {self.point.call.inputs[0]: self._slope}

    @cached_property
    def _slope(self) -> Tensor:
        slope: Tensor = self._norm.scaled(torch.ones_like(self._norm.input) / self._deviation)
        return slope

    @property
    def _fits(self) -> bool:
        return True

    def squared(self, given: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Of the input, and of weight and bias."""
        (k,) = given
        assert k is not None
        return {self.point.call.inputs[0]: k * self._slope.square()} | squared_parameters(self, k)

    def spread(self) -> Iterator[tuple[Value, Tensor, int]]:
        """Weight and bias."""
        found: Iterator[tuple[Value, Tensor, int]] = self._norm.spread(self._normalised)
        return found


def read_layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Norm:
    """As `torch.nn.functional.layer_norm` and `torch.layer_norm` have their arguments."""
    read = content(input)
    return Norm(read, math.prod(normalized_shape), weight, bias, eps, read.dim() - len(normalized_shape))


def read_rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Norm:
    """As `torch.nn.functional.rms_norm`."""
    read = content(input)
    eps = torch.finfo(read.dtype).eps if eps is None else eps
    lead = read.dim() - len(normalized_shape)
    return Norm(read, math.prod(normalized_shape), weight, None, eps, lead, centred=False)


def read_group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Norm:
    """As `torch.nn.functional.group_norm`."""
    read = content(input)
    return Norm(read, read[0].numel() // num_groups, weight, bias, eps, 1, read.dim() - 2)


def read_batch_norm(
    input: Any,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Statistics | None:
    """As `torch.nn.functional.batch_norm`; None in training, where samples touch."""
    if training:
        return None
    read = content(input)
    trailing = read.dim() - 2
    shape = (-1, *(1,) * trailing)
    norm = Norm(read, 1, weight, bias, eps, read.dim(), trailing)
    return Statistics(norm, running_mean.view(shape), (running_var + eps).sqrt().view(shape))
