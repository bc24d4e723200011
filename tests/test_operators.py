"""Operators: one oracle over operator, setting and the form of what they are multiplied with."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian, jacobian

import hesse
from cases import classes, x
from hesse import FisherOperator, GaussNewtonOperator, HessianOperator, Loss, errors
from losses import SETTINGS, Setting, by_hand, summed
from networks import mlp
from oracle import hessian_matrix, relative_error

TOLERANCE = 1e-9


def identity(setting):
    return torch.eye(len(setting.hessian), dtype=torch.float64)


def damped(loss):
    return HessianOperator(loss) + 0.3


def combined(loss):
    A = HessianOperator(loss) - 2 * GaussNewtonOperator(loss) * 0.25
    return -A * 3 + torch.tensor(0.5) - 1


@dataclass(frozen=True)
class Kind:
    """An operator of a loss, and its matrix read off a setting.

    `likelihood`: it needs a loss that is known to be one; `made`: of others, so that few settings will do.
    """

    name: str
    make: object
    exact: object
    likelihood: bool = False
    made: bool = False


KINDS = [
    Kind("hessian", HessianOperator, lambda s: s.hessian),
    Kind("gauss-newton", GaussNewtonOperator, lambda s: s.gauss_newton),
    Kind("fisher, exact", FisherOperator, lambda s: s.gauss_newton, likelihood=True),
    Kind("fisher, empirical", partial(FisherOperator, kind="empirical"), lambda s: s.empirical),
    Kind("damped", damped, lambda s: s.hessian + 0.3 * identity(s), made=True),
    Kind(
        "a sum of multiples",
        combined,
        lambda s: -3 * (s.hessian - 0.5 * s.gauss_newton) - 0.5 * identity(s),
        made=True,
    ),
]
CASES = [
    pytest.param(kind, setting, id=f"{kind.name}: {setting.name}")
    for kind in KINDS
    for setting in (SETTINGS[2::4] if kind.made else SETTINGS)
    if setting.likelihood or not kind.likelihood
]


# The forms of what an operator is multiplied with: each gives the columns of the product with V [P, k].
def vectors(A, V, setting):
    return torch.stack([A @ v for v in V.T], 1)


def columns(A, V, setting):
    return A @ V.contiguous()


def scattered(A, V, setting):
    spread = V.new_full((2 * len(V), V.shape[1] + 3), float("nan"))[::2, 1:-2]
    spread.copy_(V)
    assert not spread.is_contiguous()
    return A @ spread


def dicts(A, V, setting):
    return torch.stack([setting.flat(A @ setting.packed(v)) for v in V.T], 1)


def dict_of_many(A, V, setting):
    return setting.flat(A @ setting.packed(V.T)).T


def arrays(A, V, setting):
    found = A.to_scipy() @ V.numpy()
    assert found.dtype == np.float64
    return torch.from_numpy(found)


FORMS = [vectors, columns, scattered, dicts, dict_of_many, arrays]


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_products(kind, setting):
    setting = setting()
    A, exact = kind.make(setting.loss()), kind.exact(setting)
    V = x(len(exact), 3)
    for form in FORMS:
        found = form(A, V, setting)
        assert found.dtype == torch.float64, form
        assert relative_error(found, exact @ V) < TOLERANCE, form


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_exact_answers(kind, setting):
    setting = setting()
    A, exact = kind.make(setting.loss()), kind.exact(setting)
    matrix = A.to_dense()
    assert matrix.shape == A.shape
    assert relative_error(matrix, exact) < TOLERANCE
    scale = exact.abs().max()
    assert (setting.flat(A.diagonal()) - exact.diagonal()).abs().max() < TOLERANCE * scale
    assert (A.trace() - exact.trace()).abs() < TOLERANCE * scale * len(exact)
    blocks = A.blocks()
    assert list(blocks) == setting.names
    for i, (name, rows) in enumerate(zip(setting.names, exact.split(setting.numbers), strict=True)):
        assert blocks[name].shape == (*setting.shapes[i], *setting.shapes[i])
        expected = rows.split(setting.numbers, 1)[i]
        assert (blocks[name].reshape(expected.shape) - expected).abs().max() < TOLERANCE * scale
    assert setting.flat(A.diagonal()).sum().item() == pytest.approx(A.trace().item())  # by the plan


def test_what_an_operator_tells():
    setting = SETTINGS[0]()
    A = GaussNewtonOperator(setting.loss())
    assert (A.shape, A.dtype, A.device) == ((31, 31), torch.float64, torch.device("cpu"))
    assert list(A.names) == setting.names
    assert A.T is A
    assert repr(A) == "GaussNewtonOperator(shape=[31, 31], torch.float64, cpu)"
    assert repr(A + 1) == "Combination(shape=[31, 31], torch.float64, cpu)"
    assert repr(setting.loss()) == "Loss(Sequential, cross_entropy, 31 parameters, reduction='mean')"


# Of functions, without data.
def coupled(a, b):
    return (torch.outer(a, b.flatten()).sin() @ b.flatten()).square().sum() + a.prod()


CONTAINERS = {
    "tuple": (coupled, lambda a, b: (a, b)),
    "list": (coupled, lambda a, b: [a, b]),
    "dict": (lambda p: coupled(p["a"], p["b"]), lambda a, b: {"a": a, "b": b}),
    "nested": (lambda p: coupled(p["a"], p["more"][0]), lambda a, b: {"a": a, "more": [b]}),
    "tensor": (lambda p: coupled(p[:3], p[3:]), lambda a, b: torch.cat([a, b.flatten()])),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_of_a_function(name):
    """Vectors come in the container of the inputs, alone or many, or flat."""
    func, pack = CONTAINERS[name]
    inputs = pack(x(3), x(2, 2))
    leaves, spec = torch.utils._pytree.tree_flatten(inputs)
    exact = hessian_matrix(lambda *t: func(*spread(torch.utils._pytree.tree_unflatten(t, spec))), leaves)
    A, V = HessianOperator(func, inputs), x(7, 3)
    assert relative_error(A @ V, exact @ V) < TOLERANCE
    assert relative_error(A @ V[:, 0], exact @ V[:, 0]) < TOLERANCE
    assert relative_error(A.to_dense(), exact) < TOLERANCE
    diagonal = A.diagonal()
    assert torch.utils._pytree.tree_structure(diagonal) == spec
    flat = torch.cat([t.flatten() for t in torch.utils._pytree.tree_leaves(diagonal)])
    assert relative_error(flat, exact.diagonal()) < TOLERANCE
    if name == "tensor":
        return  # many vectors of a tensor are the columns of a matrix
    many = pack(V.T[:, :3], V.T[:, 3:].reshape(3, 2, 2))
    found, expected = A @ many, exact @ V
    flat = torch.cat([t.reshape(3, -1) for t in torch.utils._pytree.tree_leaves(found)], 1)
    assert torch.utils._pytree.tree_structure(found) == spec
    assert relative_error(flat, expected.T) < TOLERANCE
    one = pack(V[:3, 0], V[3:, 0].reshape(2, 2))
    found = A @ one
    assert torch.utils._pytree.tree_structure(found) == spec
    flat = torch.cat([t.flatten() for t in torch.utils._pytree.tree_leaves(found)])
    assert relative_error(flat, expected[:, 0]) < TOLERANCE


def spread(container):
    return container if isinstance(container, (tuple, list)) else (container,)


def test_gauss_newton_of_a_function():
    """Of the function's output, one row of which goes another way."""
    data, targets = x(5, 3), x(5, 2)
    func = lambda a, b: torch.tanh(data @ a) @ b + a.sum()
    of_output = lambda z: by_hand(z, targets)
    inputs = (x(3, 4), x(4, 2))
    z = func(*inputs)
    J = torch.cat([part.reshape(z.numel(), -1) for part in jacobian(func, inputs)], 1)
    exact = J.T @ hessian(of_output, z).reshape(z.numel(), z.numel()) @ J
    V = x(20, 3)
    A = GaussNewtonOperator(func, inputs, of_output=of_output)
    assert relative_error(A @ V, exact @ V) < TOLERANCE
    assert relative_error(A.to_dense(), exact) < TOLERANCE
    assert relative_error(A.trace(), exact.trace()) < TOLERANCE
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    A = GaussNewtonOperator(lambda: func(*leaves), leaves, of_output=of_output)
    assert relative_error(A @ V, exact @ V) < TOLERANCE
    assert relative_error(torch.cat([d.flatten() for d in A.diagonal()]), exact.diagonal()) < TOLERANCE


