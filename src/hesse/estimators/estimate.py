"""Trace and diagonal of a symmetric operator from some of its products, with their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hesse.errors import ArgumentError
from hesse.estimators.exchangeable import Exchangeable
from hesse.estimators.nystrom import Nystrom
from hesse.estimators.products import Draws, Products, positive
from hesse.estimators.samples import Kind, Samples
from hesse.runtime.memory import Budget
from hesse.runtime.progress import Progress, ProgressOption

_FIRST, _MOST = 16, 1024  # products before the first look at the error, and before giving up
_SAFETY = 2.5  # standard errors that the tolerance has to hold: they are estimates too
_VECTORS = 6  # that are held at once for one that is kept: Ω, Y, Q, Z and intermediates
_EXACT_COLUMNS = 256


@dataclass(frozen=True)
class Estimated:
    """An estimate with its standard error.

    Attributes:
        value: the estimate, a tensor without dimensions or [n].
        standard_error: of the value, of the same shape; zero where the value is exact. It is made of values
            that have to do with each other, so it can be too small: two of them hold the error in 75 to 98
            of 100 runs.
        products: how many products of the operator with a vector were taken.
        converged: whether 2.5 standard errors (for a diagonal: their norm) are within the tolerance.
        seed: of the random vectors.
        method: "hutchinson", "xtrace" or "xdiag", "nystrom", "lanczos" or "exact".
    """

    value: Tensor
    standard_error: Tensor
    products: int
    converged: bool
    seed: int
    method: str


def within(value: Tensor, standard_error: Tensor, rtol: float, atol: float) -> bool:
    """Whether the error is small enough, with a factor of safety."""
    return bool(_SAFETY * standard_error.norm() <= atol + rtol * value.norm())


def estimate_trace(
    A: Any,
    *,
    products: int | None = None,
    rtol: float = 0.05,
    atol: float = 0.0,
    method: Literal["hutchinson", "xtrace", "nystrom"] | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    progress: ProgressOption = None,
) -> Estimated:
    r"""An estimate of the trace of a symmetric operator, $\sum_i A_{ii}$, from products.

    With random signs $\omega_i$ and an orthonormal basis $Q$ of the range of $A$ on some of them, the
    estimate is

    $$\operatorname{tr} Q^\top A Q
      + \frac{1}{k} \sum_{i=1}^{k} \omega_i^\top (I - QQ^\top) A (I - QQ^\top)\, \omega_i ,$$

    where for a vector that $Q$ was made of, $Q$ is that of the others (XTrace). How large a basis pays is
    seen from the products: none for a flat spectrum, which is Hutchinson's estimator. The error is that of
    the best of the two.

    Args:
        A: a tensor [n, n], or what has `shape` (n, n) and `@` on tensors [n, k] (`dtype` and `device` are
            taken from it if it has them). It must be symmetric.
        products: how many products to take. None: as many as the tolerance asks for, at most 1024. From n on
            the answer is exact, from n more products.
        rtol: the error allowed, relative to the value; 2.5 standard errors have to be within `atol` and
            `rtol`.
        atol: the error allowed, in units of the value.
        method: "hutchinson" (no basis, no vectors kept), "xtrace" (the largest basis), "nystrom" (for a
            positive semi-definite operator: XNysTrace, of half the cost for the same basis). None: a basis
            of the best size.
        seed: of the random vectors. torch's own random numbers are left alone.
        memory: bytes for vectors that are kept, or a text such as "2GiB"; None for half of what is free.
            Where it is short the basis is smaller, down to none.
        progress: None for a bar on a terminal after two seconds, True, False, or a callable of (done, total).

    Returns:
        An `Estimated` with a tensor without dimensions, in the dtype of `A` (float32 at least).

    Raises:
        ArgumentError: `A` is no symmetric operator, its products are not finite or, for "nystrom", it is not
            positive semi-definite; another argument is not one of those above.

    Sources: Epperly, Tropp, Webber, SIAM J. Matrix Anal. Appl. 45 (2024), for XTrace and XNysTrace; M. F.
    Hutchinson, Commun. Stat. Simul. Comput. 18 (1989).

    Example:
        >>> import torch, hesse
        >>> A = torch.diag(torch.arange(1.0, 501.0) ** -2)
        >>> A[0, 1] = A[1, 0] = 0.5
        >>> estimated = hesse.estimate_trace(A, rtol=0.01)
        >>> estimated.converged, estimated.products < 100
        (True, True)
        >>> bool((estimated.value - A.trace()).abs() < 0.01 * A.trace())
        True
    """
    return _estimate(A, "trace", products, rtol, atol, method, seed, memory, progress)


def estimate_diagonal(
    A: Any,
    *,
    products: int | None = None,
    rtol: float = 0.05,
    atol: float = 0.0,
    method: Literal["hutchinson", "xdiag", "nystrom"] | None = None,
    seed: int = 0,
    memory: int | str | None = None,
    progress: ProgressOption = None,
) -> Estimated:
    r"""An estimate of the diagonal of a symmetric operator, $A_{11}, \dots, A_{nn}$, from products.

    With random signs $\omega_i$ and an orthonormal basis $Q$ of the range of $A$ on some of them, the
    estimate is

    $$\operatorname{diag}(QQ^\top A) + \frac{1}{k} \sum_{i=1}^{k} \omega_i \odot (I - QQ^\top) A\, \omega_i
    ,$$

    where for a vector that $Q$ was made of, $Q$ is that of the others (XDiag). Without a basis it is the
    estimator of Bekas, Kokiopoulou and Saad. Arguments and errors are those of `estimate_trace`; "xdiag"
    stands for its "xtrace", and tolerances are of the norm of the diagonal.

    Returns:
        An `Estimated` with tensors [n], in the dtype of `A` (float32 at least).

    Sources: Epperly, Tropp, Webber, SIAM J. Matrix Anal. Appl. 45 (2024), for XDiag; C. Bekas, E.
    Kokiopoulou, Y. Saad, Appl. Numer. Math. 57 (2007).

    Example:
        >>> import torch, hesse
        >>> estimated = hesse.estimate_diagonal(torch.diag(torch.arange(1.0, 1001.0)))
        >>> estimated.value[:4].round()
        tensor([1., 2., 3., 4.])
        >>> estimated.products
        16
    """
    return _estimate(A, "diagonal", products, rtol, atol, method, seed, memory, progress)


def _estimate(
    A: Any,
    kind: Kind,
    products: int | None,
    rtol: float,
    atol: float,
    method: str | None,
    seed: int,
    memory: int | str | None,
    progress: ProgressOption,
) -> Estimated:
    positive("products", products)
    if min(rtol, atol) < 0:
        raise ArgumentError(f"rtol and atol must not be negative, met {rtol} and {atol}")
    with Progress(progress) as bar:
        wrapped = Products(A, bar)
        samples = _samples(wrapped, kind, method, seed, memory)
        for goal in [products] if products else _rounds(wrapped.n):
            if goal >= wrapped.n:
                return _exact(wrapped, kind, seed)
            wrapped.expect(goal - wrapped.count)
            samples.grow(goal)
            value, error = samples.result()
            converged = within(value, error, rtol, atol)
            if converged:
                break
        return Estimated(
            value.to(wrapped.dtype), error.to(wrapped.dtype), wrapped.count, converged, seed, samples.method
        )


def _rounds(n: int) -> list[int]:
    doubled = [_FIRST << power for power in range(int(math.log2(_MOST // _FIRST)) + 1)]
    return [goal if 2 * goal < n or goal == _MOST else n for goal in doubled]


def _samples(A: Products, kind: Kind, method: str | None, seed: int, memory: int | str | None) -> Samples:
    most = Budget(memory, A.device).total // (_VECTORS * A.n * A.dtype.itemsize)
    draws, basis = Draws(A, seed), {"trace": "xtrace", "diagonal": "xdiag"}[kind]
    if method is None:
        return Exchangeable(A, draws, kind, most)
    if method == "hutchinson":
        return Exchangeable(A, draws, kind, 0)
    if method == basis:
        return Exchangeable(A, draws, kind, most, shares=(1,))
    if method == "nystrom":
        return Nystrom(A, draws, kind, most)
    raise ArgumentError(f'method must be None, "hutchinson", "{basis}" or "nystrom", met {method!r}')


def _exact(A: Products, kind: Kind, seed: int) -> Estimated:
    """From the products with all unit vectors."""
    A.expect(A.n)
    diagonal = torch.empty(A.n, dtype=A.dtype, device=A.device)
    for first in range(0, A.n, _EXACT_COLUMNS):
        chosen = torch.arange(first, min(first + _EXACT_COLUMNS, A.n), device=A.device)
        units = torch.zeros(A.n, len(chosen), dtype=A.dtype, device=A.device)
        units[chosen, chosen - first] = 1
        diagonal[chosen] = A(units)[chosen, chosen - first]
    value = diagonal.double().sum().to(A.dtype) if kind == "trace" else diagonal
    return Estimated(value, torch.zeros_like(value), A.count, True, seed, "exact")
