"""What scipy minimises: a function of flat arrays, with its gradient, its Hessian and products with that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from hesse.data.loss import Loss
from hesse.data.problem import problem_of
from hesse.errors import ArgumentError
from hesse.look.evaluation import value_and_gradient
from hesse.operators import outputs
from hesse.operators.curvature import Curvature

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]


class Objective:
    r"""A function of tensors as scipy takes it: of a flat array $x \in \mathbb{R}^P$ in double precision.

    `minimize(o.fun, o.x0, jac=o.jac, hess=o.hess, method="trust-exact")`, or with `hessp=o.hessp` for methods
    that need products alone ("Newton-CG", "trust-krylov", "trust-ncg"). Nothing is scaled: for a mean over
    samples, value and derivatives are those of the mean. x holds the tensors one after the other.

    A closure's tensors, or a model's parameters, are set to x for the time of a call, and are then what they
    were, to the last bit, with their `.grad` and version; `load` sets them for good. Tensors of less
    precision are computed in, and their numbers given as, double precision.

    Args:
        func: a `Loss`; or a function, or closure, of `inputs`, see `hessian`.
        inputs: see `hessian`; not with a `Loss`.
        curvature: "hessian", or, of a `Loss`, "gauss_newton" for the matrix of `GaussNewtonOperator` in place
            of the Hessian: it is positive semidefinite for a convex loss function.
        memory: budget for the Hessian, see `hessian`.

    Raises:
        HesseError: `ArgumentError` for an x or p that has not P elements, or a closure's tensor that is there
            twice; see `hessian` and `Loss` for others.

    Source: J. Nocedal, S. J. Wright, "Numerical Optimization" (2006), for what scipy does with it.

    Example:
        >>> import torch, hesse
        >>> from scipy.optimize import minimize
        >>> rosenbrock = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
        >>> o = hesse.Objective(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> run = minimize(o.fun, o.x0, jac=o.jac, hess=o.hess, method="trust-exact")
        >>> run.x.round(4).tolist()
        [1.0, 1.0]
        >>> o.hess(run.x).round(1).tolist()
        [[802.0, -400.0], [-400.0, 200.0]]
    """

    def __init__(
        self,
        func: Callable[..., Tensor] | Loss,
        inputs: Any = None,
        *,
        curvature: Literal["hessian", "gauss_newton"] = "hessian",
        memory: int | str | None = None,
    ) -> None:
        if curvature not in ("hessian", "gauss_newton"):
            raise ArgumentError(f'curvature must be "hessian" or "gauss_newton", met {curvature!r}')
        problem = problem_of(func, inputs)
        self._given = problem.tensors
        if problem.closure and len({id(tensor) for tensor in self._given}) < len(self._given):
            raise ArgumentError(
                "inputs holds a tensor twice, and one place cannot have two values; pass it once"
            )
        if not problem.closure:  # a function is given tensors of our own, so that the caller's stay
            problem = replace(problem, tensors=tuple(tensor.detach().clone() for tensor in self._given))
        self._problem = bent = problem
        if curvature == "gauss_newton":
            if not isinstance(func, Loss):
                raise ArgumentError(
                    'curvature="gauss_newton" needs to know the output of a model; pass a Loss'
                )
            bent = func.problem(outputs.itself)
        self._curvature = Curvature(bent, memory, None)
        self._left: tuple[Array, str, Any] | None = None

    @property
    def x0(self) -> Array:
        """Where the tensors are."""
        return _array(self._given)

    def fun(self, x: ArrayLike) -> float:
        """The value at x, a float. The gradient at x is kept for one call of `jac`."""
        found: float = self._first("fun", x)
        return found

    def jac(self, x: ArrayLike) -> Array:
        """The gradient at x, [P]. The value at x is kept for one call of `fun`."""
        found: Array = self._first("jac", x)
        return found

    def hess(self, x: ArrayLike) -> Array:
        """The Hessian at x, [P, P], exactly and certified: `hessian`."""
        with self._at(self._read("x", x)):
            return _array([self._curvature.to_dense()]).reshape(self._curvature.shape)

    def hessp(self, x: ArrayLike, p: ArrayLike) -> Array:
        """The product of the Hessian at x with p, [P], by a double backward: `hvp`."""
        vector = torch.from_numpy(self._read("p", p)).to(self._curvature.device)
        with self._at(self._read("x", x)):
            return _array([self._curvature @ vector])

    def unpacked(self, x: ArrayLike) -> Any:
        """The point x as tensors, in the container of the inputs (of a `Loss`: a dict by parameter name)."""
        return self._problem.pack(self._parts(self._read("x", x)))

    def load(self, x: ArrayLike) -> None:
        """Set the inputs' tensors, or the model's parameters, to x."""
        with torch.no_grad():
            for tensor, part in zip(self._given, self._parts(self._read("x", x)), strict=True):
                tensor.copy_(part)

    def _first(self, asked: str, x: ArrayLike) -> Any:
        """Value or gradient: both are computed, and the other one is left for the next call at this x."""
        point = self._read("x", x)
        left, self._left = self._left, None
        if left is not None and left[1] == asked and np.array_equal(left[0], point):
            return left[2]
        with self._at(point):
            value, gradient = value_and_gradient(self._problem)
        both = {"fun": value.item(), "jac": _array(gradient)}
        other = "jac" if asked == "fun" else "fun"
        self._left = point, other, both[other]
        return both[asked]

    def _read(self, argument: str, x: ArrayLike) -> Array:
        """A copy, as the caller may go on to write into it."""
        array = np.array(x, dtype=np.float64)
        if array.shape != (self._problem.parameters,):
            raise ArgumentError(
                f"{argument} must be a vector of {self._problem.parameters:,} coordinates, met shape "
                f"{list(array.shape)}"
            )
        return array

    def _parts(self, point: Array) -> list[Tensor]:
        parts = torch.from_numpy(point).split(self._problem.sizes)
        return [part.to(like).view_as(like) for part, like in zip(parts, self._given, strict=True)]

    @contextmanager
    def _at(self, point: Array) -> Iterator[None]:
        """The tensors at a point, past autograd: graphs that a caller holds do not notice."""
        places = [tensor.data for tensor in self._problem.tensors]
        before = [place.clone() for place in places]
        try:
            for place, part in zip(places, self._parts(point), strict=True):
                place.copy_(part)
            yield
        finally:
            for place, content in zip(places, before, strict=True):
                place.copy_(content)


def _array(tensors: Any) -> Array:
    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    found: Array = flat.cpu().numpy()
    return found
