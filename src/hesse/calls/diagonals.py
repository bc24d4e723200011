"""Diagonals of matrices that only products are known of, rows that do not touch being taken together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

HELD = 2**22
"""How many numbers of rows are held at once."""

Product = Callable[[Tensor], Tensor]


def enters_once(ones: Tensor, pulled: Tensor, pulled_squares: Tensor) -> bool:
    """Does every element of an input enter one element of the results alone?

    Only then is $(J^T r)^2 = (J^T 1)(J^T r^2)$ for any r, and then it is so for diagonals.
    """
    eps = torch.finfo(pulled.dtype).eps
    return torch.allclose(pulled.square(), ones * pulled_squares, 1e3 * eps, 0.0)


def squared_rows(results: Sequence[Tensor], given: Sequence[Tensor | None], leaf: Tensor) -> Tensor:
    """`(J ∘ J)ᵀ` times diagonals of the results, from every row of the Jacobian by a leaf."""
    total = torch.zeros_like(leaf)
    for result, k in zip(results, given, strict=True):
        if k is None:
            continue
        product = _product(result, leaf)
        shared = _untouched(product, result, leaf)
        over = [d for d in range(result.dim()) if d not in shared]
        across = [size if d in shared else 1 for d, size in enumerate(leaf.shape)]
        for seeds in _one_hot(result, shared):
            weights = (seeds * k).sum([1 + d for d in over], keepdim=True)
            rows = torch.vmap(product)(seeds)
            total = total + (rows.square() * weights.view(len(seeds), *across)).sum(0)
    return total


def diagonal_of(slope: Tensor, leaf: Tensor) -> Tensor:
    """The diagonal of the derivative of a gradient, which is symmetric."""
    product = _product(slope, leaf)
    total = torch.zeros_like(slope)
    if bool(product(random_like(slope)).any()):
        for seeds in _one_hot(slope, _untouched(product, slope, slope)):
            total = total + (seeds * torch.vmap(product)(seeds)).sum(0)
    return total


def random_like(like: Tensor) -> Tensor:
    """Normal numbers, the same every time."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(like.shape, generator=generator).to(like)


def _product(result: Tensor, leaf: Tensor) -> Product:
    """A vector times the derivative of a result by a leaf."""

    def product(vector: Tensor) -> Tensor:
        return torch.autograd.grad(result, leaf, vector, retain_graph=True, materialize_grads=True)[0]

    return product


def _untouched(product: Product, rows: Tensor, columns: Tensor) -> set[int]:
    """The dimensions along which a matrix only couples what has the same index.

    To scale a vector along such a dimension is to scale its product.
    """
    vector = random_like(rows)
    whole = product(vector)
    found = set()
    for d, (size, other) in enumerate(zip(rows.shape, columns.shape, strict=False)):
        if size == other:
            factors = random_like(rows.new_empty(size)).abs() + 0.5
            scaled = product(vector * factors.view(size, *(1,) * (rows.dim() - d - 1)))
            expected = whole * factors.view(size, *(1,) * (columns.dim() - d - 1))
            eps = torch.finfo(whole.dtype).eps
            if bool((scaled - expected).norm() <= eps**0.5 * 0.1 * expected.norm()):
                found.add(d)
    return found


def _one_hot(like: Tensor, shared: set[int]) -> Iterator[Tensor]:
    """Stacks of vectors that are one at one place, and everywhere along the shared dimensions."""
    sizes = [1 if d in shared else size for d, size in enumerate(like.shape)]
    count = math.prod(sizes)
    for numbers in torch.arange(count, device=like.device).split(max(1, HELD // max(1, like.numel()))):
        ones = like.new_zeros(len(numbers), count)
        ones[torch.arange(len(numbers), device=like.device), numbers] = 1
        yield ones.view(-1, *sizes).expand(-1, *like.shape)
