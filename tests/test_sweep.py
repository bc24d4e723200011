import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse
from cases import Cubed, classes, of_model, x
from hesse import errors
from hesse.methods.sweep import route as sweep_route
from hesse.methods.sweep import walk as sweep
from hesse.methods.sweep.carried.leaves import LiveLeaves
from hesse.methods.sweep.cost import cost
from hesse.structure import NoStructure
from networks import Residual
from oracle import hessian_matrix, relative_error
from questions import BLOCKS
from sweeping import check, recorded, swept


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU])
def test_mlp(activation):
    targets = classes(3, 7)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3))
    check(*of_model(model, lambda out: F.cross_entropy(out, targets), x(7, 4)), 7)


def net(model, *shape, loss=None, outputs=3, covered=None):
    """Check a classifier of 5 samples."""
    targets = classes(outputs, 5)
    loss = loss or (lambda out: F.cross_entropy(out, targets))
    check(*of_model(model, loss, x(5, *shape)), 5, covered)


class Dense(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, h):
        return torch.cat([h, self.inside(h)], 1)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, h):
        return self.one(h).sigmoid() * torch.tanh(self.two(h))


class Chunked(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Linear(4, 8)

    def forward(self, h):
        one, two = self.both(h).chunk(2, 1)
        return F.silu(one) * two


def block():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))


NETS = {
    "residual": lambda: nn.Sequential(nn.Linear(3, 4), Residual(block()), Residual(block()), nn.Linear(4, 3)),
    "residual relu": lambda: nn.Sequential(
        nn.Linear(3, 4), Residual(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))), nn.Linear(4, 3)
    ),
    "nested": lambda: nn.Sequential(
        nn.Linear(3, 4), Residual(nn.Sequential(block(), Residual(block()))), nn.Linear(4, 3)
    ),
    "dense": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), Dense(nn.Linear(4, 2)), nn.Tanh(), Dense(nn.Linear(6, 2)), nn.Linear(8, 3)
    ),
    "gated": lambda: nn.Sequential(nn.Linear(3, 4), Gated(), nn.Linear(4, 3)),
    "chunked": lambda: nn.Sequential(nn.Linear(3, 4), Chunked(), nn.Linear(4, 3)),
    "in place": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.SiLU(inplace=True), nn.Linear(4, 3)
    ),
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
    "rms norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 3)),
    "group norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 3)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    ).eval(),
    "softmax": lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 3), nn.LogSoftmax(1)),
    "bottleneck": lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1), nn.Linear(1, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_networks(name):
    net(NETS[name](), 3)


CONVOLUTIONS = {
    "plain": lambda: [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)],
    "strides": lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 2)],
    "groups, dilation": lambda: [nn.Conv2d(2, 4, 3, groups=2, dilation=2, padding=2), nn.SiLU()],
    "same": lambda: [nn.Conv2d(2, 2, 3, padding="same"), nn.GELU()],
    "max pool": lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)],
    "average pool": lambda: [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AvgPool2d(2)],
    "batch norm": lambda: [nn.Conv2d(2, 4, 3).eval(), nn.BatchNorm2d(4).eval(), nn.ReLU(inplace=True)],
    "group norm": lambda: [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()],
    "transposed": lambda: [nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Tanh(), nn.AvgPool2d(3)],
    "residual": lambda: [nn.Conv2d(2, 3, 3), Residual(nn.Conv2d(3, 3, 3, padding=1)), nn.ReLU()],
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    torch.manual_seed(1)
    model = nn.Sequential(*CONVOLUTIONS[name](), nn.Flatten(), nn.LazyLinear(3))
    model.double()(x(1, 2, 5, 5))
    net(model, 2, 5, 5)


class Attention(nn.Module):
    """Self-attention by torch's module, or by hand, in a sequence with learned positions."""

    def __init__(self, inside):
        super().__init__()
        self.embed, self.inside, self.out = nn.Linear(3, 4), inside, nn.Linear(4, 3)
        self.positions = nn.Parameter(x(3, 4))

    def forward(self, tokens):
        return self.out(self.inside(self.embed(tokens) + self.positions).mean(1))


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, h):
        scores = self.q(h) @ self.k(h).transpose(1, 2) / 2
        return scores.softmax(-1) @ self.v(h)


class Module(nn.Module):
    def __init__(self, weights, **masks):
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(4, 2, batch_first=True), weights
        self.masks = masks

    def forward(self, h):
        return self.attention(h, h, h, need_weights=self.weights, **self.masks)[0]


