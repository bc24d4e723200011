"""The memory budget: what a call may use beyond what was allocated before it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import Node

from hesse.errors import ArgumentError
from hesse.runtime.graph import nodes, size

_UNITS = {"": 1} | {
    f"{prefix}{suffix}": base**power
    for base, suffix in ((1000, "B"), (1024, "iB"))
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    if prefix or suffix == "B"
}


class Budget:
    """Bytes that one call may use, the answer included.

    On a CPU the resident memory of the process is what counts, on CUDA what torch has allocated on
    the device.
    """

    def __init__(self, memory: int | str | None, device: torch.device) -> None:
        self._device = device
        self.total = free(device) // 2 if memory is None else parse(memory)
        self._before = self.in_use()

    @property
    def taken(self) -> int:
        """Bytes of the budget that are in use."""
        return max(0, self.in_use() - self._before)

    def left(self) -> int:
        """Bytes of the budget that are not in use yet."""
        return self.total - self.taken

    def in_use(self) -> int:
        """Bytes in use, by whomever."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return int(_process(os.getpid()).memory_info().rss)


def highest() -> int:
    """The most bytes that this process has ever had in memory; zero where the system does not tell."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


def hand_back() -> None:
    """Give the system what the allocator (glibc's, else nothing is done) keeps free between pieces in use."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):
        return None


@cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def parse(memory: int | str) -> int:
    """Bytes from a number or a text such as "2GiB", "500MB", "1.5 GiB"."""
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", memory)
        units = {unit.lower(): scale for unit, scale in _UNITS.items()}
        if match and match[2].lower() in units:
            memory = int(float(match[1]) * units[match[2].lower()])
    if isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0:
        raise ArgumentError(
            f'memory must be a positive number of bytes or a text such as "2GiB", met {memory!r}'
        )
    return memory


def show(size: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"


def free(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        unreserved, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return unreserved + cached
    return min(int(psutil.virtual_memory().available), _free_in_container())


def _free_in_container() -> int:
    # A container's own limit (cgroup v2), which the machine's figures do not show.
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        return max(0, int(limit) - used)
    except (OSError, ValueError):  # no such file, or "max"
        return 1 << 62


def bytes_per_column(outputs: Sequence[Tensor]) -> int:
    """Peak bytes that one backward pass from `outputs` holds: what each product of a batch costs.

    The engine runs nodes from the latest to the earliest; a node's incoming gradient lives from the
    first node that sends to it until it has run. Twice a node's own size is added for the
    temporaries of its formula.
    """
    order = {node: node._sequence_nr() for node in nodes(outputs)}
    sizes = {node: size(node) for node in order}
    live: set[Node] = set()
    held = peak = 0
    for node in sorted(order, key=order.__getitem__, reverse=True):
        arriving = {after for after, _ in node.next_functions if after is not None} - live
        held += sum(map(sizes.__getitem__, arriving))
        live |= arriving
        peak = max(peak, held + 2 * sizes[node])
        if node in live:
            live.discard(node)
            held -= sizes[node]
    return peak
