"""The certificate: a computed matrix against products from another source.

A Hessian is linear, so one random vector exposes a wrong one (Freivalds 1977): the computed matrix
times random signs must equal the product that a plain double backward, or differences of the gradient, give
for those signs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hesse.look.evaluation import evaluated
from hesse.look.gauss_newton import gradient_of
from hesse.look.gradient import Gradient, roundings
from hesse.probe import Probe, distance, norm
from hesse.problem import Problem


@dataclass(frozen=True)
class Certificate:
    """What the check of a result found.

    Attributes:
        deviation: the largest deviation over all probes, relative to the norm of what was checked or, where
            that cancels, to the size of what was added up.
        bound: what rounding alone may reach in this dtype and size.
        probes: number of products that the result was compared with.
        route: what gave them: "autograd" or "differences".
    """

    deviation: float
    bound: float
    probes: int
    route: str = "autograd"

    @property
    def passed(self) -> bool:
        """Is the deviation within the bound? NaN results, which have no deviation, do not pass."""
        return self.deviation <= self.bound


class Reference(Protocol):
    """Another way to products, which answers are compared with.

    Attributes:
        name: "autograd" or "differences".
        bound: what rounding may make of a product, relative to its norm.
        floor: below this share of the largest block, blocks may be zero but for rounding.
        products: how many were taken.
    """

    name: str
    bound: float
    floor: float
    products: int

    def exact(self, probe: Probe) -> Sequence[Tensor]:
        """The product that a probe is compared with."""

    def allowance(self, probe: Probe, exact: Sequence[Tensor], scale: float) -> float:
        """How far off the product may be in this very function: what it adds up may cancel."""


class Autograd:
    """Products by plain double backward."""

    name = "autograd"

    def __init__(self, problem: Problem, gradient: Gradient) -> None:
        self._eps = eps = max(torch.finfo(leaf.dtype).eps for leaf in gradient.leaves)
        self.bound = max(math.sqrt(eps), 4 * eps * math.sqrt(problem.parameters))
        self.floor = 100 * eps / self.bound
        self.products = 0
        self._problem, self._gradient = problem, gradient

    def exact(self, probe: Probe) -> Sequence[Tensor]:
        """See `Reference`."""
        return self._product(probe, probe.signs)

    def allowance(self, probe: Probe, exact: Sequence[Tensor], scale: float) -> float:
        """See `Reference`: what rounding makes of this product, measured in two ways.

        By how far products move where the point moves by no more than its own rounding, and by how far the
        sum of two products is from the product of the sum. A product that is another one each time it is
        taken is not excused.
        """
        again = distance(self._product(probe, probe.signs), exact)
        if again > self.bound * scale:
            return 0.0
        return 30 * max(self._moved(probe, exact), self._added(probe, exact, again + self._eps * scale))

    def _moved(self, probe: Probe, exact: Sequence[Tensor]) -> float:
        """How far the product at points that are about the same."""
        found = []
        for shifts in roundings(self._gradient):
            with self._problem.moved(shifts) as near, evaluated(near) as evaluation:
                product = gradient_of(evaluation).product(probe.signs, probe.rows, probe.columns)
            found.append(distance(probe.own(product), exact))
        self.products += len(found)
        return max(found)

    def _added(self, probe: Probe, exact: Sequence[Tensor], tolerance: float) -> float:
        """How far the sum of two products is, if products are linear otherwise.

        Scaling by a power of two leaves nothing to round, and shows it.
        """
        scaled = self._product(probe, [-2 * sign for sign in probe.signs])
        if distance([part / -2 for part in scaled], exact) > 4 * tolerance:
            return 0.0
        generator = torch.Generator().manual_seed(1)
        shares = [torch.rand(sign.shape, generator=generator).to(sign) for sign in probe.signs]
        some = [sign * share for sign, share in zip(probe.signs, shares, strict=True)]
        rest = [sign - part for sign, part in zip(probe.signs, some, strict=True)]
        one, other = self._product(probe, some), self._product(probe, rest)
        return distance([a + b for a, b in zip(one, other, strict=True)], exact)

    def _product(self, probe: Probe, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        self.products += 1
        return probe.own(self._gradient.product(vectors, probe.rows, probe.columns))


def certify(reference: Reference, probes: Sequence[Probe]) -> Certificate:
    """Compare every probe with a product by a reference."""
    floor = reference.floor * max((probe.norm for probe in probes), default=0.0)
    worst = 0.0
    for probe in probes:
        exact = reference.exact(probe)
        scale = max(norm(exact), probe.norm, floor) or 1.0
        off = distance(probe.computed, exact)
        if off > reference.bound * scale:
            scale = max(scale, reference.allowance(probe, exact, scale) / reference.bound)
        worst = off / scale if not off / scale <= worst else worst  # a NaN must not get lost
    return Certificate(worst, reference.bound, reference.products, reference.name)
