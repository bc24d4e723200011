"""Standard errors against closed forms."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hesse


def design(n=40):
    """A design matrix with an intercept and columns of very different units."""
    X = torch.randn(n, 3, dtype=torch.float64)
    X[:, 0] = 1
    X[:, 2] *= 1e4
    return X


def newton(likelihood, x, steps=20):
    for _ in range(steps):
        H = torch.autograd.functional.hessian(likelihood, x)
        x = x - torch.linalg.solve(H, torch.func.grad(likelihood)(x))
    return x


def logistic():
    """Data, the summed likelihood, its fit, and the weights W of $X^T W X$."""
    X = design()
    y = torch.bernoulli(torch.sigmoid(X @ torch.tensor([0.3, 1.0, -1e-4]).double()))
    nll = lambda b: F.binary_cross_entropy_with_logits(X @ b, y, reduction="sum")
    b = newton(nll, torch.zeros(3).double())
    p = torch.sigmoid(X @ b)
    return X, y, nll, b, p * (1 - p)


def poisson():
    X = design()
    y = torch.poisson(torch.exp(X @ torch.tensor([0.3, 0.5, -1e-5]).double()))
    nll = lambda b: ((X @ b).exp() - y * (X @ b)).sum()
    b = newton(nll, torch.zeros(3).double())
    return X, y, nll, b, (X @ b).exp()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("model", [logistic, poisson])
@pytest.mark.parametrize("scale", ["sum", "mean", "deviance"])
def test_closed_forms_on_every_scale(model, scale):
    X, y, nll, b, w = model()
    objective = {"sum": nll, "mean": lambda b: nll(b) / len(y), "deviance": lambda b: 2 * nll(b)}[scale]
    samples = len(y) if scale == "mean" else None
    found = hesse.covariance(objective, b, scale=scale, samples=samples)
    expected = torch.linalg.inv(X.T @ (w[:, None] * X))
    close(found.matrix, expected)
    close(found.standard_errors, expected.diagonal().sqrt())
    close(found.estimates, b)
    lower, upper = found.interval(0.95)
    close((upper - lower) / 2, 1.959963984540054 * expected.diagonal().sqrt())
    close((upper + lower) / 2, b)
    close(found.correlation.diagonal(), torch.ones(3).double())
    close(found.correlation * expected.diagonal().sqrt().outer(expected.diagonal().sqrt()), expected)


def test_least_squares():
    """The variance estimated, the errors are those of every textbook: s^2 (X'X)^-1."""
    X = design()
    y = X @ torch.tensor([1.0, 2.0, 3e-4]).double() + torch.randn(40, dtype=torch.float64)
    b = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
    squares = lambda b: (y - X @ b).square().sum()
    s2 = squares(b) / (40 - 3)
    found = hesse.covariance(lambda b: squares(b) / (2 * s2), b, scale="sum")
    close(found.matrix, s2 * torch.linalg.inv(X.T @ X))


def test_names_in_names_out():
    X, y, _, b, w = logistic()
    expected = torch.linalg.inv(X.T @ (w[:, None] * X)).diagonal().sqrt()
    parts = {"intercept": b[0], "slopes": b[1:]}
    nll = lambda p: F.binary_cross_entropy_with_logits(
        p["intercept"] + X[:, 1:] @ p["slopes"], y, reduction="sum"
    )
    found = hesse.covariance(nll, parts, scale="sum")
    assert found.names == ("intercept", "slopes[0]", "slopes[1]")
    assert found.standard_errors.keys() == parts.keys()
    close(found.standard_errors["intercept"], expected[0])
    close(found.standard_errors["slopes"], expected[1:])
    assert found.interval()[0]["slopes"].shape == (2,)
    leaves = [part.clone().requires_grad_() for part in parts.values()]
    closure = lambda: nll(dict(zip(parts, leaves, strict=True)))
    as_list = hesse.covariance(closure, leaves, scale="sum")
    assert as_list.names == ("params[0]", "params[1][0]", "params[1][1]")
    close(as_list.standard_errors[1], expected[1:])
    assert not as_list.matrix.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [40, 7])
