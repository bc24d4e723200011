"""Is the second derivative that torch gives for a call the derivative of its gradient?

A product of autograd's Hessian is compared with differences of autograd's gradient, in float64, and nothing
of hesse's derivatives is asked. The function is a random linear and a random quadratic form of all results,
so that the derivative of the gradient by what comes from above is compared as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from hesse.probe import norm

Results = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A call as a function of its real differentiable arguments."""

TOLERANCE = 1e-3
"""Relative to the larger of the two; torch's rounding of large complex arguments takes almost that."""

_STEPS = (1e-5, 1e-4, 1e-6, 1e-3, 1e-8)
_BESIDE = (1e-3, 1e-2)  # how far points are moved, relative to their size, where they are at a kink
_COORDINATES = 64  # moved at once in each argument: each of them may cross a kink


class Verdict(Enum):
    """On one call at one point."""

    RIGHT = "right"
    CASTS = "rounds to fewer digits"
    WRONG = "wrong"
    WRONG_HERE = "wrong at one point"
    NONE = "no second derivative"
    FAILS = "no gradient"
    FIRST = "the gradient is wrong already"
    UNSETTLED = "not settled"


@dataclass(frozen=True)
class Judgement:
    """What was found.

    Attributes:
        verdict: about the call.
        off: relative distance of the product from the differences; NaN where there is none.
        note: what torch raised, or where the call was looked at.
    """

    verdict: Verdict
    off: float = math.nan
    note: str = ""


class Combination:
    """A scalar function of the results of a call.

    Attributes:
        dtype: of the results, where they have fewer digits; float64 otherwise.
        magnitude: of all that is summed up.
    """

    def __init__(self, results: Results, inputs: Sequence[Tensor]) -> None:
        self._results = results
        generator = torch.Generator().manual_seed(9)
        self._weights: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.dtype = torch.float64
        self.magnitude = 0.0
        with torch.enable_grad():
            made = results([tensor.detach().requires_grad_() for tensor in inputs])
        for position, result in enumerate(made):
            if result.requires_grad:
                value = _real(result.detach())
                finite = value.isfinite()
                size = _rms(value) or 1.0
                one, two = (random_like(value[finite], generator) for _ in range(2))
                self._weights.append((position, finite, one, two / size))
                self.magnitude += size * math.sqrt(max(1, value.numel()))
                if value.dtype != torch.float64:
                    self.dtype = value.dtype

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The value; zero without a graph where no result has one."""
        total = torch.zeros((), dtype=torch.float64)
        made = self._results(inputs)
        for position, finite, one, two in self._weights:
            chosen = _real(made[position])[finite]
            total = total + (one * chosen).sum() + 0.5 * (two * chosen * chosen).sum()
        return total

    def gradient(
        self, inputs: Sequence[Tensor], create_graph: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Leaves, and the gradient by them."""
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            total = self(*leaves)
            if not total.requires_grad:
                return leaves, [torch.zeros_like(leaf) for leaf in leaves]
            slopes = torch.autograd.grad(total, leaves, create_graph=create_graph, materialize_grads=True)
        return leaves, list(slopes)

    def product(
        self, inputs: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient, and the Hessian times vectors as autograd has it."""
        leaves, slopes = self.gradient(inputs, create_graph=True)
        plain = [slope.detach() for slope in slopes]
        pairs = [(slope, v) for slope, v in zip(slopes, vectors, strict=True) if slope.requires_grad]
        if not pairs:
            return plain, [torch.zeros_like(leaf) for leaf in leaves]
        outputs, cotangents = zip(*pairs, strict=True)
        return plain, list(torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True))


def judge(results: Results, inputs: Sequence[Tensor]) -> Judgement:
    """Compare at the point; where it is at a kink or seems wrong, at points near by as well."""
    found = [_examined(results, inputs)]
    if found[0].verdict in (Verdict.WRONG, Verdict.UNSETTLED):
        for far in _BESIDE:
            found.append(_examined(results, _moved(inputs, far)))
            if found[-1].verdict is Verdict.RIGHT:
                break
    here, last = found[0], found[-1]
    if here is last:
        return here
    if last.verdict is Verdict.RIGHT:
        if here.verdict is Verdict.WRONG:
            return Judgement(Verdict.WRONG_HERE, here.off, "right beside it")
        return Judgement(Verdict.RIGHT, last.off, "beside a kink")
    for verdict in (Verdict.WRONG, Verdict.FIRST):
        same = [judgement for judgement in found if judgement.verdict is verdict]
        if len(same) > 1:
            return same[0]
    return next((judgement for judgement in found if judgement.verdict is Verdict.UNSETTLED), here)


def directions(inputs: Sequence[Tensor]) -> list[Tensor]:
    """A random direction in which some coordinates of every tensor are moved as much as its size allows."""
    generator = torch.Generator().manual_seed(8)
    found = []
    for tensor, size in zip(inputs, _sizes(inputs), strict=True):
        vector = random_like(tensor, generator) * size
        if tensor.numel() > _COORDINATES:
            chosen = torch.randperm(tensor.numel(), generator=generator)[_COORDINATES:]
            vector.view(-1)[chosen] = 0.0
        found.append(vector)
    return found


def differences(combination: Combination, inputs: Sequence[Tensor], step: float) -> list[Tensor]:
    """The derivative of the gradient along `directions`."""
    up, down = _around(combination, inputs, step)
    return [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]


def curvature(combination: Combination, inputs: Sequence[Tensor], step: float) -> float:
    """The second derivative of the value along `directions`, without any gradient."""
    vectors = directions(inputs)
    up, here, down = (
        combination(*(t + sign * step * v for t, v in zip(inputs, vectors, strict=True))).item()
        for sign in (1, 0, -1)
    )
    return (up - 2 * here + down) / step**2


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers, of the shape but not of the strides of a tensor."""
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)


