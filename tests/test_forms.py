"""Code written for torch-secorder and torch runs unchanged: forms of functions, containers, strict."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse
from hesse import errors

W = torch.tensor([1.0, 2.0], requires_grad=True)
CUBE = [6.0, 12.0]  # the diagonal of the sum of cubes at W


def cube(scale=1.0):
    return (scale * W**3).sum()


class Cube:
    def __call__(self, scale=1.0):
        return cube(scale)


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(W.detach().clone())

    def forward(self):
        return (self.weight**3).sum()


def with_keywords(*args, scale=1.0, **kwargs):
    return cube(scale)


CLOSURES = {
    "a default": cube,
    "a captured default": lambda w=W: (w**3).sum(),
    "any number of arguments": lambda *args: cube(),
    "keywords": with_keywords,
    "a partial function": functools.partial(cube, 1.0),
    "a partial function with a keyword": functools.partial(cube, scale=1.0),
    "a callable object": Cube(),
    "nothing": lambda: cube(),
}


@pytest.mark.parametrize("func", CLOSURES.values(), ids=CLOSURES)
def test_a_function_that_can_be_called_with_nothing_is_a_closure(func):
    assert hesse.hessian_diagonal(func, [W])[0].tolist() == CUBE
    assert hesse.hessian_trace(func, [W]).item() == sum(CUBE)
    assert hesse.approximate_diagonal(func, [W])[0].tolist() == CUBE
    assert hesse.plan("diagonal", func, [W]).shares[0].why != "zero"


def test_a_module_is_called_as_its_forward_asks():
    module = Held()
    assert hesse.hessian_diagonal(module, module.parameters())[0].tolist() == CUBE
    assert torch.equal(hesse.hessian(module, list(module.parameters()))[0][0], torch.diag(torch.tensor(CUBE)))
    x = torch.tensor([[0.5, 1.0]])
    summed = nn.Sequential(nn.Linear(2, 1), nn.Tanh())
    assert hesse.hessian(summed, x).shape == (1, 2, 1, 2)  # a function of its input


def test_a_function_of_any_number_of_plain_tensors_is_given_them():
    """There a closure could have given zeros only."""
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    found = hesse.hessian_diagonal(lambda *xs: sum((x**3).sum() for x in xs), (x, y))
    assert [part.tolist() for part in found] == [[6.0, 12.0], [18.0]]


def test_a_closure_that_misses_its_arguments_says_who_called_it():
    with pytest.raises(IndexError) as caught:
        hesse.hessian_diagonal(lambda *xs: (xs[0] ** 3).sum(), [W])
    if hasattr(caught.value, "add_note"):
        assert "without arguments" in "".join(caught.value.__notes__)


def test_a_closure_over_tensors_none_of_which_requires_grad_is_told():
    model = nn.Linear(2, 1)
    loss = lambda: model(torch.ones(3, 2)).square().sum()
    for frozen in (model.state_dict(), [p.detach() for p in model.parameters()]):
        with pytest.warns(errors.IndependentWarning, match=r"none of the tensors.*model\.parameters"):
            found = hesse.hessian_diagonal(loss, frozen)
        assert not any(part.any() for part in (found.values() if isinstance(found, dict) else found))
    model.requires_grad_(False)
    with pytest.warns(errors.IndependentWarning, match="none of the tensors of model"):
        hesse.model_hessian_diagonal(model, F.mse_loss, torch.ones(3, 2), torch.ones(3, 1))


def containers(model):
    yield "a list", list(model.parameters()), list
    yield "a generator", model.parameters(), list
    yield "values of a dict", dict(model.named_parameters()).values(), list
    yield "a ParameterList", nn.ParameterList(model.parameters()), list
    yield (
        "a ParameterDict",
        nn.ParameterDict({n.replace(".", "_"): p for n, p in model.named_parameters()}),
        dict,
    )
    yield "named parameters", model.named_parameters(), dict
    yield "a list of named parameters", list(model.named_parameters()), dict
    yield "items of a dict", dict(model.named_parameters()).items(), dict


@pytest.mark.parametrize("number", range(8))
def test_whatever_gives_parameters(number):
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    data = torch.randn(5, 3, dtype=torch.float64)
    loss = lambda: model(data).square().sum()
    expected = hesse.hessian_diagonal(loss, tuple(model.parameters()))
    _, given, kind = list(containers(model))[number]
    found = hesse.hessian_diagonal(loss, given)
    assert type(found) is kind
    if kind is dict:
        by_name = {name.replace(".", "_"): part for name, part in found.items()}
        found = [by_name.pop(name) for name in ("0_weight", "0_bias", "2_weight", "2_bias")]
        assert not by_name
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_vector_of_another_shape_with_as_many_elements():
    x = torch.arange(6.0).view(2, 3)
    func = lambda x: (x**3).sum()
    v = torch.arange(1.0, 7.0)
    expected = 6 * x * v.view(2, 3)
    assert torch.equal(hesse.hessian_diagonal(func, x, v), expected)
    assert torch.equal(hesse.hessian_diagonal(func, [x], [v.view(3, 2)])[0], expected)
    assert torch.equal(hesse.hvp(func, x, v), expected)
    assert torch.equal(hesse.hvp(func, [x], v)[0], expected)  # a tensor for a list of one
    assert hesse.second_directional_derivative(func, x, v) == (expected * v.view(2, 3)).sum()


@pytest.mark.parametrize("empty", [[], (), {}])
def test_nothing_to_differentiate_by(empty):
    func = lambda *args: W.sum()
    assert hesse.hessian_diagonal(func, empty) == empty
    assert hesse.hessian_blocks(func, empty) == empty
    assert hesse.hessian(func, empty) == empty
    assert hesse.hvp(func, empty, empty) == empty
    assert hesse.hessian_trace(func, empty).item() == 0
    result = hesse.hessian_diagonal(func, empty, full_output=True)
    assert result.value == empty
    assert result.passes == 0
    assert "nothing to differentiate" in str(result.plan)


def test_a_model_without_parameters():
    assert hesse.model_hessian_diagonal(nn.Tanh(), F.mse_loss, W, W) == []


def test_integers_have_zeros_beside_others():
    n = torch.tensor([3, 4])
    found = hesse.hessian_diagonal(lambda w, n: (w**3 * n).sum(), (W.detach(), n))
    assert found[0].tolist() == [18.0, 48.0]
    assert found[1].tolist() == [0, 0]
    assert found[1].dtype == n.dtype
    found = hesse.hessian_diagonal(cube, {"n": n, "w": W}, {"n": n, "w": torch.tensor([1.0, 2.0])})
    assert found["w"].tolist() == [6.0, 24.0]
    assert hesse.hessian_trace(cube, [n, W]).item() == 18.0
    with pytest.raises(errors.IndependentError, match=r"params\[0\] does not require grad"):
        hesse.hessian_diagonal(cube, [n, W], strict=True)
    with pytest.warns(errors.IndependentWarning, match=r"int64 alone.*\.float\(\)"):
        assert hesse.hessian_diagonal(lambda x: (x**2).sum(), n).tolist() == [0, 0]


def test_strict_says_what_torch_says():
    with pytest.raises(RuntimeError, match="One of the differentiated Tensors does not require grad"):
        hesse.hessian_diagonal(cube, [W, torch.ones(2)], strict=True)


LINEAR = {
    "hessian": hesse.hessian,
    "blocks": hesse.hessian_blocks,
    "hvp": lambda f, x, **kw: hesse.hvp(f, x, x, **kw),
}


@pytest.mark.parametrize("question", LINEAR.values(), ids=LINEAR)
def test_strict_refuses_a_gradient_that_is_constant(question):
    """As torch does; the diagonal and the trace, which torch has not, ask for influence alone."""
    inputs = torch.ones(2), torch.ones(2)
    func = lambda x, y: (x**3).sum() + (2 * y).sum()
    with pytest.raises(RuntimeError, match=r"inputs\[1\] influences the output linearly"):
        question(func, inputs, strict=True)
    question(func, inputs)
    hesse.hessian_diagonal(func, inputs, strict=True)
    hesse.hessian_trace(func, inputs, strict=True)


def test_types_of_errors_are_torchs():
    x = torch.ones(4)
    vector_and_name = lambda a: (3 * a, "name")
    for question in LINEAR.values():
        with pytest.raises(TypeError, match="must return a tensor"):
            question(vector_and_name, x)
    with pytest.raises(TypeError, match="same structure"):
        hesse.hvp(cube, x, (x, 2))
    with pytest.raises(TypeError, match=r"v\[1\] must be a tensor"):
        hesse.hvp(lambda a, b: (a * b).sum(), (x, x), (x, 2))
    with pytest.raises(RuntimeError, match="as many elements"):
        hesse.hvp(lambda a: (a**2).sum(), x, torch.ones(5))


def test_the_flags_of_the_trace_are_named():
    """The third argument of torch-secorder's is a number of samples."""
    with pytest.raises(TypeError, match="positional"):
        hesse.hessian_trace(cube, [W], 10)


