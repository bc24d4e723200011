"""What the peers do, where it is more than one call; and the yardsticks, which answer nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.cases import Classifier, Function
from benchmarks.measure import Extrapolated, timed

# What torch says of the hooks that BackPACK puts on a model.
warnings.filterwarnings("ignore", message="Full backward hook is firing")

_MATRIX = 1024  # rows and columns of the matrices that the floor is measured with


def double_backward(func: Function, tensors: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The product that everybody writes by hand."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradient = torch.autograd.grad(func(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(gradient, leaves, v)


def backpack_diagonal(
    classifier: Classifier, extension: str = "DiagHessian", saved: str = "diag_h", converted: bool = False
) -> Callable[[], list[Tensor]]:
    """BackPACK's diagonals; it leaves hooks and attributes on the classifier's model.

    `converted`: BackPACK is to rewrite the model as modules that it knows, sums included.
    """

    @cache
    def extended() -> tuple[nn.Module, nn.Module]:
        from backpack import extend

        return extend(classifier.model, use_converter=converted), extend(nn.CrossEntropyLoss())

    def diagonal() -> list[Tensor]:
        model, loss = extended()
        from backpack import backpack, extensions

        model.zero_grad()
        with backpack(getattr(extensions, extension)()):
            loss(model(classifier.inputs), classifier.targets).backward()
        return [getattr(parameter, saved) for parameter in classifier.model.parameters()]

    return diagonal


def product_by_product(func: Function, leaves: Sequence[Tensor], chunk: int) -> list[Tensor]:
    """The diagonal by one product per coordinate over one graph, each by its own tensor only."""
    gradients = torch.autograd.grad(func(*leaves), leaves, create_graph=True)
    return [
        _entries(gradient, leaf, torch.arange(leaf.numel(), device=leaf.device), chunk).view_as(leaf)
        for gradient, leaf in zip(gradients, leaves, strict=True)
    ]


def some_products(func: Function, leaves: Sequence[Tensor], chunk: int, count: int) -> Extrapolated:
    """What `product_by_product` does, for `count` coordinates of each tensor; chunk 1 does not batch."""
    seconds, gradients = timed(lambda: torch.autograd.grad(func(*leaves), leaves, create_graph=True))
    sample, entries = sampled_coordinates(leaves, count), []
    for gradient, leaf, rows in zip(gradients, leaves, sample, strict=True):
        taken, found = timed(partial(_entries, gradient, leaf, rows, chunk))
        seconds += taken * leaf.numel() / len(rows)
        entries.append(found)
    return Extrapolated(seconds, sum(map(len, sample)), entries)


def sampled_coordinates(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Coordinates of each tensor drawn at random; for a larger count the same ones first."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(tensor.numel(), generator=generator) for tensor in tensors]
    return [order[:count].to(tensor.device) for order, tensor in zip(orders, tensors, strict=True)]


def _entries(gradient: Tensor, leaf: Tensor, rows: Tensor, chunk: int) -> Tensor:
    """Entries of the diagonal at these rows of a tensor's own block."""
    if chunk == 1:
        flat = gradient.flatten()
        each = (torch.autograd.grad(flat[row], leaf, retain_graph=True)[0].flatten()[row] for row in rows)
        return torch.stack(list(each))
    return batched_entries(
        lambda entry: torch.autograd.grad(gradient, leaf, entry, retain_graph=True)[0], leaf, rows, chunk
    )


def batched_entries(product: Callable[[Tensor], Tensor], leaf: Tensor, rows: Tensor, chunk: int) -> Tensor:
    """Entries of the diagonal at these rows of a tensor's own block, which `product` multiplies with."""
    parts = []
    for part in rows.split(chunk):
        one_hot = leaf.new_zeros(len(part), leaf.numel()).scatter_(1, part[:, None], 1.0)
        found = vmap(lambda entry: product(entry.view_as(leaf)).flatten())(one_hot)
        parts.append(found.gather(1, part[:, None])[:, 0])
    return torch.cat(parts)


def matrix_products(operations: float, device: str) -> Callable[[], Extrapolated]:
    """The time of so many operations at the rate of a product of large float32 matrices."""
    a, b = torch.randn(2, _MATRIX, _MATRIX, device=device)
    share = operations / (2 * _MATRIX**3)
    return lambda: Extrapolated(timed(lambda: a @ b)[0] * share)


def per_sample_gradients(classifier: Classifier) -> Callable[[], None]:
    """The gradients of ten logits by the parameters, for every sample."""
    parameters = {name: parameter.detach() for name, parameter in classifier.model.named_parameters()}

    def logit(parameters: dict[str, Tensor], sample: Tensor, k: int) -> Tensor:
        return functional_call(classifier.model, parameters, (sample[None],))[0, k]

    def gradients() -> None:
        for k in range(10):
            vmap(grad(partial(logit, k=k)), in_dims=(None, 0))(parameters, classifier.inputs)

    return gradients
