"""The functions that are differentiated, as data: float32, seeded, on any device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.models.catalogue import science

T = TypeVar("T")
Function = Callable[..., Tensor]
Problem = tuple[Function, tuple[Tensor, ...]]

# What torch says on every change of the oneDNN flags, which `elementary_recurrence` makes.
warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")


@dataclass(frozen=True)
class Classifier:
    """A model, samples, and the classes that they are to be told; its loss is the cross entropy."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def problem(self) -> Problem:
        """The loss as a function of the parameters, which are detached from the model."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)

        def func(*tensors: Tensor) -> Tensor:
            logits = functional_call(self.model, dict(zip(names, tensors, strict=True)), (self.inputs,))
            return F.cross_entropy(logits, self.targets)

        return func, tuple(parameter.detach() for parameter in parameters)

    def double(self) -> Classifier:
        """The same in float64; the model is changed."""
        return Classifier(self.model.double(), self.inputs.double(), self.targets)


@dataclass(frozen=True)
class Case:
    """One scalar function of tensors.

    Attributes:
        name: what `--case` takes.
        description: what the page says of it.
        build: gives `(func, tensors)`, for `func(*tensors)`, or a classifier.
        peers_need: a context in which peers have to evaluate the function to differentiate it twice.
        note: why they need it.
        sample: for a classifier with too many coordinates for one product each: how many of every
            tensor are compared. Zero compares all.
    """

    name: str
    description: str
    build: Callable[[], Problem | Classifier]
    peers_need: Callable[[], AbstractContextManager[None]] = nullcontext
    note: str = ""
    sample: int = 0

    def classifier(self, device: str) -> Classifier | None:
        """The classifier behind the function, if there is one, the same at every call."""
        built = self._built(device)
        return built if isinstance(built, Classifier) else None

    def problem(self, device: str) -> Problem:
        """The function and its tensors, the same ones at every call."""
        built = self._built(device)
        return built.problem() if isinstance(built, Classifier) else built

    def _built(self, device: str) -> Problem | Classifier:
        torch.manual_seed(0)
        with torch.device(device):
            return self.build()

    def for_peers(self, func: Callable[..., T]) -> Callable[..., T]:
        """The function, evaluated in the context that peers need."""
        if self.peers_need is nullcontext:
            return func

        def helped(*tensors: Tensor) -> T:
            with self.peers_need():
                return func(*tensors)

        return helped


@contextmanager
def elementary_attention() -> Iterator[None]:
    """Attention without fused kernels."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def elementary_recurrence() -> Iterator[None]:
    """Recurrent layers without the fused kernels of oneDNN and cuDNN."""
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
        yield


def _classifier(model: nn.Module, inputs: Tensor, classes: int) -> Classifier:
    """A model with random targets."""
    return Classifier(model, inputs, torch.randint(classes, (len(inputs),)))


