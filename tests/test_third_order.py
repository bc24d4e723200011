"""Norms in a function that takes gradients itself: a third derivative, which torch's fused ones get wrong.

The oracle therefore gets the same function with norms written by hand.
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
