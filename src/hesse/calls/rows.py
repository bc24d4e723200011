"""Calls that take rows of a tensor by themselves, in closed form: norms and softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hesse.calls.elementwise import Elementwise
from hesse.calls.local import Added, Local
from hesse.calls.table import canonical
from hesse.curvature.terms import Cross, Diagonal, Factor, Term
from hesse.tape.record import Call, Value
from hesse.tape.samples import Samples


@dataclass
class Bend:
    """The second derivative of every row: `diag(d) + c x xᵀ + p qᵀ + q pᵀ`.

    Attributes:
        diagonal: d, [N, R, d].
        square: c, [N, R], and x, [N, R, d].
        mutual: p and q, [N, R, d].
    """

    diagonal: Tensor
    square: tuple[Tensor, Tensor] | None = None
    mutual: tuple[Tensor, Tensor] | None = None


class RowWise(Local):
    """A call of one input whose rows do not touch: [N, R, d], R rows of d elements in every sample.

    Attributes:
        outer: how many columns the second derivative of a row has beside its diagonal.
    """

    outer: int

    def __init__(self, call: Call, value: Value, samples: Samples, dim: int | None, size: int = 0) -> None:
        """Rows lie along dimension `dim` of the input, or are runs of `size` elements behind the samples."""
        super().__init__(call, [value], {value: samples})
        self._place = samples
        self._size = size if dim is None else value.tensor.shape[dim]
        rest = samples.first(value.tensor.detach()).shape[1:]
        axis = len(rest) - 1
        if dim is not None:
            behind = samples.count > 1 and dim > samples.dim
            axis = dim + (1 if samples.outer * samples.inner > 1 else -1) * behind
        self._moved = torch.empty(rest, device="meta").movedim(axis, -1).shape
        self._axis = axis

    def rows(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """A tensor like the input as [*lead, N, R, d]."""
        first = self._place.first(tensor, lead)
        return first.movedim(lead + 1 + self._axis, -1).reshape(*first.shape[: lead + 1], -1, self._size)

    def like_input(self, rows: Tensor, lead: int = 0) -> Tensor:
        """The inverse of `rows`."""
        moved = rows.reshape(*rows.shape[: lead + 1], *self._moved)
        return self._place.back(moved.movedim(-1, lead + 1 + self._axis), lead)

    def added(self) -> Added:
        """A diagonal, and few columns for every row."""
        return [self.inputs], self.outer * sum(self._width(value) // self._size for value in self.inputs)

    def pull_rows(self, stack: Tensor) -> Tensor:
        """Cotangents [r, N, R, d] times the Jacobian."""
        raise NotImplementedError

    def bend(self, adjoint: Tensor) -> Bend:
        """The second derivative of every row, for an adjoint like the result."""
        raise NotImplementedError

    def square_rows(self, k: Tensor) -> Tensor:
        """Diagonals [N, R, d] of the result's curvature times the squared Jacobian."""
        raise NotImplementedError

    def squares(self, k: Tensor) -> Tensor:
        """A diagonal of the result's curvature, like the result, times the squared Jacobian."""
        return self.like_input(self.square_rows(self.rows(k)))

    def bent(self, adjoint: Tensor) -> Tensor:
        """The diagonal of the second derivative."""
        bend = self.bend(adjoint)
        total = bend.diagonal
        if bend.square is not None:
            weight, column = bend.square
            total = total + weight.unsqueeze(-1) * column.square()
        if bend.mutual is not None:
            one, other = bend.mutual
            total = total + 2 * one * other
        return self.like_input(total)

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """In closed form."""
        (stack,), (value,) = columns, self.inputs
        assert stack is not None
        return {value: self.like_input(self.pull_rows(self.rows(stack, 1)), 1)}

    def curvature(self, adjoints: Sequence[Tensor | None]) -> Iterator[Term]:
        """A diagonal, and few columns for every row."""
        (adjoint,), (value,) = adjoints, self.inputs
        if adjoint is None:
            return
        bend = self.bend(adjoint)
        yield Diagonal(self.like_input(bend.diagonal), {value: None})
        if bend.square is not None:
            weight, column = bend.square
            yield Factor(weight, {value: self._apart(column)})
        if bend.mutual is not None:
            one, other = map(self._apart, bend.mutual)
            yield Cross(len(one), {value: one}, {value: other})

    def _apart(self, column: Tensor) -> Tensor:
        """A column [N, R, d] as a stack of R, each of which is zero in all rows but one."""
        return self.like_input(torch.diag_embed(column.transpose(1, 2)).permute(3, 0, 2, 1), 1)


