"""Random numbers: the function draws its own, and torch's global ones go on as if it had not."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class Stream:
    """A stream of random numbers that begins where torch's global one is, and goes on by itself.

    The generators are the process's, so a call that draws from them, or seeds them, is given the stream's
    state for as long as it runs: what other threads draw before and after is theirs.
    """

    def __init__(self) -> None:
        self._used, self._alone, self._seeded = False, threading.active_count() == 1, False
        self._before, self._states = _states(), list[Tensor]()

    @contextmanager
    def drawing(self, seeding: bool = False) -> Iterator[None]:
        """Draw from this stream, or seed it, the devices having been seeded already."""
        outer = _states()
        own = self._states or outer
        _set([own[0], *outer[1:]] if seeding else own)
        self._used, self._seeded = True, self._seeded or seeding
        try:
            yield
        finally:
            self._states = _states()
            _set(outer)

    @property
    def used(self) -> bool:
        """Was anything drawn?"""
        return self._used or self._moved

    def restore(self) -> None:
        """Take back what calls that cannot be seen (compiled code) have drawn, and seeds of devices."""
        if self._moved:
            _set(self._before)
        elif self._seeded:
            _set([torch.default_generator.get_state(), *self._before[1:]])

    @property
    def _moved(self) -> bool:
        """Are the global generators not where they were? Known only where no other thread may draw."""
        alone = self._alone and threading.active_count() == 1
        # strict=False: CUDA may have been initialised since
        return alone and not all(torch.equal(b, a) for b, a in zip(self._before, _states(), strict=False))


_CURRENT: ContextVar[Stream | None] = ContextVar("hesse random numbers", default=None)


def current() -> Stream:
    """The stream of the question that is being answered."""
    return _CURRENT.get() or Stream()


class _OfTheStream:
    """torch's default generator, where it is the function that asks: its seeds are those of its stream."""

    def __init__(self, own: torch.Generator) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        method, stream = getattr(self._own, name), _CURRENT.get()
        if stream is None or not callable(method):
            return method

        def asked(*args: Any) -> Any:
            with stream.drawing(seeding=name in ("manual_seed", "seed")):
                return method(*args)

        return asked


@contextmanager
def random_state_kept() -> Iterator[Stream]:
    """Give torch's global random generators back as they were; yields the stream that is drawn from."""
    stream = Stream()
    token = _CURRENT.set(stream)
    try:
        with _SEEDS.told():
            yield stream
    finally:
        _CURRENT.reset(token)
        stream.restore()


class _Seeds:
    """Has torch's functions find streams in place of its default generator while any question is answered."""

    def __init__(self) -> None:
        self._lock, self._questions = threading.Lock(), 0

    @contextmanager
    def told(self) -> Iterator[None]:
        """A question is answered."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def forked(self) -> None:
        """In the child of a fork there is no other question, and nobody to release the lock."""
        self._lock = threading.Lock()

    def _count(self, more: int) -> None:
        with self._lock:
            self._questions += more
            own = torch.default_generator
            vars(torch.random)["default_generator"] = _OfTheStream(own) if self._questions else own


_SEEDS = _Seeds()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_SEEDS.forked)


def _states() -> list[Tensor]:
    """The states of torch's global generators: the CPU's, then those of the devices in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.default_generator.get_state(), *devices]


def _set(states: list[Tensor]) -> None:
    torch.default_generator.set_state(states[0])
    for device, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, device)


def _functions(names: str) -> Iterator[Any]:
    """What torch calls by these names, wherever."""
    for place in (torch, torch.Tensor, functional):
        yield from (getattr(place, name) for name in names.split() if hasattr(place, name))


DRAWING = frozenset(
    _functions(
        """rand randn randint randperm normal bernoulli multinomial poisson binomial rand_like randn_like
        randint_like dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout
        rrelu gumbel_softmax fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_with_indices
        fractional_max_pool3d_with_indices uniform_ normal_ exponential_ geometric_ cauchy_ log_normal_
        random_ bernoulli_ rrelu_ dropout_ alpha_dropout_ feature_dropout_ feature_alpha_dropout_
        scaled_dot_product_attention multi_head_attention_forward lstm gru rnn_tanh rnn_relu"""
    )
)
"""Calls that may draw from the global generators."""
