"""A loss over data: what batches may be, what every question makes of them, and what is refused."""

import collections
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hesse
from cases import classes, x
from hesse import GaussNewtonOperator, HessianOperator, Loss, errors
from losses import SETTINGS, Setting
from networks import Paired, mlp
from oracle import hessian_matrix, relative_error

TOLERANCE = 1e-10


def setting(sizes=(2, 2, 1), reduction="mean"):
    torch.manual_seed(0)
    loss_fn = nn.MSELoss(reduction=reduction)
    return Setting(mlp(), loss_fn, x(sum(sizes), 3), x(sum(sizes), 3), sizes, reduction)


# What a batch may be: each gives a model, a loss and the batches, of two linear layers' sum.
class Two(nn.Module):
    """Two inputs, and with labels its loss; `wrapped`: in what."""

    def __init__(self, wrapped=lambda loss, out: out):
        super().__init__()
        self.one, self.two, self.wrapped = nn.Linear(3, 2), nn.Linear(2, 2), wrapped

    def forward(self, a, b, labels=None):
        out = torch.tanh(self.one(a)) * self.two(b)
        return out if labels is None else self.wrapped(F.mse_loss(out, labels), out)


class Encoding(collections.UserDict):
    """Like what the tokenisers of transformers give."""

    def to(self, device):
        return Encoding({key: part.to(device) for key, part in self.items()})


class Graphs:
    """Like a batch of graphs: nodes, and which graph they are of."""

    def __init__(self, nodes, more, of, labels):
        self.nodes, self.more, self.of, self.labels = nodes, more, of, labels
        self.num_graphs = len(labels)

    def to(self, device):
        return self

    def to_dict(self):
        return {"nodes": self.nodes, "more": self.more, "of": self.of, "labels": self.labels}


class OfGraphs(Two):
    def forward(self, graphs):
        nodes = super().forward(graphs.nodes, graphs.more)
        return torch.zeros(graphs.num_graphs, 2).to(nodes).index_add(0, graphs.of, nodes)


A, B, Y = x(5, 3), x(5, 2), x(5, 2)
PARTS = [slice(2), slice(2, 4), slice(4, 5)]
Dotted = collections.namedtuple("Dotted", ["a", "b"])
FORMS = {
    "tuple of inputs": (Two, F.mse_loss, lambda s: ((A[s], B[s]), Y[s])),
    "list of inputs": (Two, F.mse_loss, lambda s: [[A[s], B[s]], Y[s]]),
    "named tuple of inputs": (Two, F.mse_loss, lambda s: (Dotted(A[s], B[s]), Y[s])),
    "dict of inputs": (Two, F.mse_loss, lambda s: ({"b": B[s], "a": A[s]}, Y[s])),
    "like a dict of inputs": (Two, F.mse_loss, lambda s: (Encoding(a=A[s], b=B[s]), Y[s])),
    "dict": (lambda: Two(lambda loss, out: loss), None, lambda s: {"a": A[s], "b": B[s], "labels": Y[s]}),
    "dict, output.loss": (
        lambda: Two(lambda loss, out: SimpleNamespace(loss=loss, logits=out)),
        None,
        lambda s: {"a": A[s], "b": B[s], "labels": Y[s]},
    ),
    'like a dict, output["loss"]': (
        lambda: Two(lambda loss, out: {"loss": loss, "logits": out}),
        None,
        lambda s: Encoding(a=A[s], b=B[s], labels=Y[s]),
    ),
    "dict, loss of output and batch": (
        lambda: Two(lambda loss, out: out),
        lambda out, batch: F.mse_loss(out, batch["labels"]),
        lambda s: {"a": A[s], "b": B[s], "labels": Y[s]},
    ),
    "forward": (
        Two,
        lambda out, batch: F.mse_loss(out, batch[2]),
        lambda s: (A[s], B[s], Y[s]),
        {"forward": lambda model, batch: model(*batch[:2])},
    ),
    "an object": (
        OfGraphs,
        lambda out, graphs: F.mse_loss(out, graphs.labels),
        lambda s: Graphs(A[s], B[s], torch.arange(len(A[s])), Y[s]),
    ),
    "samples": (
        Two,
        lambda out, batch: F.mse_loss(out, batch.labels),
        lambda s: SimpleNamespace(a=A[s], b=B[s], labels=Y[s]),
        {"forward": lambda model, batch: model(batch.a, batch.b), "samples": lambda batch: len(batch.labels)},
    ),
}


