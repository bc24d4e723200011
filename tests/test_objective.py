"""A network as scipy takes it."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

import hesse
from oracle import hessian_matrix


def problem(dtype=torch.float64, params=None, **options):
    """A loss over three batches, and the same as a function of its parameters."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    x, y = torch.randn(10, 3, dtype=dtype), torch.randint(0, 2, (10,))
    loss = hesse.Loss(model, F.cross_entropy, list(zip(x.split(4), y.split(4), strict=True)), params=params)

    def func(*values):
        state = {**dict(model.named_parameters()), **dict(zip(loss.params, values, strict=True))}
        return F.cross_entropy(torch.func.functional_call(model, state, (x,)), y)

    return model, loss, func, tuple(p.detach().clone() for p in loss.params.values())


def tensors_at(x, like):
    parts = torch.from_numpy(x).split([t.numel() for t in like])
    return tuple(part.view_as(t).to(t) for part, t in zip(parts, like, strict=True))


@pytest.mark.parametrize("params", [None, ["2.*"]])
@pytest.mark.parametrize("form", ["loss", "closure", "function", "dict"])
def test_derivatives_of_every_form(form, params):
    _, loss, func, start = problem(params=params)
    names = list(loss.params)
    objective = {
        "loss": lambda: hesse.Objective(loss),
        "closure": lambda: hesse.Objective(loss.value_of_one_batch, list(loss.params.values())),
        "function": lambda: hesse.Objective(func, start),
        "dict": lambda: hesse.Objective(lambda d: func(*d.values()), dict(zip(names, start, strict=True))),
    }
    if form == "closure":
        loss.value_of_one_batch = lambda: func(*loss.params.values())
    o = objective[form]()
    x = o.x0 + np.linspace(-1, 1, o.x0.size)
    p = np.cos(np.arange(x.size))
    there = tensors_at(x, start)
    slopes = torch.func.grad(func, tuple(range(len(there))))(*there)
    H = hessian_matrix(func, there).detach().numpy()
    assert type(o.fun(x)) is float
    np.testing.assert_allclose(o.fun(x), func(*there).item(), rtol=1e-14)
    np.testing.assert_allclose(
        o.jac(x), torch.cat([s.detach().flatten() for s in slopes]), rtol=0, atol=1e-15
    )
    np.testing.assert_allclose(o.hess(x), H, rtol=0, atol=1e-14)
    np.testing.assert_allclose(o.hessp(x, p), H @ p, rtol=0, atol=1e-14)
    assert all(found.dtype == np.float64 for found in (o.x0, o.jac(x), o.hess(x), o.hessp(x, p)))


