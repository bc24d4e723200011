"""Structure is a bonus: looking for it never costs an answer that the plain way gives."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import hesse
from cases import of_model, x
from hesse import work
from oracle import hessian_matrix
from questions import QUESTIONS

METHODS = ["auto", "sweep", "taps", "dense"]


def linear(*sizes):
    return [nn.Linear(a, b).double() for a, b in sizes]


def of_modules(modules, loss):
    """A loss of modules as a closure over their parameters, and as a function of these for the oracle."""
    held = nn.ModuleList(modules)
    names = [name for name, _ in held.named_parameters()]

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = held

        def forward(self):
            return loss()

    def function(*tensors):
        return functional_call(Whole(), {f"held.{n}": t for n, t in zip(names, tensors, strict=True)}, ())

    return loss, list(held.parameters()), function


def clip():
    """A loss over both dimensions of a table of scores, beside one whose samples do not touch."""
    a, b = linear((3, 2), (3, 2))
    images, texts = x(4, 3), x(4, 2)
    return of_modules(
        [a, b], lambda: F.cross_entropy(texts @ a(images).T, torch.arange(4)) + b(images).square().sum()
    )


def cumulated():
    """Every sample touches those after it, in one of two branches."""
    a, b = linear((3, 2), (3, 2))
    data = x(4, 3)
    return of_modules([a, b], lambda: a(data).cumsum(0).square().sum() + b(data).square().sum())


def softmax_over_samples():
    a, b = linear((3, 2), (3, 2))
    data = x(5, 3)
    return of_modules([a, b], lambda: (a(data).softmax(0) * b(data).tanh()).square().sum())


def normed_over_samples():
    (a,) = linear((3, 2))
    data = x(5, 3)
    return of_modules([a], lambda: F.layer_norm(a(data).T, (5,)).pow(3).sum())


def routed():
    a, b = linear((4, 4), (4, 4))
    data = x(8, 4)

    def loss():
        hidden = a(data)
        return b(hidden[hidden[:, 0] > 0]).square().sum() + hidden.tanh().sum()

    return of_modules([a, b], loss)


def fourier():
    a, b = linear((4, 4), (4, 4))
    data = x(6, 5, 4)
    return of_modules([a, b], lambda: b(torch.fft.fft(a(data), dim=1).real).tanh().square().sum())


def fourier_over_samples():
    a, b = linear((4, 4), (4, 4))
    data = x(6, 5, 4)
    return of_modules([a, b], lambda: b(torch.fft.fft(a(data), dim=0).real).square().sum())


def poisson():
    """A rate that would be negative if some samples were changed much."""
    (a,) = linear((3, 4))
    nn.init.uniform_(a.weight)
    nn.init.constant_(a.bias, 0.01)
    data = torch.zeros(6, 3, dtype=torch.float64)
    data[5] = 1
    counts = torch.randint(0, 4, (6, 4)).double()
    return of_modules([a], lambda: -torch.distributions.Poisson(a(data)).log_prob(counts).sum())


def asserting():
    """An assertion that fails wherever but at the point itself."""
    (a,) = linear((3, 2))
    data = x(5, 3)
    expected = a(data).sum().item()

    def loss():
        out = a(data)
        assert abs(out.sum().item() - expected) < 1e-12
        return torch.i0(out).square().sum()  # no row of the table

    return of_modules([a], loss)


def factored():
    """A Cholesky factor that does not exist where the matrix is perturbed."""
    (a,) = linear((3, 3))
    data = torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        a.weight.copy_(torch.eye(3) + 1e-6)
        a.bias.zero_()
    return of_modules([a], lambda: torch.linalg.cholesky(a(data) @ a(data).T).diagonal().log().sum())


def shapes_of_values():
    (a,) = linear((3, 4))
    data = x(6, 3)

    def loss():
        out = a(data)
        return out.flatten()[: 5 + int(out.sum().item() * 1e6) % 7].square().sum()

    return of_modules([a], loss)


FUNCTIONS = [
    clip,
    cumulated,
    softmax_over_samples,
    normed_over_samples,
    routed,
    fourier,
    fourier_over_samples,
    poisson,
    asserting,
    factored,
    shapes_of_values,
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", FUNCTIONS, ids=lambda build: build.__name__)
def test_every_method_answers(build, method):
    loss, parameters, function = build()
    matrix = hessian_matrix(function, [p.detach() for p in parameters])
    for question in QUESTIONS:
        for check in (True, False):
            result = question.ask(loss, parameters, method=method, check=check, full_output=True)
            assert question.error(result.value, matrix, parameters) < 1e-9


def test_samples_that_touch_anywhere_are_told():
    loss, parameters, _ = cumulated()
    plan = hesse.plan("diagonal", loss, parameters, method="sweep")
    why_not = {e.method: e.why_not for e in plan.estimates}
    assert why_not["sweep"] == "cumsum joins samples, or changes their order"


@pytest.mark.parametrize("build", [routed, poisson])
def test_structure_is_found_by_a_smaller_change(build):
    """Where a branch flips, or an argument is refused, samples are changed by so little that they are not."""
    loss, parameters, _ = build()
    result = hesse.hessian_diagonal(loss, parameters, method="taps", full_output=True)
    weight = parameters[0].numel()
    outputs = parameters[0].shape[0]
    assert result.plan.method == "taps"
    assert "product per output" in result.plan.reason
    assert f"{outputs} columns instead of {weight}" in result.plan.shares[0].why


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (asserting, r"changed \(AssertionError\)"),
        (shapes_of_values, "the shape of the result of __getitem__ depends on values"),
    ],
)
def test_the_reason_is_in_the_plan(build, reason):
    loss, parameters, _ = build()
    plan = hesse.plan("diagonal", loss, parameters, method="sweep")
    (why_not,) = (e.why_not for e in plan.estimates if e.method == "sweep")
    assert re.search(reason, why_not)


@pytest.mark.parametrize(
    "place",
    [
        "hesse.look.explore._look",
        "hesse.methods.sweep.option._best",
        "hesse.look.meter.flops",
        "hesse.methods.taps.run.usable",
        "hesse.methods.sweep.walk.diagonal",
        "hesse.methods.taps.run.run",
        "hesse.tape.record.Recorder._record",
    ],
)
@pytest.mark.parametrize("error", [IndexError, RuntimeError, KeyError, AssertionError])
def test_a_fault_of_ours_costs_no_answer(place, error, monkeypatch):
    def broken(*args, **kwargs):
        raise error("shape '[4, -1, 4]' is invalid")

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    targets = torch.randint(0, 3, (7,))
    function, tensors = of_model(model, lambda out: F.cross_entropy(out, targets), x(7, 4))
    expected = hessian_matrix(function, tensors).diagonal()
    monkeypatch.setattr("hesse.structure.RAISES_FAULTS", False)
    monkeypatch.setattr(place, broken)
    for method in ("auto", "sweep", "taps"):
        result = hesse.hessian_diagonal(function, tensors, method=method, full_output=True)
        assert result.certificate.passed
        torch.testing.assert_close(torch.cat([d.flatten() for d in result.value]), expected)
        assert "[4, -1, 4]" not in str(result.plan)  # internals are no reason


@pytest.mark.parametrize("text", [",a->a", "a,->a", "a,a->"])
def test_a_contraction_with_a_scalar(text):
    def func(x):
        parts = [x.prod() if not names else x**2 for names in text.partition("->")[0].split(",")]
        return torch.einsum(text, *parts).pow(3).sum()

    point = x(4)
    torch.testing.assert_close(hesse.hessian(func, point), hessian_matrix(func, (point,)))


def test_in_the_tests_it_is_raised(monkeypatch):
    def broken(*args, **kwargs):
        raise IndexError("ours")

    monkeypatch.setattr("hesse.methods.sweep.option._best", broken)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(IndexError, match="ours"):
        hesse.model_hessian_diagonal(model, F.cross_entropy, torch.randn(7, 4), torch.randint(0, 3, (7,)))


def test_what_a_callable_for_progress_raises_comes_through(monkeypatch):
    """It is no trouble with structure, and no reason to go on by another way."""
    monkeypatch.setattr("hesse.structure.RAISES_FAULTS", False)

    def stop(done, total):
        raise RuntimeError("enough")

    runs = []
    run = work.Work._run
    monkeypatch.setattr(work.Work, "_run", lambda self, *args: runs.append(1) or run(self, *args))
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3))
    data = torch.randn(7, 40), torch.randint(0, 3, (7,))
    with pytest.raises(RuntimeError, match="enough") as caught:
        hesse.model_hessian_diagonal(model, F.cross_entropy, *data, method="taps", progress=stop)
    assert len(runs) == 1
    assert caught.value.__cause__ is None


ADDED = [(2, 3), (1, 3), (1,), (3,), (2, 1), ()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ADDED, ids=str)
def test_whatever_is_added_by_addmm(shape, method):
    added, left, right = (x(*s or ((),)).requires_grad_() for s in (shape, (2, 4), (4, 3)))
    function = lambda c, a, b: torch.addmm(c, a, b).tanh().pow(2).sum()
    matrix = hessian_matrix(function, (added, left, right))
    leaves = [added, left, right]
    for question in QUESTIONS:
        result = question.ask(lambda: function(*leaves), leaves, method=method, full_output=True)
        assert question.error(result.value, matrix, leaves) < 1e-9
        assert result.certificate.passed


@pytest.mark.parametrize("method", METHODS)
def test_group_norm_of_images_with_channels_last(method):
    """Where torch's kernel ends the process, in products by a single tensor."""
    blocks = [(nn.Conv2d(c, 4, k), nn.GroupNorm(2, 4), nn.Tanh()) for c, k in ((2, 3), (4, 1))]
    model = nn.Sequential(*blocks[0], *blocks[1]).double()
    images = x(2, 2, 6, 6)
    expected = hesse.hessian_diagonal(lambda: model(images).square().sum(), model.parameters())
    last = model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    found = hesse.hessian_diagonal(lambda: last(images).square().sum(), last.parameters(), method=method)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def forces_inside(x):
    energy = (x**4).sum()
    torch.autograd.grad(energy, x)
    return energy


