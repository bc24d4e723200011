"""A wrong result is noticed, and the slower exact way is taken."""

import pytest
import torch
from torch import nn

import hesse
from hesse import errors
from hesse.look.gradient import Gradient
from oracle import as_matrix, hessian_matrix

QUESTIONS = [hesse.hessian, hesse.hessian_blocks, hesse.hessian_diagonal]
POINTS = (torch.randn(40, dtype=torch.float64), torch.randn(5, dtype=torch.float64))


def func(a, b):
    return (a.exp().sum() * b).sin().sum() * 1e-3 + a.pow(3).sum()


def flat(answer):
    parts = torch.utils._pytree.tree_leaves(answer)
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("question", QUESTIONS)
def test_wrong_batches_are_noticed(question, monkeypatch):
    """Batched products that are wrong in one entry, as a broken batching rule would give them."""
    expected = flat(question(func, POINTS))
    right = Gradient.product

    def wrong(self, vectors, rows, columns, create_graph=False):
        found = right(self, vectors, rows, columns, create_graph)
        if torch._C._functorch.is_batchedtensor(vectors[0]):
            found[0] = found[0] + 1e-4 * found[0].abs().sum() * torch.ones_like(found[0])
        return found

    monkeypatch.setattr(Gradient, "product", wrong)
    with pytest.warns(errors.CertificateWarning, match=r"in batches deviates.*computed again"):
        result = question(func, POINTS, full_output=True)
    torch.testing.assert_close(flat(result.value), expected)
    assert result.certificate.passed
    assert not torch.allclose(flat(question(func, POINTS, check=False)), expected, rtol=1e-8)


def test_hidden_asymmetry_is_noticed():
    """A hook on a gradient makes it the gradient of nothing; no custom Function gives it away."""
    a = torch.randn(4, dtype=torch.float64)
    b = torch.randn(4, dtype=torch.float64)

    def hooked(a, b):
        inner = a * b
        inner.register_hook(lambda gradient: gradient * (1 + b))
        return inner.square().sum() * a.sum()

    expected = hessian_matrix(hooked, (a, b))
    assert not torch.allclose(expected, expected.T)
    with pytest.warns(errors.CertificateWarning, match="one triangle"):
        found = hesse.hessian(hooked, (a, b))
    torch.testing.assert_close(as_matrix(found, (a, b)), expected)


class Clipped(torch.autograd.Function):
    """A backward that is not linear: no product with it is a sum of others."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.tanh(gradient)


@pytest.mark.filterwarnings("ignore::hesse.errors.DerivativeWarning")
def test_products_that_do_not_add_up_are_told():
    x = torch.randn(4, dtype=torch.float64)
    with pytest.warns(errors.CertificateWarning) as caught:
        result = hesse.hessian(lambda x: Clipped.apply(x).pow(3).sum() * x.sum(), x, full_output=True)
    assert not result.certificate.passed
    assert "not deterministic" in str(caught[-1].message)


def test_an_unbatchable_operation_is_taken_one_by_one():
    class Unbatchable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return Factor.apply(x) * gradient

    class Factor(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 3 * x**2

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            assert gradient.sum().item() == gradient.sum().item()  # vmap has no .item()
            return 6 * x * gradient

    x = torch.randn(50, dtype=torch.float64)
    found = hesse.hessian_diagonal(lambda x: Unbatchable.apply(x).sum(), x)
    torch.testing.assert_close(found, 6 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_are_zero_but_for_rounding_pass(dtype):
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    inputs, targets = torch.randn(32, 8, dtype=dtype), torch.randn(32, 1, dtype=dtype)
    diagonal = hesse.model_hessian_diagonal(model, nn.functional.mse_loss, inputs, targets)
    assert diagonal[1].abs().max() < 1e-4  # the bias before the batch norm


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    x = torch.randn(20, dtype=torch.float64)
    result = hesse.hessian(lambda x: scale * (x @ x) ** 2, x, full_output=True)
    assert result.certificate.passed
    assert result.certificate.deviation < 1e-14


def test_rounding_of_a_function_that_cancels_is_no_failure():
    weights = torch.randn(500, 2000)
    result = hesse.hessian(lambda x: (weights @ x).logsumexp(0), torch.randn(2000), full_output=True)
    assert result.certificate.passed


def test_zero_hessian_passes():
    result = hesse.hessian(lambda x: (3 * x).sum() + 0 * (x**2).sum(), torch.ones(5), full_output=True)
    assert result.certificate.passed
    assert not result.value.any()


def test_products_that_cancel_pass():
    # Random signs may give H s = 0 for a small matrix: the deviation is measured by H, not by H s.
    for n in range(2, 8):
        x = torch.rand(n)
        result = hesse.hessian(lambda x: x.sum() ** 2 * 0.1 + 3, x, full_output=True)
        assert result.certificate.passed
