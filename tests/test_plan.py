"""A plan says what will happen, without doing it; given back, it happens so."""

import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse
from cases import CASES, x
from hesse import errors
from hesse.look.gradient import Gradient
from networks import NETWORKS, BentNet, Problem, mlp, squares
from oracle import hessian_matrix
from questions import DIAGONAL, QUESTIONS

every_question = pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)


def of_network(network):
    problem = network()
    return problem.closure, problem.tensors


@pytest.fixture(
    params=[*CASES, *NETWORKS], ids=[*(case.name for case in CASES), *(f"net: {n.name}" for n in NETWORKS)]
)
def case(request):
    return request.param() if request.param in CASES else of_network(request.param)


def small(loss=squares, samples=5):
    return Problem(mlp(), loss, x(samples, 3))


def planned(question, problem, **options):
    return hesse.plan(question, problem.closure, problem.tensors, **options)


def compared(plan):
    """All that depends neither on the clock nor on what a question calls its argument."""
    plain = dataclasses.asdict(plan)
    del plain["learned"]  # the plan of a result has sizes of chunks too
    for part in (plain, *plain["estimates"]):
        del part["seconds"]
    for share in plain["shares"]:
        del share["name"]
    return plain


class Told(list):
    """What the progress was, step by step."""

    def __call__(self, done, total):
        self.append((done, total))


@pytest.mark.parametrize("method", ["dense", "taps"])
def test_what_is_planned_happens(case, method):
    func, inputs = case
    for question in QUESTIONS:
        ahead = hesse.plan(question.name, func, inputs, method=method)
        told = Told()
        result = question.ask(func, inputs, method=ahead, full_output=True, progress=told)
        plan = result.plan
        assert result.passes == plan.passes + plan.check_passes
        assert told[-1:] == ([(plan.passes, plan.passes)] if plan.passes else [])
        assert result.certificate.probes == plan.check_passes
        for one, other in zip(plan.shares, ahead.shares, strict=True):
            assert one.method == other.method
            assert one.why == other.why or plan.method == "dense"
        assert (plan.method, plan.passes, plan.check_passes) == (
            ahead.method,
            ahead.passes,
            ahead.check_passes,
        )


@every_question
def test_the_plan_of_a_question_is_the_one_in_its_result(question, taps_everywhere):
    problem = small()
    ahead = planned(question.name, problem, method="taps", memory="1GiB")
    result = question.ask(problem.closure, problem.tensors, method="taps", memory="1GiB", full_output=True)
    assert compared(ahead) == compared(result.plan)


NAMES = {
    hesse.hessian: "hessian",
    hesse.hessian_blocks: "blocks",
    hesse.hessian_diagonal: "diagonal",
    hesse.model_hessian_diagonal: "diagonal",
    hesse.hessian_trace: "diagonal",
    "trace": "diagonal",
    "hessian_trace": "diagonal",
    "hessian_blocks": "blocks",
}


@pytest.mark.parametrize(
    ("asked", "known"), NAMES.items(), ids=lambda value: getattr(value, "__name__", value)
)
def test_every_name_of_a_question(asked, known):
    assert planned(asked, small()).question == known


@pytest.mark.parametrize("asked", ["gradient", hesse.approximate_diagonal, None, 3])
def test_no_plan_for(asked):
    with pytest.raises(errors.ArgumentError, match="question must be one of"):
        planned(asked, small())


@pytest.mark.parametrize(
    "call",
    [planned, lambda question, problem, **options: DIAGONAL.ask(problem.closure, problem.tensors, **options)],
    ids=["plan", "question"],
)
def test_unknown_method(call):
    with pytest.raises(errors.ArgumentError, match=r"method must be .*a Plan or one of .*, met 'fast'"):
        call("diagonal", small(), method="fast")


@every_question
@pytest.mark.parametrize("method", ["auto", "dense", "taps"])
def test_nothing_is_differentiated_twice(question, method, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("a second derivative, while planning")

    problem = small()
    for product in ("product", "tapped", "moved"):
        monkeypatch.setattr(Gradient, product, forbidden)
    took, grad = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda outputs, *a, **k: took.append(outputs) or grad(outputs, *a, **k)
    )
    planned(question.name, problem, method=method)
    assert took
    assert all(
        isinstance(output, torch.Tensor) and output.dim() == 0 for output in took
    )  # of the value alone