def forces_inside_by_position(x):
    energy = (x**4).sum()
    torch.autograd.grad(energy, x, None, False)
    return energy


def backward_inside(x):
    energy = (x**4).sum()
    energy.backward()
    return energy


@pytest.mark.parametrize("func", [forces_inside, forces_inside_by_position, backward_inside])
def test_a_gradient_taken_inside_does_not_use_the_graph_up(func):
    point = torch.tensor([1.0, 2.0])
    expected = 12 * point**2
    assert torch.equal(hesse.hessian(func, point), torch.diag(expected))
    assert torch.equal(hesse.hvp(func, point, torch.ones(2)), expected)
    assert point.grad is None
    leaf = point.clone().requires_grad_()
    leaf.grad = torch.tensor([7.0, 8.0])
    kept = leaf.grad
    assert torch.equal(hesse.hessian_diagonal(lambda: func(leaf), [leaf])[0], expected)
    assert leaf.grad is kept
    assert kept.tolist() == [7.0, 8.0]


def test_a_potential_in_eval_mode_has_its_structure():
    """Forces that are taken inside, and not used further, hide nothing."""

    class Potential(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

        def forward(self, positions):
            positions.requires_grad_()
            energy = self.net(positions).sum()
            (self.forces,) = torch.autograd.grad(energy, positions, create_graph=self.training)
            return energy

    model = Potential().eval()
    positions = x(6, 3)
    result = hesse.hessian_diagonal(
        lambda: model(positions), model.parameters(), method="sweep", full_output=True
    )
    assert result.plan.method == "sweep"
    plain = hesse.hessian_diagonal(lambda: model.net(positions).sum(), model.parameters(), method="dense")
    for one, other in zip(result.value, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_parameters_that_are_not_asked_for_hide_nothing():
    """They require grad too, and so does all that is made of them."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data, targets = x(7, 4), torch.randint(0, 3, (7,))
    loss = lambda: F.cross_entropy(model(data), targets) + model[0].weight.square().sum()
    asked = [model[2].weight, model[4].weight]
    whole = hesse.hessian_diagonal(loss, list(model.parameters()))
    for method in ("sweep", "taps"):
        result = hesse.hessian_diagonal(loss, asked, method=method, full_output=True)
        assert {share.method for share in result.plan.shares} == {method}
        torch.testing.assert_close(result.value, [whole[2], whole[4]])
    blocks = hesse.hessian(loss, asked, method="taps")
    torch.testing.assert_close(blocks, hesse.hessian(loss, asked, method="dense"))


ZERO = {
    "a bias before a batch norm": lambda x, w: (F.batch_norm(x, None, None, training=True) * w).sum(),
    "a softmax summed up": lambda x, w: torch.softmax(x, 0).sum(),
    "a log-softmax summed up": lambda x, w: x.log_softmax(0).exp().sum() + w.sum(),
    "nearly equal values": lambda x, w: F.group_norm(3 + 1e-6 * x, 1, eps=1e-16).pow(3).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("question", [hesse.hessian, hesse.hessian_blocks, hesse.hessian_diagonal])
@pytest.mark.parametrize("func", ZERO.values(), ids=ZERO)
def test_what_is_zero_or_cancels_but_for_rounding_passes(func, question, dtype):
    """The deviation is relative to the size of what was added up, and there is no warning."""
    at, w = torch.randn(6, 4).to(dtype), torch.randn(6, 4).to(dtype)
    result = question(lambda x: func(x, w), at, full_output=True)
    assert result.certificate.passed
    assert result.certificate.bound < 1e-3


def test_a_shape_like_another_value():
    a, b = linear((3, 4), (3, 4))
    data = x(5, 3)
    loss, parameters, function = of_modules(
        [a, b], lambda: torch.i0(a(data).view_as(b(data))).square().sum() + b(data).sin().sum()
    )
    matrix = hessian_matrix(function, parameters)
    for method in ("auto", "sweep", "taps"):
        for question in QUESTIONS:
            result = question.ask(loss, parameters, method=method, full_output=True)
            assert question.error(result.value, matrix, parameters) < 1e-9