def test_parameters_are_left_as_they_were():
    model, loss, _, _ = problem()
    o = hesse.Objective(loss)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [(p.detach().clone(), p._version, p.data_ptr(), p.grad) for p in model.parameters()]
    x = o.x0 + 1 / 3
    for ask in (o.fun, o.jac, o.hess, lambda x: o.hessp(x, x)):
        ask(x)
    loss.loss_fn = lambda z, y: 1 / 0
    with pytest.raises(ZeroDivisionError):
        o.fun(x)
    for parameter, (value, version, place, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert (parameter._version, parameter.data_ptr()) == (version, place)
        assert parameter.grad is grad
        assert (grad == 1).all()


def test_a_graph_of_the_callers_does_not_notice():
    model, loss, _, _ = problem()
    value = F.cross_entropy(model(torch.ones(2, 3).double()), torch.tensor([0, 1]))
    o = hesse.Objective(loss)
    o.hess(o.x0 + 1)
    value.backward()


def test_tensors_of_a_function_are_left_as_they_were():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    o = hesse.Objective(lambda x: x.square().sum(), x)
    o.jac([3.0, 4.0])
    assert (x.tolist(), x._version) == ([1, 2], 0)


def test_load_and_unpacked():
    _, loss, func, start = problem()
    o = hesse.Objective(loss)
    x = o.x0 + 1 / 3
    by_name = o.unpacked(x)
    assert list(by_name) == list(loss.params)
    for found, expected in zip(by_name.values(), tensors_at(x, start), strict=True):
        assert torch.equal(found, expected)
    o.load(x)
    np.testing.assert_array_equal(o.x0, x)
    assert loss.value().item() == pytest.approx(func(*by_name.values()).item(), rel=1e-14)
    inputs = [torch.zeros(2), torch.zeros(1)]
    hesse.Objective(lambda a, b: a.sum() * b.sum(), inputs).load([1, 2, 3])
    assert [t.tolist() for t in inputs] == [[1, 2], [3]]


def test_value_and_gradient_of_a_point_are_computed_once():
    calls = []

    def func(x):
        calls.append(None)
        return x.square().sum()

    o = hesse.Objective(func, torch.ones(2).double())
    x = np.array([1.0, 2.0])
    for first, second in ((o.fun, o.jac), (o.jac, o.fun)):
        calls.clear()
        first(x)
        second(x)
        assert len(calls) == 1
    o.fun(x)
    x[0] = 3.0  # written into by the caller
    assert o.jac(x).tolist() == [6, 4]
    o.fun(x)
    calls.clear()
    o.fun(x)
    o.fun(x)  # asked again: it may be another function by now
    assert len(calls) == 2


@pytest.mark.parametrize("method", ["trust-exact", "trust-krylov", "trust-ncg", "Newton-CG"])
def test_minimise(method):
    model, loss, _, _ = problem(params=["2.*"])
    penalty = lambda: sum(p.square().sum() for p in model.parameters()) / 50
    o = hesse.Objective(
        hesse.Loss(model, lambda z, y: F.cross_entropy(z, y) + penalty(), loss._data, params=["2.*"])
    )
    second = {"hess": o.hess} if method == "trust-exact" else {"hessp": o.hessp}
    run = minimize(o.fun, o.x0, jac=o.jac, method=method, tol=1e-7, **second)
    assert run.success
    assert run.fun < o.fun(o.x0)
    assert np.abs(o.jac(run.x)).max() < 1e-5


def test_gauss_newton():
    _, loss, _, _ = problem()
    o = hesse.Objective(loss, curvature="gauss_newton")
    expected = hesse.GaussNewtonOperator(loss).to_dense().numpy()
    np.testing.assert_allclose(o.hess(o.x0), expected, rtol=0, atol=1e-15)
    np.testing.assert_allclose(o.hessp(o.x0, o.x0), expected @ o.x0, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_precision_is_given_as_double(dtype):
    func = lambda x: (x**3).sum()
    half = dtype is torch.bfloat16
    with pytest.warns(hesse.HesseWarning) if half else nullcontext():
        o = hesse.Objective(func, torch.tensor([1.0, 2.0], dtype=dtype))
        x = np.array([0.5, 3.0])
        found = o.jac(x), o.hess(x), o.hessp(x, x)
    assert [part.dtype for part in found] == [np.float64] * 3
    assert [part.tolist() for part in found] == [[0.75, 27], [[3, 0], [0, 18]], [1.5, 54]]


def test_a_tensor_without_influence():
    o = hesse.Objective(lambda x, y: x.square().sum(), [torch.ones(1).double(), torch.ones(2).double()])
    assert o.jac([1, 2, 3]).tolist() == [2, 0, 0]
    assert np.diag(o.hess([1, 2, 3])).tolist() == [2, 0, 0]


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda o, x: o.fun(x[:1]), r"x must be a vector of 2 coordinates, met shape \[1\]"),
        (lambda o, x: o.hess(x[None]), r"x must be a vector of 2 coordinates, met shape \[1, 2\]"),
        (lambda o, x: o.hessp(x, np.ones(3)), r"p must be a vector of 2 coordinates, met shape \[3\]"),
        (lambda o, x: hesse.Objective(torch.sum, torch.ones(2), curvature="x"), "curvature must be"),
        (lambda o, x: hesse.Objective(torch.sum, torch.ones(2), curvature="gauss_newton"), "pass a Loss"),
        (lambda o, x: hesse.Objective(problem()[1], torch.ones(2)), "inputs must be left out with a Loss"),
    ],
)
def test_errors(ask, text):
    o = hesse.Objective(lambda x: x.square().sum(), torch.ones(2).double())
    with pytest.raises(hesse.HesseError, match=text):
        ask(o, o.x0)


def test_a_tensor_that_is_there_twice():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(hesse.HesseError, match="inputs holds a tensor twice"):
        hesse.Objective(lambda: w.square().sum(), [w, w])