class _Residual(nn.Module):
    """The sum of what a module gives and its input, or what a shortcut makes of the input."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def mlp(
    *widths: int,
    samples: int,
    activation: type[nn.Module] = nn.Tanh,
    normed: bool = False,
    skips: bool = False,
) -> Classifier:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths[:-1]):
        norm = [nn.LayerNorm(narrow)] if normed else []
        hidden = nn.Sequential(nn.Linear(wide, narrow), *norm, activation())
        layers += [_Residual(hidden)] if skips and wide == narrow else hidden
    model = nn.Sequential(*layers, nn.Linear(*widths[-2:]))
    return _classifier(model, torch.randn(samples, widths[0]), widths[-1])


def deep_mlp(depth: int, **kind: Any) -> Classifier:
    """Hidden layers of width 128, with He's initial weights: torch's own shrink to nothing on the way."""
    classifier = mlp(64, *[128] * depth, 10, samples=32, **kind)
    for layer in classifier.model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return classifier


def cnn() -> Classifier:
    first = (nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2))
    second = (nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2))
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32, 10))
    return _classifier(model, torch.randn(32, 1, 8, 8), 10)


def residual_cnn(activation: type[nn.Module]) -> Classifier:
    def conv(channels: int) -> nn.Module:
        return nn.Conv2d(channels, 16, 3, padding=1)

    blocks = (_Residual(nn.Sequential(conv(16), activation(), conv(16))) for _ in range(2))
    body = (layer for block in (conv(3), *blocks) for layer in (block, activation()))
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return _classifier(model, torch.randn(64, 3, 8, 8), 10)


def pooled_cnn() -> Classifier:
    """Convolutions, ReLU and max pooling, as in LeNet."""
    layers = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 5 * 5, 10))
    return _classifier(model, torch.randn(32, 1, 28, 28), 10)


def residual_cnn_pooled() -> Classifier:
    """As `residual_cnn` with ReLU, max pooling after the first layer."""
    classifier = residual_cnn(nn.ReLU)
    assert isinstance(classifier.model, nn.Sequential)
    classifier.model.insert(2, nn.MaxPool2d(2))
    return classifier


class _Bottleneck(nn.Sequential):
    """What a residual block of ResNet-18 or ResNet-50 adds to its input."""

    def __init__(self, channels: int, width: int, stride: int, deep: bool) -> None:
        if deep:
            shapes = [(channels, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        else:
            shapes = [(channels, width, 3, stride), (width, width, 3, 1)]
        layers = [layer for shape in shapes for layer in (*_normed_convolution(*shape), nn.ReLU())]
        super().__init__(*layers[:-1])


def _normed_convolution(channels: int, out: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    norm = nn.BatchNorm2d(out)
    nn.init.normal_(norm.running_mean, std=0.1)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False), norm


def whole_resnet(blocks: Sequence[int], deep: bool) -> Classifier:
    """A ResNet as torchvision has it, max pooling included, its norms with the statistics of nobody."""
    layers: list[nn.Module] = [*_normed_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        out = 4 * width if deep else width
        for block in range(count):
            stride = 2 if stage and not block else 1
            shortcut = stride > 1 or channels != out
            body = _Bottleneck(channels, width, stride, deep)
            way = nn.Sequential(*_normed_convolution(channels, out, 1, stride)) if shortcut else None
            layers += [_Residual(body, way), nn.ReLU()]
            channels = out
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return _classifier(model.eval(), torch.randn(4, 3, 64, 64), 10)


def resnet18() -> Classifier:
    """The shape of ResNet-18 for small images, its norms with the statistics of nobody's training."""
    conv = _normed_convolution
    layers = [*conv(3, 64, 3, 1), nn.ReLU()]
    channels = 64
    for out in (64, 64, 128, 128, 256, 256, 512, 512):
        stride = 1 if out == channels else 2
        body = nn.Sequential(*conv(channels, out, 3, stride), nn.ReLU(), *conv(out, out, 3, 1))
        shortcut = None if out == channels else nn.Sequential(*conv(channels, out, 1, stride))
        layers += [_Residual(body, shortcut), nn.ReLU()]
        channels = out
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return _classifier(model.eval(), torch.randn(8, 3, 32, 32), 10)


class _Pooled(nn.Module):
    """A sequence model, the mean of its outputs over time, and a linear head."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)

    def forward(self, sequences: Tensor) -> Tensor:
        outputs = self.body(sequences)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return self.head(outputs.mean(1))


class _Positions(nn.Module):
    """Adds a learned vector for every position."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(0.1 * torch.randn(positions, width))

    def forward(self, sequences: Tensor) -> Tensor:
        return sequences + self.vectors


def transformer() -> Classifier:
    body = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, activation="gelu", batch_first=True)
    return _classifier(_Pooled(body, 12, 3), torch.randn(16, 8, 12), 3)


def transformer_of(width: int, heads: int, hidden: int, tokens: int, samples: int) -> Classifier:
    """Two encoder layers on learned positions."""
    layers = (
        nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, activation="gelu", batch_first=True)
        for _ in range(2)
    )
    model = _Pooled(nn.Sequential(_Positions(tokens, width), *layers), width, 10)
    return _classifier(model, torch.randn(samples, tokens, width), 10)


def lstm() -> Classifier:
    body = nn.LSTM(6, 12, batch_first=True)
    return _classifier(_Pooled(body, 12, 3), torch.randn(16, 8, 6), 3)


