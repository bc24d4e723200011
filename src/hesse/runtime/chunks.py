"""How many products to batch: found while working, so that looking for it costs nothing."""

from __future__ import annotations

from collections.abc import Hashable

from hesse.runtime.room import Room

_START = 32
_GAIN = 0.95  # a larger size must cut the time per column by at least a twentieth
_SLOW = 3e-4  # seconds for a batched column, from which a plain product may be as fast
_HEAVY = 1e-2  # seconds for a column, from which batches mostly only take more memory
_FEW = 8


class ChunkSize:
    """Grows while the time per column falls; every chunk that is tried is part of the answer.

    The first chunk warms up and is not judged. Where a column is slow although it is batched, plain
    products are tried too, in turn with batches so that one noisy time does not decide: for functions
    that fill the machine by themselves, batching only moves more memory. Where a column is expected to be
    that slow, it begins with plain products.
    """

    def __init__(self, room: Room, total: int, expected: float = 0.0) -> None:
        """`expected`: seconds for a plain product."""
        self._room = room
        self._left = total
        self._warm = expected > _HEAVY
        self._size = 1 if self._warm else _START
        self._trials = [_FEW, 1, _FEW] if self._warm else []  # sizes still to be tried, in turn
        self._tried = self._warm  # plain products were, or will be
        self._settled = False
        self._rates: dict[int, float] = {}  # seconds a column, the least of every size
        self._regime: Hashable = None

    @property
    def size(self) -> int:
        """Columns to batch next."""
        return min(self._size, self._room.limit)

    def report(self, columns: int, seconds: float, regime: Hashable) -> None:
        """Tell what a chunk took; only chunks of one regime (rows of the same tensor) are compared."""
        self._left -= columns
        if self._settled or columns < self.size:
            return
        if not self._warm:
            self._warm = True
            self._size = 2 * columns
            return
        if regime != self._regime:
            self._regime, self._rates = regime, {}
        first = not self._rates
        rate = self._rates[columns] = min(seconds / columns, self._rates.get(columns, float("inf")))
        if first and columns > 1 and rate > _SLOW and not self._tried:
            self._trials, self._tried = [1, columns // 2, 1, columns // 2], True
        if self._trials:
            self._size = self._trials.pop(0)
            return
        enough = min(self._rates.values()) / _GAIN
        best = min(size for size, rate in self._rates.items() if rate <= enough)
        grows = best == max(self._rates)
        self._settled = not grows
        # A size that may turn out worse is not worth trying on most of what is left.
        self._size = 2 * best if grows and 4 * best <= self._left else best

    def halve(self) -> bool:
        """After running out of memory: go on with half; False where there is nothing to halve."""
        if self.size == 1:
            return False
        self._room.lower(self.size // 2)
        return True

    def forbid(self) -> None:
        """Batching does not work for this function: one product at a time from now on."""
        self._room.lower(1)
