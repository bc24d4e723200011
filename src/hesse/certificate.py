"""The certificate: a computed matrix against one product by plain autograd.

A Hessian is linear, so one random vector exposes a wrong one (Freivalds 1977): the computed matrix
times random signs must equal the product that a plain double backward gives for those signs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.gradient import Gradient
from hesse.probe import Probe


@dataclass(frozen=True)
class Certificate:
    """What the check of a result found.

    Attributes:
        deviation: the largest deviation from plain autograd over all probes, relative to the norm.
        bound: what rounding alone may reach in this dtype and size.
        probes: number of products by plain autograd that the result was compared with.
    """

    deviation: float
    bound: float
    probes: int

    @property
    def passed(self) -> bool:
        """Is the deviation within the bound? NaN results, which have no deviation, do not pass."""
        return self.deviation <= self.bound


def certify(gradient: Gradient, probes: Sequence[Probe]) -> Certificate:
    """Compare every probe with one plain product.

    Where one exceeds the bound, two more products measure the rounding of this very function (it may
    cancel inside), and the bound is raised accordingly, by a factor of 30 at most.
    """
    size = sum(leaf.numel() for leaf in gradient.leaves)
    eps = max(torch.finfo(leaf.dtype).eps for leaf in gradient.leaves)
    bound = strict = max(math.sqrt(eps), 4 * eps * math.sqrt(size))
    # Some blocks are zero but for rounding (a bias before a batch norm): measure those by the rest.
    floor = 100 * eps / bound * max((probe.norm for probe in probes), default=0.0)
    worst, products = 0.0, 0
    for probe in probes:
        exact = gradient.product(probe.signs, probe.rows, probe.columns)
        scale = max(_norm(exact), probe.norm, floor) or 1.0
        deviation = _distance(probe.computed, exact) / scale
        products += 1
        if deviation > bound:
            rounding = _rounding(gradient, probe, exact) / scale
            products += 2
            bound = max(bound, min(30 * rounding, 30 * strict))
        worst = deviation if not deviation <= worst else worst  # a NaN must not get lost
    return Certificate(worst, bound, products)


def _rounding(gradient: Gradient, probe: Probe, exact: Sequence[Tensor]) -> float:
    """How far the sum of two products is from the product of the sum, by plain autograd alone."""
    generator = torch.Generator().manual_seed(1)
    halves = [sign * torch.randint(0, 2, sign.shape, generator=generator).to(sign) for sign in probe.signs]
    one = gradient.product(halves, probe.rows, probe.columns)
    rest = [sign - half for sign, half in zip(probe.signs, halves, strict=True)]
    other = gradient.product(rest, probe.rows, probe.columns)
    return _distance([a + b for a, b in zip(one, other, strict=True)], exact)


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return _norm([a - b for a, b in zip(one, other, strict=True)])


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(torch.linalg.vector_norm(t.detach().double()).item() for t in tensors))