@pytest.mark.parametrize("several", [True, False], ids=["batches", "one batch"])
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_batches(name, several):
    build, loss_fn, batch, *options = FORMS[name]
    torch.manual_seed(0)
    model = build().double()
    data = [batch(s) for s in PARTS] if several else [batch(slice(None))]
    loss = Loss(model, loss_fn, data, **(options[0] if options else {}))
    named = dict(model.named_parameters())

    plain = Two().double()

    def whole(*tensors):
        given = dict(zip(named, tensors, strict=True))
        return F.mse_loss(torch.func.functional_call(plain, given, (A, B)), Y)

    exact = hessian_matrix(whole, list(named.values()))
    assert loss.samples == 5
    assert len(loss) == len(data)
    assert relative_error(hesse.hessian(loss, flat=True), exact) < TOLERANCE
    diagonal = hesse.hessian_diagonal(loss)
    assert list(diagonal) == list(named)
    assert relative_error(torch.cat([d.flatten() for d in diagonal.values()]), exact.diagonal()) < TOLERANCE
    v = x(len(exact))
    assert relative_error(HessianOperator(loss) @ v, exact @ v) < TOLERANCE
    if loss_fn is not None:
        assert (GaussNewtonOperator(loss) @ v).isfinite().all()


@pytest.mark.parametrize(
    ("data", "count"),
    [
        ((A, Y), 1),
        ([A, Y], 1),
        ([(A, Y)], 1),
        ([(A[:2], Y[:2]), (A[2:], Y[2:])], 2),
        (((A[:2], Y[:2]), (A[2:], Y[2:])), 2),
        ([[A[:2], Y[:2]], [A[2:], Y[2:]]], 2),
        (DataLoader(TensorDataset(A, Y), batch_size=2), 3),
        (DataLoader(TensorDataset(A, Y), batch_size=2, shuffle=True), 3),
    ],
)
def test_one_batch_or_several(data, count):
    model = nn.Linear(3, 2).double()
    loss = Loss(model, F.mse_loss, data)
    diagonal = hesse.hessian_diagonal(loss)
    assert relative_error(diagonal["weight"], A.square().mean(0).expand(2, 3)) < TOLERANCE
    assert loss.value().item() == pytest.approx(F.mse_loss(model(A), Y).item())
    assert len(loss) == count


