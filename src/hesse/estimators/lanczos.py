"""The Lanczos process: an orthonormal basis in which a symmetric operator is a small matrix.

One kernel for eigenpairs and for quadrature. Every product is orthogonalised against the whole basis, twice,
so that no eigenvalue appears again as a ghost; what is found on the way is the small matrix T = V'AV, in
float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hesse.estimators.products import Products

_BREAKDOWN = 10.0  # rounding errors of ‖T‖: what is left of a product that is not more than that is nothing


class Lanczos:
    """Processes side by side, each with a basis of its own, that share the calls of the operator.

    Args:
        A: the products.
        start: the first columns of every basis, [batch, n, block].
        size: how many columns a basis may have.
        fresh: gives [n, k] random vectors, to go on with where a basis is invariant under A (an exhausted
            one stays as it is); without, columns of zeros follow.

    Attributes:
        v: the bases, [batch, n, size + block]; the last `block` of the columns in use have not met A yet.
        t: the matrices V'AV, [batch, size, size] in float64.
        used: how many columns of v have met A.
        coupling: [batch, block, block], what A V has outside of V by its last columns; zero where V is
            invariant.
    """

    def __init__(
        self, A: Products, start: Tensor, size: int, fresh: Callable[[int], Tensor] | None = None
    ) -> None:
        batch, n, self.block = start.shape
        self._A, self._fresh, self.used = A, fresh, 0
        self.v = torch.zeros(batch, n, size + self.block, dtype=A.dtype, device=A.device)
        self.t = torch.zeros(batch, size, size, dtype=torch.float64, device=A.device)
        self.coupling = torch.zeros(batch, self.block, self.block, dtype=torch.float64, device=A.device)
        self._append(start)

    def step(self) -> None:
        """Multiply the newest columns, and append what the products have outside of the basis."""
        batch, n, _ = self.v.shape
        low, high = self.used, self.used + self.block
        newest = self.v[:, :, low:high].transpose(0, 1).reshape(n, -1)
        products = self._A(newest).reshape(n, batch, self.block).transpose(0, 1)
        self.used = high
        along = self._append(products)
        self.t[:, :high, low:high] = along
        self.t[:, low:high, :high] = along.mT

    def _append(self, columns: Tensor) -> Tensor:
        """Append columns, made orthonormal; what they have along the basis."""
        basis, block = self.v[:, :, : self.used], self.block
        size = self.t.flatten(1).abs().amax(1).to(self.v)
        least = _BREAKDOWN * self._A.eps * torch.maximum(columns.norm(dim=1).amax(1), size)
        along: Tensor = basis.mT @ columns
        q, r = torch.linalg.qr(columns - basis @ along)
        again = basis.mT @ q
        q, mend = torch.linalg.qr(q - basis @ again)
        along, r = along.double() + again.double() @ r.double(), mend.double() @ r.double()
        kept = r.norm(dim=2) > least[:, None]
        self.coupling = torch.where(kept[..., None], r, 0.0)
        q = torch.where(kept[:, None], q, 0.0)
        if self._fresh is not None and not kept.all():
            q = torch.where(kept[:, None], q, self._fresh(block))
            for _ in range(2):
                q = torch.linalg.qr(q - basis @ (basis.mT @ q)).Q
        self.v[:, :, self.used : self.used + block] = q
        return along

    def restart(self, rotation: Tensor) -> None:
        """Keep only V `rotation` [batch, used, kept] and the columns that have not met A."""
        kept = rotation.shape[2]
        ahead = self.v[:, :, self.used : self.used + self.block].clone()
        self.v[:, :, :kept] = self.v[:, :, : self.used] @ rotation.to(self.v)
        self.v[:, :, kept : kept + self.block] = ahead
        small = rotation.mT @ self.t[:, : self.used, : self.used] @ rotation
        self.t.zero_()
        self.t[:, :kept, :kept] = small
        self.used = kept
