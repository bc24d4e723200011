"""Leaves that a sweep keeps alive: tied weights, and those that enter otherwise than linearly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse
from cases import x
from hesse.errors import CertificateWarning
from hesse.methods.sweep.carried.live import Strand
from networks import NETWORKS, Language, Problem
from questions import BLOCKS, DIAGONAL
from sweeping import check

SAMPLES = 4


def classified(logits):
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


def rnn(dim):
    """A tanh cell over 4 steps, samples in dimension `dim`."""
    data = x(4, SAMPLES, 2) if dim else x(SAMPLES, 4, 2)

    def function(outer, inner, bias, out):
        state, states = data.new_zeros(SAMPLES, 3), []
        for step in data.unbind(1 - dim):
            state = torch.tanh(step @ outer + F.linear(state, inner, bias))
            states.append(state)
        return (torch.stack(states, 1 - dim) @ out).logsumexp(2).square().mean() + classified(state @ out)

    return function, (x(2, 3), x(3, 3), x(3), x(3, 3)), {0, 1, 2, 3}


def gru():
    data = x(SAMPLES, 4, 2)

    def function(outer, inner, outer_bias, inner_bias, out):
        state = data.new_zeros(SAMPLES, 3)
        for step in data.unbind(1):
            r, z, n = F.linear(step, outer, outer_bias).chunk(3, 1)
            s, t, m = F.linear(state, inner, inner_bias).chunk(3, 1)
            update = torch.sigmoid(z + t)
            state = (1 - update) * torch.tanh(n + torch.sigmoid(r + s) * m) + update * state
        return classified(state @ out)

    return function, (x(9, 2), x(9, 3), x(9), x(9), x(3, 3)), {0, 1, 2, 3}


def autoencoder():
    data = x(SAMPLES, 4)

    def function(weight, encoding, decoding):
        hidden = torch.tanh(F.linear(data, weight, encoding))
        return F.mse_loss(torch.sigmoid(F.linear(hidden, weight.T, decoding)), data)

    return function, (x(3, 4), x(3), x(4)), {0, 1, 2}


def skip():
    """One weight in two layers, one of which is skipped; their biases are their own."""
    data = x(SAMPLES, 3)

    def function(first, shared, one, other, last):
        hidden = torch.tanh(data @ first)
        hidden = hidden + F.gelu(F.linear(hidden, shared, one))
        return classified(torch.tanh(F.linear(hidden, shared, other)) @ last)

    return function, (x(3, 4), x(4, 4), x(4), x(4), x(4, 3)), {1, 2, 3}


def scale_twice():
    data = x(SAMPLES, 3)

    def function(weight, scale, last):
        hidden = torch.tanh(data @ weight * scale)
        return classified((hidden * scale) @ last)

    return function, (x(3, 4), x(4), x(4, 3)), {1}


def log_scale():
    data = x(SAMPLES, 3)

    def function(weight, log_scale, temperature):
        return classified((data @ weight) * log_scale.exp() / F.softplus(temperature))

    return function, (x(3, 3), x(3), x(())), {1, 2}


def square():
    data = x(SAMPLES, 5, 3)

    def function(weight, power):
        return torch.tanh((data @ weight) * power**2).logsumexp((1, 2)).mean()

    return function, (x(3, 2), x(5, 1)), {1}


def linearly_and_not():
    """Once in a layer and once, transposed, as its exponential."""
    data = x(SAMPLES, 3)

    def function(weight, last):
        hidden = torch.tanh(data @ weight)
        return classified((hidden @ weight.T.exp()) @ last)

    return function, (x(3, 4), x(3, 3)), {0}


def penalty():
    """Of the weights one is read where it enters, the other also multiplies the loss."""
    data = x(SAMPLES, 3)

    def function(first, last):
        hidden = torch.tanh(data @ first)
        decay = (first.square().sum() + (first @ last).pow(4).sum()) * last.norm()
        return classified(hidden @ last) * (1 + last.square().mean()) + decay

    return function, (x(3, 4), x(4, 3)), {1}


def weight_norm():
    data = x(SAMPLES, 3)

    def function(direction, length, last):
        weight = direction * (length / direction.norm(dim=1, keepdim=True))
        return classified(torch.tanh(F.linear(data, weight)) @ last)

    return function, (x(4, 3), x(4, 1), x(4, 3)), {0, 1}


def class_token():
    """A parameter that is joined to every sample; attention follows."""
    data = x(SAMPLES, 2, 4)

    def function(token, query, last):
        tokens = torch.cat([token.expand(SAMPLES, 1, 4), torch.tanh(data @ query)], 1)
        scores = (tokens @ query) @ tokens.transpose(1, 2)
        return classified((scores.softmax(-1) @ tokens)[:, 0] @ last)

    return function, (x(1, 1, 4), x(4, 4) / 2, x(4, 3)), {0, 1}


def words():
    """A table that is looked up and is the last layer."""
    tokens = torch.randint(0, 5, (SAMPLES, 2))

    def function(table, hidden):
        found = torch.tanh(F.embedding(tokens, table) @ hidden)
        return classified(F.linear(found.sum(1), table))

    return function, (x(5, 3), x(3, 3)), {0}


def convolutions():
    data = x(SAMPLES, 2, 5)

    def function(kernel, bias, norm, last):
        hidden = torch.tanh(F.conv1d(data, kernel, bias, padding=1))
        hidden = F.group_norm(F.conv1d(hidden, kernel, bias, padding=1), 1, norm)
        return classified(F.group_norm(hidden.sigmoid(), 2, norm).flatten(1) @ last)

    return function, (x(2, 2, 3), x(2), x(2), x(10, 3)), {0, 1, 2}


def flattened():
    """Positions flattened into the batch."""
    data = x(SAMPLES, 3, 4)

    def function(weight, bias):
        hidden = torch.tanh(data @ weight + bias)
        hidden = torch.sin(hidden.reshape(-1, 4) @ weight + bias).view(SAMPLES, 3, 4).transpose(0, 1)
        return torch.sigmoid(hidden.reshape(-1, 4) @ weight).view(3, SAMPLES, 4).logsumexp((0, 2)).mean()

    return function, (x(4, 4), x(4)), {0, 1}


def for_every_sample():
    """A parameter that has a part for each sample."""
    data = x(SAMPLES, 3)
    return (
        lambda each, weight: classified(torch.tanh(data @ weight + each) * each.exp()),
        (x(SAMPLES, 3), x(3, 3)),
        {0},
    )


def branches():
    """A weight for two inputs, whose results are multiplied."""
    one, other = x(SAMPLES, 3), x(SAMPLES, 3)

    def function(shared, last):
        return classified((torch.tanh(one @ shared) * torch.tanh(other @ shared)) @ last)

    return function, (x(3, 4), x(4, 3)), {0}


def in_place():
    data = x(SAMPLES, 3)

    def function(weight, scale):
        hidden = data @ weight
        hidden.mul_(scale.exp()).sigmoid_()
        hidden = hidden @ weight
        hidden += scale
        return classified(hidden)

    return function, (x(3, 3), x(3)), {0, 1}


CASES = {
    "rnn": lambda: rnn(0),
    "rnn, time first": lambda: rnn(1),
    **{
        case.__name__.replace("_", " "): case
        for case in (
            gru,
            autoencoder,
            skip,
            scale_twice,
            log_scale,
            square,
            linearly_and_not,
            penalty,
            weight_norm,
            class_token,
            words,
            convolutions,
            flattened,
            for_every_sample,
            branches,
            in_place,
        )
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("by_layers", [False, True])
def test_live(name, by_layers, monkeypatch):
    monkeypatch.setattr(
        "hesse.methods.sweep.carried.uses._columns", lambda layer, samples: 0 if by_layers else 1 << 40
    )
    function, tensors, live = CASES[name]()
    check(function, tensors, SAMPLES, live=live)


@pytest.fixture
def alive_everywhere(monkeypatch):
    """Every leaf that can stay alive does, also where products would take less."""
    monkeypatch.setattr("hesse.methods.sweep.option._products", lambda meter, leaves: float("inf"))


@pytest.mark.parametrize("question", [DIAGONAL, BLOCKS], ids=lambda question: question.name)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_networks(network, question, alive_everywhere):
    problem = network()
    result = question.ask(problem.closure, problem.tensors, method="sweep", full_output=True)
    assert question.error(result.value, problem.matrix(), problem.tensors) < 1e-9
    assert result.certificate.passed


class Repeated(nn.Module):
    """One layer after itself, with skips and a penalty on another weight."""

    def __init__(self, width=32):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.scale = nn.Parameter(x(width) / 4)

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        for _ in range(3):
            hidden = hidden + torch.tanh(self.layer(hidden)) * self.scale.exp()
        return self.last(hidden)


def repeated():
    return Problem(Repeated(), classified, x(16, 8))


def test_weights_that_are_used_again_take_no_products(alive_everywhere):
    problem = repeated()
    result = hesse.hessian_diagonal(problem.closure, problem.tensors, method="sweep", full_output=True)
    why = {name: share.why for name, share in zip(problem.names, result.plan.shares, strict=True)}
    assert {name for name, reason in why.items() if reason == "carried along the way"} == {
        "layer.weight",
        "layer.bias",
        "scale",
    }
    assert result.passes == result.plan.check_passes
    assert result.certificate.passed
    assert DIAGONAL.error(result.value, problem.matrix(), problem.tensors) < 1e-9


def test_the_plan_weighs_products():
    """Where rows for few outputs are carried through three layers, or 1,024 products are taken."""
    problem = repeated()
    plan = hesse.plan("diagonal", problem.closure, problem.tensors, method="sweep")
    assert problem.names.index("layer.weight") in plan.by("sweep")


def test_a_trace():
    problem = repeated()
    trace = hesse.hessian_trace(problem.closure, problem.tensors, method="sweep")
    torch.testing.assert_close(trace, problem.matrix().trace())


def test_a_plan_given_back(alive_everywhere):
    problem, other = repeated(), Problem(Repeated(), classified, x(9, 8))
    plan = hesse.plan("diagonal", problem.closure, problem.tensors, method="sweep")
    result = hesse.hessian_diagonal(other.closure, other.tensors, method=plan, full_output=True)
    assert result.plan.by("sweep") == plan.by("sweep") == set(range(7))
    assert DIAGONAL.error(result.value, other.matrix(), other.tensors) < 1e-9


def test_a_large_table_is_left_to_others():
    """Of a table that is also the last layer, every row would be carried past every sample."""
    model = Language()
    model.table = nn.Embedding(500, 3)
    model.out = nn.Linear(3, 500, bias=False)
    model.out.weight = model.table.weight
    problem = Problem(model, classified, torch.randint(0, 500, (64,)))
    plan = hesse.plan("diagonal", problem.closure, problem.tensors, method="sweep")
    names = {problem.names[i] for i in plan.by("sweep")}
    assert names == {"hidden.weight", "hidden.bias"}


def test_what_does_not_fit_the_budget_is_not_kept_alive(alive_everywhere):
    problem = Problem(Repeated(64), classified, x(256, 8))

    def planned(memory):
        return hesse.plan("diagonal", problem.closure, problem.tensors, method="sweep", memory=memory)

    wide = planned("4GiB")
    assert wide.by("sweep") == set(range(7))
    assert problem.names.index("layer.weight") not in planned(wide.peak_bytes // 2).by("sweep")


@pytest.mark.parametrize("by_layers", [False, True])
def test_a_strand_gone_wrong_is_noticed(by_layers, monkeypatch, alive_everywhere):
    monkeypatch.setattr(
        "hesse.methods.sweep.carried.uses._columns", lambda layer, samples: 0 if by_layers else 1 << 40
    )
    pull = Strand.pull

    def wrong(self, call, ahead):
        pull(self, call, ahead)
        self.by = {value: stack * 1.001 for value, stack in self.by.items()}

    monkeypatch.setattr(Strand, "pull", wrong)
    problem = repeated()
    with pytest.warns(CertificateWarning, match="computed by sweep deviates"):
        result = hesse.hessian_diagonal(problem.closure, problem.tensors, method="sweep", full_output=True)
    assert result.plan.method == "dense"
    assert DIAGONAL.error(result.value, problem.matrix(), problem.tensors) < 1e-9
