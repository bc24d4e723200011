"""Measure one model: `python -m benchmarks.models.measure NAME` prints what was found as lines of JSON.

Each line holds all of the one before, so that the last one counts where time runs out.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import hesse
from benchmarks.measure import highest, settled
from benchmarks.models import catalogue
from benchmarks.models.model import Model, Problem
from benchmarks.models.oracle import Coordinate, Oracle, drawn
from hesse.errors import HesseError, HesseWarning

Record = dict[str, Any]

TOLERANCE = 1e-6
"""Up to this two routes agree, relative to the largest entry of a tensor's diagonal."""

_FLOOR = 1e-8  # of the largest entry of all: where a whole tensor's diagonal is zero but for rounding
_BY_DIFFERENCES = 1e-4
COORDINATES = 40
_DIFFERENCES, _LARGEST = 6, 3
_QUICK = 5.0  # seconds up to which a call is made again
_PRODUCTS = 5
_WAYS_UP_TO = 10.0  # seconds that another method may take, as predicted


def measured(model: Model, tell: Callable[[Record], None]) -> None:
    """Everything about one model, told as it becomes known."""
    torch.manual_seed(0)
    torch.set_default_dtype(model.dtype)
    record: Record = {"what": model.what, "question": model.question, "by": model.by}
    record["dtype"] = str(model.dtype).removeprefix("torch.")
    try:
        problem = model.build()
        oracle = Oracle(problem)
        record |= {
            "tensors": len(problem.tensors),
            "coordinates": sum(tensor.numel() for tensor in problem.tensors),
            "gradient_seconds": _median(oracle.gradient),
        }
    except Exception as error:  # whatever it is becomes the row
        tell(record | {"build_error": _line(error)})
        return
    tell(record)
    _load()
    answer, plan, record["hesse"] = _answered(model.question, problem)
    tell(record)
    record |= _checked(model.question, oracle, answer)
    tell(record)
    if answer is None:
        return
    again, record["given_back"] = _asked(model.question, problem, method=plan)
    if again is not None:
        record["given_back"]["deviation"] = _deviation(answer, again)
    tell(record)
    predicted = {e.method: e.seconds for e in plan.estimates if not e.why_not}
    for way in ("sweep", "taps", "dense"):
        limit = record.get("products_seconds", 0) if way == "dense" else predicted.get(way, _WAYS_UP_TO)
        if way != plan.method and limit < _WAYS_UP_TO:
            other, record[way] = _asked(model.question, problem, method=way)
            if other is not None:
                record[way]["deviation"] = _deviation(answer, other)
            tell(record)


def _load() -> None:
    """What torch loads late is loaded, and not counted."""
    hesse.hessian(lambda x: x.pow(3).sum(), torch.ones(20))


def _asked(question: str, problem: Problem, **options: Any) -> tuple[list[Tensor] | None, Record]:
    """The answer, as one matrix or one vector a tensor; its time and its growth of memory."""
    answer, _, record = _answered(question, problem, **options)
    return answer, record


def _answered(question: str, problem: Problem, **options: Any) -> tuple[list[Tensor] | None, Any, Record]:
    """The same, with the plan."""

    def ask() -> Any:
        inputs = list(problem.tensors) if problem.closure else tuple(problem.tensors)
        if question == "hessian":
            return hesse.hessian(problem.func, inputs, flat=True, full_output=True, **options)
        return hesse.hessian_diagonal(problem.func, inputs, full_output=True, **options)

    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            result, seconds, peak = _grown(ask)
            if seconds < _QUICK:
                result, again, peak = _grown(ask)
                seconds = min(seconds, again)
        except Exception as error:
            return None, None, {"error": _line(error), "ours": isinstance(error, HesseError)}
    plan, certificate = result.plan, result.certificate
    record = {
        "seconds": seconds,
        "peak_bytes": peak,
        "method": plan.method,
        "reason": plan.reason,
        "passes": result.passes,
        "planned_passes": plan.passes,
        "predicted_seconds": plan.seconds,
        "by_method": _by_method(plan),
        "not_swept": next((e.why_not for e in plan.estimates if e.method == "sweep"), None),
        "not_tapped": next((e.why_not for e in plan.estimates if e.method == "taps"), None),
        "deviation": certificate.deviation if certificate else None,
        "warnings": _told(given),
    }
    answer = [result.value] if isinstance(result.value, Tensor) else list(result.value)
    return [part.detach() for part in answer], plan, record


def _by_method(plan: Any) -> dict[str, int]:
    """How many coordinates each method answers."""
    found: dict[str, int] = {}
    for share in plan.shares:
        found[share.method] = found.get(share.method, 0) + share.shape.numel()
    return found


def _told(given: list[warnings.WarningMessage]) -> list[str]:
    """What hesse warned of, each once."""
    told = (w for w in given if issubclass(w.category, HesseWarning))
    return list(dict.fromkeys(f"{w.category.__name__}: {_shortened(str(w.message))}" for w in told))