class Softmax(RowWise):
    r"""$y = \mathrm{softmax}(u)$: with $w = y (g - \langle g, y \rangle)$, H is `diag(w) - w yᵀ - y wᵀ`."""

    outer = 1

    @cached_property
    def _y(self) -> Tensor:
        return self.rows(self.call.arguments[0].detach()).softmax(-1)

    def pull_rows(self, stack: Tensor) -> Tensor:
        """See `RowWise`."""
        along = torch.einsum("knrd,nrd->knr", stack, self._y)
        return (stack - along.unsqueeze(-1)).mul_(self._y)

    def bend(self, adjoint: Tensor) -> Bend:
        """See `RowWise`."""
        (w,) = self.pull_rows(self.rows(adjoint).unsqueeze(0))
        return Bend(w, mutual=(self._y, -w))

    def square_rows(self, k: Tensor) -> Tensor:
        r"""Of $J_{ci} = y_c (\delta_{ci} - y_i)$."""
        weighted = k * self._y.square()
        return weighted * (1 - 2 * self._y) + self._y.square() * weighted.sum(-1, keepdim=True)

    @property
    def unit(self) -> tuple[Tensor, Tensor]:
        """First and second derivative of every element by its own input, like the input."""
        y = self.like_input(self._y)
        return y * (1 - y), y * (1 - y) * (1 - 2 * y)


class LogSoftmax(Softmax):
    r"""With y the softmax: $J^T g = g - y \sum g$, and H is $-\sum g$ times `diag(y) - y yᵀ`."""

    outer = 1

    def pull_rows(self, stack: Tensor) -> Tensor:
        """See `RowWise`."""
        return stack - self._y * stack.sum(-1, keepdim=True)

    def bend(self, adjoint: Tensor) -> Bend:
        """See `RowWise`."""
        total = self.rows(adjoint).sum(-1)
        return Bend(-total.unsqueeze(-1) * self._y, (total, self._y))

    def square_rows(self, k: Tensor) -> Tensor:
        r"""Of $J_{ci} = \delta_{ci} - y_i$."""
        return k * (1 - 2 * self._y) + self._y.square() * k.sum(-1, keepdim=True)

    @property
    def unit(self) -> tuple[Tensor, Tensor]:
        """See `Softmax`."""
        y = self.like_input(self._y)
        return 1 - y, -y * (1 - y)


