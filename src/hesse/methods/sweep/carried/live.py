r"""Leaves that stay alive on a walk backwards: those that enter more than once, or not linearly.

Beside the curvature over the values of a sample, the walk then keeps $K_{uw}$ between these values and a leaf
w, a stack with a row for each coordinate of w, and adds up $K_{ww}$. Where w enters the call
$v = \varphi(u, w)$ with adjoint g and Jacobians A by u and J by w, for any value a that is alive

$$K_{ww} \mathrel{+}= J^T K_{vv} J + J^T K_{vw} + K_{wv} J
    + \frac{\partial^2 \langle g, \varphi \rangle}{\partial w^2}, \qquad
  K_{aw} \mathrel{+}= K_{av} J, \qquad
  K_{uw} \mathrel{+}= A^T K_{vw} + \frac{\partial^2 \langle g, \varphi \rangle}{\partial u\,\partial w}.$$

A leaf has no samples: of $K_{ww}$ only the sum over them is held, and of that only the diagonal where no more
is asked for. Rows do not meet: some of them together are a *strand*, which is pulled back by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hesse.calls.facts import Site
from hesse.curvature.total import Curvature
from hesse.methods.sweep.carried.uses import Rows, Use
from hesse.probe import Probe, random_signs
from hesse.tape.record import Value

Adjoints = Sequence[Tensor | None]
Stacks = Mapping[Value, Tensor]
Ahead = Callable[[Value], bool]
"""Does a value lead to uses of the leaf that are still to come?"""

HELD = 2**20
"""How many numbers a strand may have by a value."""


class Strand:
    """Some rows of curvature, or of derivatives, by the values that are alive.

    Attributes:
        by: a stack for every value; none where they are zero.
    """

    def __init__(self) -> None:
        self.by: dict[Value, Tensor] = {}

    def add(self, stacks: Stacks) -> None:
        """Add to all rows."""
        for value, stack in stacks.items():
            self.by[value] = self.by[value] + stack if value in self.by else stack

    def pull(self, site: Site, ahead: Ahead) -> None:
        """Take the results of a call out."""
        columns = [self.by.pop(value, None) for value in site.outputs]
        if any(stack is not None for stack in columns) and any(map(ahead, site.inputs)):
            pulled = site.first.pull(columns)
            self.add({value: stack for value, stack in pulled.items() if ahead(value)})


class LiveLeaf(ABC):
    """What a walk knows of a leaf that is alive.

    Attributes:
        strands: what is pulled back for it.
    """

    strands: Sequence[Strand]

    @abstractmethod
    def enter(self, use: Any, curvature: Curvature, adjoints: Adjoints, ahead: Ahead) -> None:
        """Take in a use while the results of its call are alive."""

    @abstractmethod
    def parts(self) -> dict[int, Tensor]:
        """The curvature of leaves by themselves, by index: matrices, or diagonals like the leaves."""

    def probes(self) -> list[Probe]:
        """What to compare with plain products: the block that a diagonal was read from, times signs."""
        return []


class Directions(Strand):
    """The curvature between some directions of a leaf and the values that are alive."""

    def __init__(self, leaf: Tensor) -> None:
        super().__init__()
        self.leaf = leaf

    @property
    def directions(self) -> Tensor:
        """As rows, [rows, size]: random signs."""
        return random_signs([self.leaf])[0].view(1, -1)


class Coordinates(Directions):
    """Consecutive coordinates."""

    def __init__(self, leaf: Tensor, numbers: slice) -> None:
        super().__init__(leaf)
        self.numbers = numbers

    @property
    def directions(self) -> Tensor:
        """As rows, [rows, size]."""
        rows = self.leaf.new_zeros(self.numbers.stop - self.numbers.start, self.leaf.numel())
        rows[:, self.numbers].diagonal().fill_(1)
        return rows


class ByCoordinates(LiveLeaf):
    """A leaf that enters in any route: rows for its coordinates, and before them one for random signs."""

    strands: list[Directions]

    def __init__(self, use: Use, rows: int, check: bool) -> None:
        """`rows`: how many a strand has."""
        self.leaf, (self.index,) = use.leaf.tensor.detach(), use.leaves
        self.strands = [Directions(self.leaf)] if check else []
        for start in range(0, use.size, rows):
            self.strands.append(Coordinates(self.leaf, slice(start, min(start + rows, use.size))))

    def enter(self, use: Use, curvature: Curvature, adjoints: Adjoints, ahead: Ahead) -> None:
        """See `LiveLeaf`."""
        derivative = use.at(adjoints)
        for strand in self.strands:
            rows = derivative.rows(strand.directions)
            along = curvature.along(rows.results, lambda value: value in use.site.outputs or ahead(value))
            self.add(strand, rows, along)
            for stacks in (along, rows.inputs):
                strand.add({value: stack for value, stack in stacks.items() if ahead(value)})

    @abstractmethod
    def add(self, strand: Any, rows: Rows, along: Stacks) -> None:
        """What a use adds: how its call follows some directions, and the curvature along them."""


class DiagonalByCoordinates(ByCoordinates):
    """Its diagonal, and for a check the product of its block with random signs."""

    def __init__(self, use: Use, check: bool) -> None:
        most = use.size + max(value.tensor.numel() for value in use.site.outputs)
        super().__init__(use, max(1, HELD // most), check)
        self._own, self._product = self.leaf.new_zeros(2, use.size)
        self._check = check
        # By the results of the call that is taken in, times the signs: J, and K_vw with what J adds to it.
        self._moved: dict[Value, Tensor] = {}
        self._along: dict[Value, Tensor] = {}

    def add(self, strand: Any, rows: Rows, along: Stacks) -> None:
        """See `ByCoordinates`."""
        if not isinstance(strand, Coordinates):
            self._sign(strand, rows, along)
            return
        self._add_diagonal(strand, rows, along)
        if self._check:
            self._add_product(strand, rows)

    def _sign(self, signs: Directions, rows: Rows, along: Stacks) -> None:
        self._moved = {value: stack.flatten() for value, stack in rows.results.items()}
        total = Strand()
        total.add(signs.by)
        total.add(along)
        self._along = {value: stack.flatten() for value, stack in total.by.items()}
        if rows.own is not None:
            self._product += rows.own[0]

    def _add_diagonal(self, strand: Coordinates, rows: Rows, along: Stacks) -> None:
        own = self._own[strand.numbers]
        if rows.own is not None:
            own += rows.own[:, strand.numbers].diagonal()
        for value, stack in rows.results.items():
            for times, stacks in ((1, along), (2, strand.by)):
                if value in stacks:
                    own += times * torch.linalg.vecdot(_flat(stack), _flat(stacks[value]))

    def _add_product(self, strand: Coordinates, rows: Rows) -> None:
        product = self._product[strand.numbers]
        for value, stack in rows.results.items():
            if value in self._along:
                product += _flat(stack) @ self._along[value]
            if value in strand.by:
                product += _flat(strand.by[value]) @ self._moved[value]

    def parts(self) -> dict[int, Tensor]:
        """See `LiveLeaf`."""
        return {self.index: self._own.view(self.leaf.shape)}

    def probes(self) -> list[Probe]:
        """See `LiveLeaf`."""
        if not self._check:
            return []
        signs, product = random_signs([self.leaf]), self._product.view(self.leaf.shape)
        return [Probe([self.index], [self.index], signs, [product], float(self._own.norm()))]


class MatrixByCoordinates(ByCoordinates):
    """Its block with itself."""

    def __init__(self, use: Use, check: bool) -> None:
        """`check`: is made where the block is joined with the others."""
        super().__init__(use, use.size, check=False)
        self._own = self.leaf.new_zeros(use.size, use.size)

    def add(self, strand: Any, rows: Rows, along: Stacks) -> None:
        """See `ByCoordinates`."""
        if rows.own is not None:
            self._own += rows.own
        for value, stack in rows.results.items():
            if value in along:
                self._own += _flat(stack) @ _flat(along[value]).T
            if value in strand.by:
                half = _flat(stack) @ _flat(strand.by[value]).T
                self._own += half + half.T

    def parts(self) -> dict[int, Tensor]:
        """See `LiveLeaf`."""
        return {self.index: self._own}


def _flat(stack: Tensor) -> Tensor:
    return stack.reshape(len(stack), -1)
