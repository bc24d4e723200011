"""XTrace, XDiag and Hutchinson's estimator in one: some vectors make a basis, all of them test it.

With random signs Ω = [ω_1 .. ω_k], Y = AΩ, and an orthonormal basis Q of the first b columns of Y, the
products are k + b in number: Y and Z = AQ. For b = k this is XTrace and XDiag, for b = 0 it is Hutchinson's.
The squared error is that of ‖(I - QQ')A‖² / k. For a given number of products, the best b makes
‖(I - QQ')A‖² / (products - b) least, and Y tells the numerator for every b, before Z is asked for.

Source: E. N. Epperly, J. A. Tropp, R. J. Webber, XTrace: making the most of every sample in stochastic trace
estimation, SIAM J. Matrix Anal. Appl. 45 (2024); the formulas that leave out one vector are from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesse.estimators.products import Draws, Products
from hesse.estimators.samples import Kind, Moments

_SHARES = (0, 1 / 2, 1)  # of half the products: how large a basis is considered
# Values left out have to do with each other: by how much more their mean spreads than if they had not.
_TOGETHER = 1.3


class Exchangeable:
    """Vectors, their products and the basis made of them, growing in number.

    Args:
        A: the products.
        draws: the random vectors.
        kind: "trace" or "diagonal".
        shares: how large a basis is considered, as shares of half the products.
        most: how many vectors may be kept; further ones are used and forgotten.
    """

    def __init__(
        self, A: Products, draws: Draws, kind: Kind, most: int, shares: tuple[float, ...] = _SHARES
    ) -> None:
        self._A, self._draws, self._kind, self._shares = A, draws, kind, shares
        self._most, self._chunk = most if any(shares) else 0, max(1, most)
        self._shift = 0.0
        self._omega = self._y = self._q = self._z = torch.empty(A.n, 0, dtype=A.dtype, device=A.device)
        self._r = torch.empty(0, 0, dtype=torch.float64, device=A.device)
        self._forgotten = Moments()

    @property
    def method(self) -> str:
        """The name of what was done."""
        return {"trace": "xtrace", "diagonal": "xdiag"}[self._kind] if self._size else "hutchinson"

    @property
    def _size(self) -> int:
        return self._z.shape[1]

    def grow(self, products: int) -> None:
        """Take products until there are so many in all."""
        self._keep(products - products // 2)
        if not self._forgotten.count:  # else there are values that this basis belongs to
            size = self._choose(products)
            self._z = torch.cat([self._z, self._product(self._q[:, self._size : size])], 1)
        self._keep(self._omega.shape[1] + products - self._A.count)
        while left := products - self._A.count:
            omega = self._draws.signs(min(left, self._chunk))
            self._forgotten = self._forgotten.add(self._outside(omega, self._product(omega)))

    def result(self) -> tuple[Tensor, Tensor]:
        """Value and standard error, in float64."""
        b = self._size
        moments = self._forgotten.add(self._left_out(b))
        moments = moments.add(self._outside(self._omega[:, b:], self._y[:, b:]))
        known = self._q[:, :b] * self._z
        if self._kind == "trace":
            base = known.sum().double() - self._A.n * self._shift
        else:
            base = known.sum(1).double() - self._shift
        return base + moments.mean, moments.standard_error

    def _keep(self, count: int) -> None:
        """Vectors and products, so many in all if that many may be kept."""
        more = min(count, self._most) - self._omega.shape[1]
        if more <= 0:
            return
        omega = self._draws.signs(more)
        y = self._product(omega)
        if not self._omega.shape[1]:
            self._A.check_symmetric(omega, y)
            # A + shift I is estimated instead, by so little that rounding hides it: without, a singular A
            # would have a singular R, and nothing could be left out.
            self._shift = self._A.eps * y.norm().item() / y.numel() ** 0.5
            y = y + self._shift * omega
        self._omega, self._y = torch.cat([self._omega, omega], 1), torch.cat([self._y, y], 1)

    def _product(self, vectors: Tensor) -> Tensor:
        return self._A(vectors) + self._shift * vectors

    def _choose(self, products: int) -> int:
        """How many columns the basis gets; they are made."""
        k, half = self._omega.shape[1], min(products // 2, self._omega.shape[1])
        sizes = sorted({max(self._size, round(share * half)) for share in self._shares})
        if not sizes[-1] or not self._shift:  # no basis is asked for, or A is zero
            return 0
        self._orthogonalise(k)
        spread = {b: self._spread(b) for b in sizes if k - b > 1 or b > 1}
        if not spread:  # too few to tell
            return self._size
        return min(spread, key=lambda b: spread[b] / (products - b))

    def _orthogonalise(self, columns: int) -> None:
        """Append to Q R = Y by block Gram-Schmidt, done twice."""
        new, known = self._y[:, self._q.shape[1] : columns], self._q
        if not new.shape[1]:
            return
        above = known.T @ new
        q, r = torch.linalg.qr(new - known @ above)
        again = known.T @ q
        q, mend = torch.linalg.qr(q - known @ again)
        r, above = mend.double() @ r.double(), above.double() + again.double() @ r.double()
        below = torch.zeros(r.shape[0], known.shape[1], dtype=r.dtype, device=r.device)
        self._r = torch.cat([torch.cat([self._r, above], 1), torch.cat([below, r], 1)])
        self._q = torch.cat([known, q], 1)

    def _spread(self, b: int) -> float:
        """What (I - QQ')A has off its diagonal, squared and summed, by those not in a basis of b columns."""
        k = self._q.shape[1]
        if k - b > 1:  # further vectors test it
            outside = self._q[:, b:] @ self._r[b:, b:].to(self._q)
            return (self._omega[:, b:k] * outside).var(1).sum().item()
        left, distance = self._left(b)
        outside = self._q[:, :b] @ (left * distance).to(self._q)
        return _TOGETHER * (self._omega[:, :b] * outside).var(1).sum().item()

    def _left(self, b: int) -> tuple[Tensor, Tensor]:
        """What each of b columns of Y has outside of all others: a unit vector in Q, and how much."""
        eye = torch.eye(b, dtype=self._r.dtype, device=self._r.device)
        left = torch.linalg.solve_triangular(self._r[:b, :b].T, eye, upper=False)
        norms = left.norm(dim=0)
        return left / norms, 1 / norms

    def _outside(self, omega: Tensor, y: Tensor) -> Tensor:
        """The deviations of vectors that the basis was not made of."""
        q = self._q[:, : self._size]
        if self._kind == "diagonal":
            return omega * (y - q @ (q.T @ y))
        inside = q.T @ omega
        return ((omega - q @ inside) * (y - self._z @ inside)).sum(0)

    def _left_out(self, b: int) -> Tensor:
        """The deviations of the vectors that the basis was made of, each from the basis of the others."""
        q, omega = self._q[:, :b], self._omega[:, :b]
        s, d = self._left(b)
        if self._kind == "diagonal":
            outside = q @ s.to(q)
            return outside * (d.to(q) * omega - self._z @ s.to(q))
        h, w, r = (q.T @ self._z).double(), (q.T @ omega).double(), self._r[:b, :b]
        c = (s * w).sum(0)
        x = w - c * s
        return c * d - (s * (h @ s)).sum(0) - (r * x).sum(0) + (x * (h @ x)).sum(0)
