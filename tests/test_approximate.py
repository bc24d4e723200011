"""Approximate diagonals: exact where nothing is dropped, the published recurrence elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse
from cases import Cubed, classes, of_model, x
from hesse.calls import diagonals
from hesse.look.gradient import Gradient
from hesse.tape.record import Recorder
from oracle import hessian_matrix

KINDS = ["becker-lecun", "hesscale"]


@pytest.fixture(autouse=True)
def no_products(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a Hessian-vector product was taken")

    monkeypatch.setattr(Gradient, "product", refuse)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def exact(function, tensors):
    diagonal = hessian_matrix(function, tensors).diagonal()
    parts = diagonal.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def is_exact(function, tensors, kind="hesscale"):
    close(hesse.approximate_diagonal(function, tuple(tensors), kind), exact(function, tensors))


@pytest.mark.parametrize("kind", KINDS)
def test_elementwise_functions(kind):
    data = x(4, 3)
    is_exact(lambda u: (torch.tanh(u) * data).exp().sum(), [x(4, 3)], kind)
    is_exact(lambda u, w: (u.sin() + w**3).square().sum() + (u * data).prod(1).sum(), [x(4, 3)] * 2, kind)


MIXED = {
    "difference": lambda u, w: (u - w).pow(4).sum(),
    "product": lambda u, w: (u * w).tanh().sum(),
    "side by side": lambda u, w: torch.cat([u, w]).pow(3).sum(),
    "softmax": lambda u, w: (F.softmax(w, dim=1, dtype=torch.float64) * u).square().sum(),
    "norm": lambda u, w: F.layer_norm(u.float(), (3,), w[0], w[1]).pow(3).sum(),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.filterwarnings("ignore:func is given torch.float64")
def test_tensors_of_two_precisions(name):
    u, w = x(4, 3), x(2, 3).float() if name == "norm" else x(4, 3).float()
    found = hesse.approximate_diagonal(MIXED[name], (u, w))
    assert [part.dtype for part in found] == [torch.float64, torch.float32]
    for part, whole in zip(found, exact(MIXED[name], (u, w)), strict=True):
        torch.testing.assert_close(part, whole.to(part), rtol=1e-4, atol=1e-4)


LOSSES = {
    "cross entropy": F.cross_entropy,
    "smoothed": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.2, reduction="sum"),
    "nll": lambda out, y: F.nll_loss(F.log_softmax(out, 1), y),
    "softmax": lambda out, y: F.nll_loss(F.softmax(out, 1).log(), y),
    "by hand": lambda out, y: (out.logsumexp(1) - out.gather(1, y[:, None]).squeeze(1)).mean(),
    "mse": lambda out, y: F.mse_loss(out, F.one_hot(y, 3).double()),
    "bce": lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 3).double()),
    "huber": lambda out, y: F.huber_loss(out, F.one_hot(y, 3).double()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_one_layer_before_a_loss(name):
    data, targets = x(5, 4), classes(3, 5)
    is_exact(lambda w, b: LOSSES[name](F.linear(data, w, b), targets), [x(3, 4), x(3)])


@pytest.mark.parametrize("name", ["linear", "matmul", "conv1d", "addmm"])
def test_one_layer_by_other_names(name):
    data = x(5, 4)
    layer = {
        "linear": lambda w, b: F.linear(data, weight=w, bias=b),
        "matmul": lambda w, b: data @ w.T + b,
        "conv1d": lambda w, b: F.conv1d(data.unsqueeze(2), w.unsqueeze(2), b).squeeze(2),
        "addmm": lambda w, b: torch.addmm(b, data, w.T),
    }[name]
    is_exact(lambda w, b: torch.tanh(layer(w, b)).square().sum(), [x(3, 4), x(3)], "becker-lecun")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_unit(kind):
    layers = [layer for _ in range(3) for layer in (nn.Linear(1, 1), nn.Tanh())]
    is_exact(*of_model(nn.Sequential(*layers), lambda out: out.square().sum(), x(6, 1)), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_multilayer_perceptron_by_hand(kind):
    data, targets = x(5, 4), classes(3, 5)
    first, second, shift, bias = x(6, 4), x(3, 6), x(6), x(3)

    def function(first, shift, second, bias):
        return F.cross_entropy(F.linear(torch.tanh(F.linear(data, first, shift)), second, bias), targets)

    h = torch.tanh(data @ first.T + shift)
    p = (h @ second.T + bias).softmax(1)
    t = F.one_hot(targets, 3).double()
    g, k = (p - t) / 5, p * (1 - p) / 5
    if kind == "becker-lecun":
        k = t * k
    slope = 1 - h**2
    below = slope**2 * (k @ second**2) - 2 * h * slope * (g @ second)
    expected = [below.T @ data**2, below.sum(0), k.T @ h**2, k.sum(0)]
    found = hesse.approximate_diagonal(function, (first, shift, second, bias), kind)
    close(found, expected)
    logs = lambda *tensors: F.nll_loss(
        F.log_softmax(F.linear(torch.tanh(F.linear(data, *tensors[:2])), *tensors[2:]), 1), targets
    )
    close(hesse.approximate_diagonal(logs, (first, shift, second, bias), kind), expected)


def test_softmax_of_units():
    u, weights = x(4, 3), x(4, 3)
    (found,) = hesse.approximate_diagonal(
        lambda u: (u.softmax(1) * weights).exp().sum(), (u,), "becker-lecun"
    )
    p = u.softmax(1)
    g, k = weights * (weights * p).exp(), weights**2 * (weights * p).exp()
    close([found], [(p * (1 - p)) ** 2 * k + g * p * (1 - p) * (1 - 2 * p)])


def test_residual_block_by_hand():
    u, W = x(3), x(3, 3)
    function = lambda u, W: (u + torch.tanh(W @ u)).square().square().sum()
    h = torch.tanh(W @ u)
    g, k, slope = 4 * (u + h) ** 3, 12 * (u + h) ** 2, 1 - h**2
    inner = slope**2 * k - 2 * h * slope * g
    close(hesse.approximate_diagonal(function, (u, W)), [k + (W**2).T @ inner, inner[:, None] * u**2])


def test_tied_weight_by_hand():
    data, W = x(5, 3), x(3, 3)
    function = lambda W: (torch.tanh(data @ W) @ W).square().sum() + W.square().sum()
    h = torch.tanh(data @ W)
    g, slope = 2 * h @ W @ W.T, 1 - h**2
    inner = slope**2 * (2 * W**2).sum(1) - 2 * h * slope * g
    close(
        hesse.approximate_diagonal(function, [W]),
        [(data**2).T @ inner + 2 * (h**2).sum(0)[:, None] + 2],
    )


def reference(function, tensors):
    """The recurrence of "hesscale" by full Jacobians and second derivatives of every call."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    with Recorder(leaves) as tape:
        value = function(*leaves)
    gradient = {tape.value_of(value): torch.ones_like(value)}
    k = {}
    for call in reversed(tape.calls):
        inputs = list(dict.fromkeys(call.inputs.values()))

        def again(*contents, call=call, inputs=inputs):
            now = dict(zip(inputs, contents, strict=True))
            arguments = [now[call.inputs[i]] if i in call.inputs else a for i, a in enumerate(call.arguments)]
            return call.again(arguments)

        (output,) = call.outputs
        g = gradient.pop(output)
        contents = tuple(v.tensor.detach() for v in inputs)
        first = torch.autograd.functional.jacobian(again, contents)
        along = lambda *contents, g=g, again=again: (again(*contents) * g).sum()
        second = torch.autograd.functional.hessian(along, contents)
        own = k.pop(output, torch.zeros_like(g)).flatten()
        for i, v in enumerate(inputs):
            J = first[i].reshape(g.numel(), -1)
            bend = second[i][i].reshape(v.tensor.numel(), -1).diagonal()
            k[v] = k.get(v, 0) + (own @ J**2 + bend).view(v.tensor.shape)
            gradient[v] = gradient.get(v, 0) + (g.flatten() @ J).view(v.tensor.shape)
    return [next(part for v, part in k.items() if v.leaf == i) for i in range(len(leaves))]


