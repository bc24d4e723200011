"""Show how far the work is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from hesse.errors import ArgumentError

_PATIENCE = 2.0  # seconds before a bar is worth showing

ProgressOption = bool | Callable[[int, int], Any] | None


class _Told(BaseException):
    """What the caller's callable raised: nothing on the way takes it for trouble of its own."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Progress:
    """Counts passes, and shows a bar or tells a callable.

    `wanted`: None shows a bar on a terminal for work beyond two seconds, True shows one at once,
    False is silent, a callable gets `(done, total)` after every step.
    """

    def __init__(self, wanted: ProgressOption) -> None:
        if not (wanted is None or isinstance(wanted, bool) or callable(wanted)):
            raise ArgumentError(
                f"progress must be None, True, False or a callable of (done, total), met {wanted!r}"
            )
        self._tell = wanted if callable(wanted) else None
        self._bar_after = 0.0 if wanted is True else _PATIENCE
        self._may_show = wanted is True or (wanted is None and sys.stderr.isatty())
        self._total = self._done = self._passes = 0
        self._start = time.perf_counter()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if isinstance(error, _Told):
            raise error.error from None

    @property
    def done(self) -> int:
        """Passes done."""
        return self._passes

    def expect(self, steps: int) -> None:
        """Add to the number of passes, or chunks of a sweep, that are to come."""
        self._total += steps
        if self._bar is not None:
            self._bar.total = self._total

    def advance(self, passes: int = 0, chunks: int = 0) -> None:
        """Note that so many more passes, or chunks of a sweep, are done."""
        self._passes += passes
        self._done += passes + chunks
        if self._tell is not None:
            try:
                self._tell(self._done, self._total)
            except Exception as error:
                raise _Told(error) from None
        elif self._bar is not None:
            self._bar.update(passes + chunks)
        elif self._may_show and time.perf_counter() - self._start >= self._bar_after:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, initial=self._done, unit="pass", desc="hesse", leave=False)