def test_the_world_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(2, 1).requires_grad_(False))
    model.double()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    data = x(5, 3)
    random_after_data = torch.get_rng_state()
    hesse.plan(
        "diagonal",
        lambda: squares(model[1](model[0](data))) + 0 * torch.rand(()),
        list(model[:2].parameters()),
    )
    assert torch.equal(torch.get_rng_state(), random_after_data)
    assert not torch.equal(random, random_after_data)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3, dtype=torch.float64))
    assert model[0].bias.grad is None
    assert not torch.overrides._len_torch_function_stack()


@every_question
@pytest.mark.parametrize("method", ["dense", "taps"])
def test_given_back_for_other_values(question, method, taps_everywhere):
    plan = planned(question.name, small(), method=method)
    other = small(samples=7)
    result = question.ask(other.closure, other.tensors, method=plan, full_output=True)
    assert question.error(result.value, other.matrix(), other.tensors) < 1e-9
    assert result.plan.method == method
    assert [s.method for s in result.plan.shares] == [s.method for s in plan.shares]


def test_given_back_for_a_trace():
    problem = small()
    plan = planned("trace", problem, method="taps")
    trace = hesse.hessian_trace(problem.closure, problem.tensors, method=plan)
    torch.testing.assert_close(trace, problem.matrix().trace())


def test_refused_for_another_question():
    problem = small()
    with pytest.raises(errors.ArgumentError, match="plan for the diagonal, met the blocks"):
        hesse.hessian_blocks(problem.closure, problem.tensors, method=planned("diagonal", problem))


@pytest.mark.parametrize(
    "inputs",
    [(x(2, 4), x(3)), (x(3, 2), x(3)), (x(2, 3),), (x(2, 3).float(), x(3).float())],
    ids=["other shape", "transposed", "fewer", "other dtype"],
)
@pytest.mark.parametrize("method", ["dense", "taps"])
def test_refused_for_other_tensors(inputs, method):
    func = lambda *tensors: sum(t.pow(3).sum() for t in tensors)
    plan = hesse.plan("diagonal", func, (x(2, 3), x(3)), method=method)
    with pytest.raises(errors.ArgumentError, match="other shapes or dtypes"):
        hesse.hessian_diagonal(func, inputs, method=plan)


def test_planned_anew_where_a_planned_tensor_is_no_layers_weight_any_more(taps_everywhere):
    data, weight = x(5, 3), x(2, 3)
    plan = hesse.plan("diagonal", lambda w: squares(F.linear(data, w)), (weight,), method="taps")
    assert plan.by("taps") == {0}
    for func in (
        lambda w: squares(F.linear(data, w)) + w.pow(4).sum(),  # used elsewhere too
        lambda w: w.pow(4).sum(),  # no layer
    ):
        result = hesse.hessian_diagonal(func, (weight,), method=plan, full_output=True)
        assert result.plan.method == "dense"
        assert "looked at again" in result.plan.reason
        torch.testing.assert_close(result.value[0].flatten(), hessian_matrix(func, [weight]).diagonal())


