"""Taps: one product a neuron, exact wherever they apply, and not taken (or noticed) where they do not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse
from cases import x
from hesse import errors
from hesse.look.gradient import Gradient
from hesse.tape.samples import Samples
from networks import NETWORKS, BentNet, Penalised, Problem, Shared, contrastive, mlp, squares
from questions import BLOCKS, DIAGONAL, HESSIAN, QUESTIONS

TOLERANCE = 1e-9
every_question = pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)


def ask(question, problem, **options):
    options = {"method": "taps", "full_output": True, **options}
    return question.ask(problem.closure, problem.tensors, **options)


def assert_exact(question, result, problem):
    assert question.error(result.value, problem.matrix(), problem.tensors) < TOLERANCE
    assert result.certificate.passed


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_every_network(network, taps_everywhere):
    """Exact, by taps for all tensors but those that are known to be none, and no warning."""
    problem = network()
    matrix = problem.matrix()
    for question in QUESTIONS:
        result = ask(question, problem)
        assert question.error(result.value, matrix, problem.tensors) < TOLERANCE, question.name
        assert problem.left(result.plan) == network.left(question.name)
        assert result.passes == result.plan.passes + result.plan.check_passes
    trace = hesse.hessian_trace(problem.closure, problem.tensors, method="taps")
    torch.testing.assert_close(trace, matrix.trace())


@every_question
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_whatever_pays(network, question):
    problem = network()
    assert_exact(question, ask(question, problem), problem)
    assert_exact(question, ask(question, problem, method="auto"), problem)


PASSES = {
    # of the diagonal: one per output and position, one per other coordinate
    "mlp": 4 + 3,
    "one sample": 4 + 3,
    "two positions": 2 * (4 + 3),
    "skips, norm, product of layers": 4 + 4 + 12,
    "attention": 2 * (3 + 3 + 2),
    "branches": 4 + 4 + 2,  # two layers share theirs
    "lstm": 3 * 12 + 2 * 3 + 2,
    "cnn": 9 * 4 + 4 * 4 + 2,
    "lstm cell": 3 * 8 + 2 * 2,  # one for both layers of a sum; and what the state moves, but for the first
    "contrastive loss": 4 * (4 + 3),  # samples touch: they are positions of one
}


@pytest.mark.parametrize("name", PASSES)
def test_passes(name, taps_everywhere):
    (network,) = (network for network in NETWORKS if network.name == name)
    assert ask(DIAGONAL, network()).plan.passes == PASSES[name]


def test_far_fewer_passes_than_coordinates():
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    problem = Problem(model, lambda output: F.cross_entropy(output, torch.arange(32) % 10), x(32, 64))
    result = ask(DIAGONAL, problem)
    assert result.plan.passes == 2 * 128 + 10
    assert result.passes == result.plan.passes + 3  # one of the check for every layer
    assert sum(t.numel() for t in problem.tensors) == 26_122


@pytest.mark.parametrize("memory", ["60MB", "400MB"])
def test_within_the_budget(memory):
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10))
    problem = Problem(model, lambda output: F.cross_entropy(output, torch.arange(256) % 10), x(256, 32))
    tight, loose = ask(DIAGONAL, problem, memory=memory), ask(DIAGONAL, problem)
    for one, other in zip(tight.value, loose.value, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_create_graph_takes_the_dense_way():
    result = ask(DIAGONAL, Problem(mlp(), squares, x(5, 3)), create_graph=True)
    assert result.plan.method == "dense"
    assert result.value[0].requires_grad


def test_float32():
    model = mlp()
    problem = Problem(model, squares, x(5, 3))
    expected = torch.cat([part.flatten() for part in ask(DIAGONAL, problem).value])
    model.float()
    single = Problem.__new__(Problem)
    single.__dict__.update(
        problem.__dict__, data=(problem.data[0].float(),), tensors=list(model.parameters())
    )
    found = torch.cat([part.flatten() for part in ask(DIAGONAL, single).value])
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@every_question
def test_dropout_is_refused(question):
    problem = Problem(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)), squares, x(5, 3))
    with pytest.raises(errors.NotDeterministicError, match="dropout"):
        ask(question, problem)


def deaf(monkeypatch):
    """Samples are taken to lie in dimension 0, and not to touch."""
    monkeypatch.setattr("hesse.look.perturb.found", lambda before, after, which: Samples(len(which), 0))
    monkeypatch.setattr("hesse.look.explore.noticed", lambda *arguments: False)
    for tells in ("placed", "contradicted"):
        monkeypatch.setattr(f"hesse.look.explore.{tells}", lambda *arguments: None)


def alone(monkeypatch):
    """Weights are taken to be used by their layers alone."""
    monkeypatch.setattr("hesse.calls.weights._alone", lambda *arguments: True)


def trusting(monkeypatch):
    """Every Hessian is taken to be symmetric."""
    monkeypatch.setattr("hesse.look.evaluation._custom_functions", lambda value: set())


def normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


PLANTED = {
    # what is assumed wrongly, of which function, and the questions for which that matters
    "batch norm in training": (deaf, normed, squares, QUESTIONS),
    "a contrastive loss": (deaf, mlp, contrastive, QUESTIONS),
    "a penalty on the weight": (alone, Penalised, squares, QUESTIONS),
    "a view of the weight": (alone, Shared, squares, QUESTIONS),
    "a backward by hand": (trusting, BentNet, squares, [BLOCKS, HESSIAN]),
}


@pytest.mark.parametrize(
    ("planted", "question"),
    [(name, question) for name, (*_, questions) in PLANTED.items() for question in questions],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_wrong_assumption_is_caught_by_the_certificate(planted, question, monkeypatch, taps_everywhere):
    """With the looking switched off, the check alone must notice; with it on there is nothing to notice."""
    look_away, model, loss, _ = PLANTED[planted]
    problem = Problem(model(), loss, x(4, 3))
    assert_exact(question, ask(question, problem), problem)

    look_away(monkeypatch)
    with pytest.warns(errors.CertificateWarning) as caught:
        result = ask(question, problem)
    assert "by taps deviates from plain autograd" in str(caught[0].message)
    assert_exact(question, result, problem)
    assert result.plan.method == "dense"
    unchecked = ask(question, problem, check=False)
    assert unchecked.plan.method == "taps"
    assert question.error(unchecked.value, problem.matrix(), problem.tensors) > 1e-6


@pytest.mark.parametrize(
    ("question", "products"),
    [(DIAGONAL, "tapped"), (BLOCKS, "tapped"), (HESSIAN, "tapped"), (HESSIAN, "moved")],
    ids=lambda value: getattr(value, "name", value),
)
def test_wrong_batches_are_noticed(question, products, monkeypatch, taps_everywhere):
    right = getattr(Gradient, products)

    def wrong(self, layers, vectors, others):
        found = right(self, layers, vectors, others)
        return [1.001 * part for part in found] if torch._C._functorch.is_batchedtensor(vectors[0]) else found

    monkeypatch.setattr(Gradient, products, wrong)
    problem = Problem(mlp(), squares, x(5, 3))
    with pytest.warns(errors.CertificateWarning, match="by taps deviates"):
        result = ask(question, problem)
    assert_exact(question, result, problem)


@pytest.mark.xfail(
    strict=True, reason="samples of one half may touch each other unseen, in a batch this small"
)
def test_samples_that_touch_in_pairs(taps_everywhere):
    pairs = lambda output: squares(output[0::2] * output[1::2])
    problem = Problem(mlp(), pairs, x(4, 3))
    assert_exact(DIAGONAL, ask(DIAGONAL, problem), problem)