PARAMS = {
    "all": (lambda m: None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
    "a name": (lambda m: "2.weight", ["2.weight"]),
    "names, in the model's order": (lambda m: ["2.bias", "0.weight"], ["0.weight", "2.bias"]),
    "a pattern": (lambda m: "*.bias", ["0.bias", "2.bias"]),
    "a module": (lambda m: m[2], ["2.weight", "2.bias"]),
    "modules": (lambda m: [m[2], m[0]], ["0.weight", "0.bias", "2.weight", "2.bias"]),
    "a parameter": (lambda m: m[0].bias, ["0.bias"]),
    "parameters": (lambda m: m[2].parameters(), ["2.weight", "2.bias"]),
    "a mixture": (lambda m: ("0.b*", m[2], m[2].bias), ["0.bias", "2.weight", "2.bias"]),
}


@pytest.mark.parametrize("name", PARAMS)
def test_params(name):
    select, names = PARAMS[name]
    s = setting()
    loss = s.loss(params=select(s.model))
    blocks = hesse.hessian(loss)
    assert list(blocks) == names
    numbers = torch.arange(len(s.hessian)).split(s.numbers)
    chosen = torch.cat([numbers[s.names.index(name)] for name in names])
    found = hesse.hessian(loss, flat=True)
    assert relative_error(found, s.hessian[chosen][:, chosen]) < TOLERANCE


# Values, and every question.
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradient(reduction):
    s = setting((4, 1), reduction)
    loss = s.loss()
    expected = s.whole(*s.tensors)
    slopes = torch.autograd.grad(expected, s.tensors)
    assert loss.value().item() == pytest.approx(expected.item(), rel=1e-12)
    value, gradient = loss.value_and_gradient()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for found in (gradient, loss.gradient()):
        assert relative_error(s.flat(found), torch.cat([g.flatten() for g in slopes])) < TOLERANCE


def every_answer(s, loss):
    """What every question gives, beside the matrix it is of."""
    H, names, first = s.hessian, s.names, s.numbers[0]
    v, V = (
        torch.linspace(-1, 1, len(H), dtype=torch.float64),
        torch.eye(len(H), dtype=torch.float64)[:2] + 0.5,
    )
    one, many = s.packed(v), s.packed(V)
    matrix = hesse.hessian(loss)
    yield torch.cat([torch.cat([b.reshape(m, n) for b, n in zip(row.values(), s.numbers, strict=True)], 1)
                     for row, m in zip(matrix.values(), s.numbers, strict=True)]), H  # fmt: skip
    yield hesse.hessian(loss, flat=True), H
    yield hesse.hessian(loss, flat=True, rows=[0, 3]), H[[0, 3]]
    yield hesse.hessian(loss, flat=True, rows=slice(2), columns=slice(1, 4)), H[:2, 1:4]
    some = hesse.hessian(loss, rows={names[1]: [0]}, square=True)
    yield some[names[1]][names[1]], H[first : first + 1, first : first + 1]
    yield hesse.hessian_blocks(loss)[names[0]].reshape(first, first), H[:first, :first]
    yield s.flat(hesse.hessian_diagonal(loss)), H.diagonal()
    yield s.flat(hesse.hessian_diagonal(loss, v=one)), v * H.diagonal()
    yield hesse.hessian_diagonal(loss, flat=True), H.diagonal()
    yield hesse.hessian_trace(loss), H.trace()
    yield s.flat(hesse.hvp(loss, one)), H @ v
    yield s.flat(hesse.hvp(loss, v=one)), H @ v
    yield s.flat(hesse.hvp(loss, many)), V @ H
    yield hesse.hvp(loss, v, flat=True), H @ v
    yield hesse.hvp(loss, V, flat=True), V @ H
    yield hesse.second_directional_derivative(loss, one), v @ H @ v
    yield hesse.second_directional_derivative(loss, v=one), v @ H @ v


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_question(reduction):
    s = setting((3, 3, 1), reduction)
    loss = s.loss()
    for number, (found, expected) in enumerate(every_answer(s, loss)):
        assert found.shape == expected.shape, number
        assert relative_error(found, expected) < TOLERANCE, number


@pytest.mark.parametrize("method", ["sweep", "taps", "dense"])
def test_every_method(method):
    s = setting((3, 3, 1))
    loss = s.loss()
    found = hesse.hessian_diagonal(loss, method=method, full_output=True)
    assert found.plan.method == method
    assert relative_error(s.flat(found.value), s.hessian.diagonal()) < TOLERANCE


@pytest.mark.parametrize("kind", ["hesscale", "becker-lecun"])
def test_the_approximate_diagonal(kind):
    """Exact for a linear layer before squares."""
    s = Setting(nn.Linear(3, 2), F.mse_loss, x(5, 3), x(5, 2), (3, 2))
    found = hesse.approximate_diagonal(s.loss(), kind=kind)
    assert relative_error(s.flat(found), s.hessian.diagonal()) < TOLERANCE


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 99), st.sampled_from(["mean", "sum"])
)
def test_any_split_and_order(sizes, seed, reduction):
    """The same samples give the same answer, however they lie in batches."""
    s = setting((sum(sizes),), reduction)
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    data = list(zip(s.inputs[order].split(sizes), s.targets[order].split(sizes), strict=True))
    loss = Loss(s.model, s.loss_fn, data, reduction=reduction)
    assert relative_error(loss.value(), s.whole(*s.tensors).detach()) < TOLERANCE
    assert relative_error(s.flat(hesse.hessian_diagonal(loss)), s.hessian.diagonal()) < TOLERANCE
    v = x(len(s.hessian), 2)
    assert relative_error(HessianOperator(loss) @ v, s.hessian @ v) < TOLERANCE
    assert relative_error(GaussNewtonOperator(loss) @ v, s.gauss_newton @ v) < TOLERANCE
    assert relative_error(GaussNewtonOperator(loss).trace(), s.gauss_newton.trace()) < TOLERANCE


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.sampled_from(["mean", "sum"]))
def test_any_split_for_every_question(sizes, reduction):
    s = setting(sizes, reduction)
    for number, (found, expected) in enumerate(every_answer(s, s.loss())):
        assert relative_error(found, expected) < TOLERANCE, number