@pytest.mark.parametrize(
    ("func", "of_output"),
    [
        (lambda a: a * torch.arange(3.0, dtype=torch.float64), lambda z: z.sum()),  # linear in the output
        (lambda a: torch.ones(3, dtype=torch.float64), lambda z: z.square().sum()),  # without the inputs
        (lambda a: a.detach() * 2, lambda z: z.square().sum()),
    ],
)
@pytest.mark.filterwarnings("ignore::hesse.errors.DerivativeWarning")
def test_gauss_newton_that_is_zero(func, of_output):
    A = GaussNewtonOperator(func, x(3), of_output=of_output)
    assert torch.equal(A @ x(3, 2), torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(A.to_dense(), torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(A.diagonal(), torch.zeros(3, dtype=torch.float64))


def test_gauss_newton_where_the_output_is_the_parameter():
    A = GaussNewtonOperator(lambda a: a, x(3), of_output=lambda z: z.pow(2).sum())
    assert relative_error(A.to_dense(), 2 * torch.eye(3, dtype=torch.float64)) < TOLERANCE
    assert (
        relative_error(A @ torch.eye(3, dtype=torch.float64), 2 * torch.eye(3, dtype=torch.float64))
        < TOLERANCE
    )


# Where they must be equal.
def both(setting):
    loss = setting.loss()
    return HessianOperator(loss).to_dense(), GaussNewtonOperator(loss).to_dense()


@pytest.mark.parametrize("loss_fn", [F.mse_loss, by_hand])
def test_gauss_newton_is_the_hessian_of_a_linear_model(loss_fn):
    H, G = both(Setting(nn.Linear(3, 2), loss_fn, x(5, 3), x(5, 2), (2, 3)))
    assert relative_error(G, H) < TOLERANCE


def test_gauss_newton_is_the_hessian_where_the_residual_is_zero():
    model, data = mlp().double(), x(5, 3)
    setting = Setting(model, F.mse_loss, data, model(data).detach(), (2, 3))
    H, G = both(setting)
    assert relative_error(G, H) < TOLERANCE
    other = Setting(model, F.mse_loss, data, model(data).detach() + 1, (2, 3))
    H, G = both(other)
    assert relative_error(G, H) > 1e-3


def test_the_exact_fisher_of_a_cross_entropy_by_its_definition():
    """The expectation over all classes, by the model's own probabilities."""
    setting = SETTINGS[0]()
    exact = 0
    for one in setting.inputs.split(1):
        J, z = setting.jacobian(one)
        p = z.softmax(1)[0]
        for label in range(3):
            g = (p - F.one_hot(torch.tensor(label), 3)) @ J
            exact = exact + p[label] * torch.outer(g, g) / 5
    loss = setting.loss()
    assert relative_error(FisherOperator(loss).to_dense(), exact) < TOLERANCE
    assert relative_error(GaussNewtonOperator(loss).to_dense(), exact) < TOLERANCE


def test_an_indefinite_gauss_newton_matrix():
    setting = SETTINGS[2]()
    assert torch.linalg.eigvalsh(setting.gauss_newton).min() < -1e-3  # what test_products compares with


# Drawn targets.
class Recording(nn.CrossEntropyLoss):
    """Keeps what it was called with, by the output."""

    def forward(self, z, targets):
        key = z.detach().numpy().tobytes()
        before = self.__dict__.setdefault("met", {}).setdefault(key, targets)
        assert torch.equal(before, targets)
        return super().forward(z, targets)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sampled_fisher(reduction):
    """It is the empirical one of the targets that were drawn, the same at every product."""
    loss_fn = Recording(reduction=reduction)
    setting = Setting(mlp(), loss_fn, x(5, 3), classes(3, 5), (2, 2, 1), reduction)
    loss = setting.loss()
    A = FisherOperator(loss, kind="sampled", seed=3)
    loss.value()  # its check is with the targets of the data
    loss_fn.met.clear()
    V = x(31, 2)
    found = A @ V
    drawn = torch.cat(
        [loss_fn.met[setting.model(data).detach().numpy().tobytes()] for data, _ in setting.batches]
    )
    assert len(loss_fn.met) == 3
    plain = nn.CrossEntropyLoss(reduction=reduction)
    exact = Setting(setting.model, plain, setting.inputs, drawn, (5,), reduction).empirical
    for form in FORMS:
        assert relative_error(form(A, V, setting), exact @ V) < TOLERANCE, form
    assert relative_error(found, exact @ V) < TOLERANCE
    assert relative_error(A.to_dense(), exact) < TOLERANCE
    assert relative_error(setting.flat(A.diagonal()), exact.diagonal()) < TOLERANCE
    assert len(loss_fn.met) == 3


def test_seeds_of_a_sampled_fisher():
    loss = Setting(mlp(), F.cross_entropy, x(20, 3), classes(3, 20), (5, 15)).loss()
    v = x(31)
    state = torch.get_rng_state()
    one, same, other = (FisherOperator(loss, kind="sampled", seed=seed) @ v for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert torch.equal(state, torch.get_rng_state())


LIKELIHOODS = {
    "cross entropy": (F.cross_entropy, lambda n: classes(3, n)),
    "cross entropy, module": (nn.CrossEntropyLoss(), lambda n: classes(3, n)),
    "cross entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), lambda n: classes(3, n)),
    "cross entropy, partial": (partial(F.cross_entropy, reduction="sum"), lambda n: classes(3, n)),
    "cross entropy, probabilities": (F.cross_entropy, lambda n: x(n, 3).softmax(1)),
    "binary": (F.binary_cross_entropy_with_logits, lambda n: classes(2, 3 * n).view(n, 3).double()),
    "squares": (F.mse_loss, lambda n: x(n, 3)),
    "squares, sum": (nn.MSELoss(reduction="sum"), lambda n: x(n, 3)),
    "poisson": (F.poisson_nll_loss, lambda n: classes(4, 3 * n).view(n, 3).double()),
    "poisson, sum": (nn.PoissonNLLLoss(reduction="sum"), lambda n: classes(4, 3 * n).view(n, 3).double()),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_fishers_come_to_the_exact_one(name):
    """Over many samples the draws average out."""
    loss_fn, targets = LIKELIHOODS[name]
    samples = 3000
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.mul_(0.5)
    reduction = "sum" if "sum" in name or "partial" in name else "mean"
    setting = Setting(model, loss_fn, x(samples, 2), targets(samples), (1000, 2000), reduction)
    loss = setting.loss()
    exact = FisherOperator(loss).to_dense()
    mean = sum(FisherOperator(loss, kind="sampled", seed=seed).to_dense() for seed in range(4)) / 4
    assert relative_error(mean, exact) < 0.05
    assert relative_error(exact, GaussNewtonOperator(loss).to_dense()) < TOLERANCE


def test_classes_that_are_left_out_of_a_sampled_fisher():
    """Those of index -100 have no gradient, whatever is drawn."""
    targets = torch.tensor([0, -100, 2, -100, 1]).repeat(300)
    kept = targets != -100
    model, data = nn.Linear(2, 3).double(), x(1500, 2)
    few = Setting(model, summed, data[:5][kept[:5]], targets[:5][kept[:5]], (3,), "sum")
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    loss = Loss(model, loss_fn, (data[:5], targets[:5]), reduction="sum")
    assert relative_error(FisherOperator(loss, kind="empirical").to_dense(), few.empirical) < TOLERANCE
    loss = Loss(model, loss_fn, (data, targets), reduction="sum")
    draws = sum(FisherOperator(loss, kind="sampled", seed=seed).to_dense() for seed in range(5)) / 5
    p = torch.softmax(model(data[kept]).detach(), 1)
    bend = p.diag_embed() - p[:, :, None] * p[:, None]
    ones = torch.cat([data[kept][:, None, :].expand(-1, 3, 2), torch.ones(900, 3, 1, dtype=torch.float64)], 2)
    exact = torch.einsum("nab,nai,nbj->aibj", bend, ones, ones)
    order = [0, 1, 3, 4, 6, 7, 2, 5, 8]  # weights, then biases
    exact = exact.reshape(9, 9)[order][:, order]
    assert relative_error(draws, exact) < 0.1


# How they are answered.
@pytest.mark.parametrize("question", ["diagonal", "blocks"])
@pytest.mark.parametrize("kind", KINDS[1:4], ids=lambda kind: kind.name)
def test_the_sweep_takes_no_products(kind, question, monkeypatch):
    """But for those of the check, of each batch."""
    products = []
    product = hesse.look.gauss_newton.GaussNewton.product
    monkeypatch.setattr(
        "hesse.look.gauss_newton.GaussNewton.product",
        lambda self, *args, **options: products.append(1) or product(self, *args, **options),
    )
    setting = Setting(mlp(), F.cross_entropy, x(90, 3), classes(3, 90), (40, 50))
    A = kind.make(setting.loss())
    found = getattr(A, question)()
    plan = A._plans[question]
    assert plan.method == "sweep"
    assert plan.passes == 0
    assert len(products) <= 2 * (1 + plan.check_passes)
    assert relative_error(A @ x(31, 2), kind.exact(setting) @ x(31, 2)) > 0  # other vectors
    if question == "diagonal":
        assert relative_error(setting.flat(found), kind.exact(setting).diagonal()) < TOLERANCE


def test_one_pass_over_the_data_for_all_columns():
    setting = SETTINGS[0]()

    class Counting(list):
        passes = 0

        def __iter__(self):
            Counting.passes += 1
            return super().__iter__()

    loss = Loss(setting.model, setting.loss_fn, Counting(setting.batches))
    A = HessianOperator(loss)
    A @ x(31)
    before = Counting.passes
    A @ x(31, 40)
    assert Counting.passes == before + 1


def test_the_point_is_where_the_parameters_are():
    """What was learned at one point serves another."""
    torch.manual_seed(1)
    setting = Setting(mlp(), F.cross_entropy, x(5, 3), classes(3, 5), (2, 3))
    A = HessianOperator(setting.loss())
    A.diagonal(), A @ x(31, 2)
    with torch.no_grad():
        for tensor in setting.tensors:
            tensor.mul_(1.5)
    V = x(31, 2)
    assert relative_error(A @ V, setting.hessian @ V) < TOLERANCE
    assert relative_error(setting.flat(A.diagonal()), setting.hessian.diagonal()) < TOLERANCE


# Dtypes and edges.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy_keeps_the_dtype(dtype):
    A = HessianOperator(lambda a: a.pow(4).sum() + a.prod(), torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    S = A.to_scipy()
    kind = np.float32 if dtype == torch.float32 else np.float64
    assert (S.dtype, S.shape) == (kind, (3, 3))
    exact = np.array([[12, 3, 2], [3, 48, 1], [2, 1, 108]], dtype=np.float64)
    given = np.array([1, -1, 2], dtype=kind)
    for found, expected in (
        (S @ given, exact @ given),
        (S.rmatvec(given), exact @ given),
        (S.T @ given, exact @ given),
        (S.H @ given, exact @ given),
        (S.matmat(np.eye(3, dtype=kind)), exact),
        (S @ given[:, None], (exact @ given)[:, None]),
        (S @ np.eye(3, dtype=kind)[::-1, ::2], exact[:, ::-1][:, ::2]),
    ):
        assert found.dtype == kind
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    values = scipy.sparse.linalg.eigsh(S, k=1, return_eigenvectors=False)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(exact)[-1:], rtol=1e-5)
    solved, failed = scipy.sparse.linalg.cg(S, given, rtol=1e-6)
    assert not failed
    np.testing.assert_allclose(exact @ solved, given, rtol=1e-3, atol=1e-4)


def test_scipy_takes_what_it_does_not_own():
    A = HessianOperator(lambda a: a.pow(3).sum(), torch.ones(3, dtype=torch.float64))
    given = np.arange(3.0)
    given.flags.writeable = False
    np.testing.assert_allclose(A.to_scipy() @ given, 6 * given)
    np.testing.assert_allclose(A.to_scipy() @ np.arange(3), 6 * np.arange(3))  # integers too
    np.testing.assert_allclose((A + 1).to_scipy() @ given, 7 * given)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_columns(kind):
    setting = SETTINGS[0]()
    A = kind.make(setting.loss())
    found = A @ torch.zeros(31, 0, dtype=torch.float64)
    assert (found.shape, found.dtype) == ((31, 0), torch.float64)


def test_vectors_of_another_floating_dtype_come_back_in_it():
    setting = SETTINGS[0]()
    A = HessianOperator(setting.loss())
    for v in (x(31), x(31, 2)):
        found = A @ v.float()
        assert found.dtype == torch.float32
        assert relative_error(found.double(), setting.hessian @ v) < 1e-5


@pytest.mark.filterwarnings("ignore::hesse.errors.PrecisionWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """The sum over batches is in float32, what goes in and out in the parameters' dtype."""
    model = nn.Linear(3, 1, bias=False).to(dtype)
    data, targets = torch.randn(64, 3).to(dtype), torch.randn(64, 1).to(dtype)
    loss = Loss(model, F.mse_loss, list(zip(data.split(8), targets.split(8), strict=True)))
    exact = 2 * data.double().T @ data.double() / 64
    coarse = 4 * torch.finfo(dtype).eps
    for A in (HessianOperator(loss), GaussNewtonOperator(loss)):
        assert A.dtype == dtype
        V = torch.randn(3, 2).to(dtype)
        for v in (V, V[:, 0]):
            found = A @ v
            assert found.dtype == dtype
            assert relative_error(found.double(), exact @ v.double()) < coarse
        assert relative_error(A.to_dense().double(), exact) < coarse
        found = A.to_scipy() @ V.float().numpy()
        assert found.dtype == np.float32
        assert relative_error(torch.from_numpy(found).double(), exact @ V.double()) < coarse
    A = HessianOperator(loss) + 0.5
    assert relative_error((A @ V).double(), exact @ V.double() + 0.5 * V.double()) < coarse


@pytest.mark.filterwarnings("ignore::hesse.errors.PrecisionWarning")
def test_mixed_dtypes():
    """Flat vectors hold all of them."""
    a, b = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([3.0])
    A = HessianOperator(lambda a, b: (a.pow(3) * b).sum(), (a, b))
    assert A.dtype == torch.float64
    exact = torch.tensor([[18.0, 0, 3], [0, 36, 12], [3, 12, 0]], dtype=torch.float64)
    V = x(3, 2)
    assert relative_error(A @ V, exact @ V) < 1e-6
    assert relative_error(A @ V[:, 0], exact @ V[:, 0]) < 1e-6
    assert relative_error(A.to_dense().double(), exact) < 1e-6


# What is refused.
def quadratic():
    return HessianOperator(lambda a: a.square().sum(), torch.ones(3))


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (torch.ones(4), r"v must be a vector \[3\] or a matrix of columns \[3, k\], met shape \[4\]"),
        (torch.ones(2, 3, 1), r"v must be a vector \[3\]"),
        (torch.ones(3, 2, 2), r"v must be a vector \[3\]"),
        (torch.ones(3, dtype=torch.complex64), "v is complex; pass a real tensor"),
        (torch.ones(3, 2, dtype=torch.complex64), "v is complex; pass a real tensor"),
        (torch.ones(3, dtype=torch.long), r"v has dtype torch.int64; pass floating-point numbers"),
        (torch.ones(3, 2, dtype=torch.bool), r"v has dtype torch.bool; pass floating-point"),
        (torch.ones(3, device="meta"), "v is on meta; pass a real tensor on cpu"),
        (torch.ones(3, 2, device="meta"), "v is on meta"),
        ([torch.ones(3), torch.ones(3)], "v must have the same structure as the inputs"),
        ({"a": torch.ones(4)}, "v has shape"),
        ("v", "must be a tensor"),
        (np.ones(3), "v must be a tensor"),
        (2.0, "must be a tensor"),
    ],
)
def test_bad_vectors(v, message):
    with pytest.raises(errors.HesseError, match=message):
        quadratic() @ v


def test_bad_vectors_of_a_loss():
    setting = SETTINGS[0]()
    A = HessianOperator(setting.loss())
    good = setting.packed(x(31))
    for change, message in (
        ({"0.weight": x(5, 5)}, r"0\.weight"),
        ({"0.weight": good["0.weight"].to(torch.complex128)}, "complex"),
        ({"0.weight": good["0.weight"].to("meta")}, "meta"),
        ({"other": x(2)}, "structure"),
        ({"0.weight": None}, "tensor"),
    ):
        with pytest.raises(errors.HesseError, match=message):
            A @ {**good, **change}
    with pytest.raises(errors.ArgumentError, match="structure"):
        A @ {name: good[name] for name in setting.names[:2]}


def test_bad_sums():
    A = quadratic()
    other = HessianOperator(lambda a: a.square().sum(), torch.ones(4))
    with pytest.raises(errors.ArgumentError, match=r"same shapes, met \[\[3\]\] and \[\[4\]\]"):
        A + other
    for wrong in ("a", None, torch.ones(3), [1]):
        with pytest.raises(errors.ArgumentError, match="an operator is added to another or to a number"):
            A + wrong
        with pytest.raises(errors.ArgumentError, match="multiplied by a number"):
            wrong * A
    with pytest.raises(errors.ArgumentError, match="met HessianOperator"):
        A * A
    with pytest.raises(TypeError):
        torch.ones(3) @ A  # only from the right


def test_sums_from_the_left():
    A = quadratic()
    eye = torch.eye(3)
    for found, factor in ((1 + A, 3), (2 * A, 4), (A / 2, 1), (1 - A, -1), (sum([A, A]), 4)):
        assert torch.equal(found @ eye, factor * eye)


def test_bad_operators():
    setting = SETTINGS[0]()
    loss = setting.loss()
    with pytest.raises(errors.ArgumentError, match="inputs must be left out with a Loss"):
        HessianOperator(loss, x(3))
    with pytest.raises(errors.ArgumentError, match="inputs and of_output must be left out with a Loss"):
        GaussNewtonOperator(loss, of_output=lambda z: z.sum())
    with pytest.raises(errors.ArgumentError, match="of_output is missing"):
        GaussNewtonOperator(lambda a: a, x(3))
    with pytest.raises(errors.ArgumentError, match=r"must be a hesse\.Loss, met function"):
        FisherOperator(lambda a: a)
    with pytest.raises(errors.ArgumentError, match='kind must be "exact", "sampled" or "empirical"'):
        FisherOperator(loss, kind="observed")
    with pytest.raises(errors.ArgumentError, match="nothing to differentiate by"):
        HessianOperator(lambda *a: torch.zeros(()), ())
    with pytest.raises(errors.HesseError, match="func must be callable"):
        HessianOperator(x(3), x(3))
    with pytest.raises(errors.HesseError, match="func must be callable"):
        GaussNewtonOperator(x(3), x(3), of_output=lambda z: z.sum())
    with pytest.raises(errors.HesseError, match="of_output must be callable"):
        GaussNewtonOperator(lambda a: a, x(3), of_output=1)
    with pytest.raises(errors.HesseError, match="output"):
        GaussNewtonOperator(lambda a: (a, a), x(3), of_output=lambda z: z[0].sum()) @ x(3)
    with pytest.raises(errors.OutputError, match="must return a scalar"):
        GaussNewtonOperator(lambda a: a, x(3), of_output=lambda z: z) @ x(3)


NO_LIKELIHOODS = {
    "by hand": (by_hand, "by_hand, is not known to be a negative log-likelihood"),
    "unlike": (nn.L1Loss(), "L1Loss, is not known"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), "label_smoothing=0.1 is no log-likelihood"),
    "smoothed, partial": (partial(F.cross_entropy, label_smoothing=0.1), "label_smoothing=0.1 is no log-"),
    "weighted": (nn.CrossEntropyLoss(weight=torch.ones(3)), "weight=.* is no log-likelihood"),
    "weighted, binary": (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), "pos_weight=.* is no log-"),
    "poisson of rates": (nn.PoissonNLLLoss(log_input=False), "log_input=False is no log-likelihood"),
    "none": (None, "loss_fn"),
}


@pytest.mark.parametrize("name", NO_LIKELIHOODS)
@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_a_fisher_of_what_is_no_likelihood(kind, name):
    loss_fn, message = NO_LIKELIHOODS[name]
    with pytest.raises(errors.ArgumentError, match=message):
        FisherOperator(Loss(mlp(), loss_fn, (torch.randn(5, 3), torch.randn(5, 3))), kind=kind)


@pytest.mark.parametrize("make", [GaussNewtonOperator, partial(FisherOperator, kind="empirical")])
def test_an_output_that_is_no_tensor(make):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs):
            return self.layer(inputs), inputs

    model, data, targets = Pair().double(), x(5, 3), x(5, 2)
    loss_fn = lambda output, targets: F.mse_loss(output[0], targets)
    loss = Loss(model, loss_fn, (data, targets))
    with pytest.raises(errors.ArgumentError, match=r"the model gives a tuple.*pass forward="):
        make(loss) @ x(8)
    mended = Loss(model, F.mse_loss, (data, targets), forward=lambda model, batch: model(batch[0])[0])
    plain = Loss(model.layer, F.mse_loss, (data, targets))
    v = x(8)
    assert relative_error(make(mended) @ v, make(plain) @ v) < TOLERANCE
    with pytest.raises(errors.ArgumentError, match=r"loss_fn is None.*pass loss_fn"):
        make(Loss(model, None, (data, targets), forward=lambda model, batch: model(batch[0])[0].sum())) @ v


