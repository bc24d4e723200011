"""Eigenpairs, spectral density and log-determinant from products, beside dense decompositions."""

import math

import pytest
import torch

import hesse
from hesse.errors import ArgumentError, BudgetError
from hesse.estimators.lanczos import Lanczos
from hesse.estimators.products import Draws, Products
from hesse.runtime.progress import Progress
from operators import SPECTRA, Counted, Diagonal, outliers, rotated

WANTED = {
    "largest": lambda values, k: values.flip(0)[:k],
    "smallest": lambda values, k: values[:k],
    "both": lambda values, k: torch.cat([values.flip(0)[: k - k // 2], values[: k // 2].flip(0)]),
    "magnitude": lambda values, k: values[values.abs().argsort(descending=True)][:k],
}


def process(A, steps, batch=1):
    A = Products(A, Progress(False))
    lanczos = Lanczos(A, Draws(A, 0).signs(batch).T[..., None], steps)
    for _ in range(steps):
        lanczos.step()
    return lanczos


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_basis_is_orthonormal_and_the_matrix_projected(dtype):
    A = rotated(outliers(200)).to(dtype)
    lanczos = process(A, 60, batch=3)
    eps = torch.finfo(dtype).eps
    for v, t in zip(lanczos.v, lanczos.t, strict=True):
        torch.testing.assert_close(v.T @ v, torch.eye(61, dtype=dtype), rtol=0, atol=100 * eps)
        v, exact = v[:, :60].double(), A.double()
        torch.testing.assert_close(t, v.T @ exact @ v, rtol=0, atol=1e4 * eps)
        assert (t - t.triu(-1).tril(1)).abs().max() < 1e4 * eps  # tridiagonal


def test_no_ghosts_in_float32_after_100_steps():
    values = torch.cat([torch.tensor([100.0, 50.0, 20.0]), torch.linspace(-1, 1, 997)])
    ritz = torch.linalg.eigvalsh(process(Diagonal(values), 100).t[0]).flip(0)
    torch.testing.assert_close(ritz[:3], values[:3].double(), rtol=1e-6, atol=0)
    assert ritz[3] <= 1.0001


@pytest.mark.parametrize("which", WANTED)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 7, 30, 150])
def test_eigenpairs_beside_eigh(which, block, n):
    A = torch.randn(n, n, dtype=torch.float64)
    A = A + A.T
    k = min(4, n)
    found = hesse.eigsh(A, k, which, block=block, tol=1e-9)
    torch.testing.assert_close(found.values, WANTED[which](torch.linalg.eigvalsh(A), k), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(k).double(), rtol=0, atol=1e-8)
    true = (A @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, true, rtol=0.1, atol=1e-10)
    assert found.converged.all()


@pytest.mark.parametrize("k", [1, 5, 8])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(100),
        torch.ones(100),
        torch.cat([torch.ones(1), torch.zeros(99)]),
        torch.cat([torch.full((3,), 5.0), torch.zeros(97)]),
        torch.cat([torch.full((4,), 5.0), torch.linspace(4, 0, 116)]),
        1e-9 / torch.arange(1.0, 121.0),
    ],
    ids=["zero", "identity", "rank one", "triple", "fourfold", "tiny"],
)
def test_degenerate_spectra(values, dtype, block, k):
    if values[3] == 5 and block == 1:
        pytest.skip("copies over a bulk are found for certain only by a block of as many")
    values = values.to(dtype)
    scale = values.max().item() or 1.0
    for A in (Diagonal(values), rotated(values)):
        found = hesse.eigsh(A, k, "magnitude", block=block, tol=1e-5)
        torch.testing.assert_close(found.values / scale, values[:k] / scale, rtol=0, atol=1e-4)
        assert found.converged.all()


def test_ten_outliers_take_no_more_products_than_arpack():
    from scipy.sparse.linalg import LinearOperator, eigsh

    values = outliers(4000)
    ours, theirs = [], []
    for seed in range(3):
        found = hesse.eigsh(Diagonal(values), 10, tol=1e-6, seed=seed)
        torch.testing.assert_close(found.values, values[:10].flip(0), rtol=1e-6, atol=0)
        # Eigenvectors of a diagonal operator are unit vectors.
        torch.testing.assert_close(found.vectors.abs().amax(0), torch.ones(10).double(), rtol=1e-6, atol=0)
        counted = Counted(values)

        def product(vector, counted=counted):
            counted.columns += 1
            return values.numpy() * vector.ravel()

        start = torch.randn(4000, generator=torch.Generator().manual_seed(seed)).numpy()
        eigsh(LinearOperator((4000, 4000), product, dtype="float64"), 10, which="LA", tol=1e-6, v0=start)
        ours.append(found.products)
        theirs.append(counted.columns)
    assert sum(ours) <= 1.3 * sum(theirs)


def test_what_is_not_converged_is_told():
    found = hesse.eigsh(rotated(SPECTRA["flat"](300)), 5, products=30, tol=1e-10)
    assert not found.converged.all()
    assert found.products <= 36
    assert (found.residuals > 1e-10).any()