def test_a_mean_over_tokens():
    """Weighted by their number, which differs from batch to batch."""
    torch.manual_seed(0)
    model, data = nn.Linear(3, 4).double(), x(4, 5, 3)
    targets = classes(4, 20).view(4, 5)
    targets[0, 1:] = targets[3, 3:] = -100
    loss_fn = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())
    batches = list(zip(data.split(2), targets.split(2), strict=True))
    loss = Loss(model, loss_fn, batches, samples=lambda batch: int((batch[1] != -100).sum()))
    assert loss.samples == 14
    whole = Setting(model, loss_fn, data, targets, (4,))
    assert relative_error(hesse.hessian(loss, flat=True), whole.hessian) < TOLERANCE
    with pytest.warns(errors.DataWarning, match=r"no mean over samples.*for a mean over tokens.*samples="):
        Loss(model, loss_fn, batches).value()


# Options.
def test_full_output():
    s = setting((40, 40, 20))
    result = hesse.hessian_diagonal(s.loss(), full_output=True)
    assert result.names == tuple(s.names)
    assert list(result.shapes) == s.shapes
    assert (result.plan.question, result.plan.method) == ("diagonal", "sweep")
    assert result.certificate.passed
    single = hesse.hessian_diagonal(setting((40,)).loss(), full_output=True)
    assert result.certificate.probes == 3 * single.certificate.probes
    assert result.passes == 3 * single.passes
    dense = hesse.hessian_diagonal(s.loss(), method="dense", full_output=True)
    assert dense.passes == 3 * (dense.plan.passes + dense.plan.check_passes)


@pytest.mark.parametrize("question", ["hessian", "hessian_blocks", "hessian_diagonal"])
def test_a_plan_given_back(question):
    s = setting((40, 40, 20))
    loss, ask = s.loss(), getattr(hesse, question)
    plan = hesse.plan(question, loss)
    assert plan.reason.endswith("of the first of 3 batches")
    expected = ask(loss)
    for check in (True, "first", False):
        result = ask(loss, method=plan, check=check, full_output=True)
        assert (result.plan.method, result.plan.passes) == (plan.method, plan.passes)
        assert "looked at again" not in result.plan.reason
        assert (result.certificate is None) == (check is False)
        for one, other in zip(
            *(torch.utils._pytree.tree_leaves(r) for r in (result.value, expected)), strict=True
        ):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_a_plan_for_products():
    s = setting()
    loss, v = s.loss(), s.packed(x(31))
    plan = hesse.plan("hvp", loss)
    assert (plan.question, plan.passes) == ("product", 1)
    found = hesse.hvp(loss, v, method=plan)
    assert relative_error(s.flat(found), s.hessian @ s.flat(v)) < TOLERANCE


def test_one_look_serves_batches_of_one_shape(monkeypatch):
    """The others are evaluated once each, and are not explored."""
    s, plain = setting((8,) * 5), []
    evaluate = Loss._output
    monkeypatch.setattr(Loss, "_output", lambda *args: plain.append(1) or evaluate(*args))
    loss = s.loss()
    hesse.hessian_diagonal(loss, method="sweep")
    several = len(plain)
    plain.clear()
    hesse.hessian_diagonal(setting((8,)).loss(), method="sweep")
    alone = len(plain)
    assert several <= alone + 4 + 3  # three more for the check of the reduction


def test_a_batch_of_another_shape_gets_its_own_plan(monkeypatch):
    met = []
    answered = hesse.answer._answered
    monkeypatch.setattr("hesse.answer._answered", lambda *args: met.append(args[2].method) or answered(*args))
    hesse.hessian_diagonal(setting((8, 3, 8, 3)).loss())
    assert met[:2] == ["auto", "auto"]
    assert all(isinstance(method, hesse.Plan) for method in met[2:])


