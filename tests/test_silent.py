"""Nothing silent: parts of a function that autograd does not see, torch's own errors, lost digits."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse
from cases import CASES, x
from hesse import errors
from hesse.checks.suspects import suspects
from hesse.runtime import kernels
from hesse.tape.record import Recorder

POINT = torch.tensor([1.0, 2.0], dtype=torch.float64)


class Detached(torch.autograd.Function):
    """The backward differentiates a detached copy, as adjoint methods do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x**3).sum()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((y**3).sum(), y)
        return gradient * slope


class Ungraphed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x**3).sum()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return gradient * 3 * x**2


class Rounded(torch.autograd.Function):
    """A straight-through estimator: its backward is not the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def cut(x):
    y = x.detach().requires_grad_()
    return (y**3).sum()


def slope_of_a_copy(x):
    y = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad((y**3).sum(), y)
    return (slope * x).sum()


def slope_of_what_has_no_graph(x):
    with torch.no_grad():
        y = 2 * x
    y.requires_grad = True
    (slope,) = torch.autograd.grad((y**3).sum(), y)
    return (slope * x).sum()


HIDDEN = {
    "a detached copy in a backward": (lambda x: Detached.apply(x), "backward of Detached"),
    "beside other terms": (lambda x: 100 * (x**2).sum() + Detached.apply(x), "backward of Detached"),
    "a backward without a graph": (lambda x: (x**4).sum() + Ungraphed.apply(x), "backward of Ungraphed"),
    "a straight-through estimator": (
        lambda x: (Rounded.apply(x) - 0.3).square().sum(),
        "backward of Rounded",
    ),
    "a detached copy": (cut, "made to require grad"),
    "the slope of a detached copy": (slope_of_a_copy, "made to require grad"),
    "the slope of a copy made without a graph": (slope_of_what_has_no_graph, "made to require grad"),
}
QUESTIONS = {
    "hessian": hesse.hessian,
    "blocks": hesse.hessian_blocks,
    "diagonal": hesse.hessian_diagonal,
    "trace": hesse.hessian_trace,
    "hvp": lambda func, x, **options: hesse.hvp(func, x, torch.ones_like(x), **options),
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize(("func", "name"), HIDDEN.values(), ids=HIDDEN)
def test_what_autograd_does_not_see_is_named(func, name, question):
    with pytest.warns(errors.DerivativeWarning, match=name) as caught:
        question(func, POINT)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.raises(errors.NotTwiceDifferentiableError, match=name):
        question(func, POINT, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_closure_is_where_it_was_after_the_comparison(dtype):
    w = POINT.to(dtype, copy=True).requires_grad_()
    version, before = w._version, w.detach().clone()
    with pytest.warns(errors.DerivativeWarning):
        hesse.hessian_diagonal(lambda: (w**2).sum() + Detached.apply(w), [w])
    assert w._version == version
    assert torch.equal(w.detach(), before)
    pending = (w * w).sum()
    with pytest.warns(errors.DerivativeWarning):
        hesse.hvp(lambda: (w**2).sum() + Detached.apply(w), [w], [torch.ones(2, dtype=dtype)])
    pending.backward()
    assert torch.equal(w.grad, 2 * before)


def detached_for_good(x):
    """A stop-gradient, not a leaf: meant as a constant."""
    return (x * x.detach()).sum()


def leaf_of_its_own(x):
    points = torch.linspace(0, 1, 5, dtype=x.dtype).requires_grad_()
    (slope,) = torch.autograd.grad((points[:, None] * x).sin().sum(), points, create_graph=True)
    return slope.square().sum()


RIGHT = {
    "a custom Function": next(case for case in CASES if case.name == "custom Function")(),
    "a stop-gradient": (detached_for_good, (POINT,)),
    "points of its own": (leaf_of_its_own, (POINT,)),
    "a comparison": (lambda x: (x * (x > 1.5)).square().sum(), (POINT,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("func", "tensors"), RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_not_accused(func, tensors, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for question in (hesse.hessian, hesse.hessian_diagonal):
            question(func, tuple(tensor.to(dtype) for tensor in tensors))


def test_a_custom_function_that_is_right_is_compared_once_for_products(monkeypatch):
    class Cubed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x**3).sum()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return gradient * 3 * x**2

    evaluations = []

    def func(x):
        evaluations.append(1)
        return Cubed.apply(x)

    for times in (5, 1, 1):  # with two differences the first time
        evaluations.clear()
        assert torch.equal(hesse.hvp(func, POINT, torch.ones_like(POINT)), 6 * POINT)
        assert len(evaluations) == times


# Differences of the gradient in place of autograd's own products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("question", [hesse.hessian, hesse.hessian_blocks, hesse.hessian_diagonal])
@pytest.mark.parametrize("method", ["auto", "dense"])
def test_certified_by_differences(question, method, dtype):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    data, targets = torch.randn(7, 4, dtype=dtype), torch.randint(0, 3, (7,))
    before = [p.detach().clone() for p in model.parameters()]
    loss = lambda: F.cross_entropy(model(data), targets)
    result = question(loss, list(model.parameters()), check="differences", method=method, full_output=True)
    certificate = result.certificate
    assert certificate.route == "differences"
    assert certificate.passed
    assert certificate.deviation < (1e-8 if dtype == torch.float64 else 1e-3)
    assert certificate.probes >= 2
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


by_differences = partial(hesse.hessian, check="differences", full_output=True)
FLAT = {
    "linear": lambda x: (3 * x).sum(),
    "zero": lambda x: x.softmax(0).sum(),
    "of rank one": lambda x: x.sum() ** 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("func", FLAT.values(), ids=FLAT)
def test_differences_of_what_is_flat(func, dtype):
    assert by_differences(func, torch.randn(6).to(dtype)).certificate.passed


@pytest.mark.parametrize("question", [hesse.hessian, hesse.hessian_blocks, hesse.hessian_diagonal])
@pytest.mark.parametrize("func", [lambda x: Detached.apply(x), lambda x: Detached.apply(x) ** 2])
def test_differences_see_what_has_no_graph(func, question):
    """Also where autograd sees zeros, of which there is nothing to take products of."""
    with pytest.warns(errors.DerivativeWarning, match="hides from autograd is the backward of Detached"):
        result = question(func, POINT, check="differences", full_output=True)
    assert not result.certificate.passed


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_differences_do_not_depend_on_scales(scale):
    point = x(5)
    assert by_differences(lambda x: scale * x.exp().sum() ** 2, point).certificate.passed
    assert by_differences(lambda x: (x / scale).sin().sum() * 7, point * scale).certificate.passed


def chunked(options, inputs, weight, target):
    return F.linear_cross_entropy(inputs, weight, target, options=options)


has_chunks = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch has no linear_cross_entropy"
)


@has_chunks
@pytest.mark.parametrize("method", ["auto", "dense"])
def test_a_cross_entropy_in_chunks(method):
    """Its backward in torch 2.13 scales a gradient that the forward saved: the second derivative is wrong."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    inputs, weight, target = x(6, 3), x(4, 3), torch.randint(0, 4, (6,))
    func = lambda a, w: chunked(options, a, w, target)
    plain = hesse.hessian(lambda a, w: F.cross_entropy(F.linear(a, w), target), (inputs, weight))
    result = hesse.hessian(func, (inputs, weight), method=method, check="differences", full_output=True)
    assert result.certificate.passed
    torch.testing.assert_close(result.value, plain)
    torch.testing.assert_close(hesse.hvp(func, (inputs, weight), (inputs, weight))[0].shape, inputs.shape)


