"""Structure is a bonus: what goes wrong where it is looked for or used is a reason to do without it.

Nothing that is tried for the sake of structure may cost the answer that the plain way gives. `sought` is the
one place that sees to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hesse.runtime.batches import loops_allowed

RAISES_FAULTS = False
"""Raise errors that are nobody's refusal: tests set it, so that a fault of ours does not pass for one."""


class NoStructure(Exception):  # noqa: N818
    """A function is without some structure; the message, a reason for the plan, says what is missing."""


@contextmanager
def sought() -> Iterator[None]:
    """Whatever goes wrong inside is a `NoStructure`."""
    try:
        with loops_allowed():
            yield
    except NoStructure:
        raise
    except Exception as error:
        if RAISES_FAULTS:
            raise
        raise NoStructure(
            f"an unexpected {type(error).__name__} came up where structure was sought"
        ) from error


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """What the caller's function, or torch, raises inside is a refusal: `what` they could not do."""
    try:
        yield
    except NoStructure:
        raise
    except Exception as error:
        raise NoStructure(f"{what} ({type(error).__name__})") from error
