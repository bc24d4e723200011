"""The logarithm of a determinant."""

from __future__ import annotations

from typing import Any

from hesse.errors import ArgumentError
from hesse.estimators.estimate import Estimated, within
from hesse.estimators.spectrum import spectral_density
from hesse.runtime.progress import ProgressOption


def logdet(
    A: Any,
    shift: float = 0.0,
    *,
    steps: int = 80,
    probes: int = 8,
    rtol: float = 0.05,
    atol: float = 0.0,
    seed: int = 0,
    memory: int | str | None = None,
    progress: ProgressOption = None,
) -> Estimated:
    r"""An estimate of $\log\det(A + sI) = \sum_i \log(\lambda_i + s)$ of a positive definite $A + sI$.

    By the quadrature of `spectral_density`, whose arguments and errors these are. The standard error is that
    of the probes. What too few steps would leave out shows where the smallest eigenvalue is far smaller than
    the largest: raise `steps` until the value stays.

    Args:
        A: a tensor [n, n], or what has `shape` (n, n) and `@` on tensors [n, k]. It must be symmetric.
        shift: the s that is added to every eigenvalue.
        steps: the nodes of each quadrature.
        probes: how many quadratures.
        rtol: the error allowed, relative to the value; 2.5 standard errors have to be within `atol` and
            `rtol`.
        atol: the error allowed, absolute.
        seed: of the probes. torch's own random numbers are left alone.
        memory: bytes for the vectors, or a text such as "2GiB"; None for half of what is free.
        progress: None for a bar on a terminal after two seconds, True, False, or a callable of (done, total).

    Returns:
        An `Estimated` with float64 tensors without dimensions; exact where steps times probes reach n.

    Raises:
        ArgumentError: a Ritz value plus the shift is not positive: A + shift I is not positive definite.
        BudgetError: the memory does not hold the vectors of one probe.

    Example:
        >>> import torch, hesse
        >>> hesse.logdet(torch.eye(5), shift=1.0).value / 5
        tensor(0.6931, dtype=torch.float64)
    """
    spectrum = spectral_density(A, steps=steps, probes=probes, seed=seed, memory=memory, progress=progress)
    used = spectrum.weights > 0
    least = spectrum.nodes[used].min().item() + shift
    if least <= 0:
        raise ArgumentError(
            f"A + shift I must be positive definite, met the Ritz value "
            f"{least:.3g}, the shift included: raise shift"
        )
    mean, error = spectrum.mean(lambda nodes: (nodes + shift).where(used, 1.0).log())
    value, error = spectrum.n * mean, spectrum.n * error
    method = "exact" if spectrum.exact else "lanczos"
    return Estimated(value, error, spectrum.products, within(value, error, rtol, atol), seed, method)