@pytest.mark.parametrize("method", ["auto", "dense"])
def test_what_is_wrong_in_torch_itself_is_found_by_differences(method, monkeypatch):
    """Autograd's own certificate passes; with what hesse puts in its place taken away, that is."""
    monkeypatch.delitem(kernels.REPLACED, torch._weight_norm)
    direction, size = x(4, 3), x(4, 1)
    func = lambda v, g: torch._weight_norm(v.tanh(), g, 0).pow(3).sum()
    ask = partial(hesse.hessian_diagonal, func, (direction, size), method=method, full_output=True)
    assert ask().certificate.passed
    message = "deviates from differences of the gradient.*torch gives for _weight_norm is wrong"
    with pytest.warns(errors.DerivativeWarning, match=message):
        assert not ask(check="differences").certificate.passed


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("size", [1e-9, 1e-8, 1e-7, 1e-6])
def test_a_gradient_that_jumps_a_little_hides_nothing(size):
    """As by the steps of an adaptive solver; nothing is missing behind the custom Function."""

    def func(x):
        jump = torch.sign(torch.sin(1e7 * x)).detach()
        return Same.apply(x).pow(3).sum() + size * (jump * x).sum()

    point = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(hesse.hessian_diagonal(func, point), 6 * point)


def test_a_custom_function_in_fewer_digits_hides_nothing():
    func = lambda x: Same.apply(x.float()).sin().double().pow(3).sum()
    with pytest.warns(errors.PrecisionWarning) as caught:
        hesse.hessian_diagonal(func, x(5))
    assert len(caught) == 1


