"""Trace and diagonal from products: exactness, leaving one out, bias, coverage, degenerate operators."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hesse
from hesse.errors import ArgumentError, DtypeError
from hesse.estimators.products import Draws, Products
from hesse.runtime.progress import Progress
from operators import SPECTRA, Counted, Diagonal, rotated

ESTIMATES = {"trace": hesse.estimate_trace, "diagonal": hesse.estimate_diagonal}
BASIS = {"trace": "xtrace", "diagonal": "xdiag"}


def signs(A, count, seed=0):
    """The vectors that an estimate draws."""
    return Draws(Products(A, Progress(False)), seed).signs(count)


def exact(A, kind):
    return A.trace() if kind == "trace" else A.diagonal()


def left_out(A, omega, kind):
    """Values for every vector from a basis of all others, each by a decomposition of its own."""
    values = []
    for i in range(omega.shape[1]):
        q = torch.linalg.qr(A @ omega[:, [j for j in range(omega.shape[1]) if j != i]]).Q
        w = omega[:, i]
        if kind == "trace":
            rest = w - q @ (q.T @ w)
            values.append((q.T @ A @ q).trace() + rest @ A @ rest)
        else:
            values.append((q @ q.T @ A).diagonal() + w * (A @ w - q @ (q.T @ (A @ w))))
    return torch.stack(values, -1)


def left_out_nystrom(A, omega, kind):
    values = []
    for i in range(omega.shape[1]):
        others = omega[:, [j for j in range(omega.shape[1]) if j != i]]
        y, w = A @ others, omega[:, i]
        known = y @ torch.linalg.solve(others.T @ y, y.T)
        rest = w * ((A - known) @ w)
        values.append(known.trace() + rest.sum() if kind == "trace" else known.diagonal() + rest)
    return torch.stack(values, -1)


@pytest.mark.parametrize("kind", ESTIMATES)
@pytest.mark.parametrize("name", ["1/i", "flat", "outliers"])
def test_equals_leaving_out_one_by_one(kind, name):
    A = rotated(SPECTRA[name](60))
    found = ESTIMATES[kind](A, products=20, method=BASIS[kind])
    values = left_out(A, signs(A, 10), kind)
    torch.testing.assert_close(found.value, values.mean(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.standard_error, values.std(-1) / math.sqrt(10), rtol=1e-6, atol=1e-9)
    assert (found.products, found.method) == (20, BASIS[kind])


@pytest.mark.parametrize("kind", ESTIMATES)
def test_nystrom_equals_leaving_out_one_by_one(kind):
    A = rotated(SPECTRA["1/i"](60))
    found = ESTIMATES[kind](A, products=12, method="nystrom")
    values = left_out_nystrom(A, signs(A, 12), kind)
    torch.testing.assert_close(found.value, values.mean(-1), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        found.standard_error, 2 * values.std(-1) / math.sqrt(12), rtol=1e-5, atol=1e-10
    )


@pytest.mark.parametrize("kind", ESTIMATES)
def test_hutchinson_is_the_plain_mean(kind):
    A = rotated(SPECTRA["flat"](60))
    omega = signs(A, 9)
    values = omega * (A @ omega)
    values = values.sum(0) if kind == "trace" else values
    found = ESTIMATES[kind](A, products=9, method="hutchinson")
    torch.testing.assert_close(found.value, values.mean(-1))
    torch.testing.assert_close(found.standard_error, values.std(-1) / 3)


@pytest.mark.parametrize("kind", ESTIMATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("products", [None, 40, 1000])
def test_exact_where_the_products_reach_the_dimension(kind, dtype, products):
    A = torch.randn(40, 40, dtype=dtype)
    A = A + A.T
    found = ESTIMATES[kind](A, products=products, rtol=0)
    torch.testing.assert_close(found.value, exact(A, kind))
    assert found.converged
    assert found.method == "exact"
    assert not found.standard_error.any()


@pytest.mark.parametrize("method", [None, "basis", "nystrom"])
@pytest.mark.parametrize("kind", ESTIMATES)
def test_low_rank_is_exact(kind, method):
    A = rotated(torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(97)]).double())
    method = BASIS[kind] if method == "basis" else method
    found = ESTIMATES[kind](A, products=20, method=method)
    torch.testing.assert_close(found.value, exact(A, kind), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ESTIMATES)
@pytest.mark.parametrize("method", [None, "hutchinson", "basis", "nystrom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero(kind, method, dtype):
    method = BASIS[kind] if method == "basis" else method
    found = ESTIMATES[kind](Diagonal(torch.zeros(300, dtype=dtype)), method=method)
    assert found.value.dtype == dtype
    assert not found.value.any()
    assert (found.converged, found.products) == (True, 16)


@pytest.mark.parametrize("kind", ESTIMATES)
@pytest.mark.parametrize("method", [None, "hutchinson", "basis", "nystrom"])
def test_scale_does_not_matter(kind, method):
    method = BASIS[kind] if method == "basis" else method
    A = rotated(SPECTRA["1/i"](300))
    one, other = (ESTIMATES[kind](scale * A, method=method, rtol=0.03) for scale in (1.0, 2.0**-30))
    assert (one.products, one.converged) == (other.products, other.converged)
    torch.testing.assert_close(one.value, 2.0**30 * other.value)
    torch.testing.assert_close(one.standard_error, 2.0**30 * other.standard_error)


@pytest.mark.parametrize("kind", ESTIMATES)
@pytest.mark.parametrize("method", [None, "hutchinson", "nystrom"])
def test_memory_and_chunks(kind, method):
    """Without room for vectors everything is forgotten; the same signs give Hutchinson's mean."""
    A = rotated(SPECTRA["1/i"](200))
    short = ESTIMATES[kind](A, products=50, memory=6 * 200 * 8 * 8, method=method)
    assert short.products == 50
    assert ((short.value - exact(A, kind)).norm() / exact(A, kind).norm()) < 0.5
    if method == "hutchinson":
        ample = ESTIMATES[kind](A, products=50, method=method)
        torch.testing.assert_close(ample.value, short.value)
        torch.testing.assert_close(ample.standard_error, short.standard_error)
    none = hesse.estimate_trace(A, products=50, memory=1)
    torch.testing.assert_close(none.value, hesse.estimate_trace(A, products=50, method="hutchinson").value)


