"""The caller's autocast: on for their function, and off for all that is computed with what it gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Autocast:
    """What a device casts to, and whether it keeps what it has cast."""

    device: str
    dtype: torch.dtype
    cache: bool

    def switched(self, on: bool) -> torch.autocast:
        """A context in which it is on, or off."""
        return torch.autocast(self.device, self.dtype, enabled=on, cache_enabled=self.cache)


Autocasts = Sequence[Autocast]

_CALLERS: ContextVar[Autocasts | None] = ContextVar("hesse's callers' autocasts", default=None)


def callers() -> Autocasts:
    """What was on when a question was asked, also where it has been switched off since."""
    known = _CALLERS.get()
    if known is not None:
        return known
    return [
        Autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]


@contextmanager
def off(autocasts: Autocasts) -> Iterator[None]:
    """Outside of the caller's function."""
    with _switched(autocasts, on=False, known=autocasts):
        yield


@contextmanager
def on(autocasts: Autocasts) -> Iterator[None]:
    """Inside of the caller's function, which may ask questions of its own."""
    with _switched(autocasts, on=True, known=None), ExitStack() as stack:
        if autocasts:  # what is kept would outlive the contents of the tensors
            torch.clear_autocast_cache()
            stack.callback(torch.clear_autocast_cache)
        yield


@contextmanager
def _switched(autocasts: Autocasts, on: bool, known: Autocasts | None) -> Iterator[None]:
    token = _CALLERS.set(known)
    try:
        with ExitStack() as stack:
            for autocast in autocasts:
                stack.enter_context(autocast.switched(on))
            yield
    finally:
        _CALLERS.reset(token)