class Encoder(nn.Module):
    def __init__(self, **masks):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, 0.0, "gelu", batch_first=True)
        self.masks = masks

    def forward(self, h):
        return self.layer(h, **self.masks)


FUTURE = torch.ones(3, 3, dtype=torch.bool).triu(1)
PADDING = torch.arange(3) >= torch.tensor([3, 1, 2, 3, 2])[:, None]
BLIND = torch.arange(3) >= torch.tensor([3, 1, 0, 3, 2])[:, None]  # a sample may look at nothing


ATTENTION = {
    "by hand": ByHand,
    "module": lambda: Module(True),
    "fused": lambda: Module(False),
    "module, causal": lambda: Module(True, attn_mask=FUTURE),
    "module, padded": lambda: Module(True, key_padding_mask=PADDING),
    "fused, causal": lambda: Module(False, attn_mask=FUTURE, is_causal=True),
    "fused, masked": lambda: Module(False, attn_mask=FUTURE),
    "fused, padded": lambda: Module(False, key_padding_mask=BLIND),
    "fused, padded, causal": lambda: Module(False, attn_mask=FUTURE, key_padding_mask=PADDING),
    "encoder": Encoder,
    "encoder, causal": lambda: Encoder(src_mask=FUTURE, is_causal=True),
    "encoder, padded, causal": lambda: Encoder(src_mask=FUTURE, src_key_padding_mask=PADDING),
    "encoder, norm first": lambda: nn.TransformerEncoderLayer(
        4, 2, 5, 0.0, "relu", batch_first=True, norm_first=True
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    net(Attention(ATTENTION[name]()), 3, 3)


def test_masked_attention_is_swept():
    """Infinite scores do not hide the samples, and no call is unknown."""
    tokens, targets = x(5, 3, 3), classes(3, 5)
    for attention in (Encoder(src_mask=FUTURE, is_causal=True), Module(True, key_padding_mask=PADDING)):
        func, tensors = of_model(Attention(attention), lambda out: F.cross_entropy(out, targets), tokens)
        result = hesse.hessian_diagonal(func, tensors, full_output=True)
        assert result.plan.by("sweep") == set(range(len(tensors)))
        assert "by autograd" not in result.plan.reason
        found = torch.cat([part.flatten() for part in result.value])
        assert relative_error(found, hessian_matrix(func, tensors).diagonal()) < 1e-9


def test_embedding():
    tokens, targets = torch.randint(0, 6, (5, 3)), classes(3, 5)
    table, weight = x(6, 4), x(3, 4)

    def function(table, weight):
        hidden = torch.tanh(F.embedding(tokens, table)).sum(1)
        return F.cross_entropy(hidden @ weight.T, targets)

    check(function, (table, weight), 5)


def test_positions_flattened_into_the_batch():
    data, targets = x(5, 3, 4), classes(3, 15)

    def function(first, bias, second):
        hidden = torch.tanh(data @ first + bias)
        hidden = hidden + hidden.flip(1)
        return F.cross_entropy(hidden.reshape(15, 4) @ second, targets)

    check(function, (x(4, 4), x(4), x(4, 3)), 5)


def binary(out):
    return (out > 0).double()


LOSSES = {
    "class weights": lambda out, y: F.cross_entropy(out, y, weight=torch.tensor([0.5, 2.0, 1.0]).double()),
    "label smoothing": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.2),
    "ignored class": lambda out, y: F.cross_entropy(out, y, ignore_index=1),
    "sum": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
    "none": lambda out, y: F.cross_entropy(out, y, reduction="none").mean(),
    "probabilities": lambda out, y: F.cross_entropy(out, F.one_hot(y, 3).double() * 0.8 + 0.1),
    "nll": lambda out, y: F.nll_loss(F.log_softmax(out, 1), y),
    "mse": lambda out, y: F.mse_loss(out, F.one_hot(y, 3).double()),
    "bce": lambda out, y: F.binary_cross_entropy(out.sigmoid(), F.one_hot(y, 3).double()),
    "bce with logits": lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 3).double()),
    "kl": lambda out, y: F.kl_div(F.log_softmax(out, 1), F.one_hot(y, 3) * 0.7 + 0.1, reduction="batchmean"),
    "huber": lambda out, y: F.huber_loss(out, F.one_hot(y, 3).double()),
    "smooth l1": lambda out, y: F.smooth_l1_loss(out, F.one_hot(y, 3).double(), beta=0.3),
    "by hand": lambda out, y: ((out - F.one_hot(y, 3)) ** 2).sum(1).mean() / 2,
    "log-sum-exp": lambda out, y: out.logsumexp(1).mean() - out.gather(1, y[:, None]).mean(),
    "two": lambda out, y: F.cross_entropy(out, y) + 0.1 * out.square().mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    targets = classes(3, 5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    net(model, 3, loss=lambda out: LOSSES[name](out, targets))


def test_blocks_beside_what_is_not_covered(monkeypatch):
    monkeypatch.setattr("hesse.methods.sweep.option._products", lambda meter, leaves: 0.0)
    data, targets = x(5, 4), classes(3, 5)

    def function(tied, norm, bias, last):
        hidden = torch.tanh(torch.tanh(data @ tied + bias) @ tied)
        return F.cross_entropy(F.layer_norm(hidden, (4,), norm) @ last, targets)

    tensors = (x(4, 4), x(4), x(4), x(4, 3))
    result = hesse.hessian_blocks(function, tensors, method="sweep", full_output=True)
    assert result.plan.by("sweep") == {1, 2, 3}
    assert result.plan.passes == 16
    assert result.certificate.passed
    assert BLOCKS.error(result.value, hessian_matrix(function, tensors), tensors) < 1e-12
    kept = hesse.hessian_blocks(function, tensors, method=result.plan, check=False)
    assert all(torch.equal(one, other) for one, other in zip(kept, result.value, strict=True))


def refused(function, tensors, count, match):
    with pytest.raises(NoStructure, match=match):
        swept(function, tensors, count)


def test_contrastive_loss():
    data = x(6, 3)

    def function(weight, other):
        z = F.normalize(torch.tanh(data @ weight) @ other, dim=1)
        return F.cross_entropy(z @ z.T, torch.arange(6))

    refused(function, (x(3, 4), x(4, 2)), 6, "sum over samples")


def test_batch_norm_in_training():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    function, tensors = of_model(model, lambda out: out.logsumexp(1).sum(), x(5, 3))
    refused(function, tensors, 5, "sum over samples")


def test_loss_that_is_no_sum_over_samples():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    for loss in (lambda out: F.mse_loss(out, torch.zeros_like(out)).sqrt(), lambda out: out.std()):
        function, tensors = of_model(model, loss, x(5, 3))
        refused(function, tensors, 5, "samples")


def test_custom_function():
    data = x(5, 3)
    function = lambda a, b: (Cubed.apply(data @ a) @ b).square().sum()
    refused(function, (x(3, 4), x(4, 2)), 5, "no call that can be seen")


def test_weights_that_are_not_covered():
    data, targets = x(5, 4), x(5, 4)

    def function(tied, bias, scale, alone, penalised):
        hidden = torch.tanh(data @ tied + bias)
        hidden = torch.tanh(hidden @ tied) * scale.exp()
        hidden = torch.tanh(hidden @ alone) @ penalised
        return F.mse_loss(hidden, targets) + penalised.square().sum()

    tensors = (x(4, 4), x(4), x(4), x(4, 4), x(4, 4))
    check(function, tensors, 5, covered={1, 3, 4})


def test_overwritten_value():
    data = x(5, 4)

    def function(first, second):
        hidden = data @ first
        kept = hidden * 1.0
        bent = kept.exp().detach() * kept.square()
        with torch.no_grad():
            kept.zero_()
        return (bent @ second).square().sum()

    with pytest.raises((NoStructure, RuntimeError)):
        swept(function, (x(4, 4), x(4, 2)), 5)


def test_one_sample():
    """Without samples the whole function is one."""
    data = x(1, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    function, tensors = of_model(model, lambda out: out.logsumexp(1).sum().square(), data)
    check(function, tensors, 1)


def test_a_number_for_every_sample():
    data = x(5, 3)
    function = lambda w, b: (torch.tanh(data @ w + b).exp().squeeze(1) ** 2).sum()
    check(function, (x(3, 1), x(1)), 5)
    function = lambda w, s: ((torch.tanh(data @ w).sum(1) * s) ** 3).sum()
    check(function, (x(3, 2), x(())), 5)


def way_of(model, loss, *shape):
    function, tensors = of_model(model, loss, x(5, *shape))
    value, tape, samples = recorded(function, tensors, 5)
    return sweep_route.route_of(tape, value, samples)


def classified(out):
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


def test_rank_of_relu_network_is_the_number_of_outputs():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()
    ranks = []

    def take(entry, block):
        ranks.append(sum(len(columns) for _, columns in block.factors))

    way = way_of(model, classified, 1, 6, 6)
    sweep.run(way, take, LiveLeaves(way.depends, "diagonal"))
    assert ranks[1:] == [3] * 4


def test_cost():
    def of(activation, depth):
        hidden = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), activation())]
        return cost(way_of(nn.Sequential(nn.Linear(3, 8), *hidden, nn.Linear(8, 2)), classified, 3))

    assert of(nn.ReLU, 4).flops < of(nn.Tanh, 4).flops
    assert of(nn.ReLU, 4).peak_bytes < of(nn.Tanh, 4).peak_bytes
    assert of(nn.Tanh, 12).flops < 3.5 * of(nn.Tanh, 4).flops
    assert of(nn.Tanh, 12).peak_bytes == of(nn.Tanh, 4).peak_bytes
    assert of(nn.Tanh, 2).unknown == ()
    way = way_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), lambda out: torch.i0(out).sum(), 3)
    assert cost(way).unknown == ("i0",)


