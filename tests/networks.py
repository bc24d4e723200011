"""Networks to differentiate, as data: each is a model, its loss and its data, in float64."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from cases import x
from oracle import hessian_matrix


class Residual(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, h):
        return h + self.inside(h)


class Problem:
    """The loss of a model, in every form that hesse takes."""

    def __init__(self, model, loss, *data):
        self.model, self.loss, self.data = model.double(), loss, data
        self.names, self.tensors = map(list, zip(*model.named_parameters(), strict=True))

    def closure(self):
        return self.loss(self.model(*self.data))

    def function(self, *tensors):
        return self.loss(functional_call(self.model, dict(zip(self.names, tensors, strict=True)), self.data))

    def matrix(self):
        """The exact Hessian; frozen tensors have no part in it."""
        matrix = hessian_matrix(self.function, self.tensors)
        free = torch.cat([torch.full((t.numel(),), t.requires_grad) for t in self.tensors])
        return matrix * free * free[:, None]

    def left(self, plan):
        """Names of the tensors that a plan leaves to the dense method."""
        return {name for name, share in zip(self.names, plan.shares, strict=True) if share.method == "dense"}


@dataclass(frozen=True)
class Network:
    """`dense`: the tensors that no question can tap; `apart`: the others that some question cannot."""

    name: str
    build: object
    dense: tuple = ()
    apart: dict = field(default_factory=dict)

    def left(self, question):
        """Names of the tensors that a question must leave to the dense method."""
        return {*self.dense, *self.apart.get(question, ())}

    def __call__(self):
        torch.manual_seed(0)
        return self.build()


def squares(output):
    return output.pow(4).mean() + output.sin().mean()


def contrastive(output):
    normed = F.normalize(output)
    return F.cross_entropy(normed @ normed.T, torch.arange(len(output)))


def classes(output):
    """Cross entropy with the classes in turn."""
    flat = output.flatten(0, -2)
    return F.cross_entropy(flat, torch.arange(len(flat)) % flat.shape[1])


def mlp(*, bias=True, activation=nn.Tanh):
    return nn.Sequential(nn.Linear(3, 4, bias=bias), activation(), nn.Linear(4, 3, bias=bias))


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.scale = nn.LayerNorm(4), nn.Parameter(torch.ones(4))

    def forward(self, inputs):
        hidden = inputs + torch.tanh(self.first(inputs))
        return self.norm(hidden * F.gelu(self.second(hidden), approximate="tanh")) * self.scale


class Penalised(nn.Module):
    """The weight has a second use that is no layer; its gradient there is zero, its curvature is not."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 2)
        self.register_buffer("start", self.layer.weight.detach().clone())

    def forward(self, inputs):
        penalty = (self.layer.weight - self.start).square().sum()
        return self.out(torch.tanh(self.layer(inputs))) + penalty


class Shared(nn.Module):
    """The weight is used again through a view of it that is no layer's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs):
        return torch.tanh(self.layer(inputs)) * self.layer.weight.flatten()[:3].exp()


class GradientPenalty(nn.Module):
    """The function takes a gradient itself, which reads the weights a second time."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, inputs):
        inputs = inputs.clone().requires_grad_()
        output = self.net(inputs)
        (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
        return output + slope.square().sum(1, keepdim=True)


class Bent(torch.autograd.Function):
    """Its own backward, which is the gradient of nothing: the Hessian is not symmetric."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return torch.tanh(a)

    @staticmethod
    def backward(ctx, gradient):
        (a,) = ctx.saved_tensors
        return gradient * (1 + a.sum(-1, keepdim=True) * a)


class BentNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, inputs):
        return self.second(Bent.apply(self.first(inputs)))


class Unheard(nn.Module):
    """One layer's result is thrown away."""

    def __init__(self):
        super().__init__()
        self.first, self.unheard, self.second = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        self.unheard(hidden)
        return self.second(hidden)


class Pooled(nn.Module):
    """Samples become one vector."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs)).mean(0))


class Reshaped(nn.Module):
    """A layer's output is given another shape in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        hidden = self.first(inputs)
        hidden.unsqueeze_(1)
        return self.second(torch.tanh(hidden))


class Tokens(nn.Module):
    """Positions share the weights and meet in an attention; samples do not."""

    def __init__(self):
        super().__init__()
        self.key, self.value, self.out = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, tokens):
        key, value = self.key(tokens), self.value(tokens)
        return torch.tanh(self.out(F.scaled_dot_product_attention(key, key, value)))


def encoder(**options):
    return nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, activation="gelu", **options)


class Crossed(nn.Module):
    """What is asked and what is looked at come from two inputs."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.out = nn.Linear(4, 2)

    def forward(self, query, memory):
        return self.out(torch.tanh(self.attention(query, memory, memory)[0]))


class Branches(nn.Module):
    """Two layers go into one sum, and a third one into more."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.out = *(nn.Linear(3, 4) for _ in range(3)), nn.Linear(4, 2)

    def forward(self, inputs):
        third = self.three(inputs.cos())
        return self.out(torch.tanh(self.one(inputs) + self.two(inputs.sin()) + third) * third.exp())