class CrossEntropy(RowWise):
    r"""Cross entropy, $-\langle t, \log \mathrm{softmax}(u) \rangle$ with targets t for every row.

    With y the softmax and $m = \sum t$, the gradient is $m y - t$ and H is m times `diag(y) - y yᵀ`. Weights,
    smoothing and what is ignored are all in t, so m is taken from the gradients at two other points.
    """

    outer = 1

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """By autograd."""
        return Local.pull(self, columns)

    def bend(self, adjoint: Tensor) -> Bend:
        """See `RowWise`."""
        (value,) = self.inputs
        even = torch.zeros_like(self.rows(value.tensor.detach()))
        lifted = even.clone()
        lifted[..., 0] = math.log(self._size)
        step = self._gradient(lifted, adjoint) - self._gradient(even, adjoint)
        moved = lifted.softmax(-1) - even.softmax(-1)
        m = (step * moved).sum(-1) / moved.square().sum(-1).clamp_min(torch.finfo(moved.dtype).tiny)
        y = self.rows(self.call.arguments[0].detach()).softmax(-1)
        return Bend(m.unsqueeze(-1) * y, (-m, y))

    def _gradient(self, rows: Tensor, adjoint: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = self.like_input(rows).detach().requires_grad_()
            result = self.call.again([leaf, *self.call.arguments[1:]])
        return self.rows(torch.autograd.grad(result, leaf, adjoint)[0])


class Normalised(RowWise):
    r"""Rows, centred or not, divided by their size, then scaled and shifted by parameters.

    With P the centring (or nothing), s the size, $x = P u / s$, $q = P g$ and $m = \langle q, x \rangle / d$,

    $$J^T g = (q - m x) / s, \qquad H = \bigl(3 m\, x x^T / d - (q x^T + x q^T) / d - m P \bigr) / s^2.$$
    """

    outer = 2

    def __init__(self, call: Call, value: Value, samples: Samples, norm: Norm) -> None:
        super().__init__(call, value, samples, None, norm.size)
        self.norm, self._centred = norm, norm.centred
        u = self._projected(self.rows(norm.input))
        self._s = (u.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        self._x = u / self._s

    def spread(self) -> Iterator[tuple[Value, Tensor, int]]:
        """Weight and bias."""
        return self.norm.spread(self.like_input(self._x))

    def _projected(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(-1, keepdim=True) if self._centred else rows

    def curvature(self, adjoints: Sequence[Tensor | None]) -> Iterator[Term]:
        """The scale is linear."""
        return super().curvature([None if g is None else self.norm.scaled(g) for g in adjoints])

    def pull_rows(self, stack: Tensor) -> Tensor:
        """See `RowWise`."""
        scaled = stack * self._slope
        along = torch.einsum("knrd,nrdb->knrb", scaled, self._basis)
        return scaled.sub_(torch.einsum("knrb,nrdb->knrd", along, self._basis))

    @cached_property
    def _slope(self) -> Tensor:
        """The weight over the size of a row."""
        return self.rows(self.norm.scaled(torch.ones_like(self.norm.input))) / self._s

    @cached_property
    def _basis(self) -> Tensor:
        """What J takes out of a row: [N, R, d, 1 or 2]."""
        out = [self._x, torch.ones_like(self._x)] if self._centred else [self._x]
        return torch.stack(out, -1) / math.sqrt(self._size)

    def bend(self, adjoint: Tensor) -> Bend:
        """See `RowWise`; the first part is `x pᵀ + p xᵀ` with `p = 3/2 m x - q`."""
        x, q, square = self._x, self._projected(self.rows(adjoint)), self._s.square()
        m = (q * x).mean(-1, keepdim=True)
        mutual = x, (1.5 * m * x - q) / (self._size * square)
        mean = (m / (self._size * square)).squeeze(-1), torch.ones_like(x)
        return Bend((-m / square).expand_as(x), mean if self._centred else None, mutual)

    def squares(self, k: Tensor) -> Tensor:
        """Through the scale first."""
        return super().squares(self.norm.scaled(self.norm.scaled(k)))

    def square_rows(self, k: Tensor) -> Tensor:
        r"""Of $J_{ci} = (\delta_{ci} - (a + x_c x_i) / d) / s$, where a is one if rows are centred."""
        x, a = self._x, float(self._centred)
        total, first, second = (part.sum(-1, keepdim=True) for part in (k, k * x, k * x.square()))
        squared = (a * (total + 2 * x * first) + x.square() * second) / self._size**2
        return (k - 2 * k * (a + x.square()) / self._size + squared) / self._s.square()


@dataclass
class Norm:
    """What a norm was called with.

    Attributes:
        input: its contents.
        size: elements of a row.
        weight: a tensor, a value that requires grad, or None; likewise `bias`.
        trailing: dimensions of the input behind those of weight and bias.
    """

    input: Tensor
    size: int
    weight: Tensor | Value | None
    bias: Tensor | Value | None
    eps: float
    trailing: int = 0
    centred: bool = True

    def scaled(self, stack: Tensor) -> Tensor:
        """Times the weight."""
        if self.weight is None:
            return stack
        weight = self.weight.tensor if isinstance(self.weight, Value) else self.weight
        return stack * weight.detach().view(*weight.shape, *(1,) * self.trailing)

    def spread(self, normalised: Tensor) -> Iterator[tuple[Value, Tensor, int]]:
        """Weight and bias with their slopes."""
        for parameter, slope in ((self.weight, normalised), (self.bias, torch.ones_like(normalised))):
            if isinstance(parameter, Value):
                yield parameter, slope, self.trailing


@dataclass
class Statistics:
    """The running statistics of a batch norm, to be broadcast over its input."""

    norm: Norm
    mean: Tensor
    deviation: Tensor


class FixedNorm(Elementwise):
    """Batch norm by running statistics: every channel is scaled and shifted."""

    def __init__(self, call: Call, value: Value, samples: Samples, statistics: Statistics) -> None:
        super().__init__(call, [value], {value: samples})
        self._norm, self._deviation = statistics.norm, statistics.deviation
        self._normalised = (self._norm.input - statistics.mean) / self._deviation

    @cached_property
    def slopes(self) -> dict[Value, Tensor | None]:
        """The same for all samples."""
        slope = self._norm.scaled(torch.ones_like(self._normalised) / self._deviation)
        return dict.fromkeys(self.inputs, slope)

    def squares(self, k: Tensor) -> Tensor:
        """A diagonal of the result's curvature times squared slopes."""
        (slope,) = self.slopes.values()
        assert slope is not None
        return k * slope.square()

    def spread(self) -> Iterator[tuple[Value, Tensor, int]]:
        """Weight and bias."""
        return self._norm.spread(self._normalised)

    def added(self) -> Added:
        """Nothing."""
        return (), 0

    def curvature(self, adjoints: Sequence[Tensor | None]) -> Iterator[Term]:
        """None."""
        return iter(())


def _contents(input: Any) -> Tensor:
    return (input.tensor if isinstance(input, Value) else input).detach()


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Norm:
    return Norm(_contents(input), math.prod(normalized_shape), weight, bias, eps)


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Norm:
    contents = _contents(input)
    eps = torch.finfo(contents.dtype).eps if eps is None else eps
    return Norm(contents, math.prod(normalized_shape), weight, None, eps, centred=False)


def _group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Norm:
    contents = _contents(input)
    return Norm(contents, contents[0].numel() // num_groups, weight, bias, eps, contents.dim() - 2)


def _batch_norm(
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
    if training:
        return None
    contents = _contents(input)
    trailing = contents.dim() - 2
    shape = (-1, *(1,) * trailing)
    norm = Norm(contents, 1, weight, bias, eps, trailing)
    return Statistics(norm, running_mean.view(shape), (running_var + eps).sqrt().view(shape))


def _softmax(input: Any, dim: int | None = None, *_: Any, **__: Any) -> int | None:
    return dim if dim is None else dim % _contents(input).dim()


def _cross_entropy(input: Any, *_: Any, **__: Any) -> int:
    return min(1, _contents(input).dim() - 1)


_CLOSED: dict[str, tuple[Callable[..., Any], Callable[..., Local]]] = {
    "layer_norm": (_layer_norm, Normalised),
    "rms_norm": (_rms_norm, Normalised),
    "group_norm": (_group_norm, Normalised),
    "batch_norm": (_batch_norm, FixedNorm),
    "softmax": (_softmax, Softmax),
    "log_softmax": (_softmax, LogSoftmax),
    "cross_entropy": (_cross_entropy, CrossEntropy),
}


def closed_form(call: Call, inputs: Sequence[Value], samples: Mapping[Value, Samples]) -> Local | None:
    """The call in closed form, if there is one: a norm or softmax of a live value alone, in one precision."""
    value = call.inputs.get(0)
    others = [held for position, held in call.inputs.items() if position > 0]
    name = canonical(call.name)
    if (
        name not in _CLOSED
        or value is None
        or value not in samples
        or any(held in samples for held in others)
        or len({v.tensor.dtype for v in (value, *others, *call.outputs)}) > 1
    ):
        return None
    signature, made = _CLOSED[name]
    read = call.read_by(signature)
    place = samples[value]
    if read is None or (isinstance(read, int) and place.count > 1 and read == place.dim):
        return None  # rows of samples: these touch
    found = made(call, value, place, read)
    found.inputs, found.samples = list(inputs), samples
    return found
