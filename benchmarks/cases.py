"""The functions that are differentiated, as data: float32, seeded, on any device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Function = Callable[..., Tensor]
Problem = tuple[Function, tuple[Tensor, ...]]

# What torch says on every change of the oneDNN flags, which `elementary_recurrence` makes.
warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")


@dataclass(frozen=True)
class Case:
    """One scalar function of tensors.

    Attributes:
        name: what `--case` takes.
        description: what the page says of it.
        build: gives `(func, tensors)`, for `func(*tensors)`.
        peers_need: a context in which peers have to evaluate the function to differentiate it twice.
        note: why they need it.
    """

    name: str
    description: str
    build: Callable[[], Problem]
    peers_need: Callable[[], AbstractContextManager[None]] = nullcontext
    note: str = ""

    def problem(self, device: str) -> Problem:
        """The function and its tensors, the same ones at every call."""
        torch.manual_seed(0)
        with torch.device(device):
            return self.build()

    def for_peers(self, func: Function) -> Function:
        """The function, evaluated in the context that peers need."""
        if self.peers_need is nullcontext:
            return func

        def helped(*tensors: Tensor) -> Tensor:
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


def _classifier(model: nn.Module, inputs: Tensor, classes: int) -> Problem:
    """The cross entropy of a model with random targets, by its parameters."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    targets = torch.randint(classes, (len(inputs),))

    def func(*tensors: Tensor) -> Tensor:
        logits = functional_call(model, dict(zip(names, tensors, strict=True)), (inputs,))
        return F.cross_entropy(logits, targets)

    return func, tuple(parameter.detach() for parameter in parameters)


def tanh_mlp(*widths: int, samples: int) -> Problem:
    layers = [layer for wide, narrow in pairwise(widths) for layer in (nn.Linear(wide, narrow), nn.Tanh())]
    return _classifier(nn.Sequential(*layers[:-1]), torch.randn(samples, widths[0]), widths[-1])


def cnn() -> Problem:
    first = (nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2))
    second = (nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2))
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32, 10))
    return _classifier(model, torch.randn(32, 1, 8, 8), 10)


class _Pooled(nn.Module):
    """A sequence model, the mean of its outputs over time, and a linear head."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)

    def forward(self, sequences: Tensor) -> Tensor:
        outputs = self.body(sequences)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return self.head(outputs.mean(1))


def transformer() -> Problem:
    body = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, activation="gelu", batch_first=True)
    return _classifier(_Pooled(body, 12, 3), torch.randn(16, 8, 12), 3)


def lstm() -> Problem:
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


CASES = (
    Case(
        "tanh-mlp",
        "tanh MLP 16-32-32-10, cross entropy of 256 samples",
        partial(tanh_mlp, 16, 32, 32, 10, samples=256),
    ),
    Case("cnn", "two convolutions of 8 channels, tanh, average pooling, 32 images of 8x8", cnn),
    Case(
        "transformer",
        "TransformerEncoderLayer of width 12, 2 heads, gelu, 16 sequences of 8 tokens",
        transformer,
        elementary_attention,
        "Peers evaluate the function under sdpa_kernel(SDPBackend.MATH), without which they raise.",
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

WIDE_MLP = Case(
    "wide-mlp",
    "tanh MLP 64-64-32-10, cross entropy of 256 samples",
    partial(tanh_mlp, 64, 64, 32, 10, samples=256),
)
LARGE_MLP = Case(
    "large-mlp",
    "tanh MLP 64-256-256-10, cross entropy of 512 samples",
    partial(tanh_mlp, 64, 256, 256, 10, samples=512),
)
