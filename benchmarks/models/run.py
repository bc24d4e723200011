"""Measure all models, each in a process of its own: `python -m benchmarks.models.run --help`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import hesse
from benchmarks.measure import environment
from benchmarks.models import catalogue
from benchmarks.models.model import Catalogue
from benchmarks.run import RESULTS
from benchmarks.table import ROOT

FILE = RESULTS / "models.json"
_LIMIT = 120  # seconds
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def measured(name: str, limit: float) -> dict[str, Any]:
    """What a process of its own finds out about a model; what it had found where time ran out."""
    command = [sys.executable, "-m", "benchmarks.models.measure", name]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | _ENVIRONMENT, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return _last(text) | {"out_of_time": limit}
    record = _last(done.stdout)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return record | {"ended": done.returncode, "said": said[-1][:300] if said else ""}
    return record


def _last(text: str) -> dict[str, Any]:
    """The last whole line of what was printed."""
    for line in reversed(text.splitlines()):
        if line.startswith("{") and line.endswith("}"):
            record: dict[str, Any] = json.loads(line)
            return record
    return {}


def catalogues(names: list[str] | None) -> tuple[dict[str, Catalogue], dict[str, str]]:
    """The packages that can be imported, and what went wrong with the others."""
    found, missing = {}, {}
    wanted = {name.split("/")[0] for name in names or catalogue.PACKAGES}
    for package in catalogue.PACKAGES:
        if package in wanted:
            try:
                found[package] = catalogue.catalogue(package)
            except Exception as error:  # whatever an import raises
                missing[package] = f"{type(error).__name__}: {error}"
    return found, missing


def where(found: dict[str, Catalogue]) -> dict[str, Any]:
    """Versions and machine."""
    described = environment("cpu")
    known = described["versions"]
    keep = {"torch": known["torch"], "hesse": hesse.__version__, "python": known["python"]}
    for one in found.values():
        for distribution in one.distributions:
            with suppress(PackageNotFoundError):
                keep[distribution] = version(distribution)
    return described | {"versions": keep, "threads": 1}


def read() -> dict[str, Any]:
    """The results so far."""
    if FILE.exists():
        content: dict[str, Any] = json.loads(FILE.read_text())
        return content
    return {"environment": {"versions": {}}, "models": {}}


def write(records: dict[str, Any], found: dict[str, Catalogue]) -> None:
    """Write the results beside those that are there, without rows that a package no longer has."""
    earlier = read()
    described = where(found)
    described["versions"] = earlier["environment"]["versions"] | described["versions"]
    models = {
        name: record
        for name, record in sorted((earlier["models"] | records).items())
        if (package := name.split("/")[0]) not in found or name in found[package].models
    }
    content = {"environment": described, "models": models}
    # Whole or not at all: another process may be reading, and this one may be stopped.
    written = FILE.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(content, indent=1) + "\n")
    written.replace(FILE)


def _show(record: dict[str, Any]) -> str:
    ours = record.get("hesse", {})
    if "seconds" not in ours:
        failed = (record.get(key) for key in ("build_error", "said", "out_of_time"))
        return str(ours.get("error") or next((text for text in failed if text is not None), "nothing"))
    gradients = ours["seconds"] / record["gradient_seconds"]
    return (
        f"{record['coordinates']:7,} {ours['method']:6} {ours['seconds']:8.3f} s {gradients:9.1f} gradients "
        f"{ours['peak_bytes'] / 2**20:7.1f} MiB  off {record.get('off_torch', float('nan')):.1e}"
    )


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.run", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="packages, or models as package/model")
    parser.add_argument("--limit", type=float, default=_LIMIT, help="seconds a model")
    parser.add_argument("--missing", action="store_true", help="leave out what has been measured")
    options = parser.parse_args()

    found, missing = catalogues(options.only)
    for package, reason in missing.items():
        print(f"{package}: {reason}", flush=True)
    done = read()["models"] if options.missing else {}
    names = [name for one in found.values() for name in one.models if name not in done]
    names = [n for n in names if not options.only or {n, n.split("/")[0]} & set(options.only)]
    for name in names:
        began = time.perf_counter()
        record = measured(name, options.limit)
        print(f"{name:44} {_show(record)}  ({time.perf_counter() - began:.0f} s)", flush=True)
        write({name: record}, found)


if __name__ == "__main__":
    main()
