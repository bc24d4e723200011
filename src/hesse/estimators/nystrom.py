"""Nyström's approximation of a positive semi-definite operator, and the estimators that it makes.

With random signs Ω and Y = AΩ, the approximation is Â = Y (Ω'Y)⁻¹ Y'. It costs one product a vector, where a
basis costs two, and leaving one vector out costs nothing: with v = Y (Ω'Y)⁻¹ e_i and h = e_i'(Ω'Y)⁻¹ e_i,
the approximation by all others is Â - v v'/h, and what it lacks on ω_i is v / h.

Source: E. N. Epperly, J. A. Tropp, R. J. Webber, XTrace: making the most of every sample in stochastic trace
estimation, SIAM J. Matrix Anal. Appl. 45 (2024), there XNysTrace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesse.errors import ArgumentError
from hesse.estimators.products import Draws, Products
from hesse.estimators.samples import Kind, Moments

# The values left out have to do with each other, so that their mean spreads more than they tell: measured,
# up to three times as much (eigenvalues 0.7^i), of which two are made up for.
_TOGETHER = 2.0


class Approximation:
    """Â + shift I = (QF)(QF)', where the shift is no more than rounding.

    Args:
        omega: the vectors, [n, k].
        y: their products with A, [n, k].
        eps: the relative rounding error of the products.

    Raises:
        ArgumentError: A is not positive semi-definite.
    """

    def __init__(self, omega: Tensor, y: Tensor, eps: float) -> None:
        gram, h = (omega.T @ omega).double(), (omega.T @ y).double()
        scale = y.norm().item() / y.numel() ** 0.5 or 1.0
        self.shift = eps * scale
        factor, failed = torch.linalg.cholesky_ex((h + h.T) / 2 + self.shift * gram)
        while failed:
            self.shift *= 10
            if self.shift > eps**0.5 * scale:
                raise ArgumentError(
                    'A must be positive semi-definite for "nystrom", met v\'Av < 0: leave "nystrom" out'
                )
            factor, failed = torch.linalg.cholesky_ex((h + h.T) / 2 + self.shift * gram)
        self.q, r = torch.linalg.qr(y + self.shift * omega)
        eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
        self._inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        self.f = r.double() @ self._inverse.T

    def left_out(self) -> tuple[Tensor, Tensor]:
        """All v / h, as the columns of a matrix in Q, and h: what leaving one vector out takes away."""
        h = self._inverse.square().sum(0)
        return self.f @ self._inverse / h, h


class Nystrom:
    """Vectors and products of a positive semi-definite operator, growing in number.

    Args:
        A: the products.
        draws: the random vectors.
        kind: "trace" or "diagonal".
        most: how many vectors may be kept; further ones are used and forgotten.
    """

    method = "nystrom"

    def __init__(self, A: Products, draws: Draws, kind: Kind, most: int) -> None:
        self._A, self._draws, self._kind, self._most = A, draws, kind, max(1, most)
        self._omega = self._y = torch.empty(A.n, 0, dtype=A.dtype, device=A.device)
        self._forgotten = Moments()

    def grow(self, products: int) -> None:
        """Take products until there are so many in all."""
        more = min(products, self._most) - self._omega.shape[1]
        if more > 0:
            omega = self._draws.signs(more)
            y = self._A(omega)
            self._A.check_symmetric(omega, y)
            self._omega, self._y = torch.cat([self._omega, omega], 1), torch.cat([self._y, y], 1)
            self._known = Approximation(self._omega, self._y, self._A.eps)
        while left := products - self._A.count:
            omega = self._draws.signs(min(left, self._most))
            self._forgotten = self._forgotten.add(self._outside(omega, self._A(omega)))

    def result(self) -> tuple[Tensor, Tensor]:
        """Value and standard error, in float64."""
        known = self._known
        if not self._y.any():  # the zero operator, of which the shift would be all
            zero = self._y.new_zeros(() if self._kind == "trace" else self._A.n, dtype=torch.float64)
            return zero, zero
        lacking, h = known.left_out()
        if self._kind == "trace":
            base, n = known.f.square().sum(), self._A.n
            moments = self._forgotten.add(1 / h - h * lacking.square().sum(0))
            return base - n * known.shift + moments.mean, _TOGETHER * moments.standard_error
        base = (known.q @ known.f.to(known.q)).double().square().sum(1)
        lacking = known.q @ lacking.to(known.q)
        moments = self._forgotten.add(self._omega * lacking - h.to(lacking) * lacking.square())
        return base - known.shift + moments.mean, _TOGETHER * moments.standard_error

    def _outside(self, omega: Tensor, y: Tensor) -> Tensor:
        known = self._known
        f = known.f.to(known.q)
        lacking = y + known.shift * omega - known.q @ (f @ (f.T @ (known.q.T @ omega)))
        deviations: Tensor = omega * lacking
        return deviations.sum(0) if self._kind == "trace" else deviations
