"""The leaves that a sweep keeps alive, all together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import Tensor

from hesse.calls.facts import Site
from hesse.curvature.total import Curvature
from hesse.methods.sweep.carried.live import (
    Adjoints,
    Ahead,
    DiagonalByCoordinates,
    LiveLeaf,
    MatrixByCoordinates,
)
from hesse.methods.sweep.carried.penalties import Penalty
from hesse.methods.sweep.carried.tied import DiagonalByOutputs, MatrixByOutputs
from hesse.methods.sweep.carried.uses import LayerUse, Use
from hesse.probe import Probe
from hesse.tape.record import Value


class LiveLeaves:
    """What a walk knows of the leaves that are alive, and of penalties on others.

    Attributes:
        penalties: by the leaf.
    """

    def __init__(self, depends: Mapping[Value, Set[int]], question: str, check: bool = False) -> None:
        """`depends`: the live leaves that a value is a function of; `question`: "diagonal" or "blocks"."""
        self.penalties: dict[int, list[Penalty]] = defaultdict(list)
        self._leaves: dict[int, LiveLeaf] = {}
        self._depends, self._question, self._check = depends, question, check

    def enter(self, use: Use, curvature: Curvature, adjoints: Adjoints) -> None:
        """Take in a use while the results of its call are alive."""
        index = use.leaves[0]
        if index not in self._leaves:
            self._leaves[index] = _KINDS[self._question, type(use)](use, self._check)
        self._leaves[index].enter(use, curvature, adjoints, self._ahead(index, use.site))

    def penalise(self, use: Use, adjoints: Adjoints) -> None:
        """Take in what is added to the loss of a leaf that is read elsewhere."""
        self.penalties[use.leaves[0]].append(Penalty(use, adjoints))

    def pull(self, site: Site) -> None:
        """Take the results of a call out."""
        for index, leaf in self._leaves.items():
            for strand in leaf.strands:
                if not strand.by.keys().isdisjoint(site.outputs):
                    strand.pull(site, self._ahead(index, site))

    def parts(self) -> dict[int, Tensor]:
        """The curvature of each leaf by itself: its diagonal, or matrix, by its index."""
        return {i: part for leaf in self._leaves.values() for i, part in leaf.parts().items()}

    def probes(self) -> list[Probe]:
        """What to compare with plain products: the block that a diagonal was read from times signs."""
        return [probe for leaf in self._leaves.values() for probe in leaf.probes()]

    def _ahead(self, index: int, site: Site) -> Ahead:
        """Of the call's results: does an input lead to uses of the leaf?"""

        def ahead(value: Value) -> bool:
            before = site.inputs if value in site.outputs else [value]
            return any(index in self._depends[u] for u in before)

        return ahead


_KINDS: dict[tuple[str, type[Use]], Callable[[Any, bool], LiveLeaf]] = {
    ("diagonal", Use): DiagonalByCoordinates,
    ("diagonal", LayerUse): DiagonalByOutputs,
    ("blocks", Use): MatrixByCoordinates,
    ("blocks", LayerUse): MatrixByOutputs,
}
