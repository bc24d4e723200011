r"""Second derivatives by central differences of the gradient, which ask no second derivative of torch.

Along a direction v, with a step h relative to the size of the tensors that are moved,

$$H v = \frac{\nabla f(x + h v) - \nabla f(x - h v)}{2 h} + O(h^2),$$

so that about two thirds of the digits of the dtype are left where h is the cube root of its precision. How
far two steps are from each other tells how good both are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch
from torch import Tensor

from hesse.errors import DerivativeWarning, NotTwiceDifferentiableError, warn
from hesse.look.evaluation import evaluated
from hesse.look.gradient import Gradient, roundings
from hesse.probe import Probe, distance, norm
from hesse.problem import Problem

_STEPS = (1.0, 0.25, 4.0, 0.0625)
_LONGER = 30.0


@dataclass(frozen=True)
class Difference:
    """The derivative of the gradient along a direction.

    Attributes:
        parts: by each of some tensors.
        step: what v was multiplied by at least.
        error: how far another step was away, over all parts.
        noise: what rounding of the gradient may make of it.
        slope: the derivative of the function itself.
        slope_noise: what rounding of its values may make of that.
    """

    parts: Sequence[Tensor]
    step: float
    error: float
    noise: float
    slope: float
    slope_noise: float


class Differences:
    """Products of the Hessian with vectors, from gradients at points near by: a `certificate.Reference`."""

    name = "differences"

    def __init__(self, problem: Problem, gradient: Gradient) -> None:
        self._problem, self._gradient = problem, gradient
        self._eps = max(torch.finfo(leaf.dtype).eps for leaf in gradient.leaves)
        self.bound = 10 * self._eps**0.4
        # Of blocks that are zero but for rounding it is the gradient of the others that is rounded.
        self.floor = 100 * self._eps ** (2 / 3) / self.bound
        self.products = 0

    def exact(self, probe: Probe) -> Sequence[Tensor]:
        """See `certificate.Reference`."""
        self._last = self.along(probe.signs, probe.rows, probe.columns)
        return probe.own(self._last.parts)

    def allowance(self, probe: Probe, exact: Sequence[Tensor], scale: float) -> float:
        """See `certificate.Reference`.

        A gradient that cancels is rounded by more than its own size tells: by how far it is at points that
        are about the same.
        """
        here, _ = self._gradient_at({}, probe.columns)
        around = (self._gradient_at(shifts, probe.columns)[0] for shifts in roundings(self._gradient))
        moved = max(distance(near, here) for near in around)
        return min(10 * self._last.error, 0.1 * scale) + self._last.noise + 10 * moved / self._last.step

    def along(
        self, vectors: Sequence[Tensor], rows: Sequence[int], columns: Sequence[int], longer: float = 1.0
    ) -> Difference:
        """The derivative of the gradient by `columns` when the tensors of `rows` are moved along vectors.

        `longer`: how many times the steps are longer than what suits a smooth function.
        """
        size = _rms([self._problem.tensors[i] for i in rows]) or 1.0
        step = longer * self._eps ** (1 / 3) * size / (_rms(vectors) or 1.0)
        found: list[Difference] = []
        best = None
        for factor in _STEPS:
            new = self._central(vectors, rows, columns, factor * step)
            for old in found:
                error = distance(new.parts, old.parts)
                if best is None or not best.error <= error:
                    step, noise = min(old.step, new.step), max(old.noise, new.noise)
                    best = replace(old, step=step, error=error, noise=noise)
            found.append(new)
            if best is not None and best.error <= self._eps**0.4 * norm(best.parts) + best.noise:
                break
        assert best is not None
        return best

    def _central(
        self, vectors: Sequence[Tensor], rows: Sequence[int], columns: Sequence[int], step: float
    ) -> Difference:
        (up, high), (down, low) = (
            self._gradient_at({i: sign * step * v for i, v in zip(rows, vectors, strict=True)}, columns)
            for sign in (1, -1)
        )
        self.products += 1
        parts = [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]
        noise = 10 * self._eps / step
        slope = (high - low) / (2 * step)
        return Difference(parts, step, math.inf, noise * norm(up), slope, noise * abs(high))

    def _gradient_at(self, shifts: dict[int, Tensor], columns: Sequence[int]) -> tuple[list[Tensor], float]:
        """The gradient by some tensors, and the value, where others are moved."""
        with self._problem.moved(shifts) as near, evaluated(near) as evaluation:
            found, _ = evaluation.gradients([], create_graph=False)
            value = evaluation.value.item()
        tensors = self._problem.tensors
        return [torch.zeros_like(tensors[j]) if (g := found[j]) is None else g for j in columns], value


_AGREED: WeakSet[type] = WeakSet()  # custom Functions that were compared, and alright


def require_graph(problem: Problem, gradient: Gradient, strict: bool, once: bool = False) -> None:
    """Compare a product with a difference of gradients, where a part of the function may have no graph.

    That is where a custom Function or a detached copy that is differentiated is on the way: the backward of
    the one and all that comes of the other may be without a graph, and autograd then sees zeros. `once`:
    custom Functions that were alright before need no comparison.

    Raises:
        NotTwiceDifferentiableError: they differ, and `strict` asks for an error and not a warning.
    """
    customs, cut = gradient.evaluation.customs, gradient.evaluation.watch.cut
    if problem.model_output is not None:  # no gradient has the Gauss-Newton matrix for its derivative
        return
    if not (customs or cut) or (once and not cut and customs <= _AGREED):
        return
    deviation = _deviation(problem, gradient)
    if deviation is None:
        _AGREED.update(customs)
        return
    message = (
        f"{deviation}. What hides from autograd is {' or '.join(hiding(gradient))}: what is computed under "
        f"no_grad or on a detached copy is not differentiated, and a backward need not be the derivative of "
        f"its forward; write it in differentiable operations on the tensors themselves"
    )
    if strict:
        raise NotTwiceDifferentiableError(message)
    warn(DerivativeWarning, message)


def hiding(gradient: Gradient) -> list[str]:
    """What of a function may have no graph, or another derivative than its own."""
    evaluation = gradient.evaluation
    found = [f"the backward of {name}" for name in sorted(custom.__name__ for custom in evaluation.customs)]
    if evaluation.watch.cut:
        found.append("a tensor without a graph that is made to require grad (x.detach().requires_grad_())")
    return found


def _deviation(problem: Problem, gradient: Gradient) -> str | None:
    """Say how far derivatives along random directions are from differences; None where they agree.

    By two directions, `wᵀ H v` from a product with w and from differences along v: a backward that is not the
    derivative of its forward may make H asymmetric.
    """
    rows = [i for i, leaf in enumerate(gradient.leaves) if leaf.requires_grad and leaf.numel()]
    v, w = (_direction([problem.tensors[i] for i in rows], seed) for seed in (1, 2))
    reference = Differences(problem, gradient)
    found = reference.along(v, rows, rows)
    one = [_dot(product, along) for product, along in zip(gradient.product(w, rows, rows), v, strict=True)]
    other = [_dot(part, along) for part, along in zip(found.parts, w, strict=True)]
    allowed = (10 * found.error + found.noise) * norm(w)
    share = _apart(one, other, reference.bound, allowed)
    if (
        share
    ):  # Gradients may jump a little, by the steps of an adaptive solver, say: over longer steps by less.
        far = reference.along(v, rows, rows, _LONGER)
        other = [_dot(part, along) for part, along in zip(far.parts, w, strict=True)]
        allowed = (10 * far.error + far.noise) * norm(w)
        share = _lasting(share, _apart(one, other, reference.bound, allowed))
    if share:
        return (
            f"the second derivative along a random direction is {_shown(share)} off differences of gradients"
        )
    if gradient.evaluation.watch.cut:
        slopes = [_dot(gradient.plain[i], along) for i, along in zip(rows, v, strict=True)]
        # Values are less smooth at kinks than they are to rounding.
        if share := _apart(slopes, [found.slope], math.sqrt(reference.bound), found.slope_noise):
            return f"the derivative along a random direction is {_shown(share)} off differences of values"
    return None


def _lasting(near: float, far: float) -> float:
    """What is missing is missing at every distance; zero where it is noise, which longer steps divide."""
    return near if far > near / 2 else 0.0


def _shown(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1g} of its size"


def _apart(one: Sequence[float], other: Sequence[float], bound: float, allowed: float) -> float:
    """How far two sums are from each other, relative to their parts; zero where that may be rounding."""
    off, scale = abs(math.fsum(one) - math.fsum(other)), max(sum(map(abs, one)), sum(map(abs, other)))
    return off / scale if off > bound * scale + allowed else 0.0


def _direction(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """A random direction in which every tensor is moved as much as its size allows."""
    usual = _rms(tensors) or 1.0
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator).to(t) * (_rms([t]) or usual) for t in tensors]


def _dot(one: Tensor | None, other: Tensor) -> float:
    return 0.0 if one is None else float((one.detach().double() * other).sum())


def _rms(tensors: Sequence[Tensor]) -> float:
    count = sum(tensor.numel() for tensor in tensors)
    return norm(tensors) / math.sqrt(count) if count else 0.0