class Autoencoder(nn.Module):
    """The weight is used twice, once transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(x(3, 4))
        self.encoding, self.decoding = nn.Parameter(x(3)), nn.Parameter(x(4))

    def forward(self, inputs):
        hidden = torch.tanh(F.linear(inputs, self.weight, self.encoding))
        return F.linear(hidden, self.weight.T, self.decoding)


class Twice(nn.Module):
    """A layer after itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs):
        return self.layer(torch.tanh(self.layer(inputs)))


class Recurrent(nn.Module):
    """A cell written by hand."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Parameter(x(3, 3)), nn.Linear(2, 3)

    def forward(self, sequence):
        state = torch.zeros(len(sequence), 3, dtype=sequence.dtype)
        for step in sequence.unbind(1):
            state = torch.tanh(self.outer(step) + state @ self.inner)
        return state


class LongShort(nn.Module):
    """An LSTM cell made of linear calls."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 8, bias=False), nn.Linear(2, 8)

    def forward(self, sequence):
        state, memory = sequence.new_zeros(2, len(sequence), 2)
        for step in sequence.unbind(1):
            gates, candidate = (self.inner(state) + self.outer(step)).split([6, 2], dim=1)
            keep, take, show = gates.sigmoid().chunk(3, dim=1)
            memory = keep * memory + take * torch.tanh(candidate)
            state = show * torch.tanh(memory)
        return state


class Steps(nn.Module):
    """torch's own recurrent layers; the last outputs are judged, and the last states."""

    def __init__(self, kind, **options):
        super().__init__()
        self.cells = kind(2, 3, **options)
        self.out = nn.Linear(options.get("proj_size", 3) * (1 + self.cells.bidirectional), 2)

    def forward(self, sequence):
        outputs, states = self.cells(sequence)
        hidden = states[0] if isinstance(states, tuple) else states
        return (
            self.out(outputs[:, -1] if self.cells.batch_first else outputs[-1]) + hidden.mean((0, 2))[:, None]
        )