FAR, NEAR = (torch.tensor(values, dtype=torch.float64) for values in ([1.0, -400, 3], [2.0, 800, 3]))
MENDED = {
    "sums of far exponentials": (lambda x, y: torch.logaddexp(x, y).pow(2).sum(), (FAR, NEAR)),
    "sums of far powers of two": (lambda x, y: x.logaddexp2(other=y).pow(2).sum(), (FAR, NEAR)),
    "a scatter": (lambda x, y: torch.as_strided_scatter(x, y, (2,), (1,), 1).pow(3).sum(), (x(4), x(2))),
    "a scatter in a view": (
        lambda x, y: x.t()[1:].as_strided_scatter(y, (2,), (3,)).pow(3).sum(),
        (x(4, 3), x(2)),
    ),
    "a layer norm with a bias alone": (
        lambda x, y: F.layer_norm(x, (4,), bias=y).pow(3).sum(),
        (x(3, 4), x(4)),
    ),
}


@pytest.mark.parametrize(("func", "inputs"), MENDED.values(), ids=MENDED)
def test_calls_whose_own_derivatives_are_wrong(func, inputs):
    """In torch 2.13: NaN, zeros where something passes, an error."""
    result = hesse.hessian(func, inputs, check="differences", full_output=True)
    assert result.certificate.passed
    assert all(block.isfinite().all() for row in result.value for block in row)


@has_chunks
def test_the_calls_of_a_function_are_suspected_one_by_one():
    """By themselves, in float64; torch's own, without what hesse puts in its place."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    inputs, weight = (t.float().requires_grad_() for t in (x(6, 3), x(4, 3)))
    target = torch.randint(0, 4, (6,))
    tape = Recorder([inputs, weight])
    with tape:
        hidden = (inputs.tanh() @ torch.eye(3)).exp()
        chunked(options, hidden, weight, target).square()
    assert suspects(tape.calls) == ["linear_cross_entropy"]


# Digits


def cast(x):
    return (x.float() ** 3).sum().double()


def autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x[:, None] @ x[None]).float().sum() * x.sum()


def unused_cast(x):
    (x.float() ** 3).sum()
    return (x**3).sum()


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize(
    ("func", "point", "message"),
    [
        (cast, POINT, r"given torch.float64 and computes in torch.float32 from its call of torch's float on"),
        (autocast, POINT.float(), r"given torch.float32 and computes in torch.bfloat16 from .* matmul on"),
    ],
)
def test_a_step_of_fewer_digits_is_named(func, point, message, question):
    with pytest.warns(errors.PrecisionWarning, match=message) as caught:
        question(func, point)
    assert len(caught) == 1


def test_a_step_that_leads_nowhere_is_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(hesse.hessian_diagonal(unused_cast, POINT), 6 * POINT)
