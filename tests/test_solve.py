"""Linear systems from products, beside torch.linalg.solve."""

import math

import pytest
import torch

import hesse
from hesse.errors import ArgumentError
from operators import Counted, rotated

DEFINITE = torch.logspace(0, 2, 120).double()
INDEFINITE = DEFINITE * torch.tensor([1.0, -1.0]).repeat(60)


@pytest.fixture
def b():
    return torch.randn(120, 3, dtype=torch.float64)


@pytest.mark.parametrize("method", ["cg", "minres"])
@pytest.mark.parametrize("preconditioner", [None, "nystrom"])
@pytest.mark.parametrize("damping", [0.0, 5.0])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_beside_a_dense_solution(method, preconditioner, damping, scale, b):
    A = scale * rotated(DEFINITE)
    b[:, 1] = 0
    found = hesse.solve(
        A, b, damping=scale * damping, method=method, preconditioner=preconditioner, tol=1e-10
    )
    dense = A + scale * damping * torch.eye(120, dtype=torch.float64)
    right = torch.linalg.solve(dense, b)
    torch.testing.assert_close(scale * found.x, scale * right, rtol=0, atol=1e-8)
    assert found.converged
    true = (b - dense @ found.x).norm(dim=0) / b.norm(dim=0).clamp_min(1e-300)
    torch.testing.assert_close(found.residuals[-1], true, rtol=1e-2, atol=1e-13)


def test_minres_solves_an_indefinite_system(b):
    A = rotated(INDEFINITE)
    found = hesse.solve(A, b, method="minres", tol=1e-9)
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-6)
    falls = found.residuals[1:-1] <= found.residuals[:-2] * (1 + 1e-9)
    assert falls.all()


def test_minres_takes_a_singular_system_that_has_a_solution(b):
    A = rotated(torch.cat([DEFINITE[:100], torch.zeros(20).double()]))
    found = hesse.solve(A, A @ b, method="minres", tol=1e-9)
    assert found.converged
    torch.testing.assert_close(A @ found.x, A @ b, rtol=0, atol=1e-6)


def test_negative_curvature_and_its_direction(b):
    A = rotated(INDEFINITE)
    found = hesse.solve(A, b[:, 0])
    assert found.status == ("negative curvature",)
    assert found.direction @ A @ found.direction <= 0
    assert found.direction.shape == found.x.shape == (120,)
    first = hesse.solve(-rotated(DEFINITE), b[:, 0])
    assert not first.x.any()  # nothing is gained along the first direction, which is b
    torch.testing.assert_close(first.direction, b[:, 0])


def test_columns_do_not_touch_each_other(b):
    A = rotated(DEFINITE)
    together = hesse.solve(A, b, tol=1e-8)
    for column in range(3):
        alone = hesse.solve(A, b[:, column], tol=1e-8)
        torch.testing.assert_close(together.x[:, column], alone.x, rtol=0, atol=1e-7)


def test_products_are_shared_and_counted(b):
    A = Counted(rotated(DEFINITE))
    found = hesse.solve(A, b.float(), tol=1e-4)
    assert found.products == A.columns
    assert A.calls < A.columns / 2.5


def test_zero_right_hand_side_takes_no_product():
    A = Counted(torch.eye(4))
    found = hesse.solve(A, torch.zeros(4))
    assert (found.status, found.products, A.calls) == (("converged",), 0, 0)
    assert not found.x.any()


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_degenerate_operators(method):
    b = torch.randn(50)
    assert not hesse.solve(torch.zeros(50, 50), b, method=method).converged
    u = torch.nn.functional.normalize(b, dim=0)
    rank_one = hesse.solve(1e-9 * torch.outer(u, u), b, method=method)
    torch.testing.assert_close(rank_one.x, 1e9 * b, rtol=1e-4, atol=0)
    one = hesse.solve(torch.tensor([[2]]), torch.tensor([4.0]), method=method)
    assert one.x.tolist() == [2.0]
    assert hesse.solve(torch.eye(50), b, method=method).products == 2


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_true_residual_that_rounding_keeps_up_is_told(method):
    A, b = rotated(torch.logspace(0, 5, 100).double()).float(), torch.randn(100)
    found = hesse.solve(A, b, method=method, tol=1e-7)
    assert not found.converged
    true = (b.double() - A.double() @ found.x.double()).norm() / b.norm()
    torch.testing.assert_close(found.residuals[-1, 0].double(), true.double(), rtol=0.2, atol=1e-5)


def test_out_of_products(b):
    found = hesse.solve(rotated(DEFINITE), b, products=5, tol=1e-12)
    assert found.status == ("out of products",) * 3
    assert found.products == 15


def test_the_preconditioner_saves_products():
    values = torch.cat([torch.logspace(2, 6, 40), torch.ones(460)]).double()
    b = torch.randn(500, dtype=torch.float64)
    plain, better = (
        hesse.solve(rotated(values), b, preconditioner=choice, tol=1e-8) for choice in (None, "nystrom")
    )
    assert better.converged
    assert better.products < plain.products


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: hesse.solve(torch.eye(3), torch.ones(4)),
            r"b must be a finite tensor \[3\] or \[3, k\], met \[4\]",
        ),
        (lambda: hesse.solve(torch.eye(3), 1.0), "b must be"),
        (lambda: hesse.solve(torch.eye(1), torch.tensor([math.inf])), "b must be a finite"),
        (lambda: hesse.solve(torch.eye(3), torch.ones(3), method="gmres"), "method must be"),
        (lambda: hesse.solve(torch.eye(3), torch.ones(3), preconditioner="ilu"), "preconditioner must be"),
        (lambda: hesse.solve(-torch.eye(30), torch.ones(30), preconditioner="nystrom"), "semi-definite"),
        (lambda: hesse.solve(torch.full((3, 3), math.nan), torch.ones(3)), "holds NaN"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ArgumentError, match=words):
        call()
