"""The worked examples that hesse was asked for, its containers, and code written for its models."""

from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse


def cubic(x):
    return (2 * x**3 - x**2).sum()


def test_one_variable_tensors():
    assert hesse.hessian(cubic, torch.tensor([3.0])).tolist() == [[34.0]]
    expected = torch.diag(torch.tensor([22.0, 34.0, 46.0]))
    assert torch.equal(hesse.hessian(cubic, torch.tensor([2.0, 3.0, 4.0])), expected)


def test_matrix_input():
    found = hesse.hessian(cubic, torch.tensor([[2.0, 3.0], [4.0, 7.0]]))
    expected = torch.zeros(2, 2, 2, 2)
    expected[0, 0, 0, 0], expected[0, 1, 0, 1] = 22, 34
    expected[1, 0, 1, 0], expected[1, 1, 1, 1] = 46, 82
    assert torch.equal(found, expected)


def test_two_inputs():
    found = hesse.hessian(
        lambda x, y: (2 * x * y**2 + x**3 - 10).sum(), (torch.tensor([2.0]), torch.tensor([-3.0]))
    )
    assert isinstance(found, tuple)
    assert [[b.tolist() for b in row] for row in found] == [[[[12.0]], [[-12.0]]], [[[-12.0]], [[8.0]]]]


def test_three_inputs():
    inputs = tuple(torch.tensor([value]) for value in (1.0, 2.0, 3.0))
    found = hesse.hessian(lambda x, y, z: (2 * x**2 * y + x * z**3).sum(), inputs)
    assert [[b.item() for b in row] for row in found] == [[8, 4, 27], [4, 0, 0], [27, 0, 18]]


def test_torch_secorder_examples():
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (found,) = hesse.hessian_diagonal(lambda: x @ A @ x, [x])
    assert found.tolist() == [4.0, 6.0]
    (found,) = hesse.hessian_diagonal(lambda: x @ A @ x, [x], [torch.tensor([2.0, -1.0])])
    assert found.tolist() == [8.0, -6.0]

    diagonal = hesse.model_hessian_diagonal(
        nn.Linear(10, 1), F.mse_loss, torch.randn(5, 10), torch.randn(5, 1)
    )
    assert isinstance(diagonal, list)
    assert [d.shape for d in diagonal] == [(1, 10), (1,)]


def test_forum_examples():
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(hesse.hessian_diagonal(lambda x: x.sin().sum(), x), -x.sin())
    for i, one_hot in enumerate(torch.eye(5, dtype=torch.float64)):
        along = hesse.second_directional_derivative(lambda x: x.sin().sum(), x, one_hot)
        torch.testing.assert_close(along, -x[i].sin())

    # The Hessian of an MLP's negative log-likelihood by its input, in one go.
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    func = lambda x: F.cross_entropy(model(x), torch.tensor([1]))
    x = torch.randn(1, 4, dtype=torch.float64)
    torch.testing.assert_close(hesse.hessian(func, x), torch.autograd.functional.hessian(func, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's forward mode
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"vectorize": True},
        {"vectorize": False},
        {"vectorize": True, "outer_jacobian_strategy": "forward-mode"},
        {"create_graph": True},
        {"strict": True},
    ],
)
def test_runs_where_torch_runs(arguments):
    func = lambda x, y: (x.exp() * y).sum() ** 2
    inputs = (torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64))
    if "strict" in arguments:  # torch's strict and vectorize exclude each other
        expected = torch.autograd.functional.hessian(func, inputs, strict=True)
    else:
        expected = torch.autograd.functional.hessian(func, inputs, **arguments)
    torch.testing.assert_close(hesse.hessian(func, inputs, **arguments), expected)


def test_positional_arguments_are_those_of_the_models():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert hesse.hessian(cubic, x, True, False, True, "reverse-mode").requires_grad
    assert hesse.hessian_diagonal(lambda: cubic(x), [x], None, True, True)[0].requires_grad
    model = nn.Sequential(nn.Linear(2, 1), nn.Tanh())
    found = hesse.model_hessian_diagonal(model, F.mse_loss, torch.ones(1, 2), torch.ones(1, 1), True, True)
    assert found[0].requires_grad


Point = namedtuple("Point", ["a", "b"])


