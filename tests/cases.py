"""Functions to differentiate, as data: each builds `(function, tensors)` in float64."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    name: str
    build: object

    def __call__(self):
        torch.manual_seed(0)
        return self.build()


def of_model(model, loss, *data):
    """The loss of a model as a function of its parameters, which it gets one by one."""
    model = model.double()
    names = [name for name, _ in model.named_parameters()]
    tensors = tuple(p.detach().clone() for p in model.parameters())

    def function(*tensors):
        return loss(functional_call(model, dict(zip(names, tensors, strict=True)), data))

    return function, tensors


def classes(count, samples):
    return torch.randint(0, count, (samples,))


def x(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def mlp():
    targets = classes(3, 7)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return of_model(model, lambda out: F.cross_entropy(out, targets), x(7, 4))


def relu_mlp():
    targets = classes(3, 7)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return of_model(model, lambda out: F.cross_entropy(out, targets), x(7, 4))


def cnn(**options):
    targets = classes(3, 4)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, **options), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(3)
    )
    data = x(4, 2, 6, 6)
    model.double()(data)
    return of_model(model, lambda out: F.cross_entropy(out, targets), data)


class Transformer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 6, dropout=0.0, activation="gelu", batch_first=True, **options
        )
        self.out = nn.Linear(4, 2)

    def forward(self, tokens):
        return self.out(self.layer(tokens).mean(1))


def transformer():
    targets = classes(2, 3)
    return of_model(Transformer(), lambda out: F.cross_entropy(out, targets), x(3, 4, 4))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cells = kind(3, 4, batch_first=True, **options)
        self.out = nn.LazyLinear(2)

    def forward(self, sequence):
        return self.out(self.cells(sequence)[0][:, -1])


def recurrent(kind, **options):
    data, targets = x(3, 5, 3), x(3, 2)
    model = Recurrent(kind, **options).double()
    model(data)
    return of_model(model, lambda out: F.mse_loss(out, targets), data)


def batch_norm(training):
    targets = x(6, 2)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).train(training)
    return of_model(model, lambda out: F.mse_loss(out, targets), x(6, 3))


def normed():
    targets = x(4, 2)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4), nn.GroupNorm(2, 4))
    return of_model(model, lambda out: F.mse_loss(out[:, :2], targets), x(4, 3))


def tied():
    data, targets = x(5, 4), x(5, 4)

    def function(weight, bias):
        hidden = torch.tanh(data @ weight.T + bias)
        return F.mse_loss(torch.tanh(hidden @ weight.T + bias) @ weight, targets)

    return function, (x(4, 4), x(4))


def checkpointed():
    data = x(5, 4)

    def function(first, second):
        hidden = checkpoint(lambda w: torch.tanh(data @ w), first, use_reentrant=False)
        return (hidden @ second).logsumexp(0).sum()

    return function, (x(4, 3), x(3, 2))


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value**3

    @staticmethod
    def backward(ctx, gradient):
        (value,) = ctx.saved_tensors
        return 3 * value**2 * gradient


def custom():
    return lambda a, b: (Cubed.apply(a) @ b).square().sum(), (x(3, 4), x(4, 2))


class Lopsided(torch.autograd.Function):
    """Its own backward, which is the gradient of nothing: the Hessian is not symmetric."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        return gradient * b, 2 * gradient * a


def asymmetric():
    return lambda a, b: (Lopsided.apply(a, b) ** 2 * b).sum(), (x(4), x(4))


def in_place():
    def function(a, b):
        hidden = torch.zeros(3, 2, dtype=torch.float64)
        hidden[0] = a[0] * 3
        hidden[1:].add_(a[1:]).mul_(a[1:])
        return hidden.mul_(b).square().sum()

    return function, (x(3, 2), x(3, 2))


def in_place_on_input():
    def function(a):
        a.mul_(2)
        return a.pow(3).sum()

    return function, (x(4),)


def attention():
    return lambda q, k: (F.scaled_dot_product_attention(q, k, k, is_causal=True).square().sum(),)[0], (
        x(1, 2, 3, 4),
        x(1, 2, 3, 4),
    )


def rosenbrock():
    return lambda p: ((1 - p[:-1]) ** 2 + 100 * (p[1:] - p[:-1] ** 2) ** 2).sum(), (x(40),)