@every_question
def test_plain_data(question, taps_everywhere):
    problem = small()
    plan = planned(question.name, problem, method="taps")
    plain = dataclasses.asdict(plan)
    assert plain["method"] == "taps"
    assert [share["shape"] for share in plain["shares"]] == [t.shape for t in problem.tensors]
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert str(again) == str(plan)
    assert hash(again) == hash(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.passes = 0
    assert dataclasses.replace(plan, passes=0) != plan


@every_question
def test_printed(question, taps_everywhere):
    plan = planned(question.name, small(), method="taps")
    text = str(plan)
    first, blank, header, *rest = text.split("\n")
    assert first.startswith(f"{question.name} of 31 coordinates in 4 tensors; the answer takes ")
    assert blank == ""
    assert header.split() == ["method", "passes", "FLOPs", "peak", "memory", "seconds"]
    assert any(line.startswith("* taps ") and f" {plan.passes} " in line for line in rest)
    assert any(line.startswith("  dense ") and " 31 " in line for line in rest)
    assert "taps: 2 layers with 31 coordinates take one product per output and position" in text
    name = "params" if question.name == "diagonal" else "inputs"
    assert f"  {name}[0]  [4, 3]  taps   weight of linear: 4 columns instead of 12" in rest
    assert f"  {name}[1]  [4]     taps   bias of linear: 4 columns instead of 4" in rest
    assert all(line == line.rstrip() for line in text.split("\n"))


@every_question
@pytest.mark.parametrize("memory", ["1MB", "64MB"])
def test_within_the_budget(question, memory):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    problem = Problem(model, squares, x(64, 8))
    plan = planned(question.name, problem, memory=memory, method="dense")
    budget = {"1MB": 1_000_000, "64MB": 64_000_000}[memory]
    assert (
        plan.answer_bytes
        == {"diagonal": 212, "blocks": 128**2 + 16**2 + 64**2 + 4**2, "hessian": 212**2}[question.name] * 8
    )
    assert plan.answer_bytes < plan.peak_bytes <= budget


@every_question
@pytest.mark.parametrize("method", ["dense", "taps"])
def test_the_method_is_honoured(question, method, taps_everywhere):
    plan = planned(question.name, small(), method=method)
    assert plan.method == method
    assert plan.by(method) == {0, 1, 2, 3}
    estimates = {estimate.method: estimate for estimate in plan.estimates}
    assert estimates["dense"].passes == 31
    assert (estimates["taps"].why_not is None) == (method == "taps")
    chosen = estimates[method]
    assert (chosen.passes, chosen.flops, chosen.peak_bytes) == (plan.passes, plan.flops, plan.peak_bytes)
    assert plan.seconds == chosen.seconds > 0


def test_auto_takes_what_is_predicted_to_be_fastest():
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    plan = planned("diagonal", Problem(model, squares, x(16, 32)))
    possible = [estimate for estimate in plan.estimates if estimate.why_not is None]
    assert plan.method == min(possible, key=lambda estimate: estimate.seconds).method != "dense"


def test_the_check_is_counted_where_it_is_asked_for():
    problem = small()
    with_check, without = (
        planned("diagonal", problem, check=check, method="dense") for check in (True, False)
    )
    assert (with_check.check_passes, without.check_passes) == (4, 0)
    assert with_check.passes == without.passes == 31


def why(name, question="diagonal"):
    """The reasons for every tensor of a network, by its name."""
    (network,) = (network for network in NETWORKS if network.name == name)
    problem = network()
    plan = planned(question, problem, method="taps")
    return plan, {n: share.why for n, share in zip(problem.names, plan.shares, strict=True)}


def test_reasons_of_tensors(taps_everywhere):
    _, reasons = why("a penalty")
    assert reasons["layer.weight"] == "used elsewhere too"
    _, reasons = why("skips, norm, product of layers")
    assert reasons["scale"] == "no weight of a layer"
    _, reasons = why("a layer twice", "hessian")
    assert reasons["layer.weight"] == "weight of linear used 2 times: 6 columns instead of 9"
    plan, reasons = why("gradient penalty")
    assert reasons["net.0.weight"] == "the function takes gradients itself"
    assert plan.method == "dense"
    plan, reasons = why("frozen")
    assert reasons["2.bias"] == "the function is linear in it, or does not depend on it"
    assert plan.by("zero") == {0, 3}


def test_reasons_of_methods(taps_everywhere):
    dense = planned("diagonal", small(), method="dense")
    assert dense.reason == "one product per coordinate, right for any function (as asked)"
    problem = small()
    assert {share.why for share in dense.shares} == {"as asked"}
    graphed = DIAGONAL.ask(problem.closure, problem.tensors, create_graph=True, full_output=True).plan
    assert "create_graph=True keeps every step on one graph" in graphed.reason
    bent = planned("hessian", Problem(BentNet(), squares, x(4, 3)), method="taps")
    assert bent.method == "dense"
    assert "need not be symmetric: a custom Function" in bent.reason
    no_layer = hesse.plan("diagonal", lambda p: p.pow(3).sum(), x(4), method="taps")
    assert "there is no layer whose weight is used by layers alone" in no_layer.reason


def test_reason_where_nothing_pays(monkeypatch):
    monkeypatch.setattr("hesse.methods.taps.option._paying", lambda *arguments: [])
    plan = planned("diagonal", small(), method="taps")
    assert plan.method == "dense"
    assert "one product per coordinate is as fast for every layer" in plan.reason


def test_a_function_that_is_random_has_no_plan():
    with pytest.raises(errors.NotDeterministicError):
        hesse.plan("diagonal", lambda p: (p * torch.rand(4)).pow(3).sum(), torch.ones(4))