def _grown(call: Callable[[], Any]) -> tuple[Any, float, int]:
    """What a call gives, its seconds, and by how much the resident memory grows beyond what was there.

    Seconds are all those of the process, whose calculations are in one thread: others on the machine disturb
    them less.
    """
    before = settled()
    began = time.process_time()
    result = call()
    return result, time.process_time() - began, highest() - before


def _median(call: Callable[[], Any]) -> float:
    """The median time of some calls, after one that is not counted."""
    call()
    times: list[float] = []
    while len(times) < 3 or (len(times) < 20 and sum(times) < 1.0):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return statistics.median(times)


def _checked(question: str, oracle: Oracle, answer: list[Tensor] | None) -> Record:
    """The time of one product per coordinate, and a verdict on the answer."""
    whole = question == "hessian"
    coordinates = drawn(oracle.problem, COORDINATES)
    record: Record = {}
    columns: list[list[Tensor]] = []
    times = []
    began = time.process_time()
    for column in oracle.columns(coordinates, whole):
        times.append(time.process_time() - began)
        columns.append(column)
        began = time.process_time()
    if columns:
        count = sum(tensor.numel() for tensor in oracle.problem.tensors)
        record["products"] = len(times) - 1
        # The first one's time holds that of the gradient.
        record["products_seconds"] = times[0] + (count - 1) * statistics.mean(times[1:] or times)
    if answer is None:
        return record
    return record | _verdict(oracle, coordinates, columns, answer, whole)


def _verdict(
    oracle: Oracle,
    coordinates: list[Coordinate],
    columns: list[list[Tensor]],
    answer: list[Tensor],
    whole: bool,
) -> Record:
    """The largest deviation from the oracle, and who is right where it is large."""
    sizes = [tensor.numel() for tensor in oracle.problem.tensors]
    diagonals = list(answer[0].diagonal().split(sizes)) if whole else [part.flatten() for part in answer]
    scales = _scales(diagonals)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    off: list[tuple[float, Coordinate]] = []
    for (tensor, place), column in zip(coordinates, columns, strict=False):
        if whole:
            found = answer[0][starts[tensor] + place].split(sizes)
            far = max(
                ((one - other).abs().max() / (scales[i] * scales[tensor]) ** 0.5).item()
                for i, (one, other) in enumerate(zip(found, column, strict=True))
            )
        else:
            far = abs(diagonals[tensor][place] - column[0][place]).item() / scales[tensor]
        off.append((far, (tensor, place)))
    record: Record = {"compared": len(off), "torch_refuses": oracle.refusal}
    if off:
        record["off_torch"] = max(far for far, _ in off)
    worst = [coordinate for far, coordinate in sorted(off, reverse=True) if not far <= TOLERANCE]
    record["disagree"] = len(worst)
    largest = sorted(coordinates, key=lambda c: -abs(diagonals[c[0]][c[1]].item()) / scales[c[0]])
    # Where a whole tensor has no curvature, autograd may have lost it, for hesse as well.
    flat = [c for c in coordinates if not diagonals[c[0]].any()]
    compared = dict.fromkeys([*worst[:_DIFFERENCES], *largest[:_LARGEST], *flat[:_LARGEST]])
    by_torch = dict(zip(coordinates, columns, strict=False))
    record["differences"] = []
    for coordinate in compared:
        tensor, place = coordinate
        difference = oracle.difference(coordinate)
        parts = by_torch.get(coordinate)
        theirs = None if parts is None else parts[tensor if whole else 0][place].item()
        ours = diagonals[tensor][place].item()
        record["differences"].append(
            {
                "coordinate": list(coordinate),
                "scale": scales[tensor],
                "hesse": ours,
                "torch": theirs,
                "difference": difference.value,
                "error": difference.error,
            }
        )
    return record


def _scales(diagonals: list[Tensor]) -> list[float]:
    """The largest entry of each diagonal, or a small share of the largest of all."""
    largest = [part.abs().max().item() if part.numel() else 0.0 for part in diagonals]
    return [max(one, _FLOOR * max(largest)) or 1.0 for one in largest]


def _deviation(answer: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two answers, relative to the largest entry of each tensor's."""
    scales = _scales(answer)
    pairs = zip(answer, other, scales, strict=True)
    return max(((a - b).abs().max() / s).item() if a.numel() else 0.0 for a, b, s in pairs)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {_shortened(str(error))}"


def _shortened(text: str) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))
    text = re.sub(r"(/[\w.+-]+){2,}", "(path)", text)
    return text if len(text) < 300 else text[:297] + "..."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.measure", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--dtype", choices=["float32", "float64"], help="instead of the model's own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = catalogue.find(options.name)
    if options.dtype:
        model = replace(model, dtype=getattr(torch, options.dtype))
    measured(model, lambda record: print(json.dumps(record), flush=True))


if __name__ == "__main__":
    main()