class Cells(nn.Module):
    """A loop over torch's own cell."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.out = kind(2, 3), nn.Linear(3, 2)

    def forward(self, sequence):
        state = None
        for step in sequence.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


class Initial(nn.Module):
    """The first state is learned."""

    def __init__(self):
        super().__init__()
        self.cells, self.start = nn.GRU(2, 3, batch_first=True), nn.Parameter(x(3))

    def forward(self, sequence):
        return self.cells(sequence, self.start.expand(1, len(sequence), 3).contiguous())[0]


class Language(nn.Module):
    """Words in and words out by one table."""

    def __init__(self, tied=True):
        super().__init__()
        self.table, self.hidden = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, words):
        return self.out(torch.tanh(self.hidden(self.table(words))))


class Paired(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.pair = nn.Linear(3, 2), nn.Linear(3, 2), nn.Bilinear(2, 2, 3)

    def forward(self, inputs):
        return self.pair(torch.tanh(self.one(inputs)), torch.tanh(self.two(inputs)))


def cnn(*, norm=nn.Identity, pool=nn.AvgPool2d):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=False),
        norm(),
        nn.SiLU(inplace=True),
        nn.Conv2d(4, 4, 2, groups=2),
        pool(2),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class Tensor(nn.Module):
    """One tensor that is no weight."""

    def __init__(self, *shape):
        super().__init__()
        self.x = nn.Parameter(x(*shape))

    def forward(self):
        return self.x


def rosenbrock(p):
    return ((1 - p[:-1]) ** 2 + 100 * (p[1:] - p[:-1] ** 2) ** 2).sum()


def potential(points):
    i, j = torch.triu_indices(len(points), len(points), 1)
    squared = (points[i] - points[j]).square().sum(1)
    return (squared**-6 - squared**-3).sum()


def words(*shape):
    return torch.randint(0, 5, shape)


NETWORKS = [
    Network("mlp", lambda: Problem(mlp(), classes, x(5, 3))),
    Network("no bias", lambda: Problem(mlp(bias=False), classes, x(5, 3))),
    Network("relu", lambda: Problem(mlp(activation=nn.ReLU), classes, x(5, 3))),
    Network("one sample", lambda: Problem(mlp(), squares, x(1, 3))),
    Network("unbatched", lambda: Problem(mlp(), squares, x(3))),
    Network("two positions", lambda: Problem(mlp(), squares, x(4, 2, 3))),
    Network(
        "skips, norm, product of layers",
        lambda: Problem(Skip(), squares, x(4, 4)),
        dense=("norm.weight", "norm.bias", "scale"),
    ),
    Network("attention", lambda: Problem(Tokens(), squares, x(3, 2, 4))),
    Network("cnn", lambda: Problem(cnn(), classes, x(3, 2, 6, 6))),
    Network("cnn, max pooling", lambda: Problem(cnn(pool=nn.MaxPool2d), classes, x(3, 2, 6, 6))),
    Network(
        "cnn, group norm",
        lambda: Problem(cnn(norm=lambda: nn.GroupNorm(2, 4)), classes, x(3, 2, 6, 6)),
        dense=("1.weight", "1.bias"),
    ),
    Network(
        "batch norm in training",
        lambda: Problem(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), squares, x(5, 3)
        ),
        dense=("1.weight", "1.bias"),
    ),
    Network(
        "transformer",
        lambda: Problem(encoder(batch_first=True), squares, x(2, 3, 4)),
        dense=("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    ),
    Network(
        "transformer, positions first",
        lambda: Problem(encoder(), squares, x(3, 2, 4)),
        dense=("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    ),
    Network(
        "cross attention",
        lambda: Problem(Crossed(), squares, x(3, 2, 4), x(3, 3, 4)),
        dense=("attention.in_proj_weight", "attention.in_proj_bias"),  # used in parts
    ),
    Network(
        "cross attention of other widths",
        lambda: Problem(Crossed(kdim=3, vdim=3), squares, x(3, 2, 4), x(3, 3, 3)),
        dense=("attention.in_proj_bias",),
    ),
    Network(
        "autoencoder, tied",
        lambda: Problem(Autoencoder(), squares, x(5, 4)),
        dense=("encoding", "decoding"),  # of some uses of the weight, not of all
        apart={"diagonal": ("weight",)},  # laid out in two ways
    ),
    Network("branches", lambda: Problem(Branches(), squares, x(5, 3))),
    Network("a layer twice", lambda: Problem(Twice(), squares, x(5, 3))),
    Network("recurrent by hand", lambda: Problem(Recurrent(), squares, x(4, 3, 2))),
    Network("lstm cell", lambda: Problem(LongShort(), squares, x(3, 3, 2))),
    Network("rnn", lambda: Problem(Steps(nn.RNN, batch_first=True), squares, x(3, 3, 2))),
    Network(
        "rnn, relu, no bias",
        lambda: Problem(Steps(nn.RNN, nonlinearity="relu", bias=False), squares, x(2, 6, 2)),
    ),
    Network("gru", lambda: Problem(Steps(nn.GRU), squares, x(2, 3, 2))),
    Network("lstm", lambda: Problem(Steps(nn.LSTM, batch_first=True), squares, x(3, 3, 2))),
    Network(
        "lstm, two layers, both ways",
        lambda: Problem(Steps(nn.LSTM, num_layers=2, bidirectional=True), squares, x(2, 3, 2)),
    ),
    Network(
        "gru, two layers, both ways",
        lambda: Problem(
            Steps(nn.GRU, num_layers=2, bidirectional=True, batch_first=True), squares, x(3, 2, 2)
        ),
    ),
    Network(
        "lstm, projected",
        lambda: Problem(Steps(nn.LSTM, proj_size=2, batch_first=True), squares, x(3, 3, 2)),
    ),
    Network("rnn cell", lambda: Problem(Cells(nn.RNNCell), squares, x(3, 2, 2))),
    Network("gru cell", lambda: Problem(Cells(nn.GRUCell), squares, x(3, 2, 2))),
    Network("lstm cell of torch", lambda: Problem(Cells(nn.LSTMCell), squares, x(3, 2, 2))),
    Network(
        "a learned first state",
        lambda: Problem(Initial(), squares, x(3, 2, 2)),
        # Its first use is of one state for all samples.
        dense=("start", "cells.weight_hh_l0", "cells.bias_hh_l0"),
    ),
    Network("words", lambda: Problem(Language(tied=False), classes, words(3, 2))),
    Network(
        "words, tied",
        lambda: Problem(Language(), classes, words(3, 2)),
        apart={"diagonal": ("table.weight",)},
    ),
    Network("bilinear", lambda: Problem(Paired(), squares, x(4, 3))),
    Network("frozen", lambda: Problem(frozen(), classes, x(5, 3)), dense=("0.bias",)),
    Network("contrastive loss", lambda: Problem(mlp(), contrastive, x(4, 3))),
    Network("a layer unheard", lambda: Problem(Unheard(), squares, x(4, 3))),
    Network("samples become one vector", lambda: Problem(Pooled(), squares, x(4, 3))),
    Network("reshaped in place", lambda: Problem(Reshaped(), squares, x(4, 3))),
    Network(
        "a penalty", lambda: Problem(Penalised(), squares, x(4, 3)), dense=("layer.weight", "layer.bias")
    ),
    Network(
        "a view of the weight",
        lambda: Problem(Shared(), squares, x(4, 3)),
        dense=("layer.weight", "layer.bias"),
    ),
    Network(
        "custom Function, asymmetric",
        lambda: Problem(BentNet(), squares, x(4, 3)),
        apart=dict.fromkeys(
            ("blocks", "hessian"), ("first.weight", "first.bias", "second.weight", "second.bias")
        ),
    ),
    Network(
        "gradient penalty",
        lambda: Problem(GradientPenalty(), squares, x(4, 3)),
        dense=("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"),
    ),
    Network("rosenbrock", lambda: Problem(Tensor(9), rosenbrock), dense=("x",)),
    Network("potential", lambda: Problem(Tensor(4, 3), potential), dense=("x",)),
]
