"""An operator that is known by its products: shape, dtype and device made sure of, products counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesse.errors import ArgumentError, DtypeError
from hesse.runtime.progress import Progress

_REMEDY = "give a square tensor, or an object with shape (n, n) and `@` on tensors [n, k]"


class Products:
    """The products of a symmetric operator with the columns of matrices.

    Attributes:
        n: the dimension.
        dtype: of vectors and results, float32 at least.
        device: where vectors are.
        count: the products taken so far, one for each column.
    """

    def __init__(self, A: Any, progress: Progress) -> None:
        shape = getattr(A, "shape", None)
        if shape is None or not hasattr(A, "__matmul__"):
            raise ArgumentError(f"A has no shape and `@`, met {type(A).__name__}: {_REMEDY}")
        if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
            raise ArgumentError(f"A must be square and not empty, met the shape {tuple(shape)}: {_REMEDY}")
        known = getattr(A, "dtype", None)
        dtype = known if isinstance(known, torch.dtype) else torch.get_default_dtype()
        if dtype.is_complex:
            raise DtypeError(f"A must be real, met {dtype}: give its real form of twice the dimension")
        if not dtype.is_floating_point:
            dtype = torch.get_default_dtype()
        if isinstance(A, Tensor):
            A = A.detach().to(dtype)
        self._A, self._taken_in = A, dtype
        self._progress = progress
        self.n = int(shape[0])
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.device = torch.device(getattr(A, "device", None) or "cpu")
        self.count = 0

    @property
    def eps(self) -> float:
        """The relative rounding error of the operator's dtype."""
        return torch.finfo(self._taken_in).eps

    def expect(self, products: int) -> None:
        """Tell the progress of products that are to come."""
        self._progress.expect(products)

    def __call__(self, vectors: Tensor) -> Tensor:
        """The products with all columns of `vectors` [n, k] at once."""
        columns = vectors.shape[1]
        given = vectors.to(self._taken_in)
        try:
            result = self._A @ given
        except TypeError as error:
            raise ArgumentError(
                f"A ({type(self._A).__name__}) does not multiply tensors, {error}: {_REMEDY}; one of numpy "
                "or scipy can be wrapped by an object whose `@` converts"
            ) from error
        if not isinstance(result, Tensor) or result.shape != vectors.shape:
            met = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ArgumentError(f"A @ tensor{list(vectors.shape)} must be like it, met {met}: {_REMEDY}")
        self.count += columns
        self._progress.advance(columns)
        result = result.detach().to(self.device, self.dtype)
        if not result.isfinite().all():
            raise ArgumentError(
                f"A @ vectors holds NaN or infinity, by product {self.count}: look at A itself"
            )
        return result

    def matrix(self) -> Tensor:
        """The whole operator, by its products with the identity."""
        eye = torch.eye(self.n, dtype=self.dtype, device=self.device)
        matrix = self(eye)
        self.check_symmetric(eye, matrix)
        return matrix

    def check_symmetric(self, vectors: Tensor, products: Tensor) -> None:
        """Raise where products that were taken anyway show that A is not symmetric."""
        inner = vectors.T @ products
        scale = vectors.norm(dim=0)[:, None] * products.norm(dim=0)
        off = ((inner - inner.T).abs() / (scale + scale.T).clamp_min(torch.finfo(self.dtype).tiny)).max()
        if off > self.eps**0.5:
            raise ArgumentError(
                f"A must be symmetric, met v'(A - A')w of {off:.1e} relative to |v| |Aw|: give (A + A') / 2"
            )


class Draws:
    """Random vectors from an own generator, the same ones however many are drawn at a time."""

    def __init__(self, A: Products, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ArgumentError(f"seed must be an integer, met {seed!r}")
        self._A = A
        self._generator = torch.Generator().manual_seed(seed)

    def signs(self, columns: int) -> Tensor:
        """Vectors of random signs, [n, columns]."""
        drawn = torch.empty(self._A.n, columns, dtype=self._A.dtype)
        for column in drawn.unbind(1):
            column.copy_(torch.randint(0, 2, (self._A.n,), generator=self._generator, dtype=torch.int8))
        return drawn.mul_(2).sub_(1).to(self._A.device)

    def normal(self, columns: int) -> Tensor:
        """Vectors of independent normal entries, [n, columns]."""
        drawn = torch.empty(self._A.n, columns, dtype=self._A.dtype)
        for column in drawn.unbind(1):
            column.copy_(torch.randn(self._A.n, generator=self._generator, dtype=self._A.dtype))
        return drawn.to(self._A.device)


def positive(name: str, value: int | None) -> None:
    """Raise where a number of things is none."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ArgumentError(f"{name} must be a positive integer, met {value!r}")
