"""Where plan, method and certificate meet: a problem and a question in, a `Result` out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hesse.certificate import Certificate, certify
from hesse.errors import BudgetError, CertificateWarning, NonFiniteWarning, warn
from hesse.finite import first_non_finite
from hesse.gradient import Gradient, evaluate_again, evaluated, require_deterministic
from hesse.methods import dense
from hesse.plan import Plan, choose
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
    plan = choose(question, problem, options.method)
    budget = Budget(options.memory, problem.tensors[0].device)
    if plan.answer_bytes > budget.total:
        raise BudgetError(
            f"the {question} of {problem.parameters:,} coordinates takes {show(plan.answer_bytes)}, "
            f"the memory budget is {show(budget.total)}; {_LESS_THAN[question]}, or raise memory="
        )
    progress = Progress(options.progress)
    with random_state_kept(), progress:
        first = evaluate_again(problem)
        with evaluated(problem, strict, create_graph) as gradient:
            require_deterministic(first, gradient.value)
            trouble = first_non_finite(problem, gradient)
            if trouble:
                warn(NonFiniteWarning, f"{trouble}; second derivatives are not finite there either")
            limit = _chunk_limit(plan, problem, gradient, budget)
            check = options.check and not trouble
            parts, certificate, passes = _certified(plan, gradient, limit, progress, create_graph, check)
    value = pack(parts)
    if not options.full_output:
        return value
    return Result(value, plan, certificate, passes, time.perf_counter() - began)


_LESS_THAN = {
    "hessian": "ask for hessian_diagonal, hessian_blocks or products (hvp) instead",
    "blocks": "ask for hessian_diagonal or products (hvp) instead",
    "diagonal": "ask for fewer tensors at a time",
}


def _chunk_limit(plan: Plan, problem: Problem, gradient: Gradient, budget: Budget) -> int:
    """How many products may be batched within what the budget leaves beside the answer."""
    sizes = [tensor.numel() * tensor.dtype.itemsize for tensor in problem.tensors]
    row = sum(sizes) if plan.question == "hessian" else max(sizes)
    curved = [gradient.parts[i] for i in gradient.curved]
    column = bytes_per_column([part for part in curved if part is not None])
    # A row exists twice for a moment: as the pass returns it and in the answer's layout.
    return (budget.left() - plan.answer_bytes) // max(1, column + 2 * row)


def _certified(
    plan: Plan,
    gradient: Gradient,
    chunk_limit: int,
    progress: Progress,
    create_graph: bool,
    check: bool,
) -> tuple[list[Any], Certificate | None, int]:
    """Run the method in its fastest way; where the check fails, in the next one that assumes less."""
    rows = sum(gradient.leaves[i].numel() for i in gradient.curved)
    passes = 0
    for way in dense.ways(plan.question, gradient):
        progress.expect(rows)
        outcome = dense.run(plan.question, gradient, way, chunk_limit, progress, create_graph, check)
        passes += rows
        if not check:
            return outcome.parts, None, passes
        certificate = certify(gradient, outcome.probes)
        passes += certificate.probes
        if certificate.passed:
            break
        if not math.isfinite(certificate.deviation):
            warn(
                NonFiniteWarning,
                f"the {plan.question} holds a NaN or an infinity, though the gradient is finite",
            )
            break
        warn(
            CertificateWarning,
            f"the {plan.question} computed {way} deviates from plain autograd by "
            f"{certificate.deviation:.2g}, where rounding explains {certificate.bound:.2g}; "
            + (
                "it is computed again with fewer assumptions"
                if way.batched
                else "func is ill-conditioned in this dtype, or its backward is not deterministic"
            ),
        )
    return outcome.parts, certificate, passes
