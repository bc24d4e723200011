"""Taps: one product a neuron, exact wherever they apply, and not taken (or noticed) where they do not."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import hesse
from hesse import errors
from oracle import hessian_matrix, relative_error

N = 6


def x(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def ask(model, loss_fn, inputs, targets=None, **options):
    return hesse.model_hessian_diagonal(model, loss_fn, inputs, targets, full_output=True, **options)


def expected(model, loss_fn, inputs, targets=None):
    names = [name for name, _ in model.named_parameters()]
    func = lambda *tensors: loss_fn(
        functional_call(model, dict(zip(names, tensors, strict=True)), (inputs,)), targets
    )
    return hessian_matrix(func, list(model.parameters())).diagonal()


def flat(result):
    return torch.cat([d.flatten() for d in result.value])


def mlp(*widths, bias=True, activation=nn.Tanh):
    layers = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def softmax_loss(output, targets):
    return F.cross_entropy(output, targets)


def squares(output, targets):
    return output.pow(4).mean()


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.scale = nn.LayerNorm(4), nn.Parameter(torch.ones(4))

    def forward(self, inputs):
        hidden = inputs + torch.tanh(self.first(inputs))
        return self.norm(hidden * F.gelu(self.second(hidden), approximate="tanh")) * self.scale


class Tokens(nn.Module):
    """Positions share the weights and meet in an attention; samples do not."""

    def __init__(self, wide=6):
        super().__init__()
        self.key, self.value, self.out = nn.Linear(wide, 3), nn.Linear(wide, 3), nn.Linear(3, 5)

    def forward(self, tokens):
        key, value = self.key(tokens), self.value(tokens)
        return torch.tanh(self.out(F.scaled_dot_product_attention(key, key, value)))


APPLIES = {
    # name: model, loss, inputs, passes: one per output and position, one per other coordinate
    "mlp": (mlp(4, 5, 3), softmax_loss, x(N, 4), 5 + 3),
    "no bias": (mlp(4, 5, 3, bias=False), softmax_loss, x(N, 4), 5 + 3),
    "relu": (mlp(4, 5, 3, activation=nn.ReLU), softmax_loss, x(N, 4), 5 + 3),
    "in-place activation": (
        nn.Sequential(nn.Linear(4, 5), nn.SiLU(inplace=True), nn.Linear(5, 3)).double(),
        softmax_loss,
        x(N, 4),
        5 + 3,
    ),
    "skips, norm, product of layers": (Skip().double(), squares, x(N, 4), 4 + 4 + 12),
    "two positions": (mlp(4, 5, 3), squares, x(N, 2, 4), 2 * 5 + 2 * 3),
    "attention": (Tokens().double(), squares, x(N, 2, 6), 2 * 3 + 2 * 3 + 2 * 5),
    "more positions than inputs": (mlp(2, 3), squares, x(N, 5, 2), 3 * 2 + 3),
    "one sample": (mlp(4, 3, 2), squares, x(1, 4), 3 + 2),
}


@pytest.mark.parametrize(("model", "loss", "inputs", "passes"), APPLIES.values(), ids=APPLIES)
def test_where_taps_apply(model, loss, inputs, passes):
    targets = torch.randint(0, 3, (len(inputs),))
    result = ask(model, loss, inputs, targets)
    assert relative_error(flat(result), expected(model, loss, inputs, targets)) < 1e-10
    assert result.plan.passes == passes
    dense = ask(model, loss, inputs, targets, method="dense")
    assert dense.plan.method == "dense"
    assert relative_error(flat(dense), flat(result)) < 1e-10
    trace = hesse.hessian_trace(lambda: loss(model(inputs), targets), list(model.parameters()))
    torch.testing.assert_close(trace, flat(result).sum())


def test_functional_form():
    model, inputs = mlp(4, 5, 3), x(N, 4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda parameters: squares(functional_call(model, parameters, (inputs,)), None)
    result = hesse.hessian_diagonal(loss, parameters, full_output=True)
    assert result.plan.method == "taps"
    found = torch.cat([d.flatten() for d in result.value.values()])
    assert relative_error(found, expected(model, squares, inputs)) < 1e-10


def test_frozen_layer():
    model, inputs = mlp(4, 5, 3), x(N, 4)
    model[0].weight.requires_grad_(False)
    result = ask(model, squares, inputs)
    wanted = expected(model, squares, inputs)
    wanted[:20] = 0
    assert relative_error(flat(result), wanted) < 1e-10


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(torch.tanh(self.layer(inputs)))


class Penalised(nn.Module):
    """The weight has a second use that is no layer; its gradient there is zero, its curvature is not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("start", self.layer.weight.detach().clone())

    def forward(self, inputs):
        return torch.tanh(self.layer(inputs)).sum() + (self.layer.weight - self.start).square().sum()


