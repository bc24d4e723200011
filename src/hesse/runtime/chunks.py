"""How many products to batch: found while working, so that looking for it costs nothing."""

from __future__ import annotations

from collections.abc import Hashable

_START = 32
_GAIN = 0.95  # another size must cut the time per column by at least a twentieth
_HEAVY = 3e-4  # seconds for a batched column, from which a single product may be as fast


class ChunkSize:
    """Grows while the time per column falls; every chunk that was tried is part of the answer.

    Where a column is slow although it is batched, a plain product is tried once too: for functions
    that fill the machine by themselves, batching only moves more memory.
    """

    def __init__(self, limit: int) -> None:
        self._limit = max(1, limit)
        self._size, self._settled = _START, False
        self._best_size, self._best_rate = 0, float("inf")
        self._regime: Hashable = None

    @property
    def size(self) -> int:
        """Columns to batch next."""
        return min(self._size, self._limit)

    def report(self, columns: int, seconds: float, regime: Hashable) -> None:
        """Tell what a chunk took; only chunks of one regime (rows of the same tensor) are compared."""
        if self._settled or columns < self.size:
            return
        if regime != self._regime:
            self._regime, self._best_rate = regime, float("inf")
        rate = seconds / columns
        better = rate < self._best_rate * _GAIN
        if better:
            self._best_size, self._best_rate = columns, rate
        if columns == 1:
            self._settled = better
            self._size = self._best_size if better else 2 * self._best_size
        elif not better:
            self._settled, self._size = True, self._best_size
        elif columns == _START and rate > _HEAVY:
            self._size = 1
        else:
            self._size = 2 * columns

    def halve(self) -> bool:
        """After running out of memory: go on with half; False where there is nothing to halve."""
        if self.size == 1:
            return False
        self._limit = self.size // 2
        return True

    def forbid(self) -> None:
        """Batching does not work for this function: one product at a time from now on."""
        self._limit = 1