def test_a_product_of_a_single_number_needs_no_vector():
    x = torch.tensor(2.0)
    assert hesse.hvp(lambda x: x**3, x).item() == 12
    with pytest.raises(errors.ArgumentError, match=r"single element, met 2; pass"):
        hesse.hvp(lambda x: (x**3).sum(), torch.ones(2))


QUADRATIC = lambda x: (x * torch.tensor([1.0, 2.0])).square().sum()
GRAPHED = {
    "hessian": lambda x: hesse.hessian(QUADRATIC, x, create_graph=True),
    "blocks": lambda x: hesse.hessian_blocks(QUADRATIC, x, create_graph=True),
    "diagonal": lambda x: hesse.hessian_diagonal(QUADRATIC, x, create_graph=True),
    "trace": lambda x: hesse.hessian_trace(QUADRATIC, x, create_graph=True),
    "hvp": lambda x: hesse.hvp(QUADRATIC, x, torch.ones(2), create_graph=True),
    "along": lambda x: hesse.second_directional_derivative(QUADRATIC, x, torch.ones(2), create_graph=True),
    "of a constant": lambda x: hesse.hessian(lambda x: torch.ones(()), x, create_graph=True),
}


@pytest.mark.parametrize("ask", GRAPHED.values(), ids=GRAPHED)
def test_a_constant_result_is_on_the_graph(ask):
    for last in (2.0, float("inf")):  # which must not get into the result
        x = torch.tensor([1.0, last], requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.NonFiniteWarning)
            found = ask(x)
        assert found.requires_grad
        assert torch.isfinite(found).all()
        (slope,) = torch.autograd.grad(found.sum(), x)
        assert slope.tolist() == [0, 0]
