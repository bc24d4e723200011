"""Linear systems with a symmetric operator: conjugate gradients and MINRES, many right-hand sides at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hesse.errors import ArgumentError
from hesse.estimators.iterations import Apply, Improved, conjugate_gradients, minres
from hesse.estimators.nystrom import Approximation
from hesse.estimators.products import Draws, Products, positive
from hesse.runtime.progress import Progress, ProgressOption

_RANK = 50  # of the preconditioner, and at most a tenth of the dimension
_PRODUCTS = 1000  # for each right-hand side, if nothing else is said


@dataclass(frozen=True)
class Solution:
    """What came of a linear system.

    Attributes:
        x: the solution, or how far it came; of the shape of b.
        status: for each right-hand side "converged"; "negative curvature" (of conjugate gradients:
            `direction` shows it, and x minimises what came before); "stagnated" (rounding, or a singular
            system, allows no more); "out of products".
        residuals: [iterations + 1, k], ‖b - (A + damping I) x‖ / ‖b‖ as the iteration goes; its last entry
            is by a product taken for that.
        direction: where the status is "negative curvature", p with p'(A + damping I)p <= 0; zeros elsewhere.
            Of the shape of b.
        products: how many products of the operator with a vector were taken, those of the preconditioner
            included.
    """

    x: Tensor
    status: tuple[str, ...]
    residuals: Tensor
    direction: Tensor
    products: int

    @property
    def converged(self) -> bool:
        """Whether all right-hand sides are solved."""
        return all(status == "converged" for status in self.status)


def solve(
    A: Any,
    b: Tensor,
    *,
    damping: float = 0.0,
    method: Literal["cg", "minres"] = "cg",
    preconditioner: Literal["nystrom"] | None = None,
    tol: float = 1e-5,
    products: int | None = None,
    seed: int = 0,
    progress: ProgressOption = None,
) -> Solution:
    r"""The solution of $(A + \delta I)\, x = b$ for a symmetric operator, from products.

    Solved means $\|b - (A + \delta I) x\| \le \text{tol}\, \|b\|$ by a product taken for that at the end: the
    residual that the iteration carries along drifts away from the true one. Where it did, the iteration
    starts again from the true one.

    Args:
        A: a tensor [n, n], or what has `shape` (n, n) and `@` on tensors [n, k]. It must be symmetric.
        b: right-hand sides, [n] or [n, k]. Each has its own iteration, all share the calls of the operator.
        damping: the $\delta$ that is added to every eigenvalue.
        method: "cg" for a positive definite operator; it notices one that is not. "minres" for any symmetric
            one.
        preconditioner: "nystrom" takes min(50, n / 10) products first to flatten the top of the spectrum of
            a positive semi-definite A; it pays with many large eigenvalues over a damped rest, or with many
            right-hand sides.
        tol: the residual allowed, relative to b.
        products: how many products may be taken for each right-hand side, the preconditioner's not counted.
            None: 1000.
        seed: of the preconditioner. torch's own random numbers are left alone.
        progress: None for a bar on a terminal after two seconds, True, False, or a callable of (done, total).

    Returns:
        A `Solution`, in the dtype of `A` (float32 at least).

    Raises:
        ArgumentError: `A` is no operator, b does not fit it or is not finite, products are not finite, or A
            is not positive semi-definite where "nystrom" asks for that.

    Sources: M. Hestenes, E. Stiefel, J. Res. Natl. Bur. Stand. 49 (1952); C. Paige, M. Saunders, SIAM J.
    Numer. Anal. 12 (1975); Z. Frangella, J. Tropp, M. Udell, Randomized Nyström preconditioning, SIAM J.
    Matrix Anal. Appl. 44 (2023).

    Example:
        >>> import torch, hesse
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> solution = hesse.solve(A, torch.tensor([1.0, 2.0]))
        >>> solution.x, solution.status
        (tensor([0.0909, 0.6364]), ('converged',))
        >>> hesse.solve(A, torch.tensor([1.0, 2.0]), damping=-5.0).status
        ('negative curvature',)
    """
    positive("products", products)
    if method not in ("cg", "minres"):
        raise ArgumentError(f'method must be "cg" or "minres", met {method!r}')
    if preconditioner not in (None, "nystrom"):
        raise ArgumentError(f'preconditioner must be None or "nystrom", met {preconditioner!r}')
    with Progress(progress) as bar:
        wrapped = Products(A, bar)
        if (
            not isinstance(b, Tensor)
            or b.dim() not in (1, 2)
            or len(b) != wrapped.n
            or not b.isfinite().all()
        ):
            met = f"{list(b.shape)}" if isinstance(b, Tensor) else type(b).__name__
            raise ArgumentError(f"b must be a finite tensor [{wrapped.n}] or [{wrapped.n}, k], met {met}")
        columns = b.detach().to(wrapped.device, wrapped.dtype).reshape(wrapped.n, -1)
        invert = _nystrom(wrapped, damping, seed) if preconditioner else lambda vectors: vectors
        iterate = conjugate_gradients if method == "cg" else minres
        most = products or _PRODUCTS
        wrapped.expect(most * columns.shape[1])
        solving = _Solving(lambda v: wrapped(v) + damping * v, invert, columns, tol, most)
        solving.run(iterate)
        return Solution(
            solving.x.reshape(b.shape),
            tuple(solving.status),
            torch.stack(solving.history),
            solving.direction.reshape(b.shape),
            wrapped.count,
        )


class _Solving:
    """Right-hand sides [n, k] on their way: iterated, looked at by a true residual, and iterated again."""

    def __init__(self, apply: Apply, invert: Apply, b: Tensor, tol: float, products: int) -> None:
        self._apply, self._invert, self._b, self._left = apply, invert, b, products
        self.x, self.direction = torch.zeros_like(b), torch.zeros_like(b)
        norms = b.norm(dim=0)
        self._norms, self._goals = norms.where(norms > 0, 1.0), tol * norms
        self.status = ["out of products" if norm else "converged" for norm in norms.tolist()]
        self.history = [norms / self._norms]

    def run(self, iterate: Callable[..., Improved]) -> None:
        """Until every column is solved or can go no further."""
        live = self._b[0].new_tensor([status != "converged" for status in self.status]).nonzero()[:, 0]
        residual = self._b[:, live]
        while len(live) and self._left > 1:
            before = residual.norm(dim=0)
            watch = partial(self._watch, live)
            goals = self._goals[live]
            improved = iterate(self._apply, self._invert, residual, goals, self._left - 1, watch)
            self._left -= improved.steps + 1
            self.x[:, live] += improved.x
            self.direction[:, live] = improved.direction
            residual = self._b[:, live] - self._apply(self.x[:, live])
            norms = residual.norm(dim=0)
            self.history[-1][live] = norms / self._norms[live]
            met, on = improved.direction.any(0), torch.zeros_like(live, dtype=torch.bool)
            for place, column in enumerate(live.tolist()):
                if norms[place] <= goals[place]:
                    self.status[column] = "converged"
                elif met[place]:
                    self.status[column] = "negative curvature"
                elif norms[place] > before[place] / 2 and self._left > 1:
                    self.status[column] = "stagnated"
                else:
                    on[place] = True
            live, residual = live[on], residual[:, on]

    def _watch(self, live: Tensor, places: Tensor, norms: Tensor) -> None:
        now = self.history[-1].clone()
        now[live[places]] = norms / self._norms[live[places]]
        self.history.append(now)


def _nystrom(A: Products, damping: float, seed: int) -> Apply:
    """The inverse of what makes the top eigenvalues of A + damping I like the last one known."""
    rank = min(_RANK, -(-A.n // 10))
    omega = Draws(A, seed).signs(rank)
    known = Approximation(omega, A(omega), A.eps)
    left, singular, _ = torch.linalg.svd(known.f)
    values = (singular.square() - known.shift).clamp_min(0) + damping
    u = known.q @ left.to(known.q)
    if not values[-1] > 0:
        return lambda vectors: vectors
    gain = (values[-1] / values - 1).to(u)[:, None]
    return lambda vectors: vectors + u @ (gain * (u.T @ vectors))
