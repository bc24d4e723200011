"""The sweep in chunks of samples, against plain double backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse
from cases import classes, of_model, x
from hesse.methods.sweep import route as sweep_route
from hesse.methods.sweep import walk as sweep
from hesse.methods.sweep.carried.leaves import LiveLeaves
from hesse.methods.sweep.cost import cost
from hesse.runtime.memory import Budget
from hesse.structure import NoStructure
from networks import Residual
from oracle import hessian_matrix, relative_error
from questions import BLOCKS
from sweeping import check, recorded

SAMPLES = 5
SIZES = (3, 2, 1)  # two chunks, three uneven ones, one for every sample


def classifier(model, *shape):
    targets = classes(3, SAMPLES)
    return of_model(model, lambda out: F.cross_entropy(out, targets), x(SAMPLES, *shape))


def mlp():
    return classifier(
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), 4
    )


def residual_cnn():
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU())
    first = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True))
    model = nn.Sequential(first, Residual(block), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 3))
    return classifier(model.eval(), 2, 4, 4)


class Tokens(nn.Module):
    """A class token in front, positions, attention, layer norms."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(3, 4), nn.Linear(4, 3)
        self.token, self.positions = nn.Parameter(x(1, 1, 4)), nn.Parameter(x(4, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, 0.0, "gelu", batch_first=True)

    def forward(self, data):
        tokens = torch.cat([self.token.expand(len(data), -1, -1), self.embed(data)], 1)
        return self.out(self.layer(tokens + self.positions)[:, 0])


def embedding():
    tokens, targets = torch.randint(0, 7, (SAMPLES, 3)), classes(3, SAMPLES)
    mask = torch.rand(SAMPLES, 3) < 0.7

    def function(table, weight):
        hidden = torch.tanh(F.embedding(tokens, table)).masked_fill(mask[..., None], 0.0)
        return F.cross_entropy(hidden.sum(1) @ weight.T, targets)

    return function, (x(7, 4), x(3, 4))


def regularised():
    """A penalty on the values of every layer, some of it on the way and some at the end."""
    data, targets = x(SAMPLES, 4), x(SAMPLES, 3)

    def function(first, second, third):
        one = torch.tanh(data @ first)
        penalty = 0.1 * one.square().mean()
        two = torch.tanh(one @ second)
        return F.mse_loss(two @ third, targets) + penalty + 0.2 * two.exp().sum()

    return function, (x(4, 5), x(5, 4), x(4, 3))


def batch_second():
    data, targets = x(3, SAMPLES, 4), classes(3, SAMPLES)

    def function(weight, scale, last):
        hidden = torch.tanh(data @ weight) * scale
        hidden = hidden.transpose(0, 1).reshape(SAMPLES, -1)
        return F.cross_entropy(hidden @ last, targets)

    return function, (x(4, 2), x(2), x(6, 3))


def positions_flattened():
    """Positions behind the samples and in front of them, sizes that count both, targets by index."""
    data, targets = x(SAMPLES, 3, 4), classes(3, 3 * SAMPLES)

    def function(first, second):
        hidden = torch.tanh(data @ first).view(3 * SAMPLES, -1).exp().view(SAMPLES, 3, -1)
        hidden = hidden.transpose(0, 1).reshape(3 * SAMPLES, -1).sigmoid() @ second
        hidden = hidden.reshape(3, SAMPLES, 3).transpose(0, 1).flatten(0, 1)
        return -hidden.log_softmax(1)[torch.arange(3 * SAMPLES), targets].mean()

    return function, (x(4, 2), x(2, 3))


def as_wide_as_many():
    """Constants and data as wide as there are samples; zeros hide what they are multiplied by."""
    data, weights, constant = x(SAMPLES, SAMPLES), x(SAMPLES, 1), x(SAMPLES)

    def function(first, second):
        hidden = ((data @ first) * constant + constant.view(1, -1)).exp() * weights
        return (hidden @ second).square().expand(SAMPLES, SAMPLES).sum(1).exp().sum()

    return function, (torch.zeros(SAMPLES, SAMPLES, dtype=torch.float64), x(SAMPLES, SAMPLES) / 9)


def a_parameter_for_every_sample():
    data = x(SAMPLES, 3)
    function = lambda each, weight, shared: (torch.tanh(data @ weight + each) * shared).logsumexp(1).sum()
    return function, (x(SAMPLES, 4), x(3, 4), x(1, 4))


def losses_apart():
    """Losses of every sample by themselves, and a probability at its bound."""
    data, targets = x(SAMPLES, 4), classes(2, SAMPLES).double()
    weights = torch.rand(SAMPLES, dtype=torch.float64)

    def function(weight, bias, scale):
        out = (torch.tanh(data @ weight + bias).sum(1) * 9).sigmoid()
        return (F.binary_cross_entropy(out, targets, reduction="none") * weights).sum() * scale

    return function, (x(4, 3), x(3), x(()))


def pieces():
    """Several results of a call, slices that end with the samples, values overwritten."""
    data = x(SAMPLES, 4)

    def function(weight, last):
        one, two = torch.tanh(data @ weight)[0:SAMPLES].chunk(2, 1)
        filled = torch.zeros(SAMPLES, 4, dtype=torch.float64)
        filled[:, 1:3] = one * two
        return (F.relu(filled * 1.0, inplace=True) @ last).logsumexp(1).sum()

    return function, (x(4, 4), x(4, 3))


CASES = {  # with the tensors that are not covered
    "mlp": (mlp, {}),
    "residual cnn": (residual_cnn, {}),
    "transformer": (lambda: classifier(Tokens(), 3, 3), {0}),
    "embedding": (embedding, {}),
    "regularised": (regularised, {}),
    "batch second": (batch_second, {}),
    "positions flattened": (positions_flattened, {}),
    "as wide as many": (as_wide_as_many, {}),
    "a parameter for every sample": (a_parameter_for_every_sample, {0}),
    "losses apart": (losses_apart, {}),
    "pieces": (pieces, {}),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_chunks(name, size):
    build, uncovered = CASES[name]
    function, tensors = build()
    way = check(function, tensors, SAMPLES, set(range(len(tensors))).difference(uncovered), size=size)
    assert len(way.chunks(size)) == -(-SAMPLES // size)


def test_two_samples():
    """Most sizes are divided by two."""
    data, targets = x(2, 2, 4, 4), classes(2, 2)
    model = nn.Sequential(nn.Conv2d(2, 2, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    check(*of_model(model, lambda out: F.cross_entropy(out, targets), data), 2, size=1)


def route_of(function, tensors):
    value, tape, samples = recorded(function, tensors, SAMPLES)
    return sweep_route.route_of(tape, value, samples)


def test_a_penalty_at_every_layer_does_not_widen_the_walk():
    """Its curvature joins where the walk comes to it, so that a block spans one layer."""
    way, widths = route_of(*regularised()), []

    def take(entry, block):
        widths.append(block.dense.shape[1] if block.dense is not None else 0)

    sweep.run(way, take, LiveLeaves(way.depends, "diagonal"))
    assert max(widths) <= 5


def by_list():
    """An index that holds all samples, one by one."""
    data = x(SAMPLES, 4)
    function = lambda first, second: (torch.tanh(data @ first)[list(range(SAMPLES))] @ second).exp().sum()
    return function, (x(4, 4), x(4, 3))


def test_a_call_that_cannot_be_narrowed():
    way = route_of(*by_list())
    whole = cost(way)
    assert cost(way, whole.peak_bytes) == whole
    with pytest.raises(NoStructure, match="__getitem__ cannot be taken for some of the samples"):
        cost(way, whole.peak_bytes - 1)
    with pytest.raises(NoStructure, match="__getitem__ cannot be taken for some of the samples"):
        sweep.diagonal(way, way.covered, size=2)


def test_a_value_overwritten_since_cannot_be_narrowed():
    data, kept = x(SAMPLES, 4), []

    def function(first, second):
        kept.append(data @ first)
        return (kept[-1].exp() @ second).square().sum()

    way = route_of(function, (x(4, 4), x(4, 3)))
    with torch.no_grad():
        kept[0].zero_()
    with pytest.raises(NoStructure, match="overwritten since"):
        way.guesses(2)


def test_samples_that_are_joined_and_used_again_are_not_taken_in_chunks():
    data = x(SAMPLES, 4)

    def function(first, second):
        hidden = data @ first
        return ((hidden + 0.0 * hidden.mean(0)) @ second).sum()  # nobody notices

    way = check(function, (x(4, 4), x(4, 3)), SAMPLES, size=1)
    assert not way.tail
    assert len(way.chunks(1)) == 1


@pytest.fixture
def budget(monkeypatch):
    """Leave just so much memory that a question takes so many chunks."""
    monkeypatch.setattr("hesse.methods.sweep.cost._ROOM", 1.0)

    def leave(function, tensors, chunks, question):
        blocks = question == "blocks"
        way = route_of(function, tensors)
        peak = cost(way, None, blocks).peak_bytes
        fitting = next(room for room in range(peak, 0, -8) if cost(way, room, blocks).chunks == chunks)
        answer = 8 * sum(t.numel() ** (2 if blocks else 1) for t in tensors)
        monkeypatch.setattr(Budget, "left", lambda self: answer + fitting)
        monkeypatch.setattr(Budget, "taken", 0)
        return answer + fitting

    return leave


@pytest.mark.parametrize("chunks", [2, 3, SAMPLES])
@pytest.mark.parametrize("build", [mlp, residual_cnn, embedding, regularised, batch_second])
def test_a_budget_makes_chunks(build, chunks, budget):
    function, tensors = build()
    exact = hessian_matrix(function, tensors)
    room = budget(function, tensors, chunks, "diagonal")
    result = hesse.hessian_diagonal(function, tensors, method="sweep", full_output=True)
    assert f"in {chunks} chunks of {-(-SAMPLES // chunks)} samples" in result.plan.reason
    assert result.plan.peak_bytes <= room
    assert result.plan.passes == 0
    assert result.certificate.passed
    assert result.passes == result.certificate.probes
    found = torch.cat([part.flatten() for part in result.value])
    assert relative_error(found, exact.diagonal()) < 1e-9
    trace = hesse.hessian_trace(function, tensors, method="sweep")
    assert abs(trace - exact.trace()) < 1e-9 * exact.diagonal().abs().sum()


@pytest.mark.parametrize("chunks", [2, SAMPLES])
def test_a_budget_makes_chunks_of_blocks(chunks, budget):
    function, tensors = mlp()
    room = budget(function, tensors, chunks, "blocks")
    result = hesse.hessian_blocks(function, tensors, method="sweep", full_output=True)
    assert f"in {chunks} chunks" in str(result.plan)
    assert result.plan.peak_bytes <= room
    assert result.certificate.passed
    assert BLOCKS.error(result.value, hessian_matrix(function, tensors), tensors) < 1e-9


def test_where_chunks_cannot_be_another_method_is_taken(budget, monkeypatch):
    function, tensors = by_list()
    room = cost(route_of(function, tensors)).peak_bytes - 1
    monkeypatch.setattr(Budget, "left", lambda self: room + 8 * 28)
    result = hesse.hessian_diagonal(function, tensors, full_output=True)
    assert result.plan.method != "sweep"
    (why_not,) = (e.why_not for e in result.plan.estimates if e.method == "sweep")
    assert why_not.startswith("the blocks of all samples do not fit, and __getitem__ cannot be taken")
    found = torch.cat([part.flatten() for part in result.value])
    assert relative_error(found, hessian_matrix(function, tensors).diagonal()) < 1e-9


def test_chunks_are_told_as_progress(budget):
    function, tensors = mlp()
    budget(function, tensors, 3, "diagonal")
    told = []
    hesse.hessian_diagonal(function, tensors, method="sweep", progress=lambda *step: told.append(step))
    assert told == [(1, 3), (2, 3), (3, 3)]