def test_a_parameter_for_every_sample_is_not_covered():
    data = x(5, 3)
    function = lambda each, weight, shared: (torch.tanh(data @ weight + each) * shared).logsumexp(1).sum()
    check(function, (x(5, 4), x(3, 4), x(1, 4)), 5, covered={1, 2})


def test_mixed_dtypes():
    data = x(5, 3)
    function = lambda a, b: torch.tanh(data.float() @ a.float()).double().matmul(b).square().sum()
    refused(function, (x(3, 4), x(4, 2)), 5, "dtypes")


def test_branches_that_start_from_data():
    """One branch of a product ends before the other; both are read."""
    data, other = x(5, 3), x(5, 4)

    def function(first, second):
        return (torch.tanh(data @ first) * torch.tanh(other @ second)).logsumexp(1).sum()

    check(function, (x(3, 2), x(4, 2)), 5)


def test_positions_added_to_tokens():
    """Where parameters meet data before any layer, samples come in with the data."""
    tokens = x(5, 3, 4)

    def func(positions, weight):
        return torch.tanh((tokens + positions) @ weight).logsumexp((1, 2)).sum()

    tensors = x(3, 4), x(4, 2)
    result = hesse.hessian_diagonal(func, tensors, method="sweep", full_output=True)
    assert result.plan.by("sweep") == {0, 1}
    found = torch.cat([part.flatten() for part in result.value])
    assert relative_error(found, hessian_matrix(func, tensors).diagonal()) < 1e-9


