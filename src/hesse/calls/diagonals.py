r"""One call by itself where curvature is only a diagonal.

With k the diagonal at the results of a call $\varphi$, g the adjoints and J the Jacobian, the diagonal by its
inputs u is $(J \circ J)^T k + \sum_c g_c\,\partial^2\varphi_c/\partial u^2$. What the table of
calls says makes this one or two vector-Jacobian products; of all other calls the rows of J and of the second
derivative are taken, those together that do not touch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from hesse.calls.local import rerun, slopes_of
from hesse.calls.rows import CrossEntropy, FixedNorm, Normalised, Softmax, closed_form
from hesse.calls.table import Kind, canonical, kind_of
from hesse.tape.record import Call, Value
from hesse.tape.samples import ONE_SAMPLE

SELECTING = {
    *("expand", "expand_as", "repeat", "tile", "pad", "constant_pad_nd", "unfold", "tril", "triu"),
    *("index_select", "gather", "getitem", "cumsum", "sum", "cat", "stack", "hstack", "vstack"),
    *("max_pool1d", "max_pool2d", "max_pool3d"),
}
"""Calls, beside views, whose Jacobians hold zeros and ones only; `tests/test_approximate.py` checks it."""

HELD = 2**22
"""How many numbers of rows are held at once."""

_APART = (Kind.ELEMENTWISE, Kind.PIECEWISE, Kind.SEPARABLE)
_STRAIGHT = (Kind.VIEW, Kind.LINEAR, Kind.PIECEWISE, Kind.BILINEAR)

Diagonals = dict[Value, Tensor]
Product = Callable[[Tensor], Tensor]


def with_diagonals(call: Call, units: bool) -> AnyCall:
    """The call in closed form, if there is one. `units`: a softmax is one function for every unit."""
    first = call.inputs.get(0)
    closed = None if first is None else closed_form(call, [first], {first: ONE_SAMPLE})
    if isinstance(closed, (Normalised, FixedNorm)):
        return _Norm(call, closed)
    if isinstance(closed, Softmax):
        return _Softmax(call, closed, units)
    if isinstance(closed, CrossEntropy):
        return _CrossEntropy(call, closed, units)
    return AnyCall(call)


class AnyCall:
    """A call with nothing but its row of the table.

    Attributes:
        inputs: the values that it is a function of, each once.
        kind: what is known of it.
    """

    def __init__(self, call: Call) -> None:
        self.call, self.kind = call, kind_of(call)
        self.inputs = list(dict.fromkeys(call.inputs.values()))
        repeated = len(self.inputs) < len(call.inputs)
        shapes = {value.tensor.shape for value in self.inputs}
        if (self.kind is Kind.BILINEAR and repeated) or (self.kind is Kind.SEPARABLE and len(shapes) > 1):
            self.kind = Kind.GENERAL

    def squares(self, given: Sequence[Tensor | None]) -> Diagonals:
        """Diagonals of the results by squared Jacobians; None is zero."""
        if self.kind is Kind.VIEW or canonical(self.call.name) in SELECTING:
            return self._pulled(given)
        if self.kind is Kind.BILINEAR:
            return self._by_squared_operands(given)
        if self.kind in _APART:
            (k,) = given
            assert k is not None
            return {v: self._onto(v, slope.detach().square() * k) for v, slope in self._slopes.items()}
        ones = self._pulled([torch.ones_like(v.tensor) for v in self.call.outputs], onto=False)
        pulled = self._pulled(given, onto=False)
        return {
            value: self._onto(value, ones[value] * pulled[value])
            if self._enters_once(value, ones[value])
            else self._by_rows(value, given)
            for value in self.inputs
        }

    def bends(self, adjoints: Sequence[Tensor | None]) -> Diagonals:
        """The second derivatives of `<adjoints, call>` by single elements of the inputs."""
        if self.kind in _STRAIGHT:
            return {}
        leaves, results = self._again
        if self.kind in _APART:
            (adjoint,) = adjoints
            return {
                value: self._onto(value, _product(slope, leaves[value])(adjoint.expand_as(slope)))
                for value, slope in self._slopes.items()
                if adjoint is not None and slope.requires_grad
            }
        made, seeds = _both(results, adjoints)
        if not made:
            return {}
        with torch.enable_grad():
            slopes = torch.autograd.grad(
                made, list(leaves.values()), seeds, create_graph=True, materialize_grads=True
            )
        return {
            value: self._onto(value, _diagonal(_product(slope, leaf), slope))
            for (value, leaf), slope in zip(leaves.items(), slopes, strict=True)
            if slope.requires_grad
        }

    @cached_property
    def _slopes(self) -> Diagonals:
        """Of a call of single elements: the derivative by each, with a graph."""
        return slopes_of(*self._again)

    def _pulled(self, vectors: Sequence[Tensor | None], onto: bool = True) -> Diagonals:
        """`Jᵀ` times vectors; without `onto`, by inputs broadcast to the result."""
        leaves, results = self._again
        made, given = _both(results, vectors)
        found = torch.autograd.grad(
            made, list(leaves.values()), given, retain_graph=True, materialize_grads=True
        )
        pairs = zip(leaves, found, strict=True)
        return {value: self._onto(value, part) if onto else part for value, part in pairs}

    def _by_squared_operands(self, given: Sequence[Tensor | None]) -> Diagonals:
        """An entry of the Jacobian is one element of the other operand: the product with its squares."""
        arguments = [
            a.detach().square() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in self.call.arguments
        ]
        leaves = {value: arguments[position] for position, value in self.call.inputs.items()}
        with torch.enable_grad():
            for leaf in leaves.values():
                leaf.requires_grad_()
            result = self.call.again(arguments)
        return dict(zip(leaves, torch.autograd.grad(result, list(leaves.values()), given), strict=True))

    def _enters_once(self, value: Value, ones: Tensor) -> bool:
        """Does every element of the input enter one element of the results alone?

        Only then is $(J^T r)^2 = (J^T 1)(J^T r^2)$ for any r, and then it is so for diagonals.
        """
        if sum(v.tensor.numel() for v in self.call.outputs) == 1:
            return True
        some = [_random(v.tensor) for v in self.call.outputs]
        one = self._pulled(some, onto=False)[value].square()
        other = ones * self._pulled([r.square() for r in some], onto=False)[value]
        return torch.allclose(one, other, 1e3 * torch.finfo(one.dtype).eps, 0.0)

    def _by_rows(self, value: Value, given: Sequence[Tensor | None]) -> Tensor:
        """Every row of the Jacobian, squared."""
        leaves, results = self._again
        leaf = leaves[value]
        total = torch.zeros_like(leaf)
        for result, k in zip(results, given, strict=True):
            if k is None:
                continue
            product = _product(result, leaf)
            shared = _untouched(product, result, leaf)
            over = [d for d in range(result.dim()) if d not in shared]
            across = [size if d in shared else 1 for d, size in enumerate(leaf.shape)]
            for seeds in _one_hot(result, shared):
                weights = (seeds * k).sum([1 + d for d in over], keepdim=True)
                rows = torch.vmap(product)(seeds)
                total = total + (rows.square() * weights.view(len(seeds), *across)).sum(0)
        return self._onto(value, total)

    def _onto(self, value: Value, part: Tensor) -> Tensor:
        """Undo broadcasting, and a change of precision."""
        return part.sum_to_size(value.tensor.shape).to(value.tensor.dtype)

    @cached_property
    def _again(self) -> tuple[dict[Value, Tensor], list[Tensor]]:
        broadcast = self.kind in (Kind.ELEMENTWISE, Kind.PIECEWISE)
        return rerun(self.call, self.inputs, self.call.outputs[0].tensor.shape if broadcast else None)


class _Norm(AnyCall):
    """A norm of rows, or by running statistics, with its weight and bias."""

    def __init__(self, call: Call, closed: Normalised | FixedNorm) -> None:
        super().__init__(call)
        self._closed = closed

    def squares(self, given: Sequence[Tensor | None]) -> Diagonals:
        (k,), (value,) = given, self._closed.inputs
        assert k is not None
        found = {value: self._closed.squares(k)}
        for parameter, slope, trailing in self._closed.spread():
            shape = parameter.tensor.shape
            total = (slope.square() * k).sum_to_size(*shape, *(1,) * trailing)
            found[parameter] = total.view(shape)
        return found

    def bends(self, adjoints: Sequence[Tensor | None]) -> Diagonals:
        (adjoint,), (value,) = adjoints, self._closed.inputs
        if adjoint is None or isinstance(self._closed, FixedNorm):
            return {}
        return {value: self._closed.bent(self._closed.norm.scaled(adjoint))}


class _Softmax(AnyCall):
    """Softmax or its logarithm, of rows or, as `units`, one function of every element by itself."""

    def __init__(self, call: Call, closed: Softmax, units: bool) -> None:
        super().__init__(call)
        self._closed, self._units = closed, units

    def squares(self, given: Sequence[Tensor | None]) -> Diagonals:
        (k,), (value,) = given, self.inputs
        assert k is not None
        if not self._units:
            return {value: self._closed.squares(k)}
        slope, _ = self._closed.unit
        return {value: k * slope.square()}

    def bends(self, adjoints: Sequence[Tensor | None]) -> Diagonals:
        (adjoint,), (value,) = adjoints, self.inputs
        if adjoint is None:
            return {}
        return {value: adjoint * self._closed.unit[1] if self._units else self._closed.bent(adjoint)}


class _CrossEntropy(AnyCall):
    """Cross entropy by its logits; with `units`, of a logarithm of softmax for every unit by itself."""

    def __init__(self, call: Call, closed: CrossEntropy, units: bool) -> None:
        super().__init__(call)
        self._closed, self._units = closed, units

    def bends(self, adjoints: Sequence[Tensor | None]) -> Diagonals:
        (adjoint,), (value,) = adjoints, self._closed.inputs
        if adjoint is None:
            return {}
        if not self._units:
            return {value: self._closed.bent(adjoint)}
        bend = self._closed.bend(adjoint)
        assert bend.square is not None
        y = bend.square[1]
        t = bend.diagonal - self._closed.rows(self._pulled(adjoints)[value])
        return {value: self._closed.like_input(t * y * (1 - y))}  # the diagonal is m y, the gradient m y - t


def _both(
    results: Sequence[Tensor], vectors: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results with their vectors, without those that have none."""
    pairs = [(r, v) for r, v in zip(results, vectors, strict=True) if v is not None]
    return tuple(r for r, _ in pairs), tuple(v for _, v in pairs)