@pytest.mark.parametrize(
    ("inputs", "func"),
    [
        (torch.ones(2), lambda x: x.pow(3).sum()),
        ((torch.ones(2), torch.ones(())), lambda a, b: (a**2).sum() * b),
        ([torch.ones(2), torch.ones(())], lambda a, b: (a**2).sum() * b),
        ({"a": torch.ones(2), "b": torch.ones(())}, lambda p: (p["a"] ** 2).sum() * p["b"]),
        (OrderedDict(b=torch.ones(()), a=torch.ones(2)), lambda p: (p["a"] ** 2).sum() * p["b"]),
        (({"w": torch.ones(2)}, [torch.ones(())]), lambda p, q: (p["w"] ** 2).sum() * q[0]),
        (Point(torch.ones(2), torch.ones(())), lambda a, b: (a**2).sum() * b),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_in_comes_out(inputs, func):
    shape_of = lambda tree: torch.utils._pytree.tree_map(lambda t: (), tree)
    for answer in (
        hesse.hessian_diagonal(func, inputs),
        hesse.hessian_blocks(func, inputs),
        hesse.hvp(func, inputs, inputs),
    ):
        assert type(answer) is type(inputs)
        assert shape_of(answer) == shape_of(inputs)
    full = hesse.hessian(func, inputs)
    assert type(full) is type(inputs)
    if isinstance(inputs, dict):
        assert list(full) == list(inputs)
        assert type(full["a"]) is type(inputs)
        assert full["a"]["b"].shape == (2,)
    assert hesse.hessian_trace(func, inputs).shape == ()


def test_generator_of_parameters():
    model = nn.Linear(2, 1)
    loss = lambda: model(torch.ones(3, 2)).square().mean()
    assert [d.shape for d in hesse.hessian_diagonal(loss, model.parameters())] == [(1, 2), (1,)]


def test_closure_is_taken_only_when_it_cannot_get_the_inputs():
    """In questions that torch has too; see test_forms for those of torch-secorder."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for func in (lambda *args: (args[0] ** 2).sum(), lambda y=x: (y**2).sum()):
        assert torch.equal(hesse.hessian(func, x), 2 * torch.eye(2))
        assert hesse.hvp(func, [x], [torch.ones(2)])[0].tolist() == [2.0, 2.0]
        assert torch.equal(hesse.hessian_blocks(func, [x])[0], 2 * torch.eye(2))
    assert hesse.hessian_diagonal(lambda: (x**3).sum(), [x])[0].tolist() == [6.0, 12.0]
    assert hesse.hvp(lambda: (x**3).sum(), [x], [torch.ones(2)])[0].tolist() == [6.0, 12.0]


def test_tied_weights_through_the_model():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False)
            self.other = self.one
            self.out = nn.Linear(3, 1)
            self.out.weight = nn.Parameter(self.out.weight)

        def forward(self, x):
            return self.out(torch.tanh(self.other(torch.tanh(self.one(x)))))

    model = Tied().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    found = hesse.model_hessian_diagonal(model, F.mse_loss, x, y)

    def func(weight, out, bias):
        hidden = torch.tanh(torch.tanh(x @ weight.T) @ weight.T)
        return F.mse_loss(hidden @ out.T + bias, y)

    full = torch.autograd.functional.hessian(func, tuple(model.parameters()))
    for i, d in enumerate(found):
        torch.testing.assert_close(d.flatten(), full[i][i].reshape(d.numel(), -1).diagonal())
    assert model.one.weight is model.other.weight
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_full_output():
    result = hesse.hessian(cubic, torch.tensor([2.0, 3.0]), full_output=True)
    assert isinstance(result, hesse.Result)
    assert torch.equal(result.value, torch.diag(torch.tensor([22.0, 34.0])))
    assert isinstance(result.plan, hesse.Plan)
    assert result.plan.method == "dense"
    assert result.plan.passes == 2
    assert result.passes == 3  # and one for the check
    assert result.certificate.passed
    assert result.seconds > 0
    unchecked = hesse.hessian(cubic, torch.tensor([2.0, 3.0]), check=False, full_output=True)
    assert unchecked.certificate is None
    assert unchecked.passes == 2


def test_a_plan_is_accepted_back():
    plan = hesse.hessian(cubic, torch.ones(2), full_output=True).plan
    assert torch.equal(hesse.hessian(cubic, torch.ones(2), method=plan), hesse.hessian(cubic, torch.ones(2)))
    assert torch.equal(hesse.hessian(cubic, torch.ones(2), method="dense"), 10 * torch.eye(2))


def test_no_coordinate_is_computed_twice():
    calls = []
    x = tuple(torch.randn(n, dtype=torch.float64) for n in (70, 0, 5, 90))
    func = lambda *x: torch.cat(x).exp().sum() ** 2
    note = lambda done, total: calls.append((done, total))
    result = hesse.hessian(func, x, progress=note, full_output=True)
    assert result.passes == 165 + 1
    assert [total for _, total in calls] == [165] * len(calls)
    assert calls[-1][0] == 165
    assert sorted(calls) == calls


def test_float32_agrees_within_its_precision():
    func = lambda a, b: torch.tanh(a @ b).square().sum()
    inputs = torch.randn(6, 4), torch.randn(4, 3)
    exact = hesse.hessian(func, tuple(t.double() for t in inputs))
    for row, wanted in zip(hesse.hessian(func, inputs), exact, strict=True):
        for block, value in zip(row, wanted, strict=True):
            assert block.dtype == torch.float32
            torch.testing.assert_close(block.double(), value, rtol=1e-4, atol=1e-5)


def test_mixed_dtypes():
    a, b = torch.randn(3), torch.randn(3, dtype=torch.float64)
    found = hesse.hessian(lambda a, b: (a * b).exp().sum(), (a, b))
    expected = torch.autograd.functional.hessian(lambda a, b: (a * b).exp().sum(), (a, b))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_says_so_and_sums_in_float32(dtype):
    x = torch.full((300,), 2.0, dtype=dtype)
    func = lambda x: (x**3).sum()
    with pytest.warns(hesse.errors.PrecisionWarning, match="inputs is torch.*float16.*digits"):
        trace = hesse.hessian_trace(func, x)
    assert trace.dtype == torch.float32
    assert trace.item() == 3600  # bfloat16 would have stopped counting long before
    with pytest.warns(hesse.errors.PrecisionWarning):
        assert hesse.second_directional_derivative(func, x, torch.ones(300)).dtype == torch.float32
    with pytest.warns(hesse.errors.PrecisionWarning):
        assert hesse.hessian_diagonal(func, x).dtype == dtype


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # the compiler's own
def test_compiled_functions_run_uncompiled():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    expected = hesse.model_hessian_diagonal(model, F.mse_loss, x, y)
    found = hesse.model_hessian_diagonal(torch.compile(model), F.mse_loss, x, y)
    torch.testing.assert_close(found, expected)
    compiled = torch.compile(cubic)
    assert hesse.hvp(compiled, torch.ones(2), torch.ones(2)).tolist() == [10.0, 10.0]
