"""How many products to batch: found while working, so that looking for it costs nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from hesse.runtime.room import Room

_START = 32
_GAIN = 0.95  # a larger size must cut the time per column by at least a twentieth
_CLEARLY = 0.8  # what plain products must take of what batches do, for one noisy time costs much
_SLOW = 3e-4  # seconds for a batched column, from which a plain product may be as fast
_HEAVY = 1e-2  # seconds for a column, and
_LARGE = 2**20  # bytes, from which batches mostly only take more memory
_FEW = 8


class ChunkSize:
    """Grows while the time per column falls; every chunk that is tried is part of the answer.

    The first chunk warms up and is not judged. Where a column is slow although it is batched, plain
    products are tried too, in turn with batches so that one noisy time does not decide: for functions
    that fill the machine by themselves, batching only moves more memory. Where a column is expected to be
    that slow, and is large, it begins with plain products.
    """

    def __init__(self, room: Room, total: int, expected: float = 0.0, known: int = 0, start: int = 0) -> None:
        """Begin a search.

        Args:
            room: for columns.
            total: how many there are.
            expected: seconds for a plain product.
            known: the size that paid before in the same place, if there was one.
            start: the size that paid in a similar place: a good one to begin with.
        """
        self.room = room
        self._left = total
        self._warm = expected > _HEAVY and room.column > _LARGE
        self._size = 1 if self._warm else _START
        self._trials = [_FEW, 1, _FEW] if self._warm else []  # sizes still to be tried, in turn
        self._heavy = self._tried = self._warm  # plain products were tried, or will be
        self._settled = known > 0
        if start:
            self._warm, self._tried, self._trials = True, True, []
        self._size = known or start or self._size
        self._rates: dict[int, float] = {}  # seconds a column, the least of every size
        self._regime: Hashable = None

    @property
    def size(self) -> int:
        """Columns to batch next."""
        return min(self._size, self.room.limit)

    @property
    def best(self) -> int:
        """The size that pays, as far as is known."""
        return max(self._size, *self._trials) if self._trials else self._size

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
            if self._rates and self._trials:  # what they were to be compared with is gone
                self._size, self._trials = max(self._size, *self._trials), []
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
        others = {size: rate for size, rate in self._rates.items() if size > 1}
        if best == 1 and others and not self._heavy and self._rates[1] > _CLEARLY * min(others.values()):
            best = min(others, key=lambda size: others[size])
        grows = best == max(self._rates)
        self._settled = not grows
        # A size that may turn out worse is not worth trying on most of what is left.
        self._size = 2 * best if grows and 4 * best <= self._left else best

    def halve(self) -> bool:
        """After running out of memory: go on with half; False where there is nothing to halve."""
        if self.size == 1:
            return False
        self.room.lower(self.size // 2)
        return True

    def forbid(self) -> None:
        """Batching does not work for this function: one product at a time from now on."""
        self.room.lower(1)


class Sizes:
    """The searches for chunk sizes of one answer, in their order, and what they found."""

    def __init__(self, known: Sequence[int] = ()) -> None:
        """`known`: what they found before; those of another answer may be more, or fewer."""
        self._known = known
        self._searches: list[ChunkSize] = []

    def search(self, room: Room, total: int, expected: float = 0.0) -> ChunkSize:
        """The next search."""
        known = self._known[len(self._searches) :][:1]
        last = self._searches[-1:]
        search = ChunkSize(room, total, expected, *(known or [0]), *(search.best for search in last))
        self._searches.append(search)
        return search

    @property
    def found(self) -> tuple[int, ...]:
        """The sizes that paid."""
        return tuple(search.best for search in self._searches)