def gplvm() -> Problem:
    """The negative log posterior of latent points and the logarithms of the kernel's parameters."""
    points, latent, observed = 60, 8, 12
    targets, identity = torch.randn(points, observed), torch.eye(points)

    def func(latents: Tensor, logarithms: Tensor) -> Tensor:
        variance, length, noise = logarithms.exp().unbind()
        squared = (latents[:, None] - latents[None]).square().sum(-1)
        kernel = variance * torch.exp(-0.5 * squared / length**2) + noise * identity
        factor = torch.linalg.cholesky(kernel)
        whitened = torch.linalg.solve_triangular(factor, targets, upper=False)
        log_likelihood = -0.5 * whitened.square().sum() - observed * factor.diagonal().log().sum()
        return 0.5 * latents.square().sum() - log_likelihood

    return func, (torch.randn(points, latent), torch.tensor([0.0, 0.7, -1.5]))


def rosenbrock() -> Problem:
    def func(x: Tensor) -> Tensor:
        return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()

    return func, (torch.randn(1500),)


_ELEMENTARY_ATTENTION = (
    elementary_attention,
    "Peers evaluate the function under sdpa_kernel(SDPBackend.MATH), without which they raise.",
)

TANH_MLP = Case(
    "tanh-mlp",
    "tanh MLP 16-32-32-10, cross entropy of 256 samples",
    partial(mlp, 16, 32, 32, 10, samples=256),
)
COMMON = (
    TANH_MLP,
    Case("cnn", "two convolutions of 8 channels, tanh, average pooling, 32 images of 8x8", cnn),
    Case(
        "transformer",
        "TransformerEncoderLayer of width 12, 2 heads, gelu, 16 sequences of 8 tokens",
        transformer,
        *_ELEMENTARY_ATTENTION,
    ),
    Case(
        "lstm",
        "LSTM of width 12, 16 sequences of 8 steps",
        lstm,
        elementary_recurrence,
        "Peers evaluate the function without the fused kernels of oneDNN and cuDNN, which are slower "
        "to differentiate twice or cannot be.",
    ),
    Case("gplvm", "marginal likelihood of a Gaussian process, 60 latent points in 8 dimensions", gplvm),
    Case("rosenbrock", "chained Rosenbrock function", rosenbrock),
)

# The full Hessian of multilayer perceptrons is also set beside matrix products of as many operations.
MLPS = (
    TANH_MLP,
    Case(
        "mlp-64-32-10",
        "tanh MLP 64-32-10, cross entropy of 256 samples",
        partial(mlp, 64, 32, 10, samples=256),
    ),
    Case(
        "mlp-64-32-32-10",
        "tanh MLP 64-32-32-10, cross entropy of 512 samples",
        partial(mlp, 64, 32, 32, 10, samples=512),
    ),
)

WIDE_MLP = Case(
    "wide-mlp",
    "tanh MLP 64-64-32-10, cross entropy of 256 samples",
    partial(mlp, 64, 64, 32, 10, samples=256),
)
LARGE_MLP = Case(
    "large-mlp",
    "tanh MLP 64-256-256-10, cross entropy of 512 samples",
    partial(mlp, 64, 256, 256, 10, samples=512),
)


def _deep(name: str, description: str, depth: int = 8, **kind: Any) -> Case:
    description += f", {depth} hidden layers of width 128, 32 samples"
    return Case(name, description, partial(deep_mlp, depth, **kind), sample=16)


DEEP_MLPS = (
    _deep("deep-mlp-3", "tanh MLP", 3),
    _deep("deep-mlp-4", "tanh MLP", 4),
    _deep("deep-mlp", "tanh MLP"),
    _deep("deep-mlp-16", "tanh MLP", 16),
    _deep("deep-mlp-32", "tanh MLP", 32),
    _deep("deep-relu", "ReLU MLP", activation=nn.ReLU),
    _deep("deep-gelu", "GELU MLP", activation=nn.GELU),
    _deep("deep-silu", "SiLU MLP", activation=nn.SiLU),
    _deep("deep-layernorm", "tanh MLP with a layer norm after each hidden linear layer", normed=True),
    _deep("deep-skips", "tanh MLP with a skip around every hidden layer but the first", skips=True),
)