def gaussian_process():
    observed = x(6, 2)

    def function(points, scale):
        distances = (points[:, None] - points[None]).square().sum(-1)
        kernel = torch.exp(-distances * scale.exp()) + 0.1 * torch.eye(6, dtype=torch.float64)
        lower = torch.linalg.cholesky(kernel)
        return (observed * torch.cholesky_solve(observed, lower)).sum() + lower.diagonal().log().sum()

    return function, (x(6, 2), x(()))


def nested_gradient():
    def function(weights):
        point = torch.linspace(0, 1, 5, dtype=torch.float64).requires_grad_()
        output = torch.tanh(point[:, None] * weights).sum()
        (slope,) = torch.autograd.grad(output, point, create_graph=True)
        return (slope - 1).square().sum()

    return function, (x(4),)


def transforms_inside():
    """A physics-informed loss written with torch.func."""
    points = torch.linspace(0, 1, 5, dtype=torch.float64)

    def function(weights, scale):
        def solution(t):
            return torch.tanh(t * weights * scale).sum()

        residual = torch.func.vmap(torch.func.grad(torch.func.grad(solution)))(points)
        return (residual + torch.func.vmap(solution)(points)).square().mean()

    return function, (x(4), x(4))


def backward_hooks():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for layer in model[1:]:
        layer.register_full_backward_hook(lambda module, grads_in, grads_out: None)
    data = x(5, 3)
    return of_model(model, lambda out: out.logsumexp(1).sum(), data)


def saved_on_cpu():
    def function(a, b):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return (a @ b).exp().sum()

    return function, (x(3, 2), x(2, 3))


CASES = [
    Case("torch.func inside the function", transforms_inside),
    Case("backward hooks", backward_hooks),
    Case("batched by a loop", lambda: (lambda a: F.mish(a).sum() ** 2, (x(5),))),
    Case("saved-tensor hooks", saved_on_cpu),
    Case("cubic", lambda: (lambda a: (2 * a**3 - a**2).sum(), (x(3, 2),))),
    Case("mlp", mlp),
    Case("relu mlp", relu_mlp),
    Case("cnn", cnn),
    Case("cnn, strides, groups, dilation", lambda: cnn(stride=1, groups=2, dilation=2, padding=2)),
    Case("transformer", transformer),
    Case("lstm", lambda: recurrent(nn.LSTM)),
    Case("gru, both ways", lambda: recurrent(nn.GRU, bidirectional=True)),
    Case("rnn, two layers", lambda: recurrent(nn.RNN, num_layers=2)),
    Case("batch norm in training", lambda: batch_norm(True)),
    Case("batch norm in evaluation", lambda: batch_norm(False)),
    Case("layer and group norm", normed),
    Case("tied weights", tied),
    Case("checkpointing", checkpointed),
    Case("custom Function", custom),
    Case("custom Function, asymmetric", asymmetric),
    Case("in place", in_place),
    Case("in place on the input", in_place_on_input),
    Case("fused attention", attention),
    Case("rosenbrock", rosenbrock),
    Case("gaussian process", gaussian_process),
    Case("gradient inside the function", nested_gradient),
    Case("0-d tensors", lambda: (lambda a, b: a**2 * b + b**3, (x(()), x(())))),
    Case("empty tensor", lambda: (lambda a, b: a.square().sum() + b.pow(4).sum(), (x(0, 2), x(3)))),
    Case("not contiguous", lambda: (lambda a: (a @ a.T).pow(2).sum(), (x(4, 3).T,))),
    Case("expanded", lambda: (lambda a: a.pow(3).sum(), (x(1).expand(3),))),
    Case("unused tensor", lambda: (lambda a, b: a.pow(3).sum(), (x(2), x(3)))),
    Case(
        "linear in one tensor",
        lambda: (lambda a, b, c: a.pow(3).sum() + b.sum() + (a * c).sum(), (x(2), x(3), x(2))),
    ),
    Case("constant", lambda: (lambda a: torch.zeros((), dtype=torch.float64), (x(3),))),
    Case(
        "product at zero", lambda: (lambda a: a.prod(), (torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64),))
    ),
    Case("huber", lambda: (lambda a: F.huber_loss(a, torch.zeros(4, dtype=torch.float64)), (x(4) * 2,))),
]
