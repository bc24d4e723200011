"""Time side by side, peak memory in fresh processes, agreement of the results, and the machine."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NOT_INSTALLED = "not installed"
_ENOUGH = 5.0  # seconds after which a contestant is not asked again
_PEAK_RUNS = 3
_LONG = 1.0  # seconds from which one run has to do for the peak
_PEERS = ("torch-secorder", "backpack-for-pytorch", "curvlinops-for-pytorch")


@dataclass(frozen=True)
class Extrapolated:
    """What a contestant gives that does a part of the work and says how long all of it takes.

    Attributes:
        seconds: the time of all of it, computed from that of the part.
        products: the products with vectors that were taken.
        entries: of each tensor, the answer at the coordinates that were taken.
    """

    seconds: float
    products: int = 0
    entries: list[Tensor] = field(default_factory=list)


@dataclass
class Measurement:
    """What became of one contestant: its times and the result of its last run, or its error."""

    times: list[float] = field(default_factory=list)
    result: Any = None
    error: str | None = None
    spent: float = 0.0  # seconds, those of the warm-up included

    def add(self, taken: float, result: Any) -> None:
        """Note a run."""
        self.times.append(result.seconds if isinstance(result, Extrapolated) else taken)
        self.result = result
        self.spent += taken

    @property
    def seconds(self) -> float:
        """The median time."""
        return statistics.median(self.times)


def measure(callables: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Measurement]:
    """Time the contestants in rounds, so that what disturbs the machine meets them all.

    Each is warmed up once, and the order is rotated from round to round. Who has taken 5 seconds
    altogether is not asked again; where that was the warm-up, its time stands.
    """
    measurements = {name: _warmed_up(call) for name, call in callables.items()}
    names = [name for name, measured in measurements.items() if not measured.error and not measured.times]
    for turn in range(repeats):
        gc.collect()
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            if measurements[name].spent < _ENOUGH:
                measurements[name].add(*timed(callables[name]))
    return measurements


def _warmed_up(call: Callable[[], Any]) -> Measurement:
    measured = Measurement()
    try:
        measured.add(*timed(call))
    except ImportError:
        return Measurement(error=NOT_INSTALLED)
    except Exception as error:  # whatever a peer raises is its result
        return Measurement(error=_one_line(error))
    if measured.spent < _ENOUGH:
        measured.times.clear()
    return measured


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that a call takes, and what it gives."""
    _synchronize()
    began = time.perf_counter()
    result = call()
    _synchronize()
    return time.perf_counter() - began, result


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _one_line(error: Exception) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))
    text = re.sub(r"(/[\w.+-]+){2,}", "(path)", text)
    return f"{type(error).__name__}: {text[:160]}"


def deviation(result: Any, reference: Any) -> float:
    """The largest difference between two results, relative to the largest entry of the second."""
    pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(reference), strict=True)
    differences, sizes = zip(*(((a - b).abs().max(), b.abs().max()) for a, b in pairs), strict=True)
    return (torch.stack(differences).max() / torch.stack(sizes).max()).item()  # NaN stays NaN


def in_fresh_process(make: Callable[[], Callable[[], Any]]) -> dict[str, float]:
    """What `make()()` takes where nothing has run before: the time of the first call, and the peak memory.

    The peak is what the call needs beyond what was there before, the largest of three runs after the
    first (of one, where that took long): what is loaded late is not counted, and a contestant that sizes
    its work by the clock goes at the pace of the runs that are timed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_first_call_and_peak, make).result()


def _first_call_and_peak(make: Callable[[], Callable[[], Any]]) -> dict[str, float]:
    call = make()
    first_call, _ = timed(call)
    growth = _allocated_growth if torch.cuda.is_initialized() else _resident_growth
    runs = _PEAK_RUNS if first_call < _LONG else 1
    return {"first_call": first_call, "peak_bytes": max(growth(call) for _ in range(runs))}


def _allocated_growth(call: Callable[[], Any]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def _resident_growth(call: Callable[[], Any]) -> int:
    before = settled()
    call()
    return highest() - before


def settled() -> int:
    """Bytes of resident memory, after which its peak counts anew.

    By VmHWM, which can be set back; ru_maxrss cannot, and starts with the parent's peak.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that the call asks for it again
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def highest() -> int:
    """The most bytes of resident memory since it was `settled`."""
    return _resident("VmHWM")


def _resident(kind: str) -> int:
    kibibytes = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert kibibytes
    return 1024 * int(kibibytes[1])


def environment(device: str) -> dict[str, Any]:
    """Versions and machine."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = {name: _version(name) for name in ("torch", "hesse", *_PEERS)}
    return {
        "versions": {name: found for name, found in versions.items() if found}
        | {"python": platform.python_version()},
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