@pytest.mark.parametrize("question", [hesse.hessian, hesse.hessian_diagonal])
def test_checked_by_differences(question):
    s = setting((3, 2))
    result = question(s.loss(), check="differences", full_output=True)
    assert result.certificate.passed
    assert result.certificate.route == "differences"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_create_graph(reduction):
    """A third derivative through the sum."""
    s = setting((3, 2), reduction)
    trace = hesse.hessian_trace(s.loss(), create_graph=True)
    found = torch.autograd.grad(trace, s.tensors)
    assert relative_error(torch.cat([g.flatten() for g in found]), slope_of_the_trace(s)) < 1e-9
    v = x(31)
    along = hesse.second_directional_derivative(s.loss(), s.packed(v), create_graph=True)
    assert along.requires_grad
    many = hesse.hvp(s.loss(), torch.eye(31, dtype=torch.float64), create_graph=True, flat=True)
    found = torch.autograd.grad(many.trace(), s.tensors)
    assert relative_error(torch.cat([g.flatten() for g in found]), slope_of_the_trace(s)) < 1e-9


def slope_of_the_trace(s):
    leaves = [t.detach().clone().requires_grad_() for t in s.tensors]
    gradient = torch.autograd.grad(s.whole(*leaves), leaves, create_graph=True)
    trace = sum(
        torch.autograd.grad(part.flatten()[i], leaf, create_graph=True)[0].flatten()[i]
        for part, leaf in zip(gradient, leaves, strict=True)
        for i in range(leaf.numel())
    )
    return torch.cat([g.flatten() for g in torch.autograd.grad(trace, leaves)])


def test_strict():
    s = SETTINGS[8]()  # a layer unheard
    hesse.hessian_diagonal(s.loss())
    with pytest.raises(errors.IndependentError, match=r"unheard\.weight"):
        hesse.hessian_diagonal(s.loss(), strict=True)
    with pytest.raises(errors.IndependentError, match=r"unheard\.weight"):
        hesse.hvp(s.loss(), s.packed(torch.ones(sum(s.numbers), dtype=torch.float64)), strict=True)
    s = setting()
    assert (
        relative_error(s.flat(hesse.hessian_diagonal(s.loss(), strict=True)), s.hessian.diagonal())
        < TOLERANCE
    )


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, s, told: hesse.hessian_diagonal(loss, progress=told),
        lambda loss, s, told: hesse.hessian(loss, progress=told),
        lambda loss, s, told: hesse.hvp(loss, s.packed(x(31)), progress=told),
        lambda loss, s, told: hesse.hvp(loss, s.packed(x(4, 31)), progress=told),
        lambda loss, s, told: HessianOperator(loss, progress=told) @ x(31, 4),
    ],
)
def test_progress_is_told_for_every_batch(ask):
    s, told = setting((3, 3, 1)), []
    ask(s.loss(), s, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_what_progress_raises_comes_through():
    s = setting((3, 3, 1))

    def stop(done, total):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        hesse.hessian_diagonal(s.loss(), progress=stop)


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, s: hesse.hessian(loss, memory="1KiB"),
        lambda loss, s: hesse.hessian_diagonal(loss, memory="100"),
        lambda loss, s: hesse.hvp(loss, s.packed(x(9, 31)), memory="1KiB"),
        lambda loss, s: HessianOperator(loss, memory="1KiB") @ x(31, 9),
        lambda loss, s: HessianOperator(loss, memory="1KiB").to_dense(),
    ],
)
def test_a_budget_that_does_not_hold_the_answer(ask):
    s = setting()
    with pytest.raises(errors.BudgetError, match="the memory budget is"):
        ask(s.loss(), s)


