"""The Gauss-Newton matrix by the sweep, against its explicit product of Jacobians and the loss's Hessian."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import classes, x
from hesse import GaussNewtonOperator
from hesse.answer import Options, answer
from networks import NETWORKS, Autoencoder, Tensor, mlp
from oracle import relative_error
from test_sweep_graphs import LOSSES, STEP, output_of

HIDDEN = ("custom Function, asymmetric",)  # whose Jacobian is not the derivative of what it computes
MODELS = [n for n in NETWORKS if n.name not in HIDDEN and not isinstance(n().model, Tensor)]
LARGE = 400
"""Coordinates beyond which explicit Jacobians take long."""


def explicit(func, of_output, tensors):
    with sdpa_kernel(SDPBackend.MATH):
        given = tuple(tensor.detach() for tensor in tensors)
        z = func(*given)
        parts = jacobian(func, given)
        bend = hessian(of_output, z.detach()).reshape(z.numel(), z.numel())
    J = torch.cat([part.reshape(z.numel(), -1) for part in parts], 1)
    return J.T @ bend @ J


def asked(A, question, plan="sweep", memory=None):
    options = Options(plan, True, memory, False, True)
    return answer(question, A.structure, options, list)


def require_equal(result, exact, sizes):
    """An answer's parts are those of the matrix."""
    scale = exact.abs().max().clamp_min(1e-6)
    for i, rows in enumerate(exact.split(sizes)):
        block = rows.split(sizes, 1)[i]
        expected = block if result.plan.question == "blocks" else block.diagonal()
        assert (result.value[i].reshape(expected.shape) - expected).abs().max() < 1e-9 * scale, i


def of_network(network):
    """Its operator, the explicit matrix, and the sizes of the parameters that are differentiated by."""
    problem = network()
    free = [(name, t) for name, t in zip(problem.names, problem.tensors, strict=True) if t.requires_grad]
    names, tensors = zip(*free, strict=True)

    def output(*leaves):
        return functional_call(problem.model, dict(zip(names, leaves, strict=True)), problem.data)

    A = GaussNewtonOperator(lambda: problem.model(*problem.data), list(tensors), of_output=problem.loss)
    return A, explicit(output, problem.loss, tensors), [t.numel() for t in tensors]


@pytest.mark.parametrize("network", MODELS, ids=lambda network: network.name)
def test_networks(network):
    A, exact, sizes = of_network(network)
    for question in ("diagonal", "blocks"):
        result = asked(A, question)
        require_equal(result, exact, sizes)
        if result.plan.chunk > 1 and all(share.method == "sweep" for share in result.plan.shares):
            require_equal(asked(A, question, replace(result.plan, chunk=2)), exact, sizes)  # in chunks
    V = x(len(exact), 2)
    assert (A @ V - exact @ V).abs().max() < 1e-9 * (exact @ V).abs().max().clamp_min(1e-6)


SWEPT = (
    "mlp",
    "relu",
    "cnn, max pooling",
    "transformer",
    "attention",
    "branches",
    "gru",
    "bilinear",
)


@pytest.mark.parametrize("network", [n for n in MODELS if n.name in SWEPT], ids=lambda network: network.name)
def test_networks_that_are_swept(network):
    A, *_ = of_network(network)
    plan = asked(A, "diagonal").plan
    assert plan.method == "sweep"
    assert plan.by("sweep")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(STEP, min_size=1, max_size=8),
    st.sampled_from(sorted(LOSSES)),
    st.integers(0, 3),
    st.sampled_from([None, 1, 2]),
)
def test_random_graph(steps, loss, seed, size):
    output, tensors = output_of(steps, seed)
    A = GaussNewtonOperator(output, tensors, of_output=LOSSES[loss])
    exact, sizes = explicit(output, LOSSES[loss], tensors), [t.numel() for t in tensors]
    for question in ("diagonal", "blocks"):
        result = asked(A, question)
        require_equal(result, exact, sizes)
        if size is not None and result.plan.chunk > size:
            require_equal(asked(A, question, replace(result.plan, chunk=size)), exact, sizes)


def test_in_chunks_under_a_budget():
    torch.manual_seed(0)
    model, data, targets = mlp().double(), x(600, 3), classes(3, 600)
    output = lambda *leaves: functional_call(model, dict(zip(names, leaves, strict=True)), (data,))
    names = [name for name, _ in model.named_parameters()]
    tensors = list(model.parameters())
    of_output = lambda z: F.cross_entropy(z, targets)
    A = GaussNewtonOperator(lambda: model(data), tensors, of_output=of_output)
    result = asked(A, "diagonal", memory="150KiB")
    assert result.plan.method == "sweep"
    assert 1 <= result.plan.chunk < 600
    p = model(data).detach().softmax(1)
    given = tuple(t.detach() for t in tensors)
    J = torch.cat([part.reshape(600, 3, -1) for part in jacobian(output, given, vectorize=True)], 2)
    bend = (p.diag_embed() - p[:, :, None] * p[:, None]) / 600
    exact = torch.einsum("nai,nab,nbi->i", J, bend, J)
    assert relative_error(torch.cat([part.flatten() for part in result.value]), exact) < 1e-9


class Scaled(nn.Module):
    """A temperature that enters everywhere is carried along."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(x(1))

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs) * self.scale)) * self.scale


@pytest.mark.parametrize("build", [Scaled, Autoencoder])
def test_live_leaves(build):
    torch.manual_seed(0)
    model = build().double()
    data = x(40, 4 if build is Autoencoder else 3)
    names, tensors = zip(*model.named_parameters(), strict=True)
    output = lambda *leaves: functional_call(model, dict(zip(names, leaves, strict=True)), (data,))
    of_output = lambda z: (z.sin() * z.roll(1, 1)).sum(1).exp().mean()
    A = GaussNewtonOperator(lambda: model(data), list(tensors), of_output=of_output)
    exact, sizes = explicit(output, of_output, tensors), [t.numel() for t in tensors]
    for question in ("diagonal", "blocks"):
        result = asked(A, question)
        assert result.plan.method == "sweep"
        assert any(share.why == "carried along the way" for share in result.plan.shares), question
        require_equal(result, exact, sizes)
