"""Bad input: the error names the argument and the remedy, and is also what torch raises there."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import hesse
from hesse import errors

X = torch.tensor([1.0, 2.0])
SQUARE = lambda x: (x**2).sum()


@torch.no_grad()
def under_no_grad(x):
    return (x**2).sum()


@torch.inference_mode()
def under_inference_mode(x):
    return (x**2).sum()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def embedding_bag(weight):
    return F.embedding_bag(torch.tensor([[0, 1]]), weight).pow(2).sum()


def ctc(logits):
    lengths = torch.tensor([6]), torch.tensor([2])
    return F.ctc_loss(logits.log_softmax(-1), torch.tensor([[1, 2]]), *lengths)


DROPOUT = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)).train()

EVERY_QUESTION = {
    "hessian": hesse.hessian,
    "diagonal": hesse.hessian_diagonal,
    "blocks": hesse.hessian_blocks,
    "trace": hesse.hessian_trace,
    "hvp": lambda func, inputs, **kw: hesse.hvp(func, inputs, inputs, **kw),
}

BAD = {
    "complex": (SQUARE, torch.ones(2, dtype=torch.complex64), errors.DtypeError, TypeError, "view_as_real"),
    "no tensor": (SQUARE, 3.0, errors.NotATensorError, TypeError, "must be a tensor.*float"),
    "no tensor inside": (SQUARE, [X, None], errors.NotATensorError, TypeError, r"\[1\].*NoneType"),
    "a list for a function of one list": (
        lambda xs: xs[0].sum(),
        [X, X],
        errors.StructureMismatchError,
        TypeError,
        r"func takes one argument.*pass \((inputs|params),\) for a function of one list",
    ),
    "sparse": (SQUARE, X.to_sparse(), errors.NotATensorError, TypeError, "sparse"),
    "two devices": (
        lambda a, b: a.sum(),
        (X, torch.ones(2, device="meta")),
        errors.ArgumentError,
        RuntimeError,
        r"one device.*\[0\] on cpu.*\[1\] on meta",
    ),
    "func is no function": (3, X, errors.NotATensorError, TypeError, "callable"),
    "vector output": (lambda x: x**2, X, errors.OutputError, RuntimeError, r"shape \[2\].*sum"),
    "number": (lambda x: (x**2).sum().item(), X, errors.OutputError, TypeError, r"float.*\.item"),
    "tuple output": (lambda x: (x.sum(),), X, errors.OutputError, TypeError, "tuple"),
    "integer output": (lambda x: (x**2).sum().long(), X, errors.OutputError, RuntimeError, "int64"),
    "complex output": (lambda x: (x * 1j).sum(), X, errors.OutputError, RuntimeError, "complex"),
    "no_grad inside": (under_no_grad, X, errors.OutputError, RuntimeError, "no_grad"),
    "inference_mode inside": (under_inference_mode, X, errors.OutputError, RuntimeError, "inference_mode"),
    "dropout": (
        lambda x: DROPOUT(x[None]).sum(),
        X,
        errors.NotDeterministicError,
        RuntimeError,
        r"not deterministic.*model\.eval\(\)",
    ),
    "once_differentiable": (
        lambda x: Once.apply(x).sum(),
        X,
        errors.NotTwiceDifferentiableError,
        RuntimeError,
        "Once is marked",
    ),
    "embedding_bag": (
        embedding_bag,
        torch.randn(5, 3),
        errors.NotTwiceDifferentiableError,
        RuntimeError,
        "embedding_bag has no double backward",
    ),
    "ctc_loss": (
        ctc,
        torch.randn(6, 1, 4),
        errors.NotTwiceDifferentiableError,
        RuntimeError,
        "ctc_loss has no double backward",
    ),
    "cdist": (
        lambda x: torch.cdist(x, torch.ones(4, 2)).exp().sum(),
        torch.randn(3, 2),
        errors.NotTwiceDifferentiableError,
        RuntimeError,
        "cdist has no double backward",
    ),
    "reentrant checkpoint": (
        lambda x: checkpoint(SQUARE, x, use_reentrant=True),
        X,
        errors.NotTwiceDifferentiableError,
        RuntimeError,
        "use_reentrant=False",
    ),
}


@pytest.mark.parametrize("question", EVERY_QUESTION.values(), ids=EVERY_QUESTION)
@pytest.mark.parametrize(("func", "inputs", "kind", "also", "message"), BAD.values(), ids=BAD)
def test_bad_problem(question, func, inputs, kind, also, message):
    with pytest.raises(kind, match=message) as caught:
        question(func, inputs)
    assert isinstance(caught.value, also)
    assert isinstance(caught.value, hesse.HesseError)


INTEGERS = {
    "integers": (SQUARE, torch.tensor([1, 2]), r"inputs has dtype torch.int64"),
    "integers inside": (
        lambda p: SQUARE(p["w"]),
        {"w": X, "n": torch.tensor(3)},
        r"\['n'\] has dtype torch.int64",
    ),
    "booleans": (SQUARE, torch.tensor([True]), "bool"),
}


@pytest.mark.parametrize("question", [hesse.hessian, hesse.hessian_blocks, EVERY_QUESTION["hvp"]])
@pytest.mark.parametrize(("func", "inputs", "message"), INTEGERS.values(), ids=INTEGERS)
def test_integers(question, func, inputs, message):
    """As in torch; what torch-secorder has too gives zeros, see test_forms."""
    with pytest.raises(errors.DtypeError, match=message) as caught:
        question(func, inputs)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, RuntimeError)


def test_inference_tensor():
    with torch.inference_mode():
        made = torch.ones(2)
    with pytest.raises(errors.ArgumentError, match=r"inference_mode.*clone"):
        hesse.hessian(SQUARE, made)


STRICT = {
    "no influence": (lambda a, b: SQUARE(a), (X, X), r"\[1\] does not influence"),
    "constant": (lambda a: torch.ones(()), (X,), "does not depend on any input"),
}


@pytest.mark.parametrize("question", EVERY_QUESTION.values(), ids=EVERY_QUESTION)
@pytest.mark.parametrize(("func", "inputs", "message"), STRICT.values(), ids=STRICT)
def test_strict(question, func, inputs, message):
    with pytest.raises(errors.IndependentError, match=message):
        question(func, inputs, strict=True)
    question(func, inputs, strict=False)


def test_strict_closure():
    a, frozen = X.clone().requires_grad_(), X.clone()
    loss = lambda: (a * frozen).square().sum()
    with pytest.raises(RuntimeError, match=r"params\[1\] does not require grad"):
        hesse.hessian_diagonal(loss, [a, frozen], strict=True)
    found = hesse.hessian_diagonal(loss, [a, frozen])
    assert found[0].tolist() == [2.0, 8.0]
    assert found[1].tolist() == [0.0, 0.0]


def test_strict_model_names_the_parameter():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"0\.weight does not require grad"):
        hesse.model_hessian_diagonal(model, F.mse_loss, torch.ones(1, 2), torch.ones(1, 1), strict=True)


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (torch.ones(3), r"v has shape \[3\], but inputs has shape \[2\]"),
        ([torch.ones(2)] * 2, "same structure"),
        ((), "same structure"),
        (2.0, "v must be a tensor"),
        (torch.ones(2, dtype=torch.complex64), "complex"),
    ],
)
def test_bad_vector(v, message):
    with pytest.raises(hesse.HesseError, match=message):
        hesse.hvp(SQUARE, X, v)
    with pytest.raises(hesse.HesseError):
        hesse.second_directional_derivative(SQUARE, X, v)
    with pytest.raises(hesse.HesseError):
        hesse.hessian_diagonal(SQUARE, X, v)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be"),
        ({"memory": "lots"}, 'memory must be.*"2GiB"'),
        ({"memory": -1}, "memory"),
        ({"memory": True}, "memory"),
        ({"progress": "yes"}, "progress must be"),
        ({"outer_jacobian_strategy": "sideways"}, "outer_jacobian_strategy"),
        ({"strict": True, "vectorize": True}, "not supported together"),
        ({"check": "sometimes"}, 'check must be True, False, "first" or "differences"'),
    ],
)
def test_bad_option(options, message):
    with pytest.raises(errors.ArgumentError, match=message):
        hesse.hessian(SQUARE, X, **options)


def test_model_form():
    with pytest.raises(errors.NotATensorError, match=r"torch\.nn\.Module"):
        hesse.model_hessian_diagonal(SQUARE, F.mse_loss, X, X)
    with pytest.raises(errors.NotATensorError, match="loss_fn"):
        hesse.model_hessian_diagonal(nn.Linear(2, 1), None, X, X)
    with pytest.raises(errors.ArgumentError, match=r"loss_fn\(model\(\*inputs\), targets\)"):
        hesse.model_hessian_diagonal(nn.Bilinear(2, 2, 1), F.mse_loss, (X, X), X)
    with pytest.raises(errors.ArgumentError, match=r"loss_fn\(model\(\*\*inputs\), targets\)"):
        hesse.model_hessian_diagonal(nn.Bilinear(2, 2, 1), F.mse_loss, {"input1": X, "input2": X}, X)
    with pytest.raises(RuntimeError, match="shape"):  # torch's own message, unchanged
        hesse.model_hessian_diagonal(nn.Linear(3, 1), F.mse_loss, X, X)


NON_FINITE = {
    "input": (SQUARE, torch.tensor([1.0, float("nan")]), "inputs itself holds NaN"),
    "value": (lambda x: (x - 2).log().sum(), X, "value of func is NaN, first in the result of torch's log"),
    "infinite value": (lambda x: (1 / (x - 1)).sum(), X, "an infinity, first in the result"),
    "gradient": (lambda x: (x - 1).sqrt().sum(), X, "gradient by inputs holds an infinity"),
    "result": (lambda x: (x - 1).abs().pow(1.5).sum(), X, "NaN or an infinity"),
}


@pytest.mark.parametrize("question", EVERY_QUESTION.values(), ids=EVERY_QUESTION)
@pytest.mark.parametrize(("func", "inputs", "message"), NON_FINITE.values(), ids=NON_FINITE)
def test_non_finite_is_said(question, func, inputs, message):
    if question is hesse.hessian_diagonal:
        message = message.replace("inputs", "params")
    with pytest.warns(errors.NonFiniteWarning, match=message):
        question(func, inputs)


def test_warnings_point_at_the_caller():
    with pytest.warns(errors.NonFiniteWarning) as caught:
        hesse.hessian(SQUARE, torch.tensor([float("nan")]))
    assert caught[0].filename == __file__


def test_a_builtin_without_a_signature():
    assert torch.equal(hesse.hessian(torch.sum, X), torch.zeros(2, 2))