def _product(result: Tensor, leaf: Tensor) -> Product:
    """A vector times the derivative of a result by a leaf."""

    def product(vector: Tensor) -> Tensor:
        return torch.autograd.grad(result, leaf, vector, retain_graph=True, materialize_grads=True)[0]

    return product


def _diagonal(product: Product, like: Tensor) -> Tensor:
    """The diagonal of a symmetric matrix."""
    total = torch.zeros_like(like)
    if bool(product(_random(like)).any()):
        for seeds in _one_hot(like, _untouched(product, like, like)):
            total = total + (seeds * torch.vmap(product)(seeds)).sum(0)
    return total


def _untouched(product: Product, rows: Tensor, columns: Tensor) -> set[int]:
    """The dimensions along which a matrix only couples what has the same index.

    To scale a vector along such a dimension is to scale its product.
    """
    vector = _random(rows)
    whole = product(vector)
    found = set()
    for d, (size, other) in enumerate(zip(rows.shape, columns.shape, strict=False)):
        if size == other:
            factors = _random(rows.new_empty(size)).abs() + 0.5
            scaled = product(vector * factors.view(size, *(1,) * (rows.dim() - d - 1)))
            expected = whole * factors.view(size, *(1,) * (columns.dim() - d - 1))
            eps = torch.finfo(whole.dtype).eps
            if bool((scaled - expected).norm() <= eps**0.5 * 0.1 * expected.norm()):
                found.add(d)
    return found


def _one_hot(like: Tensor, shared: set[int]) -> Iterator[Tensor]:
    """Stacks of vectors that are one at one place, and everywhere along the shared dimensions."""
    sizes = [1 if d in shared else size for d, size in enumerate(like.shape)]
    count = math.prod(sizes)
    for numbers in torch.arange(count, device=like.device).split(max(1, HELD // max(1, like.numel()))):
        ones = like.new_zeros(len(numbers), count)
        ones[torch.arange(len(numbers), device=like.device), numbers] = 1
        yield ones.view(-1, *sizes).expand(-1, *like.shape)


def _random(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(like.shape, generator=generator).to(like)
