"""Every question against plain double backward, in float64, on every case."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hesse
from cases import CASES
from oracle import as_matrix, hessian_matrix, relative_error

TOLERANCE = 1e-10


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    func, tensors = request.param()
    return func, tensors, hessian_matrix(func, tensors)


def diagonal_blocks(matrix, tensors):
    sizes = [t.numel() for t in tensors]
    rows = matrix.split(sizes)
    return [row.split(sizes, dim=1)[i] for i, row in enumerate(rows)]


def test_hessian(case):
    func, tensors, expected = case
    result = hesse.hessian(func, tensors, full_output=True)
    assert relative_error(as_matrix(result.value, tensors), expected) < TOLERANCE
    assert result.certificate.passed
    for i, row in enumerate(result.value):
        for j, block in enumerate(row):
            assert block.shape == tensors[i].shape + tensors[j].shape


def test_diagonal_and_trace(case):
    func, tensors, expected = case
    diagonal = hesse.hessian_diagonal(func, tensors)
    found = torch.cat([d.flatten() for d in diagonal])
    assert [d.shape for d in diagonal] == [t.shape for t in tensors]
    assert relative_error(found, expected.diagonal()) < TOLERANCE
    trace = hesse.hessian_trace(func, tensors)
    assert abs(trace - expected.trace()) <= TOLERANCE * expected.diagonal().abs().sum()


def test_blocks(case):
    func, tensors, expected = case
    blocks = hesse.hessian_blocks(func, tensors)
    for block, tensor, wanted in zip(blocks, tensors, diagonal_blocks(expected, tensors), strict=True):
        assert block.shape == tensor.shape + tensor.shape
        if tensor.numel():
            # A block that is zero but for rounding (a bias before a batch norm) is measured by the rest.
            own, whole = wanted.abs().max(), expected.abs().max()
            scale = whole if own < 1e-14 * whole else own
            assert (block.reshape(wanted.shape) - wanted).abs().max() <= TOLERANCE * scale


def test_products(case):
    func, tensors, expected = case
    v = tuple(torch.randn_like(t) for t in tensors)
    flat = torch.cat([t.flatten() for t in v])
    found = torch.cat([p.flatten() for p in hesse.hvp(func, tensors, v)])
    assert relative_error(found, flat @ expected) < TOLERANCE  # H v, or v H where H is not symmetric
    along = hesse.second_directional_derivative(func, tensors, v)
    assert along.shape == ()
    torch.testing.assert_close(along, flat @ expected @ flat, rtol=1e-9, atol=1e-9)


def test_every_chunk_size_gives_the_same(case, monkeypatch):
    func, tensors, expected = case
    for start in (1, 3, 1000):
        monkeypatch.setattr("hesse.runtime.chunks._START", start)
        found = as_matrix(hesse.hessian(func, tensors), tensors)
        assert relative_error(found, expected) < TOLERANCE


def test_result_can_be_differentiated_again(case):
    func, tensors, expected = case
    if not torch.allclose(expected, expected.T):
        pytest.skip("a backward that is no derivative has no higher ones to compare with")
    leaves = tuple(t.detach().clone().requires_grad_() for t in tensors)

    def total(*leaves):
        blocks = hesse.hessian(func, leaves, create_graph=True)
        return sum((b * b).sum() for row in blocks for b in row)

    value = total(*leaves)
    if not value.requires_grad:  # a quadratic function has a constant Hessian
        return
    gradient = torch.autograd.grad(value, leaves, allow_unused=True)
    direction = [torch.randn_like(t) for t in leaves]
    step = 1e-6
    with torch.no_grad():
        ahead = total(*(t + step * d for t, d in zip(leaves, direction, strict=True)))
        behind = total(*(t - step * d for t, d in zip(leaves, direction, strict=True)))
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True) if g is not None)
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("question", [hesse.hessian_diagonal, hesse.hessian_blocks, hesse.hessian_trace])
def test_other_questions_can_be_differentiated_again(question):
    a = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def total(a, b):
        answer = question(lambda a, b: (a**4).sum() * b**3, (a, b), create_graph=True)
        return sum((part**2).sum() for part in (answer if isinstance(answer, tuple) else (answer,)))

    assert torch.autograd.gradcheck(total, (a, b))


def test_products_can_be_differentiated_again():
    a = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    v = torch.ones(3, dtype=torch.float64)
    func = lambda a: (a**4).sum() * a[0]
    assert torch.autograd.gradcheck(lambda a: hesse.hvp(func, a, v, create_graph=True), (a,))
    assert torch.autograd.gradcheck(
        lambda a: hesse.second_directional_derivative(func, a, v, create_graph=True), (a,)
    )


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_any_shapes(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    def func(*tensors):
        total = sum((i + 1) * t.sum() for i, t in enumerate(tensors))
        return torch.sin(total) + sum(t.pow(3).sum() for t in tensors)

    expected = hessian_matrix(func, tensors)
    if expected.numel():
        found = as_matrix(hesse.hessian(func, tensors), tensors)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        diagonal = torch.cat([d.flatten() for d in hesse.hessian_diagonal(func, tensors)])
        torch.testing.assert_close(diagonal, expected.diagonal(), rtol=1e-10, atol=1e-10)


def test_diagonal_is_not_the_row_sum():
    point = torch.tensor([1.0, 2.0], dtype=torch.float64)
    func = lambda p: p[0] * p[1] + p[0] ** 2
    assert hesse.hessian_diagonal(func, point).tolist() == [2.0, 0.0]  # row sums: [3, 1]
