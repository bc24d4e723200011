"""Room for batches: how many columns fit what is left of a budget, by prediction and by what batches took."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hesse.runtime.memory import hand_back, highest

_INTERVAL = 5e-4  # seconds between two looks at the memory in use
_BATCH = 128  # columns of a large batch
_SAFE = 0.85  # of a tight workspace: what is taken for a moment only may not be seen
_NEAR = 1.35  # what a batch of up to twice the size may take, as a multiple of its share
_FAR = 2.0  # and a larger one
_KEPT = 0.1  # of a tight workspace: what an allocator may keep of one batch when the next one begins


class Room:
    """Bytes for batches of columns.

    Attributes:
        column: bytes that each is predicted to take.

    What formulas take beside their results, and what an allocator cannot use again, nobody can predict. So
    where large batches might not fit the first ones are small, and how much memory was in use while they ran
    tells how large others may be.
    """

    def __init__(self, workspace: int, column: int, in_use: Callable[[], int]) -> None:
        """`workspace`: bytes that may be used; `column`: what each is predicted to take."""
        self._tight = 4 * _BATCH * column > workspace
        self._workspace = int(_SAFE * workspace) if self._tight else workspace
        self.column, self._in_use = max(1, column), in_use
        self._base = in_use()
        self._limit = self._workspace // self.column // (4 if self._tight else 1)
        self._taken: dict[int, int] = {}  # by the size of a batch, the most that one took

    @property
    def limit(self) -> int:
        """Columns that fit."""
        return max(1, self._limit)

    def lower(self, limit: int) -> None:
        """Take no more than so many columns: more did not fit, or cannot be batched."""
        self._limit, self._tight = limit, False

    def keep(self, size: int) -> None:
        """So many bytes of the answer, which has room of its own, are in use from now on."""
        self._base += size

    @contextmanager
    def watched(self, columns: int) -> Iterator[None]:
        """Learn from what a batch takes."""
        if not self._tight:
            yield
            return
        if self._in_use() - self._base > _KEPT * self._workspace:
            hand_back()
        with peak(self._in_use) as taken:
            yield
        self._taken[columns] = max(self._taken.get(columns, 0), taken[0] - self._base)
        # Of the larger batches: small ones have what every batch takes to themselves.
        largest = max(self._taken)
        each = max(taken / size for size, taken in self._taken.items() if 2 * size > largest)
        fitting = self._workspace / max(self.column, each)
        self._limit = max(int(fitting / _FAR), min(int(fitting / _NEAR), 2 * largest))


@contextmanager
def peak(in_use: Callable[[], int]) -> Iterator[list[int]]:
    """The most memory in use while this is entered, known at its end: a list of that one number."""
    before, found, over = highest(), [in_use()], threading.Event()

    def look() -> None:
        while not over.wait(_INTERVAL):
            found[0] = max(found[0], in_use())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        after = highest()
        found[0] = max(found[0], in_use(), after if after > before else 0)