def attention(q, w):
    scores = (q @ w) @ q.transpose(1, 2)
    return ((scores.softmax(-1) @ q).tanh() @ w).square().sum()


GRAPHS = {
    "convolution": (
        lambda u, w, b: torch.tanh(F.conv2d(u, w, b, padding=1, stride=2)).square().sum(),
        [(2, 2, 5, 5), (3, 2, 3, 3), (3,)],
    ),
    "groups": (
        lambda u, w: F.conv2d(torch.tanh(F.conv2d(u, w, groups=2)).square(), w, groups=2).square().sum(),
        [(2, 4, 5, 5), (4, 2, 2, 2)],
    ),
    "average pooling": (
        lambda u: F.avg_pool2d(F.avg_pool2d(u.tanh(), 3, 2, padding=1), 2).exp().sum(),
        [(2, 3, 8, 8)],
    ),
    "max pooling": (lambda u: F.max_pool2d(u.tanh(), 3, 2).exp().sum(), [(2, 3, 7, 7)]),
    "layer norm": (
        lambda u, w, b: F.layer_norm(u, (4,), w, b).tanh().square().sum(),
        [(5, 4), (4,), (4,)],
    ),
    "rms norm": (lambda u, w: F.rms_norm(u, (4,), w).exp().sum(), [(5, 4), (4,)]),
    "group norm": (
        lambda u, w, b: F.group_norm(u, 2, w, b).tanh().square().sum(),
        [(3, 4, 2), (4,), (4,)],
    ),
    "batch norm in training": (
        lambda u, w, b: F.batch_norm(u, None, None, w, b, True).exp().sum(),
        [(5, 3, 2), (3,), (3,)],
    ),
    "batch norm": (
        lambda u, w, b: F.batch_norm(u, torch.ones(3).double(), torch.ones(3).double(), w, b).exp().sum(),
        [(5, 3, 2), (3,), (3,)],
    ),
    "softmax": (lambda u: (3 * u.softmax(1)).exp().log_softmax(0).exp().sum(), [(4, 3)]),
    "attention": (attention, [(2, 3, 4), (4, 4)]),
    "einsum": (lambda u, w: torch.einsum("nti,oi->nto", u, w).exp().sum(), [(2, 3, 4), (2, 4)]),
    "gram": (lambda u: (u @ u.T).tanh().square().sum(), [(4, 3)]),
    "reductions": (lambda u: (u.norm(dim=1) * u.mean(1) + u.prod(1)).square().sum().sqrt(), [(4, 3)]),
    "rearranged": (
        lambda u: (torch.cat([u.expand(2, 4, 3), u.cumsum(1)[None]]).flip(0).mean(2) ** 3).sum(),
        [(4, 3)],
    ),
    "cross entropy, squared": (
        lambda u: F.cross_entropy(u, classes(3, 4), reduction="none").square().sum(),
        [(4, 3)],
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_against_jacobians_of_every_call(name):
    function, shapes = GRAPHS[name]
    tensors = [x(*shape) for shape in shapes]
    close(hesse.approximate_diagonal(function, tuple(tensors)), reference(function, tensors))


def test_rows_are_taken_in_chunks(monkeypatch):
    function, shapes = GRAPHS["einsum"]
    tensors = tuple(x(*shape) for shape in shapes)
    whole = hesse.approximate_diagonal(function, tensors)
    monkeypatch.setattr(diagonals, "HELD", 30)
    close(hesse.approximate_diagonal(function, tensors), whole)


SELECTING = {
    "expand": lambda u: u.expand(2, 4, 6),
    "expand_as": lambda u: u.expand_as(torch.zeros(2, 4, 6)),
    "repeat": lambda u: u.repeat(2, 1),
    "tile": lambda u: u.tile(2),
    "pad": lambda u: F.pad(u[None], (1, 2), "reflect"),
    "constant_pad_nd": lambda u: torch.constant_pad_nd(u, (1, 2)),
    "unfold": lambda u: u.unfold(1, 3, 1),
    "tril": lambda u: u.tril(),
    "triu": lambda u: u.triu(),
    "index_select": lambda u: u.index_select(0, torch.tensor([1, 1, 0])),
    "gather": lambda u: u.gather(1, torch.tensor([[0, 0, 1]])),
    "getitem": lambda u: u[torch.tensor([1, 1, 0])],
    "cumsum": lambda u: u.cumsum(0),
    "sum": lambda u: u.sum(0),
    "cat": lambda u: torch.cat([u, u]),
    "stack": lambda u: torch.stack([u, u]),
    "hstack": lambda u: torch.hstack([u, u]),
    "vstack": lambda u: torch.vstack([u, u]),
    "max_pool1d": lambda u: F.max_pool1d(u, 3, 1),
    "max_pool2d": lambda u: F.max_pool2d(u[None], 2, 1),
    "max_pool3d": lambda u: F.max_pool3d(u[None, None], (1, 2, 2), 1),
}


@pytest.mark.parametrize("name", sorted(SELECTING))
def test_selecting_calls_hold_zeros_and_ones(name):
    jacobian = torch.autograd.functional.jacobian(SELECTING[name], x(4, 6))
    assert ((jacobian == 0) | (jacobian == 1)).all()


def test_containers_and_independent_tensors():
    frozen, w = x(3), x(2).requires_grad_()
    found = hesse.approximate_diagonal(lambda: (w**3).sum() + frozen.sum(), {"w": w, "frozen": [frozen]})
    close([found["w"], found["frozen"][0]], [6 * w.detach(), torch.zeros_like(frozen)])
    assert not found["w"].requires_grad
    assert hesse.approximate_diagonal(lambda u: torch.ones(()), x(2)).tolist() == [0, 0]


def test_state_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    data, targets = x(5, 3), classes(2, 5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    parameters = list(model.parameters())
    hesse.approximate_diagonal(lambda: F.cross_entropy(model(data), targets), parameters)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in parameters)
    assert torch.equal(random, torch.get_rng_state())


def test_errors():
    with pytest.raises(hesse.HesseError, match="becker-lecun"):
        hesse.approximate_diagonal(lambda u: u.sum(), x(2), "exact")
    refused = {
        "no call that can be seen": lambda u: Cubed.apply(u).sum(),
        "another result": lambda u: F.dropout(u, 0.5).square().sum(),
        "fft_rfft computes complex numbers": lambda u: torch.fft.rfft(u).abs().square().sum(),
        "gradients itself": lambda u: torch.autograd.grad((u**3).sum(), u, create_graph=True)[0].sum(),
    }
    for reason, function in refused.items():
        with pytest.raises(hesse.HesseError, match=rf"{reason}.*hessian_diagonal"):
            hesse.approximate_diagonal(function, x(20))


def test_it_takes_a_few_backward_passes(monkeypatch):
    """As many calls of autograd as calls on the tape, whatever the width."""
    taken = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **kwargs: taken.append(1) or grad(*args, **kwargs)
    )
    counts = []
    for width in (3, 30):
        model = nn.Sequential(
            nn.Conv2d(2, width, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(3)
        )
        model.double()(x(1, 2, 8, 8))
        function, tensors = of_model(model, lambda out: F.cross_entropy(out, classes(3, 5)), x(5, 2, 8, 8))
        taken.clear()
        hesse.approximate_diagonal(function, tuple(tensors))
        counts.append(len(taken))
    assert counts[0] == counts[1] < 40
