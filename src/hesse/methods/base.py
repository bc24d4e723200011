"""What a method offers for a whole question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hesse.look.meter import Cost


@dataclass(frozen=True)
class Option:
    """A way to answer the whole question: some tensors by a method, the others by dense.

    Attributes:
        method: its name.
        cost: of everything but the check.
        shares: for the tensors that the method answers, how.
        pieces: the tensors whose blocks are checked by one product each.
        reason: what to say of it.
        left: why it does not answer the others, where that is known.
    """

    method: str
    cost: Cost
    shares: Mapping[int, str]
    pieces: Sequence[int]
    reason: str
    left: Mapping[int, str] = field(default_factory=dict)
