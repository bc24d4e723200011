"""A plan that is given back remembers the look at the function, and notices where that looks different."""

import contextlib
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse
from cases import x
from hesse import errors
from networks import NETWORKS, Problem, mlp, squares
from oracle import hessian_matrix
from questions import QUESTIONS
from test_evaluation import SCALE, counted, writing, written

WEIGHT = x(4, 3)
DATA, OTHER = x(5, 3), x(5, 3)


def network(weight, data=DATA):
    return squares(F.linear(data, weight).tanh())


def diagonal_of(func):
    return hessian_matrix(func, [WEIGHT]).diagonal().view_as(WEIGHT)


@pytest.mark.parametrize("method", ["sweep", "taps", "dense", "auto"])
@pytest.mark.parametrize("check", [True, False])
def test_evaluated_once(method, check):
    plan = hesse.plan("diagonal", network, WEIGHT, method=method)
    count, calls = counted(network)
    result = hesse.hessian_diagonal(count, WEIGHT, method=plan, check=check, full_output=True)
    assert len(calls) == 1
    assert result.plan == plan
    torch.testing.assert_close(result.value, diagonal_of(network))


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_every_network(network):
    """Whatever the plan and its numbers, and from memory too."""
    problem = network()
    for question in QUESTIONS:
        first = question.ask(problem.closure, problem.tensors, full_output=True)
        plan = pickle.loads(pickle.dumps(first.plan))
        assert plan == first.plan
        with torch.no_grad():
            for tensor in problem.tensors:
                tensor.mul_(1.1)
        again = question.ask(problem.closure, problem.tensors, full_output=True, method=plan)
        assert question.error(again.value, problem.matrix(), problem.tensors) < 1e-9, question.name
        assert again.certificate.passed
        assert again.plan.method == plan.method
        if plan.learned.places is not None:
            assert "looked at again" not in again.plan.reason


def test_another_batch():
    plan = hesse.plan("diagonal", network, WEIGHT)
    count, calls = counted(lambda weight: network(weight, OTHER))
    torch.testing.assert_close(
        hesse.hessian_diagonal(count, WEIGHT, method=plan), diagonal_of(lambda w: network(w, OTHER))
    )
    assert len(calls) == 1


def branching(weight, way):
    hidden = F.linear(DATA, weight)
    return squares(hidden.tanh() if way else hidden.softmax(0))