class SharedView(nn.Module):
    """The weight is used again through a view of it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, inputs):
        return torch.tanh(self.layer(inputs)) @ self.layer.weight.T


def contrastive(output, targets):
    normed = F.normalize(output)
    return F.cross_entropy(normed @ normed.T, torch.arange(len(output)))


def first(output, targets):
    return output.mean()


DOES_NOT_APPLY = {
    "tied weights": (Tied().double(), squares, x(N, 4)),
    "a penalty on the weight": (Penalised().double(), first, x(N, 4)),
    "a view of the weight": (SharedView().double(), squares, x(N, 4)),
    "batch norm in training": (
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double(),
        squares,
        x(N, 4),
    ),
    "contrastive loss": (mlp(4, 5, 3), contrastive, x(N, 4)),
    "a convolution": (nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh()).double(), squares, x(N, 2, 4)),
}


@pytest.mark.parametrize(("model", "loss", "inputs"), DOES_NOT_APPLY.values(), ids=DOES_NOT_APPLY)
def test_where_taps_do_not_apply(model, loss, inputs):
    """The answer is exact all the same, and nobody is warned of what is no surprise."""
    result = ask(model, loss, inputs)
    assert result.plan.method == "dense"
    assert relative_error(flat(result), expected(model, loss, inputs)) < 1e-10


def test_only_the_layers_whose_samples_do_not_touch():
    """With positions in the first dimension they meet in the attention, but no more after it."""
    model, inputs = Tokens().double(), x(5, 6)
    result = ask(model, squares, inputs)
    assert result.plan.passes == 5 + 2 * (6 * 3 + 3)
    assert relative_error(flat(result), expected(model, squares, inputs)) < 1e-10


def test_create_graph_takes_the_dense_way():
    model, inputs = mlp(4, 5, 3), x(N, 4)
    result = ask(model, squares, inputs, create_graph=True)
    assert result.plan.method == "dense"
    assert result.value[0].requires_grad


def test_taps_are_refused_for_a_full_hessian():
    with pytest.raises(errors.ArgumentError, match=r"taps.*diagonals"):
        hesse.hessian(lambda a: a.sum(), torch.ones(2), method="taps")


@pytest.mark.parametrize("planted", ["samples touch", "weight is used twice"])
def test_a_wrong_assumption_is_caught_by_the_certificate(planted, monkeypatch):
    """With the looking switched off, the check alone must notice."""
    if planted == "samples touch":
        monkeypatch.setattr("hesse.methods.taps.samples_touch", lambda layer: False)
        model, loss = mlp(4, 5, 3), contrastive
    else:
        always_once = type("", (dict,), {"get": lambda self, key, default=None: 1})()
        monkeypatch.setattr("hesse.tape.layers._uses", lambda value: always_once)
        model, loss = SharedView().double(), squares
    inputs = x(N, 4)
    with pytest.warns(errors.CertificateWarning, match="by taps deviates"):
        result = ask(model, loss, inputs)
    assert result.plan.method == "dense"
    assert relative_error(flat(result), expected(model, loss, inputs)) < 1e-10
    assert not torch.allclose(flat(ask(model, loss, inputs, check=False)), flat(result))


def test_wrong_batches_are_noticed(monkeypatch):
    from hesse.gradient import TappedLayer

    right = TappedLayer.product

    def wrong(self, vector):
        (found,) = right(self, vector)
        return (found * 1.001 if torch._C._functorch.is_batchedtensor(vector) else found,)

    monkeypatch.setattr(TappedLayer, "product", wrong)
    model, inputs = mlp(4, 5, 3), x(N, 4)
    with pytest.warns(errors.CertificateWarning, match="by taps deviates"):
        result = ask(model, squares, inputs)
    assert relative_error(flat(result), expected(model, squares, inputs)) < 1e-10


def test_far_fewer_passes_than_coordinates():
    model = mlp(64, 128, 128, 128, 10)
    targets = torch.randint(0, 10, (32,))
    result = ask(model, softmax_loss, x(32, 64), targets)
    assert result.plan.passes == 3 * 128 + 10
    assert result.passes == result.plan.passes + 2 * 4 + 4  # do samples touch; the certificate
    assert sum(p.numel() for p in model.parameters()) == 42_634


@pytest.mark.parametrize("memory", ["60MB", "400MB"])
def test_within_the_budget(memory):
    model, inputs = mlp(32, 64, 10), x(256, 32)
    targets = torch.randint(0, 10, (256,))
    tight = ask(model, softmax_loss, inputs, targets, memory=memory)
    assert relative_error(flat(tight), flat(ask(model, softmax_loss, inputs, targets))) < 1e-12
