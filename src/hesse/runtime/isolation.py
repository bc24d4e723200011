"""Evaluate the caller's function so that it can be differentiated twice and nothing of theirs changes.

`isolated()` is entered around one evaluation and everything that is done with its graph; the `Watch`
it yields is entered around the caller's code alone. Between them

- kernels without a double backward are replaced by ones that have it (fused attention, and what `kernels`
  knows), and functions compiled by torch.compile run uncompiled, since compiled graphs have none;
- what the function changes in place (running statistics, counters, a renormed embedding, the `.grad` of
  leaves) and what its modules rebind in their buffers is put back at the end, also after an error;
- gradients are on, whatever mode the caller is in, and the caller's autocast is on for the function alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as module_hooks

from hesse.runtime import autocast
from hesse.runtime.uncompiled import eager
from hesse.runtime.watch import Watch


class _Shared:
    """What isolation changes for the whole process, one thread at a time."""

    def __init__(self) -> None:
        # Kernel choices and hooks are the process's, and threads may share a model.
        self.lock = threading.RLock()
        self.changes: list[ExitStack] = []

    def forked(self) -> None:
        """In the child of a fork nobody else is left to undo it, or to release the lock."""
        self.lock = threading.RLock()
        for change in reversed([*self.changes]):
            change.close()


_SHARED = _Shared()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_SHARED.forked)


@contextmanager
def isolated(third_order: bool = False) -> Iterator[Watch]:
    """Enter the isolation; run the caller's function inside the `Watch` that it yields.

    `third_order`: the second derivatives will be differentiated once more.
    """
    callers = autocast.callers()
    watch = Watch(third_order, callers)
    with _SHARED.lock, ExitStack() as own, ExitStack() as shared:
        if torch.is_inference_mode_enabled():
            own.enter_context(torch.inference_mode(False))
        own.enter_context(torch.enable_grad())
        own.enter_context(autocast.off(callers))
        _SHARED.changes.append(shared)
        shared.callback(_SHARED.changes.remove, shared)
        shared.enter_context(sdpa_kernel(SDPBackend.MATH))
        shared.enter_context(eager())
        shared.callback(watch.restore)
        hook = module_hooks.register_module_buffer_registration_hook(watch.note_rebound)
        shared.callback(hook.remove)
        yield watch