EDGES = [
    (torch.arange(5), DATA[:, :1].expand(5, 4)),
    (torch.tensor([1, 1, 2, 2, 0]), DATA[:, :1].expand(5, 4)),
]
DIFFERENT = {
    "a branch": (lambda w: branching(w, True), lambda w: branching(w, False), "softmax, is another one"),
    "a constant": (
        lambda w: (F.linear(DATA, w).tanh() * 2).square().sum(),
        lambda w: (F.linear(DATA, w).tanh() * 3).square().sum(),
        "mul, is another one or has other constants",
    ),
    "fewer calls": (
        lambda w: F.linear(DATA, w).tanh().square().sum().exp().log(),
        lambda w: F.linear(DATA, w).tanh().square().sum(),
        "func makes . calls where it made",
    ),
    "fewer samples": (network, lambda w: network(w, DATA[:4]), "linear, is another one"),
    "another way in": (
        lambda w: squares(F.linear(F.linear(DATA, w).tanh(), w.T.contiguous())),
        lambda w: squares(F.linear(F.linear(DATA, w).tanh(), w.view(3, 4))),
        "is another one",
    ),
    "an index": (
        lambda w: squares(F.linear(DATA, w)[torch.arange(5)].cumsum(1).tanh()),
        lambda w: squares(F.linear(DATA, w)[torch.tensor([1, 0, 4, 3, 2])].cumsum(1).tanh()),
        "__getitem__, is another one or has other constants",
    ),
    "a keyword": (
        lambda w: F.softmax(F.linear(DATA, w)[:, :, None], dim=1, dtype=None).square().sum(),
        lambda w: F.softmax(F.linear(DATA, w)[:, :, None], dtype=None, dim=2).square().sum() + w.sum() * 0,
        "softmax, is another one or has other constants",
    ),
    "a factor": (
        lambda w: squares(torch.einsum("nm,mo->no", torch.eye(5).double(), F.linear(DATA, w)).tanh()),
        lambda w: squares(torch.einsum("nm,mo->no", torch.ones(5, 5).double(), F.linear(DATA, w)).tanh()),
        "einsum, is another one or has other constants",
    ),
    "edges of a graph": (
        lambda w: squares(F.linear(DATA, w).index_add(0, *EDGES[0], alpha=0.5).tanh()),
        lambda w: squares(F.linear(DATA, w).index_add(0, *EDGES[1], alpha=0.5).tanh()),
        "index_add",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("method", ["auto", "sweep", "taps"])
def test_what_looks_different_is_looked_at_again(name, method):
    before, after, reason = DIFFERENT[name]
    plan = hesse.plan("diagonal", before, WEIGHT, method=method)
    result = hesse.hessian_diagonal(after, WEIGHT, method=plan, full_output=True)
    torch.testing.assert_close(result.value, diagonal_of(after))
    assert result.certificate.passed
    if plan.method != "dense":  # which is right whatever the function looks like
        assert "looked at again" in result.plan.reason
        assert re.search(reason, result.plan.reason)


def test_where_numbers_have_a_say_samples_are_looked_for_again():
    """No row of the table: the plan keeps no places, and some samples are changed each time."""
    func = lambda weight: squares(torch.i0(F.linear(DATA, weight)))
    plan = hesse.plan("diagonal", func, WEIGHT, method="sweep")
    assert plan.learned.places is None
    result = hesse.hessian_diagonal(func, WEIGHT, method=plan, full_output=True)
    assert "where its samples are depends on numbers" in result.plan.reason
    torch.testing.assert_close(result.value, diagonal_of(func))


@pytest.mark.parametrize("order", [[1, 0, 4, 3, 2], [4, 0, 1, 2, 3], [0, 1, 2, 4, 3], [0, 0, 2, 3, 4]])
def test_samples_in_another_order(order):
    """Also where those that are changed trade places among themselves, and nothing is certified."""
    func = lambda w: squares(torch.i0(F.linear(DATA, w))[torch.tensor(order)] + F.linear(DATA, w))
    for method in ("auto", "sweep", "taps"):
        found = hesse.hessian_diagonal(func, WEIGHT, method=method, check=False)
        torch.testing.assert_close(found, diagonal_of(func))


def test_few_coordinates_take_products_before_samples_are_changed():
    func = lambda weight: squares(torch.i0(F.linear(DATA, weight)))
    count, calls = counted(func)
    result = hesse.hessian_diagonal(count, WEIGHT, full_output=True)
    assert result.plan.method != "sweep"
    assert len(calls) == 2
    torch.testing.assert_close(result.value, diagonal_of(func))
    wide = x(100, 3)
    assert hesse.plan("diagonal", lambda w: squares(torch.i0(F.linear(DATA, w))), wide).method == "sweep"


def test_plans_are_plain():
    plan = hesse.plan("diagonal", network, WEIGHT)
    assert plan == hesse.plan("diagonal", network, WEIGHT)
    assert "Samples" not in repr(plan)
    assert "Samples" not in str(plan)


def test_check_first():
    plan = hesse.plan("diagonal", network, WEIGHT)
    ask = lambda func: (
        hesse.hessian_diagonal(func, WEIGHT, method=plan, check="first", full_output=True).certificate
    )
    assert ask(network).passed
    assert ask(network) is None
    assert ask(lambda w: network(w, OTHER)) is None
    assert ask(lambda w: branching(w, False)).passed  # it changed
    copy = pickle.loads(pickle.dumps(plan))
    assert hesse.hessian_diagonal(network, WEIGHT, method=copy, check="first", full_output=True).certificate
    assert hesse.hessian_diagonal(network, WEIGHT, check="first", full_output=True).certificate.passed


def test_the_plan_of_a_certified_result_is_certified():
    first = hesse.hessian_diagonal(network, WEIGHT, full_output=True)
    again = hesse.hessian_diagonal(network, WEIGHT, method=first.plan, check="first", full_output=True)
    assert again.certificate is None
    torch.testing.assert_close(again.value, first.value)


def test_random_numbers_are_noticed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double().eval()
    problem = Problem(model, squares, DATA)
    plan = hesse.plan("diagonal", problem.closure, problem.tensors)
    model.train()
    with pytest.raises(errors.NotDeterministicError):
        hesse.hessian_diagonal(problem.closure, problem.tensors, method=plan)


def test_buffers_are_kept():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    problem = Problem(model, squares, DATA)
    plan = hesse.plan("diagonal", problem.closure, problem.tensors)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    hesse.hessian_diagonal(problem.closure, problem.tensors, method=plan)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("func", [writing, lambda w: writing(w) + torch.rand(1).sum() * 0])
def test_what_is_changed_in_place_is_put_back_before_it_is_looked_at_again(func):
    """A function whose value depends on what it changes is the same function each time."""
    plan = hesse.plan("diagonal", network, WEIGHT)
    same = hesse.plan("diagonal", func, WEIGHT)
    for known in (plan, same):
        found = hesse.hessian_diagonal(func, WEIGHT, method=known)
        torch.testing.assert_close(found, diagonal_of(written))
        assert SCALE == 1


def test_what_does_not_fit_any_more_is_planned_anew():
    problem = Problem(mlp(), squares, x(400, 3))
    plan = hesse.hessian_diagonal(problem.closure, problem.tensors, method="sweep", full_output=True).plan
    small = hesse.hessian_diagonal(
        problem.closure, problem.tensors, method=plan, memory=plan.peak_bytes // 2, full_output=True
    )
    assert small.plan.peak_bytes < plan.peak_bytes
    torch.testing.assert_close(
        torch.cat([part.flatten() for part in small.value]), problem.matrix().diagonal()
    )


def test_chunks_that_paid_are_kept():
    func = lambda p: (p[1:] * p[:-1]).pow(2).sum().exp()
    point = x(200) / 20
    result = hesse.hessian(func, point, full_output=True)
    assert result.plan.learned.sizes
    again = hesse.hessian(func, point, method=result.plan, full_output=True)
    assert again.plan.learned.sizes == result.plan.learned.sizes
    torch.testing.assert_close(again.value, hessian_matrix(func, [point]))


def test_the_check_is_one_of_few():
    with pytest.raises(errors.ArgumentError, match='True, False, "first" or "differences"'):
        hesse.hessian(lambda p: p.sum() ** 2, x(2), check="last")


VECTOR = x(4, 3)


def test_a_product_without_isolation(monkeypatch):
    plan = hesse.plan("hvp", network, WEIGHT)
    assert plan.learned.plain
    assert "without isolation" in str(plan)
    expected = hesse.hvp(network, WEIGHT, VECTOR)
    along = hesse.second_directional_derivative(network, WEIGHT, VECTOR)
    monkeypatch.setattr("hesse.look.evaluation.isolated", None)  # then nothing else works
    count, calls = counted(network)
    for known in (plan, pickle.loads(pickle.dumps(plan))):
        torch.testing.assert_close(hesse.hvp(count, WEIGHT, VECTOR, method=known), expected)
        torch.testing.assert_close(
            hesse.second_directional_derivative(count, WEIGHT, VECTOR, method=known), along
        )
    assert len(calls) == 4
    with torch.no_grad():
        torch.testing.assert_close(hesse.hvp(network, WEIGHT, VECTOR, method=plan), expected)


@pytest.mark.parametrize(
    "func",
    [
        lambda w: squares(F.linear(DATA, w).mul_(2).tanh()),
        lambda w: squares(F.relu(F.linear(DATA, w), inplace=True)),
        lambda w: squares(F.dropout(F.linear(DATA, w), 0.5, training=False)),
        lambda w: squares(F.layer_norm(F.linear(DATA, w), (4,))),
        lambda w: squares(F.scaled_dot_product_attention(*3 * [F.linear(DATA, w)[None]])),
        lambda w: squares(F.linear(DATA.float(), w.float())).double(),
    ],
)
@pytest.mark.filterwarnings("ignore::hesse.errors.PrecisionWarning")
def test_what_needs_isolation_is_isolated(func):
    plan = hesse.plan("hvp", func, WEIGHT)
    found = hesse.hvp(func, WEIGHT, VECTOR, method=plan)
    torch.testing.assert_close(found, hesse.hvp(func, WEIGHT, VECTOR))
    if "inplace" not in func.__code__.co_names and plan.learned.plain:  # written by the call itself
        assert not {"dropout", "layer_norm", "mul_"} & plan.learned.plain


def test_other_calls_are_isolated():
    """A function that makes other calls than it did is stopped at the first of them, and isolated."""
    buffer = torch.zeros(3, dtype=torch.float64)
    plan = hesse.plan("hvp", network, WEIGHT)

    def writing(weight):
        with contextlib.suppress(Exception):  # the function's own affair
            buffer.add_(1)
        return network(weight)

    random = torch.get_rng_state()
    for func in (
        writing,
        lambda w: squares(F.scaled_dot_product_attention(*3 * [F.linear(DATA, w)[None]])),
        lambda w: squares(F.linear(DATA, w).softmax(1)),
    ):
        found = hesse.hvp(func, WEIGHT, VECTOR, method=plan)
        expected = (hessian_matrix(func, [WEIGHT]) @ VECTOR.flatten()).view_as(VECTOR)
        torch.testing.assert_close(found, expected)
        buffer.zero_()
    hesse.hvp(writing, WEIGHT, VECTOR, method=plan)
    assert not buffer.any()
    with pytest.raises(errors.NotDeterministicError):
        hesse.hvp(lambda w: network(w) * torch.rand(()), WEIGHT, VECTOR, method=plan)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_plan_for_products_fits_its_tensors():
    plan = hesse.plan("product", network, WEIGHT)
    with pytest.raises(errors.ArgumentError, match="other shapes"):
        hesse.hvp(lambda w: w.pow(3).sum(), x(2), x(2), method=plan)
    with pytest.raises(errors.ArgumentError, match="a plan for the product"):
        hesse.hessian(network, WEIGHT, method=plan)
    with pytest.raises(errors.ArgumentError, match="for products"):
        hesse.hvp(network, WEIGHT, VECTOR, method="taps")
    with pytest.raises(errors.ArgumentError, match="part of the hessian"):
        hesse.plan("hvp", network, WEIGHT, rows=[0])
    assert "product of 12 coordinates" in str(plan)
