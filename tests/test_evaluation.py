"""How often a function is evaluated and differentiated, also where it changes something in place."""

import pytest
import torch
import torch.nn.functional as F

import hesse
from cases import x
from hesse import errors
from hesse.look.evaluation import Evaluation
from networks import Problem, mlp, squares
from oracle import hessian_matrix


@pytest.fixture
def graphs(monkeypatch):
    """Whether a graph was made, for every gradient of a first order that is taken."""
    taken, right = [], Evaluation.gradients

    def counted(self, values, create_graph):
        taken.append(create_graph)
        return right(self, values, create_graph)

    monkeypatch.setattr(Evaluation, "gradients", counted)
    return taken


def counted(func):
    """The function, and a list with an entry for every evaluation."""
    calls = []

    def count(*inputs):
        calls.append(None)
        return func(*inputs)

    return count, calls


DATA, WEIGHT = x(5, 3), x(4, 3)
SCALE = torch.ones((), dtype=torch.float64)


def plain(weight):
    return squares(F.linear(DATA, weight).tanh())


def unlisted(weight):
    """By a call that the table does not know."""
    return squares(torch.i0(F.linear(DATA, weight)))


def writing(weight):
    """Changes what its own graph holds."""
    return squares(F.linear(DATA, weight).tanh() * SCALE.add_(1))


def written(weight):
    """The same without a change."""
    return squares(F.linear(DATA, weight).tanh() * 2)


def exact(func):
    return hessian_matrix(func, [WEIGHT]).diagonal().view_as(WEIGHT)


def test_a_sweep_without_a_check_makes_no_graph_of_the_gradient(graphs):
    found = hesse.hessian_diagonal(plain, WEIGHT, method="sweep", check=False)
    assert graphs == []
    torch.testing.assert_close(found, exact(plain))


def test_a_gradient_by_layers_is_compared_where_the_table_does_not_tell(graphs):
    found = hesse.hessian_diagonal(unlisted, WEIGHT, method="sweep", check=False)
    assert graphs == [False]
    torch.testing.assert_close(found, exact(unlisted))


@pytest.mark.parametrize(
    ("method", "check"), [("sweep", True), ("taps", False), ("dense", False), ("auto", True)]
)
def test_products_make_one(graphs, method, check):
    found = hesse.hessian_diagonal(plain, WEIGHT, method=method, check=check)
    assert graphs == [True]
    torch.testing.assert_close(found, exact(plain))


@pytest.mark.parametrize(("func", "same"), [(plain, plain), (writing, written)])
@pytest.mark.parametrize("method", ["sweep", "taps", "dense"])
def test_evaluated_twice(func, same, method):
    count, calls = counted(func)
    found = hesse.hessian_diagonal(count, WEIGHT, method=method)
    assert len(calls) == 2
    assert SCALE == 1
    torch.testing.assert_close(found, exact(same))


def unlisted_writing(weight):
    """Both."""
    return squares(torch.i0(F.linear(DATA, weight)) * SCALE.add_(1))


def unlisted_written(weight):
    """The same without a change."""
    return squares(torch.i0(F.linear(DATA, weight)) * 2)


@pytest.mark.parametrize(
    ("func", "same", "more"), [(unlisted, unlisted, 1), (unlisted_writing, unlisted_written, 2)]
)
@pytest.mark.parametrize(("method", "least"), [("sweep", 2), ("taps", 2)])
def test_once_more_with_samples_changed_where_the_table_does_not_tell(func, same, more, method, least):
    """And again where that put back what the graph holds."""
    times = least + more
    count, calls = counted(func)
    found = hesse.hessian_diagonal(count, WEIGHT, method=method)
    assert len(calls) == times
    assert SCALE == 1
    torch.testing.assert_close(found, exact(same))


@pytest.mark.parametrize("method", ["sweep", "taps", "dense"])
def test_what_only_some_evaluations_change_is_put_back(method):
    """The graph of an evaluation that changed nothing may hold what a perturbed one has changed."""

    def func(weight):
        hidden = torch.i0(F.linear(DATA, weight))
        if len(calls) == 3:
            SCALE.add_(1)
        return squares(hidden * SCALE)

    count, calls = counted(func)
    found = hesse.hessian_diagonal(count, WEIGHT, method=method)
    torch.testing.assert_close(found, exact(unlisted))
    assert len(calls) == (2 if method == "dense" else 3)
    assert SCALE == 1


@pytest.mark.parametrize("method", ["sweep", "taps", "dense"])
@pytest.mark.parametrize("check", [True, False])
def test_a_value_that_differs_the_last_time_is_noticed(method, check):
    count, calls = counted(lambda weight: plain(weight) * (1 + 1e-6 * len(calls)))
    with pytest.raises(errors.NotDeterministicError, match="two evaluations at the same point"):
        hesse.hessian_diagonal(count, WEIGHT, method=method, check=check)


def test_strict_asks_for_influence_without_a_graph(graphs):
    problem = Problem(mlp(), squares, x(5, 3))
    unused = x(2).requires_grad_()
    tensors = [*problem.tensors, unused]
    with pytest.raises(errors.IndependentError, match=r"params\[4\] does not influence the output"):
        hesse.hessian_diagonal(problem.closure, tensors, strict=True, method="sweep", check=False)
    assert graphs == [False]
    *_, last = hesse.hessian_diagonal(problem.closure, tensors, method="sweep", check=False)
    assert not last.any()
    assert graphs == [False]
