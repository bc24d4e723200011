"""Second derivatives of one call, in the plain pieces that a bend hands over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hesse.tape.record import Value


@dataclass(frozen=True, eq=False)
class OnElements:
    """Second derivatives by u and w whose elements meet in those of `core`, all of one shape."""

    u: Value
    w: Value
    core: Tensor


@dataclass(frozen=True, eq=False)
class Across:
    """Second derivatives by u and w: for every coordinate of u in a sample, those by w, [width of u, *w]."""

    u: Value
    w: Value
    rows: Tensor


@dataclass(frozen=True, eq=False)
class OnRows:
    """Second derivatives by rows of u that do not touch: `diag(d) + x c xᵀ + p qᵀ + q pᵀ` in each.

    Attributes:
        u: the input.
        diagonal: d, like u.
        square: c, [N, R], and x, or None; `mutual`: p and q, or None. Each is a stack [R, *u] of columns that
            are zero in all rows but one.
    """

    u: Value
    diagonal: Tensor
    square: tuple[Tensor, Tensor] | None
    mutual: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class Whole:
    """Second derivatives by all inputs together: a block [N, f, f] over their joined coordinates.

    Attributes:
        widths: coordinates of each input in a sample, in the order of the block.
        core: the block.
    """

    widths: Mapping[Value, int]
    core: Tensor


Piece = OnElements | Across | OnRows | Whole