def _examined(results: Results, inputs: Sequence[Tensor]) -> Judgement:
    try:
        return _at(results, inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        return Judgement(Verdict.FAILS, note=_line(error))


def _at(results: Results, inputs: Sequence[Tensor]) -> Judgement:
    combination = Combination(results, inputs)
    combination.gradient(inputs)
    if combination.dtype is not torch.float64:
        return Judgement(Verdict.CASTS, note=f"the result is {combination.dtype}".replace("torch.", ""))
    try:
        slopes, exact = combination.product(inputs, directions(inputs))
    except RuntimeError as error:  # NotImplementedError is one
        return Judgement(Verdict.NONE, note=_line(error))
    if not any(slope.isfinite().any() for slope in slopes):
        return Judgement(Verdict.UNSETTLED, note="the gradient is not finite")
    # What rounding of the point makes of both, unless it is a kink that makes it.
    slopes_near, exact_near = combination.product(_moved(inputs, 2e-15), directions(inputs))
    sizes = _sizes(inputs)  # times these, all parts are of the unit of the value
    level = combination.magnitude + _norm(slopes, sizes)
    shaken = min(_distance(slopes, slopes_near, sizes), 1e-10 * level) + 1e-15 * level
    rounding = _distance(exact, exact_near, sizes)
    shaken_exact = min(rounding, 1e-8 * level) + 1e-12 * level
    tried: list[tuple[float, list[Tensor], float, float]] = []
    for step in _STEPS:
        up, down = _around(combination, inputs, step)
        central = [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]
        bend = [(a + b - 2 * g) / step for a, b, g in zip(up, down, slopes, strict=True)]
        # Where the differences are finite, a NaN of autograd's product must not get lost.
        own = [part.where(other.isfinite(), 0.0) for part, other in zip(exact, central, strict=True)]
        finite = [part.where(part.isfinite(), 0.0) for part in central]
        off, scale = norm(_times(own, finite, sizes)), max(_norm(own, sizes), _norm(finite, sizes))
        noise = 10 * (shaken_exact + shaken / step)
        if off <= TOLERANCE * scale + noise:
            return Judgement(Verdict.RIGHT, off / scale if off > noise else 0.0)
        nearest = min((_distance(central, other, sizes) for _, other, *_ in tried), default=math.inf)
        tried.append((_norm(bend, sizes) + nearest + noise, central, off, scale))
    apart, central, _, scale = min(tried, key=lambda one: one[0])
    off = min(one[2] for one in tried)  # a NaN is one at every step
    if not apart + rounding <= 0.1 * (_norm(central, sizes) if math.isnan(off) else off):
        return Judgement(Verdict.UNSETTLED, off / scale, "differences of the gradient do not settle")
    return Judgement(Verdict.WRONG if _first(combination, inputs, slopes) else Verdict.FIRST, off / scale)


def _first(combination: Combination, inputs: Sequence[Tensor], slopes: Sequence[Tensor]) -> bool:
    """Is the gradient the derivative of the value?"""
    vectors = directions(inputs)
    products = [float((s * v)[s.isfinite()].sum()) for s, v in zip(slopes, vectors, strict=True)]
    for step in (1e-5, 1e-6, 1e-7):
        up, down = (
            combination(*(t + sign * step * v for t, v in zip(inputs, vectors, strict=True))).item()
            for sign in (1, -1)
        )
        off = abs((up - down) / (2 * step) - math.fsum(products))
        if off <= 1e-3 * sum(map(abs, products)) + 1e-14 * combination.magnitude / step:
            return True
    return False


def _around(combination: Combination, inputs: Sequence[Tensor], step: float) -> list[list[Tensor]]:
    """Gradients at both sides of a point."""
    vectors = directions(inputs)
    return [
        combination.gradient([t + sign * step * v for t, v in zip(inputs, vectors, strict=True)])[1]
        for sign in (1, -1)
    ]


def _moved(inputs: Sequence[Tensor], far: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    if not far:
        return list(inputs)
    return [
        t + far * size * random_like(t, generator) for t, size in zip(inputs, _sizes(inputs), strict=True)
    ]


def _real(result: Tensor) -> Tensor:
    result = result if result.layout is torch.strided else result.to_dense()
    return torch.view_as_real(result.resolve_conj()) if result.is_complex() else result


def _sizes(tensors: Sequence[Tensor]) -> list[float]:
    return [_rms(tensor) or 1.0 for tensor in tensors]


def _norm(parts: Sequence[Tensor], sizes: Sequence[float]) -> float:
    """In the unit of the value, of what is finite."""
    return norm([part[part.isfinite()] * size for part, size in zip(parts, sizes, strict=True)])


def _distance(one: Sequence[Tensor], other: Sequence[Tensor], sizes: Sequence[float]) -> float:
    return _norm([a - b for a, b in zip(one, other, strict=True)], sizes)


def _times(one: Sequence[Tensor], other: Sequence[Tensor], sizes: Sequence[float]) -> list[Tensor]:
    return [(a - b) * size for a, b, size in zip(one, other, sizes, strict=True)]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _rms(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return norm([finite]) / math.sqrt(max(1, finite.numel()))
