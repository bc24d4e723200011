"""Every kind of layer, in every layout: from layer space to parameter space without loss."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import hesse
from cases import x
from networks import Problem, mlp, squares
from questions import DIAGONAL, HESSIAN, QUESTIONS

pytestmark = pytest.mark.usefixtures("taps_everywhere")
TOLERANCE = 1e-9


class Called(nn.Module):
    """A layer that is a call by hand."""

    def __init__(self, call, *shapes):
        super().__init__()
        self.call, self.held = call, nn.ParameterList([x(*shape) for shape in shapes])

    def forward(self, inputs):
        return self.call(inputs, *self.held)


class Squared(nn.Module):
    """A bilinear layer of its input with itself."""

    def __init__(self, width, outputs, **options):
        super().__init__()
        self.layer = nn.Bilinear(width, width, outputs, **options)

    def forward(self, inputs):
        return self.layer(inputs, inputs.cos())


def between(layer, inputs):
    """The layer after another one and before one more, which mix its last dimension."""
    width = inputs.shape[-1]
    first = [nn.Linear(width, width, bias=False), nn.Tanh()] if inputs.is_floating_point() else []
    model = nn.Sequential(*first, layer, nn.Tanh(), nn.LazyLinear(2)).double()
    model(inputs)
    return Problem(model, squares, inputs)


def assert_tapped(problem):
    """All questions are answered by taps alone, and exactly."""
    matrix = problem.matrix()
    for question in QUESTIONS:
        result = question.ask(problem.closure, problem.tensors, method="taps", full_output=True)
        assert question.error(result.value, matrix, problem.tensors) < TOLERANCE, question.name
        assert problem.left(result.plan) == set()
        assert result.certificate.passed


rows = lambda: x(3, 3)
line = lambda: x(2, 2, 4)
plane = lambda: x(2, 2, 4, 3)
space = lambda: x(2, 2, 2, 3, 2)

LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), rows),
    "linear, no bias": (lambda: nn.Linear(3, 4, bias=False), rows),
    "linear of one input": (lambda: nn.Linear(1, 2), lambda: x(3, 1)),
    "linear of one output": (lambda: nn.Linear(3, 1), rows),
    "linear by keywords": (
        lambda: Called(lambda a, w, b: F.linear(bias=b, weight=w, input=a), (2, 3), (2,)),
        rows,
    ),
    "x @ W": (lambda: Called(lambda a, w: a @ w, (3, 2)), rows),
    "x @ W.T": (lambda: Called(lambda a, w: a @ w.T, (2, 3)), rows),
    "x @ W.mT, with positions": (lambda: Called(lambda a, w: a @ w.mT, (2, 4)), line),
    "matmul": (lambda: Called(lambda a, w: torch.matmul(a, w), (4, 2)), line),
    "mm": (lambda: Called(lambda a, w: a.mm(w.t()), (2, 3)), rows),
    "mm, transposed": (lambda: Called(lambda a, w: torch.mm(a, w.transpose(0, 1)), (2, 3)), rows),
    "addmm": (lambda: Called(lambda a, w, b: torch.addmm(b, a, w), (3, 2), (2,)), rows),
    "addmm, transposed": (lambda: Called(lambda a, w, b: torch.addmm(b, a, w.T), (2, 3), (2,)), rows),
    "bilinear": (lambda: Squared(3, 2), rows),
    "bilinear, no bias": (lambda: Squared(4, 2, bias=False), line),
    "embedding": (lambda: nn.Embedding(5, 3), lambda: torch.tensor([[0, 2], [2, 4], [1, 1]])),
    "embedding of a row": (lambda: nn.Embedding(5, 3), lambda: torch.tensor([3, 0, 3])),
    "embedding, padding": (lambda: nn.Embedding(4, 3, 2), lambda: torch.tensor([[0, 2], [2, 2], [1, 3]])),
    "embedding, padding from behind": (
        lambda: nn.Embedding(4, 2, -1),
        lambda: torch.tensor([[0, 3], [3, 1]]),
    ),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), line),
    "conv1d, no bias": (lambda: nn.Conv1d(2, 3, 2, bias=False), line),
    "conv1d, stride and padding": (lambda: nn.Conv1d(2, 2, 3, stride=2, padding=2), line),
    "conv1d, dilation": (lambda: nn.Conv1d(2, 2, 2, dilation=3), line),
    "conv1d, same": (lambda: nn.Conv1d(2, 2, 3, padding="same"), line),
    "conv1d, same, uneven": (lambda: nn.Conv1d(2, 2, 2, padding="same", dilation=3), line),
    "conv1d, valid": (lambda: nn.Conv1d(2, 2, 2, padding="valid"), line),
    "conv1d, around": (lambda: nn.Conv1d(2, 2, 2, padding=1, padding_mode="circular"), line),
    "conv1d, a part of the line": (lambda: nn.Conv1d(2, 2, 3, stride=3), line),
    "conv1d, every channel by itself": (lambda: nn.Conv1d(2, 4, 2, groups=2), line),
    "conv1d, unbatched": (lambda: nn.Conv1d(2, 3, 2), lambda: x(2, 4)),
    "conv2d": (lambda: nn.Conv2d(2, 2, 2), plane),
    "conv2d, all options": (lambda: nn.Conv2d(2, 4, (2, 3), (2, 1), (1, 2), (1, 2), 2), plane),
    "conv2d, unbatched": (lambda: nn.Conv2d(2, 2, 2), lambda: x(2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 1, (1, 2, 2)), space),
    "conv3d, all options": (lambda: nn.Conv3d(2, 2, (1, 2, 1), (2, 1, 2), (0, 1, 1), (1, 2, 1), 2), space),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 2), line),
    "conv_transpose1d, all options": (lambda: nn.ConvTranspose1d(2, 4, 3, 3, 1, 2, 2, dilation=2), line),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 2, 2, bias=False), plane),
    "conv_transpose2d, all options": (
        lambda: nn.ConvTranspose2d(2, 2, (1, 2), (2, 1), (0, 1), (1, 0), 2, dilation=(1, 2)),
        plane,
    ),
    "conv_transpose2d, unbatched": (lambda: nn.ConvTranspose2d(2, 1, 3, 2), lambda: x(2, 2, 2)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 1, (1, 2, 1), (1, 2, 1)), space),
    "conv_transpose3d, all options": (
        lambda: nn.ConvTranspose3d(2, 2, (1, 2, 1), (2, 1, 1), (0, 1, 0), (1, 0, 0), 2),
        space,
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own
@pytest.mark.parametrize(("layer", "inputs"), LAYERS.values(), ids=LAYERS)
def test_every_layer(layer, inputs):
    assert_tapped(between(layer(), inputs()))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose1d", "bilinear"])
def test_few_samples(name, count):
    layer, inputs = LAYERS[name]
    assert_tapped(between(layer(), inputs()[:count]))


def fixture_is_kept(function):
    """The fixture forces taps; it need not be set up anew for every example."""
    return settings(
        max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )(function)


@fixture_is_kept
@given(data=st.data(), places=st.integers(1, 3), transposed=st.booleans(), seed=st.integers(0, 2**31))
def test_any_convolution(data, places, transposed, seed):
    torch.manual_seed(seed)
    each = lambda low, high: data.draw(st.tuples(*places * [st.integers(low, high)]))
    count, groups, widths = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)))
    kernel, stride, dilation, padding = each(1, 2), each(1, 2), each(1, 2), each(0, 1)
    kinds = (
        [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
        if transposed
        else [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    )
    layer = kinds[places - 1](
        groups * widths, groups, kernel, stride, padding, groups=groups, dilation=dilation
    ).double()
    inputs = x(count, groups * widths, *each(1, 3))
    try:
        layer(inputs)
    except RuntimeError:  # the kernel does not fit in
        assume(False)
    problem = Problem(layer, squares, inputs)
    result = hesse.hessian(problem.closure, problem.tensors, method="taps", full_output=True)
    assert HESSIAN.error(result.value, problem.matrix(), problem.tensors) < TOLERANCE
    assert problem.left(result.plan) == set()


ARRANGED = {
    "samples first": (lambda h: h, lambda h, n: h),
    "positions first": (lambda h: h.transpose(0, 1), lambda h, n: h.transpose(0, 1)),
    "flat, samples in front": (lambda h: h.flatten(0, 1), lambda h, n: h.unflatten(0, (n, -1))),
    "flat, positions in front": (
        lambda h: h.transpose(0, 1).flatten(0, 1),
        lambda h, n: h.unflatten(0, (-1, n)).transpose(0, 1),
    ),
}


class Arranged(nn.Module):
    """Positions meet between the layers; what the second layer gets is arranged in one of several ways."""

    def __init__(self, there, back):
        super().__init__()
        self.there, self.back = there, back
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, tokens):
        hidden = torch.tanh(self.first(tokens)).cumsum(1)
        return self.back(self.second(self.there(hidden)), len(tokens)).cumsum(1)


@pytest.mark.parametrize(("there", "back"), ARRANGED.values(), ids=ARRANGED)
@pytest.mark.parametrize("positions_come_first", [False, True])
@fixture_is_kept
@given(count=st.integers(1, 5), positions=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_samples_are_found_wherever_they_lie(there, back, positions_come_first, count, positions, seed):
    """One product per output and position, however many samples there are."""
    torch.manual_seed(seed)
    model = Arranged(there, back)
    if positions_come_first:
        problem = Problem(model, squares, x(positions, count, 2).transpose(0, 1))
    else:
        problem = Problem(model, squares, x(count, positions, 2))
    matrix = problem.matrix()
    diagonal = hesse.hessian_diagonal(problem.closure, problem.tensors, method="taps", full_output=True)
    assert DIAGONAL.error(diagonal.value, matrix, problem.tensors) < TOLERANCE
    assert diagonal.plan.passes == positions * (3 + 2)
    hessian = hesse.hessian(problem.closure, problem.tensors, method="taps", full_output=True)
    assert HESSIAN.error(hessian.value, matrix, problem.tensors) < TOLERANCE
    assert hessian.plan.passes == positions * (3 + 2 + 3)  # the input of the second layer moves too


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_every_form(question):
    problem = Problem(mlp(), squares, x(5, 3))
    matrix = problem.matrix()
    values = [t.detach() for t in problem.tensors]
    named = lambda parameters: problem.function(*parameters.values())
    for func, inputs in [
        (problem.closure, problem.tensors),
        (problem.function, tuple(values)),
        (named, dict(zip(problem.names, values, strict=True))),
    ]:
        result = question.ask(func, inputs, method="taps", full_output=True)
        assert question.error(result.value, matrix, problem.tensors) < TOLERANCE
        assert problem.left(result.plan) == set()


def test_the_form_of_a_model():
    problem = Problem(mlp(), squares, x(5, 3))
    found = hesse.model_hessian_diagonal(
        problem.model, lambda output, targets: squares(output - targets), *problem.data, 0.0, method="taps"
    )
    assert DIAGONAL.error(found, problem.matrix(), problem.tensors) < TOLERANCE