OVERWRITTEN = {
    "softmax": lambda h: h.softmax(1),
    "log_softmax": lambda h: h.log_softmax(1),
    "cross entropy": lambda h: F.cross_entropy(h, torch.arange(len(h)) % 3, reduction="none")[:, None],
}


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_what_went_into_a_softmax_may_be_overwritten(name):
    """Its backward needs the result alone, so torch allows it; a walk must not read what is there now."""
    data = x(5, 4)

    def function(w):
        h = (data @ w) * 1.0
        found = OVERWRITTEN[name](h)
        h.mul_(2.0)
        return found.tanh().square().sum()

    weight = x(4, 3)
    exact = hessian_matrix(function, (weight,)).diagonal().view_as(weight)
    found = hesse.hessian_diagonal(function, weight, method="sweep", check=False)
    torch.testing.assert_close(found, exact)
    with pytest.raises(errors.StructureError, match="overwritten since"):
        hesse.approximate_diagonal(function, weight)


def test_what_comes_out_of_a_pooling_may_be_overwritten():
    """As by an activation in place: where it came from is still known."""
    images = x(5, 1, 6, 6)

    def function(w, v):
        pooled = F.max_pool2d(F.conv2d(images, w), 3, 1)
        return F.linear(pooled.tanh_().flatten(1), v).logsumexp(1).sum()

    tensors = x(2, 1, 3, 3), x(3, 8)
    exact = hessian_matrix(function, tensors).diagonal()
    result = hesse.hessian_diagonal(function, tensors, method="sweep", full_output=True)
    assert result.plan.method == "sweep"
    torch.testing.assert_close(torch.cat([part.flatten() for part in result.value]), exact)
