"""What a method is asked, and what it offers.

A method answers some tensors of a question, all others being left to one product per coordinate. The choice
between methods (`hesse.planning`) knows offers and nothing else of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from hesse.look.gradient import Gradient
from hesse.look.meter import CHUNK, Cost, Meter, total
from hesse.probe import Probe
from hesse.problem import Problem
from hesse.runtime.progress import Progress
from hesse.selection import Part

Question = Literal["hessian", "blocks", "diagonal"]
MethodName = Literal["sweep", "taps", "dense"]

Numbers = Mapping[int, Tensor]
"""Of coordinates, by their tensor."""
Blocks = Mapping[tuple[int, int], Tensor]
"""Matrices by the tensors of their rows and columns; of diagonals the tensors, by twice the same."""


@dataclass(frozen=True)
class Ask:
    """A question to a method.

    Attributes:
        question: what is asked.
        problem: of which problem.
        meter: holds its gradient, and what may be used.
        planned: the tensors that a plan leaves to the method; none where it is to choose.
        chunk: how many samples the plan takes at a time, likewise.
        part: of a Hessian, the rows and columns.
    """

    question: Question
    problem: Problem
    meter: Meter
    planned: Collection[int] = ()
    part: Part | None = None
    chunk: int = 0

    @property
    def gradient(self) -> Gradient:
        """What all starts from."""
        return self.meter.gradient

    def products(self, joined: bool = False) -> dict[int, Cost]:
        """What one product per coordinate takes, by tensor.

        `joined`: other tensors are answered by another method: rows of a full Hessian have all columns.
        """
        leaves, meter = self.gradient.leaves, self.meter
        first = {i: self.gradient.first_uses.get(i, 0) for i in self.gradient.curved}
        everything = sum(leaf.numel() * leaf.dtype.itemsize for leaf in leaves)
        found = {}
        for i in (i for i in first if leaves[i].numel()):
            rows, whole = leaves[i].numel(), self.question == "hessian"
            # For the full Hessian a row is taken by this tensor and those after it.
            since = min(use for j, use in first.items() if j >= i or joined) if whole else first[i]
            width = everything if whole else rows * leaves[i].dtype.itemsize
            held = meter.column + 2 * width
            limit = max(1, min(CHUNK, meter.workspace // held))
            found[i] = meter.products(rows, since, self.gradient.made(i), held, limit) + meter.arithmetic(
                0, 6 * rows * width
            )
        return found

    def products_of(self, rows: Numbers, columns: Numbers) -> Cost:
        """What one product for every one of some rows takes, by some columns."""
        leaves, first, meter = self.gradient.leaves, self.gradient.first_uses, self.meter
        width = sum(leaves[j].numel() * leaves[j].dtype.itemsize for j in columns)
        held = meter.column + 2 * width
        limit = max(1, min(CHUNK, meter.workspace // held))
        since = min((first.get(j, 0) for j in columns), default=0)
        return total(
            meter.products(len(numbers), since, self.gradient.made(i), held, limit)
            for i, numbers in rows.items()
            if i in self.gradient.curved and columns
        )

    def others(self, beside: Mapping[int, Cost], taken: Collection[int]) -> str:
        """What a reason says of the tensors that a method does not take."""
        rest = sum(self.problem.sizes[i] for i in beside if i not in taken)
        return f"; the other {rest:,} coordinates take one product each" if rest else ""


Products = Callable[[Numbers, Numbers], Blocks]
"""Some rows by some columns, by one product each."""
Found = tuple[Blocks, Sequence[Probe]]
Run = Callable[[Progress, bool, Products], Found]
"""Answers a method's tensors, and leaves what is to be checked of them if that is wanted.

Of a part of the Hessian, all, with `Products` for what the method does not take itself.
"""


def nothing(progress: Progress, check: bool, products: Products) -> Found:
    """The `Run` of a method that leaves everything to products."""
    return {}, []


@dataclass(frozen=True)
class Applicable:
    """What a method offers: to answer some tensors, the others being left to products.

    Attributes:
        cost: of everything but the check.
        shares: for the tensors that the method answers, how.
        pieces: the tensors whose blocks are checked by one product each.
        reason: what to say of it.
        left: why it does not answer the others, where that is known.
        run: answers its tensors.
        chunk: how many samples are taken at a time, where that is the method's to choose.
    """

    cost: Cost
    shares: Mapping[int, str]
    pieces: Sequence[int]
    reason: str
    left: Mapping[int, str] = field(default_factory=dict)
    run: Run = nothing
    chunk: int = 0


@dataclass(frozen=True)
class Refused:
    """Why a method does not apply."""

    why: str


Offer = Applicable | Refused


def transposed(blocks: Blocks) -> dict[tuple[int, int], Tensor]:
    """Rows and columns exchanged."""
    return {(j, i): matrix.T for (i, j), matrix in blocks.items()}


def counted(number: int, thing: str) -> str:
    """A number of things."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