def test_complex_arrays_keep_both_parts():
    A = HessianOperator(lambda v: 3 * v.square().sum(), torch.ones(3, dtype=torch.float64))
    given = np.arange(3) + 2j
    np.testing.assert_allclose(A.to_scipy() @ given, 6 * given)


def test_an_array_is_told_where_to_go():
    A = HessianOperator(lambda v: 3 * v.square().sum(), torch.ones(3))
    with pytest.raises(errors.NotATensorError, match=r"met an array; pass torch.from_numpy\(v\)"):
        A @ np.ones(3)


def test_random_numbers_without_a_say_are_looked_at_once():
    calls = []
    layer = nn.Linear(3, 1).double()

    class Counted(nn.Module):
        def forward(self, inputs):
            calls.append(len(inputs))
            return F.dropout(layer(inputs), 0.0, training=True)

    model = Counted()
    model.layer = layer
    loss = Loss(model, F.mse_loss, [(x(4, 3), x(4, 1)), (x(2, 3), x(2, 1))])
    A = HessianOperator(loss)
    # At the first product also: the first batch and its halves for the reduction, and the first batch again.
    for evaluations in (2 + 3 + 1, 2):
        calls.clear()
        A @ torch.ones(4, dtype=torch.float64)
        assert len(calls) == evaluations