def test_sums_are_in_float32_at_least():
    """In bfloat16 what comes after the first batch would be lost."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    big, small = (torch.full((1, 1), number, dtype=torch.bfloat16) for number in (32.0, 1.0))
    loss = Loss(model, nn.MSELoss(reduction="sum"), [(big, big), *[(small, small)] * 24], reduction="sum")
    with pytest.warns(errors.PrecisionWarning):
        found = HessianOperator(loss) @ torch.ones(1, dtype=torch.bfloat16)
    assert (found.dtype, found.item()) == (torch.bfloat16, 2096)
    with pytest.warns(errors.PrecisionWarning):
        assert hesse.hessian_diagonal(loss)["weight"].item() == 2096


# The caller's world.
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, inputs):
        return self.norm(self.layer(inputs)).tanh()


def state_of(model):
    return (
        {name: (id(t), t.clone(), t.requires_grad, t.grad) for name, t in model.named_parameters()},
        {name: (id(t), t.clone()) for name, t in model.named_buffers()},
        [module.training for module in model.modules()],
        torch.get_rng_state(),
    )


def same(one, other):
    flat = [torch.utils._pytree.tree_leaves(state) for state in (one, other)]
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*flat, strict=True)
    )


ASKS = [
    lambda loss: hesse.hessian(loss),
    lambda loss: hesse.hessian_diagonal(loss),
    lambda loss: hesse.hvp(loss, {name: torch.ones_like(p) for name, p in loss.params.items()}),
    lambda loss: loss.value_and_gradient(),
    lambda loss: loss.value(),
    lambda loss: hesse.plan("diagonal", loss),
    lambda loss: GaussNewtonOperator(loss).diagonal(),
    lambda loss: GaussNewtonOperator(loss) @ torch.ones(24, 2, dtype=torch.float64),
]


@pytest.mark.parametrize("ask", [*ASKS, hesse.approximate_diagonal, lambda loss: hesse.plan("hvp", loss)])
def test_shuffling_draws_from_no_stream_of_the_callers(ask):
    s = setting()
    data = DataLoader(TensorDataset(s.inputs, s.targets), batch_size=2, shuffle=True)
    model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.Tanh(), nn.Linear(6, 1, bias=False)).double()
    loss_fn = lambda z, y: F.mse_loss(z.expand_as(y), y)
    state = torch.get_rng_state()
    ask(Loss(model, loss_fn, data))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("number", range(len(ASKS)))
@pytest.mark.parametrize("training", [True, False])
def test_state_is_left_as_it_was(number, training):
    model = Norm().double().train(training)
    model.layer.weight.grad = torch.ones_like(model.layer.weight)
    before = state_of(model)
    data = [(x(6, 3), x(6, 4))] if training else [(x(6, 3), x(6, 4)), (x(3, 3), x(3, 4))]
    torch.set_rng_state(before[-1])
    ASKS[number](Loss(model, F.mse_loss, data))
    assert same(before, state_of(model))


@pytest.mark.parametrize("number", range(len(ASKS)))
def test_state_is_left_as_it_was_after_an_error(number):
    model = Norm().double()
    data = [(x(6, 3), x(6, 4))]
    calls = []

    def fails(output, targets):
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("half-way")
        return F.mse_loss(output, targets)

    before = state_of(model)
    loss = Loss(model, fails, data)
    calls.append(1)  # fails at once
    with pytest.raises(KeyError, match="half-way"):
        ASKS[number](loss)
    assert same(before, state_of(model))


def test_batch_norm_in_training_of_one_batch():
    torch.manual_seed(0)
    s = Setting(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh()),
        F.mse_loss,
        x(6, 3),
        x(6, 4),
        (6,),
    )
    assert relative_error(hesse.hessian(s.loss(), flat=True), s.hessian) < 1e-9


# Bad input.
def test_data_that_can_be_gone_through_once():
    for data in (iter([(A, Y)]), ((a, y) for a, y in [(A, Y)]), zip([A], [Y], strict=True)):
        with pytest.raises(
            errors.ArgumentError, match=r"data is a \w+, which can be gone through only once; pass a list"
        ):
            Loss(nn.Linear(3, 2), F.mse_loss, data)


@pytest.mark.parametrize("data", [[], (), DataLoader(TensorDataset(A[:0], Y[:0]))])
def test_no_data(data):
    with pytest.raises(errors.ArgumentError, match="data is empty; pass at least one batch"):
        hesse.hessian_diagonal(Loss(nn.Linear(3, 2).double(), F.mse_loss, data))


def test_an_empty_batch():
    for data in ([(A, Y), (A[:0], Y[:0])], (A[:0], Y[:0])):
        with pytest.raises(
            errors.ArgumentError, match=r"batch \d of data has no samples; leave empty batches out"
        ):
            hesse.hessian_diagonal(Loss(nn.Linear(3, 2).double(), F.mse_loss, data))


def test_single_samples():
    with pytest.raises(errors.ArgumentError, match=r"data set of single samples; pass .*DataLoader"):
        Loss(nn.Linear(3, 2), F.mse_loss, TensorDataset(A, Y))


@pytest.mark.parametrize("data", [3, None, lambda: 1])
def test_no_data_at_all(data):
    with pytest.raises(errors.ArgumentError, match=r"data must be a batch .* or an iterable of batches, met"):
        Loss(nn.Linear(3, 2), F.mse_loss, data)


@pytest.mark.parametrize(
    "ask",
    [lambda loss: loss.value(), hesse.hessian_diagonal, lambda loss: HessianOperator(loss) @ torch.ones(8)],
)
def test_another_dtype(ask):
    with pytest.raises(
        errors.ArgumentError, match=r"data hold tensors of torch\.float64.*float32; cast one of them"
    ):
        ask(Loss(nn.Linear(3, 2), F.mse_loss, (A, Y)))


def test_another_reduction():
    s = setting((4, 2))
    with pytest.raises(errors.ArgumentError, match=r"reduction='sum' is not what.*pass reduction='mean'"):
        Loss(s.model, F.mse_loss, s.batches, reduction="sum").value()
    summed = nn.MSELoss(reduction="sum")
    with pytest.raises(errors.ArgumentError, match=r"reduction='mean' is not what.*pass reduction='sum'"):
        hesse.hessian_diagonal(Loss(s.model, summed, s.batches))
    Loss(s.model, summed, s.batches[0]).value()  # of one batch there is nothing to be said
    with pytest.raises(errors.ArgumentError, match='reduction must be "mean" or "sum", met None'):
        Loss(s.model, summed, s.batches, reduction=None)


def test_neither_reduction():
    s = setting((4, 2))
    loss = Loss(s.model, lambda z, y: (z - y).square().sum().sqrt(), s.batches)
    with pytest.warns(errors.DataWarning, match="loss_fn is no mean over samples"):
        loss.value()
    hesse.hessian_diagonal(loss)  # once is enough


def test_batch_norm_in_training_of_several_batches():
    loss = Loss(Norm().double(), F.mse_loss, [(x(6, 3), x(6, 4)), (x(5, 3), x(5, 4))])
    with pytest.warns(
        errors.DataWarning, match=r"batch norm in train mode.*call model\.eval\(\) or pass one batch"
    ):
        hesse.hessian_diagonal(loss)


@pytest.mark.parametrize(
    "ask",
    [
        hesse.hessian_diagonal,
        hesse.hessian,
        lambda loss: HessianOperator(loss) @ x(26),
        lambda loss: HessianOperator(loss) @ x(26, 2),
        lambda loss: GaussNewtonOperator(loss) @ x(26, 2),
        lambda loss: GaussNewtonOperator(loss).diagonal(),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_dropout(ask, count):
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()  # 26 parameters
    loss = Loss(model, F.mse_loss, [(x(6, 3), x(6, 2))] * count)
    with pytest.raises(errors.NotDeterministicError, match=r"eval\(\)"):
        ask(loss)


class Augmented(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return A[i % 5] + torch.randn(3), Y[i % 5]


def test_random_augmentation():
    loss = Loss(nn.Linear(3, 2).double(), F.mse_loss, DataLoader(Augmented(), batch_size=3))
    with pytest.raises(
        errors.NotDeterministicError, match=r"data are not the same at every pass.*augmentation"
    ):
        hesse.hessian_diagonal(loss)


def test_shuffling():
    model, data = nn.Linear(3, 2).double(), TensorDataset(A, Y)
    loss = Loss(model, F.mse_loss, DataLoader(data, batch_size=2, shuffle=True))
    for _ in range(3):
        assert (
            relative_error(hesse.hessian_diagonal(loss)["bias"], torch.ones(2, dtype=torch.float64))
            < TOLERANCE
        )
    torch.manual_seed(0)  # one that leaves out others
    with pytest.raises(errors.NotDeterministicError, match="drop_last=True"):
        Loss(model, F.mse_loss, DataLoader(data, batch_size=2, shuffle=True, drop_last=True)).value()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("0.wieght", r"'0\.wieght' matches no parameter of the model; the model has 0\.weight"),
        (["0.weight", "nothing.*"], r"'nothing\.\*' matches no parameter of the model; the model has"),
        (nn.Linear(3, 2), "a Linear matches no parameter of the model; pass a module of the model"),
        (nn.Tanh(), "a Tanh matches no parameter"),
        (torch.zeros(3), "a Tensor matches no parameter of the model; pass parameters of the model itself"),
        ([], "params is empty; leave it out"),
        (3, "params must hold names, patterns .* met int"),
        ([None], "params must hold names, .* met NoneType"),
    ],
)
def test_bad_params(params, message):
    with pytest.raises(errors.ArgumentError, match=message):
        Loss(mlp(), F.mse_loss, (A, A), params=params)


def test_frozen_parameters():
    model = mlp()
    model[0].weight.requires_grad_(False)
    with pytest.raises(
        errors.ArgumentError, match=r"params asks for 0\.weight, which does not require grad; call"
    ):
        Loss(model, F.mse_loss, (A, A), params="0.*")
    assert list(Loss(model, F.mse_loss, (A, A)).params) == ["0.bias", "2.weight", "2.bias"]
    model.requires_grad_(False)
    with pytest.raises(
        errors.ArgumentError, match=r"no parameter that requires grad; call requires_grad_\(\)"
    ):
        Loss(model, F.mse_loss, (A, A))
    with pytest.raises(errors.ArgumentError, match="no parameter"):
        Loss(nn.Tanh(), F.mse_loss, (A, A))


def test_inputs_beside_a_loss():
    s = setting()
    loss, inputs = s.loss(), list(s.model.parameters())
    for ask in (hesse.hessian, hesse.hessian_blocks, hesse.hessian_diagonal, hesse.hessian_trace,
                hesse.approximate_diagonal, lambda *a: hesse.plan("hessian", *a),
                lambda *a: hesse.hvp(*a, v=inputs)):  # fmt: skip
        with pytest.raises(errors.ArgumentError, match="must be left out with a Loss"):
            ask(loss, inputs)


def test_vectors_beside_a_loss():
    s = setting()
    loss, good = s.loss(), s.packed(x(31))
    for ask in (
        hesse.hvp,
        hesse.second_directional_derivative,
        lambda loss, v: hesse.hessian_diagonal(loss, v=v),
    ):
        for bad, message in (
            (x(31), "structure"),
            ({**good, "0.weight": x(5, 5)}, r"0\.weight.* has shape"),
            ({**good, "0.weight": good["0.weight"].to(torch.complex128)}, "complex"),
            ({**good, "0.weight": good["0.weight"].to("meta")}, "meta"),
        ):
            with pytest.raises(errors.HesseError, match=message):
                ask(loss, bad)
    with pytest.raises(errors.ArgumentError, match="v can be left out only where"):
        hesse.hvp(loss)
    with pytest.raises(errors.ArgumentError, match="v must be a vector of 31 coordinates"):
        hesse.hvp(loss, x(30), flat=True)


@pytest.mark.parametrize(
    "ask",
    [
        hesse.hessian_diagonal,
        hesse.hessian,
        lambda loss: hesse.hvp(loss, x(8), flat=True),
        lambda loss: HessianOperator(loss) @ x(8, 2),
        lambda loss: GaussNewtonOperator(loss) @ x(8, 2),
        lambda loss: GaussNewtonOperator(loss).diagonal(),
    ],
)
def test_data_that_hold_a_nan(ask):
    bad = A.clone()
    bad[4, 0] = float("nan")
    loss = Loss(nn.Linear(3, 2).double(), F.mse_loss, [(bad[:2], Y[:2]), (bad[2:], Y[2:])])
    with pytest.warns(errors.NonFiniteWarning):
        ask(loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": lambda x: x}, "model must be a torch.nn.Module, met function"),
        ({"loss_fn": "mse"}, "loss_fn must be callable or None, met str"),
        ({"forward": 1}, "forward must be callable or None, met int"),
        ({"samples": 1}, "samples must be callable or None, met int"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"model": mlp(), "loss_fn": F.mse_loss, "data": (A, A), **change}
    with pytest.raises(errors.HesseError, match=message):
        Loss(**arguments)


def test_what_cannot_be_counted():
    loss = Loss(nn.Linear(3, 2), lambda z, y: z.sum(), [SimpleNamespace(a=A)])
    with pytest.raises(
        errors.ArgumentError, match=r"how many samples .* cannot be told of a SimpleNamespace; pass samples="
    ):
        loss.value()


def test_a_model_without_a_loss():
    model = Two(lambda loss, out: SimpleNamespace(logits=out)).double()
    with pytest.raises(
        errors.OutputError, match=r"loss_fn is None, so model must give its loss.*SimpleNamespace without"
    ):
        Loss(model, None, {"a": A, "b": B, "labels": Y}).value()
    with pytest.raises(errors.OutputError, match="scalar"):
        Loss(Paired().double(), None, [((A,), Y)], forward=lambda model, batch: model(A)).value()
