"""Where the samples are: one form for every place, found by changing some."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from cases import x
from hesse.look.evaluation import evaluated
from hesse.look.explore import explore
from hesse.look.perturb import chosen, differs, found, noticed, perturbed
from hesse.problem import from_function
from hesse.runtime.memory import Budget
from hesse.tape.samples import ONE_SAMPLE, Samples
from networks import Problem, Steps, Tokens, contrastive, mlp, squares


@st.composite
def placed(draw):
    """Samples, a shape that holds them after some leading dimensions, and how many those are."""
    count, outer, inner = draw(st.tuples(*3 * [st.integers(1, 4)]))
    shape = draw(st.lists(st.integers(1, 3), max_size=2))
    dim = draw(st.integers(0, len(shape)))
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    samples = Samples(count, dim, outer, inner) if count > 1 else ONE_SAMPLE
    return samples, (*lead, *shape[:dim], outer * count * inner, *shape[dim:]), len(lead)


@given(placed())
@settings(max_examples=200, deadline=None)
def test_there_and_back(given_):
    samples, shape, lead = given_
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    first = samples.first(tensor, lead)
    assert first.shape[: lead + 1] == (*shape[:lead], samples.count)
    assert first.numel() == tensor.numel()
    assert torch.equal(samples.back(first, lead), tensor)
    assert torch.equal(samples.first(samples.back(first, lead), lead), first)


@given(placed(), st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_narrowed(given_, start, stop):
    samples, shape, lead = given_
    assume(samples.count > 1)
    assume(start < stop <= samples.count)
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    numbers = range(start, stop)
    narrow = samples.narrow(tensor, numbers, lead)
    place, lie = samples.narrowed(numbers), samples.first(tensor, lead)
    expected = lie.narrow(lead, start, len(numbers))
    assert torch.equal(place.flat(narrow, lead), expected.reshape(*expected.shape[: lead + 1], -1))


@given(placed(), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_what_is_changed_is_found(given_, seed):
    samples, shape, lead = given_
    assume(samples.count > 1)
    assume(1 in (samples.outer, samples.inner))  # others are taken for one sample
    torch.manual_seed(seed)
    before, which = x(*shape[lead:], 3), chosen(samples.count)
    after = perturbed(before, samples, which)
    place = found(before, after, which)
    assert place.count == samples.count
    changed = differs(place.first(before), place.first(after)).flatten(1).any(1)
    assert torch.equal(changed, which)  # a place that explains it; the true one, or one that looks the same
    assert not noticed(before, after, place, which)
    assert noticed(before, after, place, ~which)


def test_nothing_is_found_where_nothing_changes():
    before = x(4, 3)
    assert found(before, before.clone(), chosen(4)) is None
    assert found(before, before * (1 + 1e-15), chosen(4)) is None


def test_masked_scores_do_not_change():
    before, which = x(4, 3), torch.tensor([True, False, True, False])
    before[:, 2] = -torch.inf
    assert found(before, before.clone(), which) is None
    assert found(before, before + which[:, None], which) == Samples(4, 0)
    before[0, 2] = 0
    assert differs(torch.where(before == 0, -torch.inf, before), before).sum() == 1


def test_all_that_changes_is_one_sample():
    before = x(4, 3)
    assert found(before, before + 1, chosen(4)) == ONE_SAMPLE
    assert found(before, before + 1, chosen(7)) == ONE_SAMPLE


@given(st.integers(2, 50))
def test_some_are_chosen_and_some_are_not(count):
    which = chosen(count)
    assert which.shape == (count,)
    assert which.any()
    assert not which.all()


def test_the_samples_of_other_scales_do_not_hide_one():
    before = torch.tensor([[1e12], [1.0], [1e-12], [1.0]], dtype=torch.float64)
    which = torch.tensor([True, False, False, True])
    after = before * torch.tensor([[1.0], [1.0], [1.1], [1.0]], dtype=torch.float64)
    assert noticed(before, after, Samples(4, 0), which)


def explored(problem):
    with evaluated(problem, recorded=True) as evaluation:
        return explore(problem, evaluation, Budget(None, torch.device("cpu")))


def places(problem):
    return list(explored(from_function(problem.closure, problem.tensors)).samples.values())


N = 5
INNER = Samples(N, 0)
EXPLORED = {
    "mlp": (lambda: Problem(mlp(), squares, x(N, 3)), [INNER, INNER]),
    "unbatched": (lambda: Problem(mlp(), squares, x(3)), 2 * [ONE_SAMPLE]),
    "one sample": (lambda: Problem(mlp(), squares, x(1, 3)), 2 * [ONE_SAMPLE]),
    "contrastive": (lambda: Problem(mlp(), contrastive, x(N, 3)), 2 * [ONE_SAMPLE]),
    "samples in dimension 1": (
        lambda: Problem(Tokens(), lambda o: squares(o), x(2, N, 4).transpose(0, 1)),
        3 * [INNER],
    ),
    "positions first": (
        lambda: Problem(mlp(), lambda o: squares(o.cumsum(0)), x(2, N, 3)),
        2 * [Samples(N, 1)],
    ),
    "batch norm in training: before and after": (
        lambda: Problem(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), squares, x(N, 3)),
        2 * [ONE_SAMPLE],
    ),
    "touching before the last layer only": (
        lambda: Problem(
            nn.Sequential(nn.Linear(3, 4), nn.Softmax(0), nn.Linear(4, 2)), lambda o: o.pow(2).mean(), x(N, 3)
        ),
        [ONE_SAMPLE, ONE_SAMPLE],
    ),
    "steps of a recurrent layer": (
        lambda: Problem(Steps(nn.LSTM, batch_first=True), squares, x(N, 3, 2)),
        7 * [INNER],
    ),
    "steps first": (
        lambda: Problem(Steps(nn.GRU), squares, x(3, N, 2)),
        [*6 * [Samples(N, 1)], INNER],
    ),
    "the transpose of a weight": (
        lambda: Problem(mlp(), lambda o: squares(o.T), x(N, 3)),
        [INNER, INNER],
    ),
}


@pytest.mark.parametrize(("build", "expected"), EXPLORED.values(), ids=EXPLORED)
def test_explored(build, expected):
    assert places(build()) == expected


def test_a_branch_on_values_is_one_sample():
    """Perturbed, the function may take another way; then nothing is said of where the samples are."""
    calls = []

    def func(weight):
        calls.append(None)
        hidden = F.linear(data, weight)
        return squares(torch.i0(hidden) if len(calls) == 1 else hidden.exp())

    data = x(N, 3)
    assert list(explored(from_function(func, (x(2, 3),))).samples.values()) == [ONE_SAMPLE]


def test_no_layers_no_samples():
    problem = from_function(lambda p: p.pow(3).sum(), x(4))
    assert explored(problem).samples == {}
    with evaluated(problem) as evaluation:
        assert explore(problem, evaluation, Budget(None, torch.device("cpu"))).samples == {}
