"""How many products to batch: found while working, so that looking for it costs nothing."""

from __future__ import annotations

from collections.abc import Hashable

_START = 32
_GAIN = 0.95  # another size must cut the time per column by at least a twentieth
_HEAVY = 3e-4  # seconds for a batched column, from which a plain product may be as fast


class ChunkSize:
    """Grows while the time per column falls; every chunk that is tried is part of the answer.

    The first chunk warms up and is not judged. Where a column is slow although it is batched, plain
    products are tried too, in turn with batches so that one noisy time does not decide: for functions
    that fill the machine by themselves, batching only moves more memory.
    """

    def __init__(self, limit: int, total: int) -> None:
        self._limit = max(1, limit)
        self._left = total
        self._size = _START
        self._warm = self._settled = False
        self._trials: list[int] = []  # sizes still to be tried in turn
        self._rates: dict[int, float] = {}  # seconds a column, the least of every size
        self._regime: Hashable = None

    @property
    def size(self) -> int:
        """Columns to batch next."""
        return min(self._size, self._limit)

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
            self._regime, self._rates, self._trials = regime, {}, []
        first = not self._rates
        before = min(self._rates.values(), default=float("inf"))
        rate = self._rates[columns] = min(seconds / columns, self._rates.get(columns, float("inf")))
        if first and columns > 1 and rate > _HEAVY:
            self._trials = [1, columns // 2, 1]
        if self._trials:
            self._size = self._trials.pop()
            return
        best = min(self._rates, key=self._rates.__getitem__)
        grows = best == max(self._rates) and (columns == 1 or rate < before * _GAIN)
        self._settled = not grows
        # A size that may turn out worse is not worth trying on most of what is left.
        self._size = 2 * best if grows and 4 * best <= self._left else best

    def halve(self) -> bool:
        """After running out of memory: go on with half; False where there is nothing to halve."""
        if self.size == 1:
            return False
        self._limit = self.size // 2
        return True

    def forbid(self) -> None:
        """Batching does not work for this function: one product at a time from now on."""
        self._limit = 1