def test_eigenpairs_in_low_precision_are_judged_by_what_is_there():
    A = rotated(outliers(200)).float()
    found = hesse.eigsh(A, 3, tol=1e-12, products=200)
    true = (A @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, true, rtol=0.5, atol=1e-6)
    assert not found.converged.any()


@pytest.mark.parametrize("n", [60, 500])
def test_moments_of_the_density(n):
    values = outliers(n)
    spectrum = hesse.spectral_density(rotated(values), steps=20, probes=8)
    assert spectrum.exact == (n == 60)
    for power in (0, 1, 2, 3):
        mean, error = spectrum.mean(lambda nodes, power=power: nodes**power)
        right = (values**power).mean()
        assert (mean - right).abs() <= 3 * error + 1e-10 * right.abs()


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_density_does_not_depend_on_the_memory(chunk):
    A = Counted(rotated(outliers(300)).float())
    one = hesse.spectral_density(A, steps=10, probes=5)
    assert A.calls == 10
    other = hesse.spectral_density(A, steps=10, probes=5, memory=chunk * 15 * 300 * 4)
    torch.testing.assert_close(one.nodes, other.nodes, rtol=1e-4, atol=1e-4)
    assert one.products == other.products == 50
    with pytest.raises(BudgetError, match="take fewer steps"):
        hesse.spectral_density(A, steps=10, probes=5, memory=1000)


def test_the_density_is_smoothed_again_without_products():
    spectrum = hesse.spectral_density(rotated(SPECTRA["flat"](400)), steps=30, probes=4)
    for width in (None, 0.3, 0.1):
        grid, density, error = spectrum.density(width=width)
        assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-3)
        assert (error >= 0).all()
    middle = spectrum.density(torch.tensor([2.0]), width=0.2)
    assert (middle.density - 0.5).abs() < 4 * middle.error + 1e-3


@pytest.mark.parametrize(
    "values", [torch.zeros(200), torch.ones(200), torch.cat([torch.ones(1), torch.zeros(199)])]
)
def test_degenerate_densities(values):
    spectrum = hesse.spectral_density(rotated(values), steps=10, probes=4)
    mean, _ = spectrum.mean(lambda nodes: nodes)
    assert mean.item() == pytest.approx(values.mean().item(), abs=0.02)
    assert spectrum.density().density.isfinite().all()
    torch.testing.assert_close(spectrum.weights.sum(1), torch.ones(4).double())


def test_the_figure():
    figure = hesse.spectral_density(Diagonal(outliers(500)), steps=20, probes=3).plot(width=1.0)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "eigenvalue"
    assert len(axes.lines) == 1
    assert len(axes.collections) == 1  # the band


@pytest.mark.parametrize("shift", [0.0, 2.0])
@pytest.mark.parametrize("name", ["flat", "1/i"])
def test_logdet_beside_slogdet(name, shift):
    A = rotated(SPECTRA[name](700))
    right = torch.linalg.slogdet(A + shift * torch.eye(700)).logabsdet
    found = hesse.logdet(A, shift)
    assert (found.value - right).abs() <= 3 * found.standard_error + 1e-9
    small = rotated(SPECTRA[name](100))
    exact = hesse.logdet(small, shift)
    torch.testing.assert_close(exact.value, torch.linalg.slogdet(small + shift * torch.eye(100)).logabsdet)
    assert (exact.method, exact.standard_error.item(), exact.converged) == ("exact", 0.0, True)


def test_coverage_of_logdet():
    A = rotated(SPECTRA["flat"](150))
    right = torch.linalg.slogdet(A).logabsdet
    runs = [hesse.logdet(A, steps=10, probes=8, seed=seed) for seed in range(60)]
    held = [((run.value - right).abs() <= 2 * run.standard_error).item() for run in runs]
    assert sum(held) >= 45


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: hesse.eigsh(torch.eye(3), 4), "k must be at most the dimension 3, met 4"),
        (lambda: hesse.eigsh(torch.eye(3), 0), "k must be a positive integer"),
        (lambda: hesse.eigsh(torch.eye(3), 1, "top"), "which must be"),
        (lambda: hesse.eigsh(torch.eye(3), 1, block=0), "block must be"),
        (lambda: hesse.eigsh(torch.eye(90), 5, products=6), "products must be at least .* 7, met 6"),
        (lambda: hesse.eigsh(torch.ones(3, 3).triu(), 1), "A must be symmetric"),
        (lambda: hesse.eigsh(torch.ones(3, 2), 1), "A must be square"),
        (lambda: hesse.eigsh(torch.full((90, 90), math.nan), 1), "holds NaN"),
        (lambda: hesse.spectral_density(torch.eye(3), steps=0), "steps must be"),
        (lambda: hesse.logdet(-torch.eye(3)), "positive definite.*raise shift"),
        (lambda: hesse.logdet(Diagonal(torch.linspace(-0.5, 9, 900)), 0.1), "positive definite"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ArgumentError, match=words):
        call()
