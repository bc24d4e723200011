"""Where plan, method and certificate meet: a problem and a question in, a `Result` out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hesse.certificate import Certificate, certify
from hesse.errors import BudgetError, CertificateWarning, NonFiniteWarning, warn
from hesse.finite import first_non_finite
from hesse.gradient import (
    Gradient,
    evaluate_again,
    evaluated,
    require_deterministic,
)
from hesse.layers import Diagonal, Layer, Matrix
from hesse.methods import dense, taps
from hesse.plan import Plan, answer_bytes, choose, may_tap
from hesse.problem import Problem
from hesse.runtime.isolation import random_state_kept
from hesse.runtime.memory import Budget, bytes_per_column, show
from hesse.runtime.progress import Progress, ProgressOption


@dataclass(frozen=True)
class Options:
    """The keyword-only options that all questions share."""

    method: str | Plan = "auto"
    check: bool = True
    memory: int | str | None = None
    progress: ProgressOption = None
    full_output: bool = False


@dataclass(frozen=True)
class Result:
    """An answer with how it came about; what `full_output=True` returns.

    Attributes:
        value: the answer, in the caller's container.
        plan: the method that was chosen, and why.
        certificate: what the check found; None with `check=False`.
        passes: Hessian-vector products taken, those of the check included.
        seconds: wall-clock time.
    """

    value: Any
    plan: Plan
    certificate: Certificate | None
    passes: int
    seconds: float


def answer(
    question: str,
    problem: Problem,
    options: Options,
    pack: Callable[[list[Any]], Any],
    create_graph: bool = False,
    strict: bool = False,
) -> Any:
    """Answer "hessian", "blocks" or "diagonal"; `pack` makes the caller's container of the parts."""
    began = time.perf_counter()
    taps_wanted = may_tap(question, options.method) and not create_graph
    size = answer_bytes(question, problem)
    budget = Budget(options.memory, problem.tensors[0].device)
    if size > budget.total:
        raise BudgetError(
            f"the {question} of {problem.parameters:,} coordinates takes {show(size)}, "
            f"the memory budget is {show(budget.total)}; {_LESS_THAN[question]}, or raise memory="
        )
    progress = Progress(options.progress)
    with random_state_kept(), progress:
        first = evaluate_again(problem)
        with evaluated(problem, strict, create_graph, tapped=taps_wanted) as gradient:
            require_deterministic(first, gradient.value)
            trouble = first_non_finite(problem, gradient)
            if trouble:
                warn(NonFiniteWarning, f"{trouble}; second derivatives are not finite there either")
            work = _Work(question, problem, gradient, budget.left() - size, progress, create_graph)
            parts, certificate, passes, plan = work.certified(options.check and not trouble)
    value = pack(parts)
    if not options.full_output:
        return value
    return Result(value, plan, certificate, passes, time.perf_counter() - began)


_LESS_THAN = {
    "hessian": "ask for hessian_diagonal, hessian_blocks or products (hvp) instead",
    "blocks": "ask for hessian_diagonal or products (hvp) instead",
    "diagonal": "ask for fewer tensors at a time",
}


@dataclass(frozen=True)
class _Work:
    """A question to a gradient, with what its answer may use: `workspace` bytes beside itself."""

    question: str
    problem: Problem
    gradient: Gradient
    workspace: int
    progress: Progress
    create_graph: bool

    def certified(self, check: bool) -> tuple[list[Any], Certificate | None, int, Plan]:
        """Answer in the fastest way; where the check fails, in the next one that assumes less."""
        layers = self.gradient.layers
        passes = 0
        ways = dense.ways(self.question, self.gradient)
        attempts = [(layers, ways[0])] if layers else []
        attempts += [([], way) for way in ways]
        for layers, way in attempts:
            plan = choose(self.question, self.problem, self.gradient, layers)
            self.progress.expect(plan.passes)
            parts, probes = self._run(layers, way, check)
            passes += plan.passes
            if not check:
                return parts, None, passes, plan
            certificate = certify(self.gradient, probes)
            passes += certificate.probes
            if certificate.passed:
                break
            if not math.isfinite(certificate.deviation):
                warn(
                    NonFiniteWarning,
                    f"the {self.question} holds a NaN or an infinity, though the gradient is finite",
                )
                break
            last = not layers and not way.batched
            warn(
                CertificateWarning,
                f"the {self.question} computed {'by taps' if layers else way} deviates from plain "
                f"autograd by {certificate.deviation:.2g}, where rounding explains "
                f"{certificate.bound:.2g}; "
                + (
                    "func is ill-conditioned in this dtype, or its backward is not deterministic"
                    if last
                    else "it is computed again with fewer assumptions"
                )
                + (
                    " (a Hessian that is not symmetric comes from a hook, a custom backward or an error in "
                    "torch's own)"
                    if way.symmetric
                    else ""
                ),
            )
        return parts, certificate, passes, plan

    def _run(
        self, layers: Sequence[Layer], way: dense.Way, check: bool
    ) -> tuple[list[Any], list[Probe]]:
        """The layers by taps and all other tensors by one product per coordinate."""
        known, probes = {}, []
        if layers:
            store = Diagonal(layers) if self.question == "diagonal" else Matrix(layers, within=self.question == "blocks")
            taps.run(store, layers, self.gradient, self.workspace, self.progress)
            known = store.parts()
            if self.question == "diagonal":
                probes = store.probes()
        outcome = dense.run(
            self.question,
            self.gradient,
            way,
            self._chunk_limit(),
            self.progress,
            self.create_graph,
            check,
            known,
        )
        return outcome.parts, [*probes, *outcome.probes]

    def _chunk_limit(self) -> int:
        """How many of the dense products may be batched."""
        sizes = [tensor.numel() * tensor.dtype.itemsize for tensor in self.problem.tensors]
        row = sum(sizes) if self.question == "hessian" else max(sizes)
        curved = [self.gradient.parts[i] for i in self.gradient.curved]
        column = bytes_per_column([part for part in curved if part is not None])
        # A row exists twice for a moment: as the pass returns it and in the answer's layout.
        return self.workspace // max(1, column + 2 * row)
