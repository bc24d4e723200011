"""Partial Hessians, flat answers, and products with many vectors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hesse
from cases import CASES, x
from hesse import errors
from networks import NETWORKS, Problem, mlp, squares
from oracle import hessian_matrix, relative_error

POINT = x(4, 3)


def energy(x):
    return x.sin().sum() * x.exp().sum() + (x**3).prod()


@pytest.fixture(scope="module")
def whole():
    return hessian_matrix(energy, (POINT,)).view(4, 3, 4, 3)


INDICES = {
    "integers": [0, 2],
    "a range": range(1, 4),
    "repeated": [3, 0, 0],
    "negative": [-1],
    "a slice": slice(1, 3),
    "a number": 1,
    "a mask of the first dimension": torch.tensor([True, False, True, False]),
    "a mask as a list": [True, False, True, False],
    "a mask of all": POINT > 0,
    "a tuple": (slice(None), 0),
    "a table": torch.tensor([[0, 1], [2, 3]]),
    "nothing": [],
    "all": slice(None),
}


def indexed(index):
    """What numpy and torch make of it."""
    if isinstance(index, (list, range)):
        return torch.tensor(list(index), dtype=None if len(index) else torch.long)
    return index


@pytest.mark.parametrize("method", ["auto", "taps", "dense"])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_an_index_of_one_tensor(index, method, whole):
    """The answer is what indexing the whole Hessian gives."""
    key = indexed(index)
    rows = hesse.hessian(energy, POINT, rows=index, method=method)
    assert rows.shape == whole[key].shape
    torch.testing.assert_close(rows, whole[key])
    columns = hesse.hessian(energy, POINT, columns=index, method=method)
    turned = whole.permute(2, 3, 0, 1)[key]
    torch.testing.assert_close(columns, turned.movedim((-2, -1), (0, 1)))
    square = hesse.hessian(energy, POINT, rows=index, square=True, method=method)
    expected = turned.movedim((-2, -1), (0, 1))[key]
    assert square.shape == expected.shape
    torch.testing.assert_close(square, expected)
    both = hesse.hessian(energy, POINT, rows=index, columns=[1], method=method)
    torch.testing.assert_close(both, whole[:, :, [1]][key])


def test_passes_are_in_proportion(whole):
    atoms = [0, 2]
    result = hesse.hessian(energy, POINT, rows=atoms, full_output=True)
    assert result.plan.passes == 6
    assert result.passes == 7  # and one for the check
    assert result.certificate.passed
    assert result.plan.part == (6, 12)
    few_columns = hesse.hessian(energy, POINT, columns=atoms, full_output=True)
    assert few_columns.plan.passes == 6
    assert "one product per column" in few_columns.plan.reason
    torch.testing.assert_close(few_columns.value, whole[:, :, atoms])
    planned = hesse.plan("hessian", energy, POINT, rows=atoms)
    assert planned.passes == 6
    assert "6 rows and 12 columns of the hessian of 12 coordinates" in str(planned)
    torch.testing.assert_close(hesse.hessian(energy, POINT, rows=[1, 3], method=planned), whole[[1, 3]])
    with pytest.raises(errors.ArgumentError, match="plan for 6 rows and 12 columns"):
        hesse.hessian(energy, POINT, method=planned)


def containers():
    a, b, c = x(2, 3), x(4), x(())
    func = lambda a, b, c: (a.exp().sum() * b).sin().sum() * c + (a**3).sum() * b.sum()
    return func, (a, b, c)


def test_containers_of_indices():
    func, (a, b, c) = containers()
    rows = hesse.hessian(func, (a, b, c))
    found = hesse.hessian(func, (a, b, c), rows=([0], slice(1, 3), []), columns=(slice(None), [0, 0], ...))
    assert isinstance(found, tuple)
    assert isinstance(found[0], tuple)
    torch.testing.assert_close(found[0][0], rows[0][0][[0]])
    torch.testing.assert_close(found[0][1], rows[0][1][[0]][:, :, [0, 0]])
    torch.testing.assert_close(found[1][2], rows[1][2][1:3])
    assert found[2][1].shape == (0, 2)
    found = hesse.hessian(func, [a, b, c], rows={1: [2]}, columns={0: slice(None), 2: ...})
    assert list(found) == [1]
    assert list(found[1]) == [0, 2]
    torch.testing.assert_close(found[1][0], rows[1][0][[2]])
    torch.testing.assert_close(found[1][2], rows[1][2][[2]])
    named = {"a": a, "b": b, "c": c}
    found = hesse.hessian(lambda p: func(**p), named, rows={"b": slice(None)})
    assert list(found) == ["b"]
    assert list(found["b"]) == ["a", "b", "c"]
    torch.testing.assert_close(found["b"]["a"], rows[1][0])
    square = hesse.hessian(lambda p: func(**p), named, rows={"b": [0], "c": ...}, square=True)
    assert {k: list(v) for k, v in square.items()} == {"b": ["b", "c"], "c": ["b", "c"]}
    torch.testing.assert_close(square["b"]["c"], rows[1][2][[0]])


def part_of_network(problem, seed):
    """Some coordinates of some tensors, by position, and their numbers among all."""
    generator = torch.Generator().manual_seed(seed)
    chosen, numbers, start = {}, [], 0
    for i, tensor in enumerate(problem.tensors):
        if tensor.numel() and torch.rand((), generator=generator) < 0.6:
            mask = torch.rand(tensor.shape, generator=generator) < 0.4
            chosen[i] = mask
            numbers.append(mask.flatten().nonzero().flatten() + start)
        start += tensor.numel()
    return chosen, torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.long)


@pytest.mark.parametrize("method", ["taps", "dense"])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_parts_of_networks(network, method):
    problem = network()
    matrix = problem.matrix()
    (rows, down), (columns, across) = (part_of_network(problem, seed) for seed in (1, 2))
    ask = lambda **options: hesse.hessian(
        problem.closure, problem.tensors, flat=True, method=method, full_output=True, **options
    )
    for options, expected in (
        ({"rows": rows, "columns": columns}, matrix[down][:, across]),
        ({"rows": rows}, matrix[down]),
        ({"columns": columns}, matrix[:, across]),
        ({"rows": rows, "square": True}, matrix[down][:, down]),
    ):
        result = ask(**options)
        assert result.value.shape == expected.shape
        if expected.numel():
            assert (result.value - expected).abs().max() <= 1e-9 * matrix.abs().max()
            assert result.certificate.passed


def test_one_layer_against_all_by_its_outputs():
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 4))
    problem = Problem(model.double(), squares, x(6, 30))
    result = hesse.hessian(
        problem.closure, problem.tensors, rows={4: slice(None)}, method="taps", full_output=True
    )
    assert result.plan.method == "taps"
    assert result.plan.passes == 4 + 15  # outputs of the last layer, and J of its inputs, for 60 rows
    assert result.passes == result.plan.passes + 1
    plain = hesse.hessian(problem.closure, problem.tensors, rows={4: slice(None)}, method="dense")
    for one, other in zip(result.value[4], plain[4], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", [c for c in CASES if "empty" not in c.name], ids=lambda case: case.name)
def test_parts_of_functions(case):
    function, tensors = case()
    matrix = hessian_matrix(function, tensors)
    numbers = torch.arange(0, len(matrix), 3)
    found = hesse.hessian(function, tensors, rows=numbers if len(tensors) > 1 else None, flat=True)
    expected = matrix[numbers] if len(tensors) > 1 else matrix
    assert relative_error(found, expected) < 1e-10 or not expected.any()


BAD = [
    ({"rows": [4]}, r"rows does not fit inputs of shape \[4, 3\].*out of"),
    ({"rows": None, "square": True}, "pass rows, and no columns"),
    ({"rows": [0], "columns": [1], "square": True}, "pass rows, and no columns"),
    ({"rows": torch.tensor([0.5])}, "integers, booleans or slices, met a tensor of torch.float32"),
    ({"columns": "first"}, "columns does not fit"),
    ({"rows": torch.ones(3, dtype=torch.bool)}, "does not fit"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_indices(options, message):
    with pytest.raises(errors.ArgumentError, match=message):
        hesse.hessian(energy, POINT, **options)


def test_bad_containers():
    func, tensors = containers()
    named = dict(zip("abc", tensors, strict=True))
    for rows, message in (
        ([0, 1], "like the inputs, with an index for every tensor, or a dict.*by position; met list of 2"),
        (slice(None), "met slice"),
        ((None, [], []), "None, which is no index"),
        ({3: [0]}, "names 3, which"),
        ({"a": [0]}, "names 'a', which"),
    ):
        with pytest.raises(errors.ArgumentError, match=message):
            hesse.hessian(func, tensors, rows=rows)
    with pytest.raises(errors.ArgumentError, match="names 'd', which"):
        hesse.hessian(lambda p: func(**p), named, rows={"d": [0]})
    with pytest.raises(TypeError, match="by name; met list of 3"):
        hesse.hessian(lambda p: func(**p), named, rows=[[0], [0], [0]])
    with pytest.raises(errors.ArgumentError, match="part of the hessian, met the diagonal"):
        hesse.plan("diagonal", func, tensors, rows={0: [0]})


@pytest.mark.parametrize("method", ["auto", "dense"])
def test_a_part_can_be_differentiated_again(method):
    point = POINT.clone().requires_grad_()
    found = hesse.hessian(energy, point, rows=[1], columns=[0], create_graph=True, method=method)
    slope = torch.autograd.grad(found.sum(), point)[0]
    full = hesse.hessian(energy, point, create_graph=True)[1, :, 0]
    torch.testing.assert_close(slope, torch.autograd.grad(full.sum(), point)[0])


def test_a_budget_holds_the_part_and_not_the_whole():
    point = torch.randn(4000, dtype=torch.float64)
    func = lambda x: (x.sin() * x.roll(1)).sum()
    with pytest.raises(MemoryError):
        hesse.hessian(func, point, memory="50MiB")
    part = hesse.hessian(func, point, rows=slice(0, 100), memory="50MiB")
    assert part.shape == (100, 4000)


# Flat answers


def test_flat_answers_are_in_the_order_of_the_inputs():
    func, (a, b, c) = containers()
    matrix = hessian_matrix(func, (a, b, c))
    for inputs, call in (
        ((a, b, c), func),
        ([a, b, c], func),
        ({"a": a, "b": b, "c": c}, lambda p: func(**p)),
        (({"a": a}, [b, c]), lambda p, q: func(p["a"], *q)),
    ):
        result = hesse.hessian(call, inputs, flat=True, full_output=True)
        torch.testing.assert_close(result.value, matrix)
        assert [shape.numel() for shape in result.shapes] == [6, 4, 1]
        assert len(result.names) == 3
        torch.testing.assert_close(hesse.hessian_diagonal(call, inputs, flat=True), matrix.diagonal())
        v = x(11)
        torch.testing.assert_close(hesse.hvp(call, inputs, v, flat=True), matrix @ v)
        many = x(5, 11)
        torch.testing.assert_close(hesse.hvp(call, inputs, many, flat=True), many @ matrix)
    assert result.names == ("inputs[0]['a']", "inputs[1][0]", "inputs[1][1]")
    alone = hesse.hessian(energy, POINT, flat=True)
    torch.testing.assert_close(alone, hessian_matrix(energy, (POINT,)))


def test_numbers_of_all_coordinates_choose_rows_of_a_flat_answer():
    func, tensors = containers()
    matrix = hessian_matrix(func, tensors)
    for rows in ([9, 0, 7, 7], torch.arange(11) % 2 == 0, slice(3, 8), torch.tensor([10])):
        found = hesse.hessian(func, tensors, rows=rows, flat=True)
        torch.testing.assert_close(found, matrix[rows])
        square = hesse.hessian(func, tensors, rows=rows, square=True, flat=True)
        torch.testing.assert_close(square, matrix[rows][:, rows])
        columns = hesse.hessian(func, tensors, columns=rows, flat=True)
        torch.testing.assert_close(columns, matrix[:, rows])


def test_flat_diagonals_of_models():
    model = mlp().double()
    data, targets = x(5, 3), x(5, 3)
    result = hesse.model_hessian_diagonal(model, F.mse_loss, data, targets, flat=True, full_output=True)
    plain = hesse.model_hessian_diagonal(model, F.mse_loss, data, targets)
    torch.testing.assert_close(result.value, torch.cat([part.flatten() for part in plain]))
    assert result.names == tuple(name for name, _ in model.named_parameters())
    v = [torch.randn_like(p) for p in model.parameters()]
    loss = lambda: F.mse_loss(model(data), targets)
    scaled = hesse.hessian_diagonal(loss, list(model.parameters()), v, flat=True)
    torch.testing.assert_close(scaled, result.value * torch.cat([part.flatten() for part in v]))


def test_flat_answers_of_several_dtypes():
    func = lambda a, b: (a.double() * b).exp().sum()
    tensors = torch.randn(3), x(3)
    matrix = hesse.hessian(func, tensors, flat=True)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-6, atol=1e-6)


# Products with many vectors


@settings(max_examples=20, deadline=None)
@given(count=st.integers(0, 70), seed=st.integers(0, 100))
def test_many_vectors_share_an_evaluation(count, seed):
    torch.manual_seed(seed)
    func, tensors = containers()
    calls = []
    counted = lambda *tensors: calls.append(1) or func(*tensors)
    matrix = hessian_matrix(func, tensors)
    vectors = tuple(x(count, *t.shape) for t in tensors)
    found = hesse.hvp(counted, tensors, vectors)
    assert len(calls) == 1
    flat = torch.cat([v.flatten(1) if v.dim() > 1 else v[:, None] for v in vectors], 1)
    assert [part.shape for part in found] == [v.shape for v in vectors]
    found = torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in found], 1)
    torch.testing.assert_close(found, flat @ matrix)


def test_many_vectors_of_a_closure_and_with_a_graph():
    w = POINT.clone().requires_grad_()
    matrix = hessian_matrix(energy, (POINT,))
    v = x(7, 4, 3)
    found = hesse.hvp(lambda: energy(w), [w], [v])[0]
    torch.testing.assert_close(found.flatten(1), v.flatten(1) @ matrix)
    graphed = hesse.hvp(energy, w, v, create_graph=True)
    slope = torch.autograd.grad(graphed.sum(), w)[0]
    single = hesse.hvp(energy, w, v.sum(0), create_graph=True)
    torch.testing.assert_close(slope, torch.autograd.grad(single.sum(), w)[0])


def test_many_vectors_within_a_budget_and_told(monkeypatch):
    told = []
    v = x(200, 4, 3)
    found = hesse.hvp(
        energy, POINT, v, memory="1MiB", progress=lambda done, total: told.append((done, total))
    )
    torch.testing.assert_close(found.flatten(1), v.flatten(1) @ hessian_matrix(energy, (POINT,)))
    assert told[-1] == (200, 200)
    assert len(told) > 1


@pytest.mark.parametrize(
    ("v", "options", "message"),
    [
        (x(7, 4, 2), {}, "as many elements"),
        (x(2, 7, 4, 3), {}, "as many elements"),
        (x(11), {"flat": True}, "a vector of 12 coordinates"),
        (x(2, 2, 12), {"flat": True}, "a vector of 12 coordinates"),
        (3.0, {"flat": True}, "met float"),
    ],
)
def test_bad_vectors(v, options, message):
    with pytest.raises(errors.ArgumentError, match=message):
        hesse.hvp(energy, POINT, v, **options)


def test_many_vectors_for_some_tensors_only():
    func, tensors = containers()
    with pytest.raises(errors.ArgumentError, match="as many elements"):
        hesse.hvp(func, tensors, (x(5, 2, 3), x(4), x(())))
