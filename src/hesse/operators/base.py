"""Symmetric matrices that are known by their products, and what is made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesse.errors import ArgumentError, NotATensorError
from hesse.problem import Problem

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator


class Operator(ABC):
    """A symmetric matrix over some tensors, [P, P], that is known by its products.

    Attributes:
        structure: the tensors: their names, shapes and container, and how vectors over them are read.
    """

    def __init__(self, structure: Problem) -> None:
        self.structure = structure
        if not structure.tensors:
            raise ArgumentError("there is nothing to differentiate by; an operator needs at least one tensor")

    @property
    def shape(self) -> tuple[int, int]:
        """[P, P]."""
        return self.structure.parameters, self.structure.parameters

    @property
    def dtype(self) -> torch.dtype:
        """Of flat vectors: what holds all tensors' dtypes."""
        found = self.structure.tensors[0].dtype
        for tensor in self.structure.tensors[1:]:
            found = torch.promote_types(found, tensor.dtype)
        return found

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.structure.tensors[0].device

    @property
    def names(self) -> tuple[str, ...]:
        """What the tensors are called, in the order of flat vectors."""
        return self.structure.names

    @property
    def T(self) -> Operator:  # noqa: N802
        """The transpose: the operator itself."""
        return self

    @abstractmethod
    def multiply(
        self, vectors: Sequence[Tensor], count: int | None, into: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Products with a vector, one part for every tensor; or with `count` of them by a leading dimension.

        `into`: zeros that products with several are added to, and that are given back.
        """

    @abstractmethod
    def diagonal(self) -> Any:
        """The diagonal, exactly, in the container of the tensors."""

    @abstractmethod
    def blocks(self) -> Any:
        """The diagonal block of every tensor, exactly: a tensor of shape s is replaced by one of [*s, *s]."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The matrix [P, P]."""

    @abstractmethod
    def trace(self) -> Tensor:
        """The trace, exactly: a tensor without dimensions."""

    def __matmul__(self, v: Any) -> Any:
        """The product with a vector [P], a matrix [P, k] of k columns, or a container like the tensors'.

        The columns of the result lie one after the other in memory. Of a container all tensors may have a
        leading dimension k: so many vectors. What goes in comes out.
        """
        if isinstance(v, Tensor) and v.dim() in (1, 2) and len(v) == self.shape[0]:
            return self._of_flat(v)
        if hasattr(v, "__array__") and not isinstance(v, Tensor):
            raise NotATensorError(
                "v must be a tensor, met an array; pass torch.from_numpy(v), or multiply A.to_scipy()"
            )
        if isinstance(v, Tensor) and v.shape not in {tensor.shape for tensor in self.structure.tensors}:
            raise ArgumentError(
                f"v must be a vector [{self.shape[0]}] or a matrix of columns [{self.shape[0]}, k], met "
                f"shape {list(v.shape)}"
            )
        vectors, count = self.structure.unpack_many("v", v)
        return self.structure.pack(self.multiply(vectors, count))

    def _of_flat(self, v: Tensor) -> Tensor:
        self._require_usable(v)
        sizes, shapes = self.structure.sizes, [tensor.shape for tensor in self.structure.tensors]
        dtypes = [tensor.dtype for tensor in self.structure.tensors]
        if v.dim() == 1:
            vectors = [p.reshape(s).to(d) for p, s, d in zip(v.split(sizes), shapes, dtypes, strict=True)]
            return torch.cat([product.flatten() for product in self.multiply(vectors, None)]).to(v.dtype)
        # Columns are worked on one by one, so they lie so, here and in the result.
        count, wide = v.shape[1], torch.promote_types(v.dtype, torch.float32)
        found = torch.zeros((count, len(v)), dtype=wide, device=v.device)
        given, sums = (
            [part.view(count, *shape) for part, shape in zip(rows.split(sizes, 1), shapes, strict=True)]
            for rows in (v.T.contiguous(), found)
        )
        vectors = [part.to(dtype) for part, dtype in zip(given, dtypes, strict=True)]
        if count:
            self.multiply(vectors, count, sums)
        return found.T.to(v.dtype)

    def _require_usable(self, v: Tensor) -> None:
        if v.is_complex() or v.device != self.device:
            met = "complex" if v.is_complex() else f"on {v.device}"
            raise ArgumentError(f"v is {met}; pass a real tensor on {self.device}")
        if not v.is_floating_point():
            raise ArgumentError(f"v has dtype {v.dtype}; pass floating-point numbers (.to({self.dtype}))")

    @property
    def _as_sum(self) -> Combination:
        return Combination([(1.0, self)])

    def __add__(self, other: Any) -> Operator:
        """The sum with an operator over the same tensors, or with a multiple of the identity (damping)."""
        return self._as_sum.plus(other, 1.0)

    def __radd__(self, other: Any) -> Operator:
        """The same."""
        return self.__add__(other)

    def __sub__(self, other: Any) -> Operator:
        """The difference."""
        return self._as_sum.plus(other, -1.0)

    def __rsub__(self, other: Any) -> Operator:
        """The difference."""
        return (-self).__add__(other)

    def __mul__(self, factor: Any) -> Operator:
        """A multiple."""
        return self._as_sum.times(factor)

    def __rmul__(self, factor: Any) -> Operator:
        """A multiple."""
        return self.__mul__(factor)

    def __truediv__(self, number: Any) -> Operator:
        """A multiple."""
        return self * (1.0 / _number(number))

    def __neg__(self) -> Operator:
        """The negative."""
        return self * -1.0

    def to_scipy(self) -> LinearOperator:
        """A `scipy.sparse.linalg.LinearOperator`: arrays in and out, in the dtype of the operator."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        dtype = torch.promote_types(self.dtype, torch.float32)  # numpy has no bfloat16

        def product(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            if v.dtype.kind == "c":
                return product(v.real) + 1j * product(v.imag)
            given = torch.from_numpy(np.array(v, copy=True)).to(self.device, dtype)
            flat = given.reshape(self.shape[0]) if given.dim() == 1 or given.shape[1] == 1 else given
            found: np.ndarray[Any, Any] = (self @ flat).reshape(given.shape).cpu().numpy()
            return found.astype(v.dtype) if v.dtype.kind == "f" else found

        kind = torch.empty(0, dtype=dtype).numpy().dtype
        return LinearOperator(self.shape, product, product, product, dtype=kind, rmatmat=product)

    def __repr__(self) -> str:
        """What it is."""
        return f"{type(self).__name__}(shape={list(self.shape)}, {self.dtype}, {self.device})"


class Combination(Operator):
    """A sum of multiples of operators over the same tensors, and of the identity."""

    def __init__(self, terms: Sequence[tuple[float, Operator]], damping: float = 0.0) -> None:
        super().__init__(terms[0][1].structure)
        self._terms, self._damping = terms, damping

    @property
    def _as_sum(self) -> Combination:
        return self

    def plus(self, other: Any, sign: float) -> Combination:
        """The sum with an operator, or a multiple of the identity."""
        if not isinstance(other, Operator):
            return Combination(self._terms, self._damping + sign * _number(other))
        more = other._as_sum
        own, theirs = ([t.shape for t in part.structure.tensors] for part in (self, more))
        if own != theirs:
            raise ArgumentError(
                f"operators of a sum must be over tensors of the same shapes, met {list(map(list, own))} and "
                f"{list(map(list, theirs))}"
            )
        terms = [*self._terms, *((sign * factor, operator) for factor, operator in more._terms)]
        return Combination(terms, self._damping + sign * more._damping)

    def times(self, factor: Any) -> Combination:
        """A multiple."""
        scale = _number(factor)
        return Combination([(scale * c, operator) for c, operator in self._terms], scale * self._damping)

    def multiply(
        self, vectors: Sequence[Tensor], count: int | None, into: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """See `Operator`."""
        sums = list(into) or [torch.zeros_like(vector) for vector in vectors]
        for factor, operator in self._terms:
            for one, part in zip(sums, operator.multiply(vectors, count), strict=True):
                one.add_(part, alpha=factor)
        if self._damping:
            for one, vector in zip(sums, vectors, strict=True):
                one.add_(vector, alpha=self._damping)
        return sums

    def diagonal(self) -> Any:
        """See `Operator`."""
        return self._summed(lambda operator: operator.diagonal(), torch.ones_like)

    def blocks(self) -> Any:
        """See `Operator`."""
        return self._summed(lambda operator: operator.blocks(), _identity)

    def to_dense(self) -> Tensor:
        """See `Operator`."""
        found = sum(factor * operator.to_dense() for factor, operator in self._terms)
        assert isinstance(found, Tensor)
        found.diagonal().add_(self._damping)
        return found

    def trace(self) -> Tensor:
        """See `Operator`."""
        found = sum(factor * operator.trace() for factor, operator in self._terms)
        assert isinstance(found, Tensor)
        return found + self._damping * self.shape[0]

    def _summed(self, ask: Callable[[Operator], Any], identity: Callable[[Tensor], Tensor]) -> Any:
        parts = [(factor, self.structure.leaves_of(ask(operator))) for factor, operator in self._terms]
        return self.structure.pack(
            [
                sum((factor * own[i] for factor, own in parts), self._damping * identity(tensor.detach()))
                for i, tensor in enumerate(self.structure.tensors)
            ]
        )


def _identity(tensor: Tensor) -> Tensor:
    eye = torch.eye(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return eye.reshape((*tensor.shape, *tensor.shape))


def _number(factor: Any) -> float:
    if isinstance(factor, (int, float)) or (isinstance(factor, Tensor) and factor.numel() == 1):
        return float(factor)
    raise ArgumentError(
        f"an operator is added to another or to a number (times the identity), and multiplied by a number; "
        f"met {type(factor).__name__}"
    )
