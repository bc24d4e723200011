"""Ask hesse and its peers the same questions: `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import approximate, estimators, operators
from benchmarks.cases import Case
from benchmarks.contestants import (
    QUESTIONS,
    YARDSTICKS,
    Question,
    contestant,
    sampled,
    sampled_reference,
)
from benchmarks.measure import (
    Extrapolated,
    Measurement,
    deviation,
    environment,
    in_fresh_process,
    measure,
    record_of,
    show,
)

RESULTS = Path(__file__).parent / "results"
_IMPORT_REPEATS = 7
_WRONG = 1e-2  # a deviation that neither float32 nor TF32 explains
_QUICK = 2.0  # seconds up to which a call is repeated in a fresh process


def answer_case(name: str, case: Case, device: str, repeats: int | None) -> dict[str, Any]:
    """Everything about one question to one case."""
    question = QUESTIONS[name]
    callables = question.contestants(case, device)
    measured = measure(callables, repeats or question.repeats)
    deviations = _deviations(question, case, device, measured)
    contestants = {}
    for who, found in measured.items():
        contestants[who] = record = record_of(found)
        if who in deviations:
            record |= {"deviation": deviations[who], "right": deviations[who] < _WRONG}
            if found.seconds < _QUICK and not isinstance(found.result, Extrapolated):
                record |= in_fresh_process(partial(contestant, name, who, device, case.name))
        print(f"{name:9} {case.name:15} {who:60} {show(record)}", flush=True)
    seconds = {
        who: record["seconds"]
        for who, record in contestants.items()
        if record.get("right") or (who in YARDSTICKS and "seconds" in record)
    }
    derived = question.derived(seconds)
    ours = next(iter(callables))
    if question.planned and not measured[ours].error:
        plan = callables[ours](full_output=True).plan
        predicted = getattr(plan, "seconds", None)
        contestants[ours]["plan"] = {"method": plan.method, "passes": plan.passes, "seconds": predicted}
        if predicted is not None:
            derived["predicted_over_measured"] = predicted / measured[ours].seconds
    _, tensors = case.problem(device)
    return {
        "description": case.description,
        "coordinates": sum(tensor.numel() for tensor in tensors),
        "sampled": sum(min(case.sample, tensor.numel()) for tensor in tensors),
        "note": case.note,
        "contestants": contestants,
        **derived,
    }


def _deviations(
    question: Question, case: Case, device: str, measured: dict[str, Measurement]
) -> dict[str, float]:
    """How far from the reference those are who answered."""
    answers = {
        who: found.result for who, found in measured.items() if not found.error and who not in YARDSTICKS
    }
    if case.sample:
        reference = sampled_reference(case, device) if answers else []
        return {who: deviation(sampled(answer, case.sample), reference) for who, answer in answers.items()}
    if question.reference not in answers:
        raise RuntimeError(f"{case.name}: nothing to compare with, {measured[question.reference].error}")
    return {who: deviation(answer, answers[question.reference]) for who, answer in answers.items()}


def answer_import(repeats: int | None) -> dict[str, Any]:
    """How long a fresh interpreter takes to import hesse, and torch alone."""
    modules = ("hesse", "torch")
    statements = {f"import {module}": [sys.executable, "-c", f"import {module}"] for module in modules}
    measured = measure(
        {name: partial(subprocess.run, command, check=True) for name, command in statements.items()},
        repeats or _IMPORT_REPEATS,
    )
    for name, found in measured.items():
        print(f"{'import':22} {name:60} {show(record_of(found))}", flush=True)
    return {
        "description": "a fresh interpreter from its start to its end",
        "contestants": {name: record_of(found) for name, found in measured.items()},
        "seconds_added_by_hesse": measured["import hesse"].seconds - measured["import torch"].seconds,
    }


def summary(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Minimum, median and maximum over the cases of every number derived from the times."""
    derived: dict[str, list[float]] = {}
    for case in cases.values():
        for key, value in case.items():
            if isinstance(value, float):
                derived.setdefault(key, []).append(value)
    return {
        key: {"minimum": min(values), "median": statistics.median(values), "maximum": max(values)}
        for key, values in derived.items()
    }


def write(question: str, device: str, cases: dict[str, dict[str, Any]], keep: bool) -> Path:
    """Write the results; `keep`: beside those of other cases, if the environment is the same."""
    where = environment(device)
    gpu = where["gpu"] or "cpu"
    path = RESULTS / f"{question}-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    if keep and path.exists():
        earlier = json.loads(path.read_text())
        if earlier["environment"] == where:
            cases = earlier["cases"] | cases
    content = {"question": question, "environment": where, "cases": cases, "summary": summary(cases)}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--question", choices=[*QUESTIONS, "approximate", "operators", "estimators", "import"]
    )
    cases = [
        *approximate.CASES,
        *operators.ROWS,
        *(case for question in QUESTIONS.values() for case in question.cases),
    ]
    known = dict.fromkeys(case.name for case in cases)
    parser.add_argument("--case", choices=list(known), help="only this one; earlier results of others stay")
    parser.add_argument("--repeats", type=int, help="rounds, instead of the question's own number")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()

    for name, question in QUESTIONS.items():
        answered = {}
        if options.question in (None, name):
            for case in question.cases:
                if options.case in (None, case.name):
                    answered[case.name] = answer_case(name, case, options.device, options.repeats)
                    path = write(name, options.device, answered, keep=options.case is not None)
        if answered:
            print(f"wrote {path.name}")
    others = {
        "approximate": (approximate.CASES, partial(approximate.answer_approximate, device=options.device)),
        # What it is to show is said of a CPU.
        "operators": (operators.ROWS if options.device == "cpu" else (), operators.answer_row),
    }
    for name, (known_cases, ask) in others.items():
        answered = {}
        for case in known_cases if options.question in (None, name) else ():
            if options.case in (None, case.name):
                answered[case.name] = ask(case, repeats=options.repeats)
                path = write(name, options.device, answered, keep=options.case is not None)
        if answered:
            print(f"wrote {path.name}")
    if options.question == "estimators" or not (options.question or options.case):
        path = write("estimators", options.device, estimators.answer_estimators(), keep=False)
        print(f"wrote {path.name}")
    if options.question == "import" or not (options.question or options.case):
        path = write("import", options.device, {"import": answer_import(options.repeats)}, keep=False)
        print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