TRANSFORMER_2 = Case(
    "transformer-2",
    "two TransformerEncoderLayers of width 16, 2 heads, gelu, learned positions, 16 sequences of 8 tokens",
    partial(transformer_of, width=16, heads=2, hidden=64, tokens=8, samples=16),
    *_ELEMENTARY_ATTENTION,
    sample=16,
)

# The diagonals of these are also set beside ten batched gradients of every sample.
RESIDUAL_CNNS = (
    Case(
        "relu-resnet",
        "two residual blocks of 16 channels, ReLU, average pooling, 64 images of 8x8",
        partial(residual_cnn, nn.ReLU),
        sample=16,
    ),
    Case(
        "silu-resnet",
        "two residual blocks of 16 channels, SiLU, average pooling, 64 images of 8x8",
        partial(residual_cnn, nn.SiLU),
        sample=16,
    ),
    Case(
        "relu-resnet-maxpool",
        "two residual blocks of 16 channels, ReLU, max pooling, 64 images of 8x8",
        residual_cnn_pooled,
        sample=16,
    ),
    Case("relu-maxpool", "two convolutions, ReLU, max pooling, 32 images of 28x28", pooled_cnn, sample=16),
)

RESNET_18 = Case(
    "resnet-18",
    "ResNet-18 for images of 32x32, ReLU, batch norm in eval mode, 8 images",
    resnet18,
    sample=1,
)

# As torchvision has them.
WHOLE_RESNETS = (
    Case(
        "resnet-18-64",
        "ResNet-18 with max pooling, batch norm in eval mode, 4 images of 64x64",
        partial(whole_resnet, (2, 2, 2, 2), False),
        sample=1,
    ),
    Case(
        "resnet-50-64",
        "ResNet-50 with max pooling, batch norm in eval mode, 4 images of 64x64",
        partial(whole_resnet, (3, 4, 6, 3), True),
        sample=1,
    ),
)


def marginal_likelihood() -> Problem:
    """Of a Gaussian process with an RBF kernel, by the logarithms of its parameters."""
    points, targets, identity = torch.randn(60, 3), torch.randn(60), torch.eye(60)
    squared = (points[:, None] - points[None]).square().sum(-1)

    def func(logarithms: Tensor) -> Tensor:
        variance, length, noise = logarithms.exp().unbind()
        factor = torch.linalg.cholesky(variance * torch.exp(-0.5 * squared / length**2) + noise * identity)
        whitened = torch.linalg.solve_triangular(factor, targets[:, None], upper=False)
        return 0.5 * whitened.square().sum() + factor.diagonal().log().sum()

    return func, (torch.tensor([0.0, 0.3, -1.0]),)


def _textbook(build: Callable[[], Any]) -> Problem:
    problem = build()
    return problem if isinstance(problem, tuple) else (problem.func, problem.tensors)


SMALL = tuple(
    Case(f"small-{name}", description, partial(_textbook, build))
    for name, description, build in (
        ("logistic", "logistic regression of 8 coefficients, 200 samples", science.logistic_regression),
        (
            "gp",
            "marginal likelihood of a Gaussian process by 3 parameters of its kernel",
            marginal_likelihood,
        ),
        ("kalman", "state space of 40 steps by a Kalman filter, 6 parameters", science.kalman_filter),
        ("hmm", "hidden Markov model of 5 states, 50 steps, 60 parameters", science.hidden_markov),
        ("garch", "likelihood of a GARCH(1, 1) process of 120 steps, 3 parameters", science.garch),
        ("ode", "misfit of an ODE integrated by 60 steps of RK4, 6 parameters", science.runge_kutta),
    )
)

HESSIAN_CASES = (*COMMON, *MLPS[1:], *SMALL)
DIAGONAL_CASES = (
    *(*COMMON, WIDE_MLP, *DEEP_MLPS, TRANSFORMER_2),
    *(*RESIDUAL_CNNS, RESNET_18, *WHOLE_RESNETS),
)
HVP_CASES = (*COMMON, LARGE_MLP)