def test_signs_do_not_depend_on_how_many_are_drawn():
    A = Products(Diagonal(torch.ones(17)), Progress(False))
    draws = Draws(A, 3)
    parts = torch.cat([draws.signs(1), draws.signs(4), draws.signs(2)], 1)
    assert torch.equal(parts, Draws(A, 3).signs(7))
    assert torch.equal(parts.abs(), torch.ones(17, 7))


def test_seeds_and_the_callers_random_state():
    A = rotated(SPECTRA["1/i"](100))
    before = torch.get_rng_state()
    one, same, other = (hesse.estimate_trace(A, products=20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert one.value == same.value
    assert one.value != other.value
    assert (one.seed, other.seed) == (1, 2)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", [None, "xtrace", "nystrom"])
def test_bias_and_coverage(name, method):
    """The mean over 200 seeds is right, and two standard errors hold the error in 75 of 100 runs at least."""
    values = SPECTRA[name](120)
    if method == "nystrom" and (values < 0).any():
        pytest.skip("not positive semi-definite")
    A, right = rotated(values), values.sum()
    runs = [hesse.estimate_trace(A, products=30, method=method, seed=seed) for seed in range(200)]
    off = torch.stack([run.value - right for run in runs])
    errors = torch.stack([run.standard_error for run in runs])
    rounding = 1e-12 * values.abs().sum()
    assert off.mean().abs() <= 4 * off.std() / math.sqrt(200) + rounding
    assert (off.abs() <= 2 * errors + rounding).double().mean() >= 0.75


@pytest.mark.parametrize("kind", ESTIMATES)
@pytest.mark.parametrize("name", SPECTRA)
def test_converged_means_within_the_tolerance(kind, name):
    A = rotated(SPECTRA[name](400))
    found = ESTIMATES[kind](A, rtol=0.02)
    assert found.converged
    assert (found.value - exact(A, kind)).norm() <= 0.02 * exact(A, kind).norm()


def test_a_decaying_spectrum_needs_few_products():
    A = rotated(SPECTRA["0.7^i"](500))
    best = hesse.estimate_trace(A, products=60)
    plain = hesse.estimate_trace(A, products=60, method="hutchinson")
    right = A.trace()
    assert (plain.value - right).abs() > 100 * (best.value - right).abs()


def test_a_flat_spectrum_takes_no_basis():
    A = rotated(SPECTRA["flat"](300))
    assert hesse.estimate_trace(A, products=60).method == "hutchinson"


def test_a_diagonal_operator_takes_no_basis():
    found = hesse.estimate_diagonal(Diagonal(torch.arange(500.0).double()), products=10)
    torch.testing.assert_close(found.value, torch.arange(500.0).double(), rtol=1e-10, atol=1e-9)


def test_products_are_counted_and_told():
    A, told = Counted(rotated(SPECTRA["1/i"](200))), []
    found = hesse.estimate_trace(A, products=31, progress=lambda done, total: told.append((done, total)))
    assert found.products == A.columns == 31
    assert told[-1] == (31, 31)
    assert A.calls < 5
    assert not hesse.estimate_trace(A, products=4, rtol=1e-6).converged


def test_an_operator_may_differentiate():
    """Products made by autograd on the spot, of which nothing is kept."""
    point = torch.arange(1.0, 9.0, requires_grad=True)

    class Quartic:
        shape = (8, 8)

        def __matmul__(self, vectors):
            (gradient,) = torch.autograd.grad((point**4).sum(), point, create_graph=True)
            columns = [torch.autograd.grad(gradient @ v, point, retain_graph=True)[0] for v in vectors.T]
            return torch.stack(columns, 1) + 0 * point[:, None]

    found = hesse.estimate_diagonal(Quartic())
    torch.testing.assert_close(found.value, 12 * point.detach() ** 2)
    assert not found.value.requires_grad


def test_integers_and_tiny_dimensions():
    A = torch.tensor([[2, 1], [1, 5]])
    assert hesse.estimate_trace(A).value == 7
    assert hesse.estimate_diagonal(A).value.tolist() == [2, 5]
    assert hesse.estimate_trace(torch.tensor([[3.0]])).value == 3
    assert hesse.estimate_trace(torch.eye(30, dtype=torch.bfloat16)).value.dtype == torch.float32


@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_any_size_and_any_number_of_products(n, products, rank):
    left = torch.randn(n, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    A = left @ left.T
    for kind, estimate in ESTIMATES.items():
        for method in (None, BASIS[kind], "nystrom", "hutchinson"):
            found = estimate(A, products=products, method=method)
            assert found.products == min(products, n) or found.method == "exact"
            assert found.value.isfinite().all()
            assert not found.standard_error.isnan().any()


@pytest.mark.parametrize(
    ("A", "options", "error", "words"),
    [
        (torch.ones(3, 4), {}, ArgumentError, r"A must be square.*\(3, 4\)"),
        (torch.ones(4), {}, ArgumentError, "A must be square"),
        (torch.ones(0, 0), {}, ArgumentError, "not empty"),
        ("text", {}, ArgumentError, "A has no shape"),
        (torch.eye(3, dtype=torch.complex64), {}, DtypeError, "A must be real"),
        (torch.full((50, 50), math.nan), {}, ArgumentError, "holds NaN"),
        (torch.ones(50, 50).triu(), {"products": 10}, ArgumentError, "A must be symmetric"),
        (-torch.eye(50), {"method": "nystrom"}, ArgumentError, "A must be positive semi-definite"),
        (torch.eye(50), {"products": 0}, ArgumentError, "products must be a positive integer, met 0"),
        (torch.eye(50), {"method": "best"}, ArgumentError, "method must be None.*'best'"),
        (torch.eye(50), {"rtol": -1.0}, ArgumentError, "rtol and atol"),
        (torch.eye(50), {"seed": 0.5}, ArgumentError, "seed must be an integer"),
        (Diagonal(torch.ones(50), transposed=True), {}, ArgumentError, "must be like it, met"),
    ],
)
def test_errors_name_the_argument(A, options, error, words):
    for estimate in ESTIMATES.values():
        with pytest.raises(error, match=words):
            estimate(A, **options)


def test_an_operator_of_numpy_is_told_of():
    from scipy.sparse.linalg import LinearOperator

    A = LinearOperator((5, 5), lambda v: v)
    with pytest.raises(ArgumentError, match="tensors"):
        hesse.estimate_trace(A)
