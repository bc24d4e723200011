"""Losses over data, as data: each is a model, its loss and its batches, in float64, and their exact matrices.

The matrices are those of all samples in one batch, so that nothing here knows of weights.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesse
from cases import Transformer, classes, x
from networks import Autoencoder, Language, Steps, Unheard, cnn, frozen, mlp, words
from oracle import hessian_matrix


class Setting:
    """A model and its loss, of data that come in batches of these sizes."""

    def __init__(self, model, loss_fn, inputs, targets, sizes, reduction="mean"):
        self.model, self.loss_fn, self.reduction = model.double(), loss_fn, reduction
        self.inputs, self.targets, self.sizes = inputs, targets, list(sizes)
        assert sum(self.sizes) == len(inputs) == len(targets)
        free = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.tensors = list(free), list(free.values())
        self.shapes = [tensor.shape for tensor in self.tensors]
        self.numbers = [tensor.numel() for tensor in self.tensors]

    @property
    def batches(self):
        return list(zip(self.inputs.split(self.sizes), self.targets.split(self.sizes), strict=True))

    def loss(self, **options):
        return hesse.Loss(self.model, self.loss_fn, self.batches, reduction=self.reduction, **options)

    def output(self, inputs, *tensors):
        return functional_call(self.model, dict(zip(self.names, tensors, strict=True)), (inputs,))

    def whole(self, *tensors):
        """The loss of all samples at once."""
        return self.loss_fn(self.output(self.inputs, *tensors), self.targets)

    @cached_property
    def hessian(self):
        return hessian_matrix(self.whole, self.tensors)

    def jacobian(self, inputs):
        """Of the model's output: [its elements, P], and the output."""
        given = tuple(tensor.detach() for tensor in self.tensors)
        with sdpa_kernel(SDPBackend.MATH):
            z = self.output(inputs, *given)
            parts = jacobian(lambda *tensors: self.output(inputs, *tensors), given)
        return torch.cat([part.reshape(z.numel(), -1) for part in parts], 1), z.detach()

    @cached_property
    def gauss_newton(self):
        J, z = self.jacobian(self.inputs)
        bend = hessian(lambda z: self.loss_fn(z, self.targets), z).reshape(z.numel(), z.numel())
        return J.T @ bend @ J

    @cached_property
    def empirical(self):
        return self.squared(self.inputs, self.targets)

    def squared(self, inputs, targets):
        """The squares of every sample's own gradient: their mean, or their sum."""
        rows = []
        for one, target in zip(inputs.split(1), targets.split(1), strict=True):
            J, z = self.jacobian(one)
            z.requires_grad_()
            (slope,) = torch.autograd.grad(self.loss_fn(z, target), z)
            rows.append(slope.flatten() @ J)
        rows = torch.stack(rows)
        return rows.T @ rows / (len(rows) if self.reduction == "mean" else 1)

    def packed(self, rows):
        """A vector [P], or several [k, P], as a dict."""
        parts = rows.split(self.numbers, -1)
        return {
            name: part.reshape((*rows.shape[:-1], *shape))
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def flat(self, found):
        """A dict of tensors, each behind the same dimensions or none, as one [..., P]."""
        assert list(found) == self.names
        lead = found[self.names[0]].dim() - len(self.shapes[0])
        parts = [found[name] for name in self.names]
        assert [part.shape[lead:] for part in parts] == self.shapes
        return torch.cat([part.reshape((*part.shape[:lead], -1)) for part in parts], -1)


def tokens(output, targets):
    """Cross entropy of every position."""
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def by_hand(output, targets):
    """A loss that is no log-likelihood, and is not convex: samples apart, outputs of one coupled."""
    along = output.roll(1, 1)
    return ((output - targets).pow(3) * along.sin() + (output * along).cos() / 2).sum(1).mean()


def summed(output, targets):
    return F.cross_entropy(output, targets, reduction="sum")


@dataclass(frozen=True)
class Named:
    """`likelihood`: the loss is one that the Fisher information is known of."""

    name: str
    build: object
    likelihood: bool = True

    @cache  # noqa: B019 - the matrices take their time
    def __call__(self):
        torch.manual_seed(0)
        return self.build()


def unheard():
    return Setting(Unheard(), F.mse_loss, x(4, 3), x(4, 2), (3, 1))


SETTINGS = [
    Named("mlp", lambda: Setting(mlp(), F.cross_entropy, x(5, 3), classes(3, 5), (2, 2, 1))),
    Named("mlp, sum", lambda: Setting(mlp(), summed, x(5, 3), classes(3, 5), (2, 3), "sum"), False),
    Named("mlp, by hand", lambda: Setting(mlp(), by_hand, x(5, 3), x(5, 3), (2, 2, 1)), False),
    Named(
        "cnn, max pooling",
        lambda: Setting(cnn(pool=nn.MaxPool2d), F.cross_entropy, x(4, 2, 6, 6), classes(2, 4), (3, 1)),
    ),
    Named(
        "transformer",
        lambda: Setting(Transformer(), nn.CrossEntropyLoss(), x(3, 4, 4), classes(2, 3), (2, 1)),
    ),
    Named(
        "words, tied",
        lambda: Setting(Language(), tokens, words(4, 2), classes(5, 8).view(4, 2), (2, 2)),
        False,
    ),
    Named("autoencoder, tied", lambda: Setting(Autoencoder(), nn.MSELoss(), x(5, 4), x(5, 4), (1, 4))),
    Named("lstm", lambda: Setting(Steps(nn.LSTM, batch_first=True), F.mse_loss, x(3, 3, 2), x(3, 2), (2, 1))),
    Named("a layer unheard", unheard),
    Named("frozen", lambda: Setting(frozen(), F.cross_entropy, x(5, 3), classes(3, 5), (5,))),
]
