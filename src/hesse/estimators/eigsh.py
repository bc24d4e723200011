"""Some eigenpairs of a symmetric operator, by the Lanczos process with thick restarts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hesse.errors import ArgumentError
from hesse.estimators.lanczos import Lanczos
from hesse.estimators.products import Draws, Products, positive
from hesse.runtime.progress import Progress, ProgressOption

Which = Literal["largest", "smallest", "both", "magnitude"]
_LEAST_COLUMNS = 20
_PRODUCTS = 100  # for each pair, if nothing else is said; for ten pairs at least


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues and eigenvectors with what is known of their errors.

    Attributes:
        values: [k], the most wanted first: falling for "largest" and "both", rising for "smallest", falling
            in magnitude for "magnitude".
        vectors: [n, k], orthonormal columns.
        residuals: [k], the norms of A v - value v, checked by a further product. An eigenvalue of A is as
            close to the value as that.
        converged: [k], whether the residual is at most `tol` times the largest eigenvalue in magnitude.
        products: how many products of the operator with a vector were taken.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    products: int


def eigsh(
    A: Any,
    k: int = 6,
    which: Which = "largest",
    *,
    tol: float = 1e-5,
    products: int | None = None,
    block: int = 1,
    seed: int = 0,
    progress: ProgressOption = None,
) -> Eigenpairs:
    r"""Eigenpairs of a symmetric operator, $A v = \lambda v$: the k most wanted ones.

    A basis of max(2k, 20) + 5 `block` vectors is held, each of n numbers. It is orthogonalised twice, so that
    no eigenvalue is found again as a ghost. Where n is not more than that, A is multiplied with the identity.

    Args:
        A: a tensor [n, n], or what has `shape` (n, n) and `@` on tensors [n, k]. It must be symmetric.
        k: how many pairs.
        which: "largest" and "smallest" are ends of the spectrum, signs counted; "both" takes half of the
            pairs from each end (the odd one from the upper), "magnitude" those farthest from zero.
        tol: the largest residual, relative to the largest eigenvalue in magnitude.
        products: how many products may be taken. None: a hundred for each pair, a thousand at least.
        block: how many vectors are multiplied at a time. Of an eigenvalue with several eigenvectors, as many
            are found for certain; with a smaller block, copies may be missed.
        seed: of the first vectors. torch's own random numbers are left alone.
        progress: None for a bar on a terminal after two seconds, True, False, or a callable of (done, total).

    Returns:
        `Eigenpairs`, in the dtype of `A` (float32 at least).

    Raises:
        ArgumentError: `A` is no symmetric operator, its products are not finite, or k or another argument is
            out of range.

    Source: K. Wu, H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J.
    Matrix Anal. Appl. 22 (2000).

    Example:
        >>> import torch, hesse
        >>> A = torch.diag(torch.arange(300.0))
        >>> found = hesse.eigsh(A, 2, "both")
        >>> found.values.round().abs().tolist(), found.converged.all().item()
        ([299.0, 0.0], True)
    """
    for name, number in (("k", k), ("products", products), ("block", block)):
        positive(name, number)
    if which not in ("largest", "smallest", "both", "magnitude"):
        raise ArgumentError(f'which must be "largest", "smallest", "both" or "magnitude", met {which!r}')
    with Progress(progress) as bar:
        wrapped = Products(A, bar)
        if k > wrapped.n:
            raise ArgumentError(f"k must be at most the dimension {wrapped.n}, met {k}")
        size = max(2 * k, _LEAST_COLUMNS) + 4 * block
        if wrapped.n <= size + block:
            return _dense(wrapped, k, which, tol)
        most = products or _PRODUCTS * max(k, 10)
        if most < k + 2 * block:
            raise ArgumentError(f"products must be at least k + 2 block = {k + 2 * block}, met {most}")
        wrapped.expect(most)
        return _restarted(wrapped, k, which, tol, most, block, size, Draws(wrapped, seed))


def wanted(values: Tensor, k: int, which: Which) -> Tensor:
    """The places of the k most wanted among rising values, the most wanted first."""
    n = len(values)
    k = min(k, n)
    falling = torch.arange(n - 1, -1, -1, device=values.device)
    if which == "magnitude":
        return values.abs().argsort(descending=True)[:k]
    if which == "smallest":
        return falling.flip(0)[:k]
    lower = k // 2 if which == "both" else 0
    return torch.cat([falling[: k - lower], falling[n - lower :]])


def _restarted(
    A: Products, k: int, which: Which, tol: float, products: int, block: int, size: int, draws: Draws
) -> Eigenpairs:
    process = Lanczos(A, draws.normal(block)[None], size, fresh=lambda columns: draws.normal(columns)[None])
    at_breakdown: Tensor | None = None
    while True:
        process.step()
        values, vectors = torch.linalg.eigh(process.t[0, : process.used, : process.used])
        chosen = wanted(values, k, which)
        found = values[chosen]
        residuals = (process.coupling[0] @ vectors[-block:, chosen]).norm(dim=0)
        allowed = tol * values.abs().max()
        done = len(found) == k and bool((residuals <= allowed).all())
        if done and not process.coupling.any():
            # The basis is invariant, and may lack further eigenvectors of the same values: those that a
            # fresh vector adds would show.
            done = at_breakdown is not None and bool(((found - at_breakdown).abs() <= allowed).all())
            at_breakdown = found
        if done or A.count + block >= products:
            vectors = process.v[0, :, : process.used] @ vectors[:, chosen].to(process.v)
            return _judged(A, found, vectors, residuals, allowed, draws)
        if process.used + block > size:
            kept = k + min(int((residuals <= allowed).sum()), (size - block - k) // 2)
            process.restart(vectors[None, :, wanted(values, kept, which)])


def _dense(A: Products, k: int, which: Which, tol: float) -> Eigenpairs:
    matrix = A.matrix()
    values, vectors = torch.linalg.eigh(matrix.double())
    allowed, chosen = tol * values.abs().max(), wanted(values, k, which)
    values, vectors = values[chosen].to(A.dtype), vectors[:, chosen].to(A.dtype)
    residuals = (matrix @ vectors - vectors * values).norm(dim=0)
    return Eigenpairs(values, vectors, residuals, residuals <= allowed, A.count)


def _judged(
    A: Products, values: Tensor, vectors: Tensor, residuals: Tensor, allowed: Tensor, draws: Draws
) -> Eigenpairs:
    """The pairs with their residuals: those of the process if one product with all of them at once agrees."""
    values, residuals = values.to(A.dtype), residuals.to(A.dtype)
    signs = draws.signs(1)[: len(values)]
    together = (A(vectors @ signs) - vectors @ (values[:, None] * signs)).norm()
    if together > 3 * torch.maximum(residuals.norm(), allowed / 10):
        residuals = (A(vectors) - vectors * values).norm(dim=0)
    return Eigenpairs(values, vectors, residuals, residuals <= allowed, A.count)