@pytest.mark.parametrize("kind", ["hessian", "sandwich"])
def test_loss_knows_its_scale(reduction, size, kind):
    X, y, _, b, w = logistic()
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data = b[None].clone()
    loss_fn = nn.BCEWithLogitsLoss(reduction=reduction)
    data = list(zip(X.split(size), y[:, None].split(size), strict=True))
    found = hesse.covariance(hesse.Loss(model, loss_fn, data, reduction=reduction), kind=kind)
    expected = torch.linalg.inv(X.T @ (w[:, None] * X))
    if kind == "sandwich":
        slopes = (torch.sigmoid(X @ b) - y)[:, None] * X
        expected = expected @ slopes.T @ slopes @ expected
    close(found.matrix, expected)
    close(found.standard_errors["weight"], expected.diagonal().sqrt()[None])
    assert found.names == ("weight[0, 0]", "weight[0, 1]", "weight[0, 2]")


def test_single_precision_stays():
    found = hesse.covariance(lambda b: (b * b).sum(), torch.ones(2), scale="sum")
    assert found.matrix.dtype == found.standard_errors.dtype == torch.float32
    close(found.matrix, torch.eye(2) / 2)


def test_columns_that_depend_on_each_other():
    """As -32 + F - 1.8 C = 0, whatever units and sizes the columns have."""
    X, y, _, _, _ = logistic()
    fahrenheit, celsius = X[:, 1], (X[:, 1] - 32) / 1.8
    nll = lambda p: F.binary_cross_entropy_with_logits(p["a"] + p["f"] * fahrenheit + p["c"] * celsius, y)
    zeros = {name: torch.zeros((), dtype=torch.float64) for name in "afc"}
    with pytest.raises(hesse.HesseError, match="do not determine") as met:
        hesse.covariance(nll, zeros, scale="mean", samples=40)
    assert "along +1 a +0.05625 c -0.03125 f; the data" in str(met.value)


def test_params_that_are_no_minimum():
    saddle = lambda p: (p["a"] ** 2 - 3 * p["a"] * p["b"] + p["b"] ** 2).sum()
    with pytest.raises(hesse.HesseError, match=r"eigenvalue -0.5 along \+1 [ab] \+1 [ab]; params are no min"):
        hesse.covariance(saddle, {"a": torch.ones(()), "b": torch.ones(())}, scale="sum")


def test_params_without_influence():
    with pytest.raises(hesse.HesseError, match=r"eigenvalue 0 along \+1 params\[1\]\[1\]; the data"):
        hesse.covariance(
            lambda a, b: a.square() + b[0].square(), [torch.ones(()), torch.ones(2)], scale="sum"
        )


SQUARE = (lambda x: x.square().sum(), torch.ones(2))


def loss(loss_fn):
    return hesse.Loss(nn.Linear(2, 1), loss_fn, (torch.ones(3, 2), torch.ones(3, 1)))


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (
            lambda: hesse.covariance(*SQUARE),
            'scale must say .* "sum" over obs.* samples=N.* "deviance".* None',
        ),
        (lambda: hesse.covariance(*SQUARE, scale="mean"), "samples must be the number of observations"),
        (lambda: hesse.covariance(*SQUARE, scale="sum", samples=3), "samples=3 with scale='sum'"),
        (lambda: hesse.covariance(*SQUARE, scale="mean", samples=0), "samples=0"),
        (lambda: hesse.covariance(*SQUARE, scale="sum", kind="robust"), "kind must be"),
        (lambda: hesse.covariance(*SQUARE, scale="sum", kind="sandwich"), "pass a Loss as nll"),
        (lambda: hesse.covariance(SQUARE[0], [], scale="sum"), "params holds no tensor"),
        (lambda: hesse.covariance(loss(F.l1_loss), scale="mean"), "left out with a Loss"),
        (lambda: hesse.covariance(loss(F.mse_loss)), "a variance of one half alone"),
        (lambda: hesse.covariance(*SQUARE, scale="sum").interval(95), "level must be between 0 and 1"),
    ],
)
def test_errors(ask, text):
    with pytest.raises(hesse.HesseError, match=text):
        ask()


@pytest.mark.filterwarnings("ignore::hesse.HesseWarning")
def test_not_finite():
    with pytest.raises(hesse.HesseError, match="not finite at params"):
        hesse.covariance(lambda x: x.log().sum(), torch.zeros(1), scale="sum")
