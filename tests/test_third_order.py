"""Norms whose fused form has wrong derivatives in torch: weight norm in second order, others in third.

A third derivative is met in a function that takes gradients itself. The oracle gets the same function with
norms written by hand.
"""

import pytest
import torch
import torch.nn.functional as F

import hesse
from oracle import as_matrix, hessian_matrix, relative_error


def by_hand(value, dims):
    centred = value - value.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()


NORMS = {
    "layer norm": (
        lambda v, w, b: F.layer_norm(v, (4,), w, b),
        lambda v, w, b: by_hand(v, (-1,)) * w + b,
        (3, 4),
    ),
    "batch norm": (
        lambda v, w, b: F.batch_norm(v, torch.zeros(4).double(), torch.ones(4).double(), w, b, training=True),
        lambda v, w, b: by_hand(v, (0,)) * w + b,
        (3, 4),
    ),
    "batch norm of images": (
        lambda v, w, b: F.batch_norm(v, None, None, w, b, training=True),
        lambda v, w, b: by_hand(v, (0, 2)) * w[:, None] + b[:, None],
        (3, 4, 2),
    ),
    "instance norm": (
        lambda v, w, b: F.instance_norm(v, weight=w, bias=b),
        lambda v, w, b: by_hand(v, (2,)) * w[:, None] + b[:, None],
        (2, 4, 3),
    ),
}


WEIGHT_NORMS = {
    "rows": (
        lambda v, g: torch._weight_norm(v, g, 0),
        lambda v, g: g * v / v.norm(dim=1, keepdim=True),
        (3, 1),
    ),
    "columns": (
        lambda v, g: torch._weight_norm(v, g, 1),
        lambda v, g: g * v / v.norm(dim=0, keepdim=True),
        (1, 4),
    ),
    "all": (lambda v, g: torch._weight_norm(v, g, -1), lambda v, g: g * v / v.norm(), ()),
}


@pytest.mark.parametrize(("fused", "plain", "shape"), WEIGHT_NORMS.values(), ids=WEIGHT_NORMS)
def test_second_derivatives_of_weight_norm(fused, plain, shape):
    data = torch.randn(5, 4, dtype=torch.float64)
    inputs = torch.randn(3, 4, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    build = lambda norm: lambda v, g: torch.tanh(data @ norm(v, g).T).exp().sum()
    expected = hessian_matrix(build(plain), inputs)
    assert relative_error(as_matrix(hesse.hessian(build(fused), inputs), inputs), expected) < 1e-10
    diagonal = torch.cat([d.flatten() for d in hesse.hessian_diagonal(build(fused), inputs)])
    assert relative_error(diagonal, expected.diagonal()) < 1e-10


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "normed", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm], ids=["new", "old"]
)
def test_layers_with_weight_norm(normed):
    model = torch.nn.Sequential(normed(torch.nn.Linear(5, 4)), torch.nn.Tanh()).double()
    data = torch.randn(6, 5, dtype=torch.float64)
    loss = lambda: model(data).exp().mean()
    parameters = list(model.parameters())
    blocks = hesse.hessian(loss, parameters)
    matrix = as_matrix(blocks, parameters)
    assert relative_error(matrix, matrix.T) < 1e-12
    step, direction = 1e-5, [torch.randn_like(p) for p in parameters]

    def gradient(scale):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(scale * d)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters)])

    ahead, behind = gradient(step), gradient(-2 * step)
    slope = (ahead - behind) / (2 * step)
    assert relative_error(matrix @ torch.cat([d.flatten() for d in direction]), slope) < 1e-6


def gradient_penalty(norm, points):
    def function(factor, weight, bias):
        at = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad(norm(at * factor, weight, bias).sin().sum(), at, create_graph=True)
        return (slope - 1).square().sum()

    return function


def with_transforms(norm, points):
    def function(factor, weight, bias):
        energy = lambda at: norm(at * factor, weight, bias).sin().sum()
        return torch.func.grad(energy)(points).square().sum()

    return function


@pytest.mark.parametrize("build", [gradient_penalty, with_transforms])
@pytest.mark.parametrize(("fused", "plain", "shape"), NORMS.values(), ids=NORMS)
def test_third_derivatives_of_norms(build, fused, plain, shape):
    points = torch.randn(shape, dtype=torch.float64)
    inputs = tuple(torch.randn(s, dtype=torch.float64) for s in (shape[1:], (4,), (4,)))
    expected = hessian_matrix(build(plain, points), inputs)
    func = build(fused, points)
    assert relative_error(as_matrix(hesse.hessian(func, inputs), inputs), expected) < 1e-10
    v = tuple(torch.randn_like(t) for t in inputs)
    product = torch.cat([p.flatten() for p in hesse.hvp(func, inputs, v)])
    flat = torch.cat([t.flatten() for t in v])
    assert relative_error(product, expected @ flat) < 1e-10
