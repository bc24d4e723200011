"""Errors of estimates for a number of products, beside curvlinops; products for eigenpairs, beside ARPACK."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hesse

SIZE, PRODUCTS = 1000, (30, 60, 120)
_RUNS, _OTHER_RUNS, _DIAGONAL_RUNS, _EIGEN_RUNS = 100, 50, 8, 20  # of the default, of other estimators
_EIGENPAIRS, _TOLERANCE = 10, 1e-6


def spectra() -> dict[str, Tensor]:
    """Eigenvalues of the reference operators."""
    i = torch.arange(1, SIZE + 1, dtype=torch.float64)
    return {
        "linspace(1, 3)": torch.linspace(1, 3, SIZE, dtype=torch.float64),
        "1/i": 1 / i,
        "1/i²": i**-2,
        "0.7^i": 0.7**i,
        "50 ones, then 1e-3": torch.where(i <= 50, 1.0, 1e-3),
        "ten outliers": outliers(SIZE),
        "zero": torch.zeros_like(i),
    }


def outliers(n: int) -> Tensor:
    """Ten eigenvalues from 10 to 100 over an indefinite bulk."""
    bulk = torch.randn(n - 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.linspace(10, 100, 10, dtype=torch.float64), bulk])


def rotated(values: Tensor) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    drawn = torch.randn(
        len(values), len(values), dtype=values.dtype, generator=torch.Generator().manual_seed(1)
    )
    q = torch.linalg.qr(drawn).Q
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def answer_spectrum(name: str, values: Tensor) -> dict[str, Any]:
    """The errors of all estimators of the trace and the diagonal of one operator."""
    A = rotated(values)
    records: dict[str, Any] = {}
    for kind, exact in (("trace", values.sum()), ("diagonal", A.diagonal())):
        for who, estimate in _contestants(kind, bool((values >= 0).all())).items():
            record = records[f"{kind}, {who}"] = {}
            runs = _RUNS if who == "hesse, default" else _OTHER_RUNS
            runs = _DIAGONAL_RUNS if kind == "diagonal" else runs
            for products in PRODUCTS:
                try:
                    peer = who.startswith("curvlinops")
                    record[str(products)] = _errors(A, exact, estimate, products, peer, runs)
                except Exception as error:
                    record[str(products)] = {"error": f"{type(error).__name__}: {error}"[:120]}
            shown = " ".join(f"{errors.get('median', math.nan):.2e}" for errors in record.values())
            print(f"estimators  {name:20} {kind:9} {who:28} {shown}", flush=True)
    return {
        "description": f"n = {SIZE}, random eigenvectors, float64; {_RUNS} runs of the default for traces, "
        f"{_OTHER_RUNS} of others, {_DIAGONAL_RUNS} for diagonals",
        "contestants": records,
    }


def _contestants(kind: str, psd: bool) -> dict[str, Callable[[Tensor, int, int], Any]]:
    ours = getattr(hesse, f"estimate_{kind}")
    methods = [
        None,
        "hutchinson",
        {"trace": "xtrace", "diagonal": "xdiag"}[kind],
        *(["nystrom"] if psd else []),
    ]

    def by(method: str | None) -> Callable[[Tensor, int, int], Any]:
        return lambda A, products, seed: ours(A, products=products, method=method, seed=seed)

    found = {f"hesse, {method or 'default'}": by(method) for method in methods}
    try:
        import curvlinops
    except ImportError:
        return found
    names = {
        "trace": ("hutchinson_trace", "hutchpp_trace", "xtrace"),
        "diagonal": ("hutchinson_diag", "xdiag"),
    }

    def peer(name: str) -> Callable[[Tensor, int, int], Any]:
        def estimate(A: Tensor, products: int, seed: int) -> Tensor:
            torch.manual_seed(seed)
            return getattr(curvlinops, name)(A, products)

        return estimate

    return found | {f"curvlinops, {name}": peer(name) for name in names[kind]}


def _errors(
    A: Tensor,
    exact: Tensor,
    estimate: Callable[[Tensor, int, int], Any],
    products: int,
    peer: bool,
    runs: int,
) -> dict[str, float]:
    """Median and root mean square of the relative error, and how often two standard errors hold it."""
    size = exact.norm().item() or 1.0
    errors, covered = [], []
    for seed in range(runs):
        found = estimate(A, products, seed)
        off = ((found if peer else found.value) - exact).norm().item()
        errors.append(off / size)
        if not peer:
            covered.append(off <= 2 * found.standard_error.norm().item())
    record = {
        "median": statistics.median(errors),
        "rms": statistics.fmean(error**2 for error in errors) ** 0.5,
    }
    return record if peer else record | {"coverage": statistics.fmean(covered)}


class _Diagonal:
    """A diagonal operator."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.dtype, self.shape = values, values.dtype, (len(values), len(values))

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.values[:, None] * vectors


def answer_eigenpairs() -> dict[str, Any]:
    """Products for ten eigenpairs over a bulk, and their errors."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    values = outliers(4000)
    wanted = values[:_EIGENPAIRS].flip(0)
    products: dict[str, list[int]] = {"hesse.eigsh": [], "scipy.sparse.linalg.eigsh": []}
    errors: dict[str, list[float]] = {who: [] for who in products}
    for seed in range(_EIGEN_RUNS):
        found = hesse.eigsh(_Diagonal(values), _EIGENPAIRS, tol=_TOLERANCE, seed=seed)
        counted = []

        def product(vector: Any, counted: list[int] = counted) -> Any:
            counted.append(1)
            return values.numpy() * vector.ravel()

        operator = LinearOperator(_Diagonal(values).shape, product, dtype=np.float64)
        theirs, _ = eigsh(operator, _EIGENPAIRS, which="LA", tol=_TOLERANCE, rng=np.random.default_rng(seed))
        for who, taken, answer in (
            ("hesse.eigsh", found.products, found.values),
            ("scipy.sparse.linalg.eigsh", len(counted), torch.from_numpy(theirs).flip(0)),
        ):
            products[who].append(taken)
            errors[who].append(((answer - wanted).abs() / wanted).max().item())
    contestants = {
        who: {
            "products": statistics.fmean(products[who]),
            "most": max(products[who]),
            "error": max(errors[who]),
        }
        for who in products
    }
    print(f"estimators  eigenpairs {contestants}", flush=True)
    return {
        "description": f"{_EIGENPAIRS} outliers over a bulk, n = 4000, tol {_TOLERANCE}; {_EIGEN_RUNS} runs",
        "contestants": contestants,
    }


def answer_estimators() -> dict[str, Any]:
    """All of it."""
    cases = {name: answer_spectrum(name, values) for name, values in spectra().items()}
    return cases | {"eigenpairs": answer_eigenpairs()}
