"""Where plan, method and certificate meet: a problem and a question in, a `Result` out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hesse import planning
from hesse.blocks import CannotSweep
from hesse.certificate import Certificate, certify
from hesse.cost import Meter
from hesse.errors import BudgetError, CertificateWarning, NonFiniteWarning, warn
from hesse.evaluation import evaluated, require_deterministic, value_of
from hesse.explore import explore
from hesse.finite import first_non_finite
from hesse.gradient import Gradient, require_influence
from hesse.methods import dense, sweep, sweep_cost, sweep_route, taps
from hesse.planning import Plan
from hesse.probe import Probe
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
    whole = _whole(question, problem, options.method, create_graph)
    size = planning.answer_bytes(question, problem)
    budget = Budget(options.memory, problem.tensors[0].device)
    if size > budget.total:
        raise BudgetError(
            f"the {question} of {problem.parameters:,} coordinates takes {show(size)}, "
            f"the memory budget is {show(budget.total)}; {_LESS_THAN[question]}, or raise memory="
        )
    progress = Progress(options.progress)
    with random_state_kept(), progress, _looked_at(problem, whole is None, strict, create_graph) as gradient:
        trouble = first_non_finite(problem, gradient)
        if trouble:
            warn(NonFiniteWarning, f"{trouble}; second derivatives are not finite there either")
        check = options.check and not trouble
        meter = Meter(gradient, budget, size)
        plan = planning.make(question, problem, meter, options.method, check, _refused(whole), brief=True)
        work = _Work(question, problem, meter, progress, create_graph)
        parts, certificate, plan = work.certified(plan, check)
    passes = progress.done + (certificate.probes if certificate else 0)
    value = pack(parts)
    if not options.full_output:
        return value
    return Result(value, plan, certificate, passes, time.perf_counter() - began)


def plan_for(question: str, problem: Problem, options: Options) -> Plan:
    """The plan for "hessian", "blocks" or "diagonal", without the answer."""
    whole = _whole(question, problem, options.method, create_graph=False)
    budget = Budget(options.memory, problem.tensors[0].device)
    with random_state_kept(), _looked_at(problem, structure=True) as gradient:
        meter = Meter(gradient, budget, planning.answer_bytes(question, problem))
        return planning.make(question, problem, meter, options.method, options.check, _refused(whole))


@contextmanager
def _looked_at(
    problem: Problem, structure: bool, strict: bool = False, create_graph: bool = False
) -> Iterator[Gradient]:
    """The gradient, after a first look that found its `structure` if that is of interest.

    The function is evaluated at the point twice. The second time is only for its value, unless the graph of
    the first one may hold what had to be put back for the look.
    """
    with ExitStack() as held:
        evaluation = held.enter_context(evaluated(problem, strict, create_graph, structure))
        found = explore(problem, evaluation)
        value = evaluation.value.detach()
        if found.changed:
            held.close()
            evaluation = held.enter_context(evaluated(problem, strict, create_graph, structure))
            again = evaluation.value
        else:
            again = value_of(problem, create_graph, structure)
        require_deterministic(value, again)
        gradient = Gradient(evaluation, found)
        if strict:
            require_influence(problem, gradient)
        yield gradient


def _refused(whole: str | None) -> dict[str, str]:
    """The methods that cannot be where the function is taken as a whole."""
    return {} if whole is None else dict.fromkeys(set(planning.METHODS) - {"dense"}, whole)


def _whole(question: str, problem: Problem, method: str | Plan, create_graph: bool) -> str | None:
    """Why the function is taken as a whole, without a look at its structure."""
    name = planning.wanted(method)
    if isinstance(method, Plan):
        method.require_fit(question, problem)
    if create_graph:
        return "create_graph=True keeps every step on one graph"
    return "not asked for" if name == "dense" else None


_LESS_THAN = {
    "hessian": "ask for hessian_diagonal, hessian_blocks or products (hvp) instead",
    "blocks": "ask for hessian_diagonal or products (hvp) instead",
    "diagonal": "ask for fewer tensors at a time",
}


@dataclass(frozen=True)
class _Work:
    """A question to a gradient."""

    question: str
    problem: Problem
    meter: Meter
    progress: Progress
    create_graph: bool

    @property
    def gradient(self) -> Gradient:
        """What all products start from."""
        return self.meter.gradient

    def certified(self, plan: Plan, check: bool) -> tuple[list[Any], Certificate | None, Plan]:
        """Answer as planned; where that cannot be or the check fails, in ways that assume less."""
        refused: dict[str, str] = {}
        while plan.method != "dense":
            self.progress.expect(plan.passes)
            try:
                parts, probes = self._run(plan, self._ways[0], check)
            except CannotSweep as error:  # seen only on the way
                refused |= {plan.method: str(error)}
                plan = self._plan("auto", check, refused)
                continue
            certificate = certify(self.gradient, probes) if check else None
            if certificate is None or self._stands(certificate):
                return parts, certificate, plan
            self._warn_of(f"by {plan.method}", certificate, last=False)
            plan = self._plan("dense", check, refused)
        for way in self._ways:
            self.progress.expect(plan.passes)
            parts, probes = self._run(plan, way, check)
            certificate = certify(self.gradient, probes) if check else None
            if certificate is None or self._stands(certificate):
                break
            self._warn_of(str(way), certificate, last=not way.batched, symmetric=way.symmetric)
        return parts, certificate, plan

    @property
    def _ways(self) -> list[dense.Way]:
        return dense.ways(self.question, self.gradient)

    def _plan(self, method: str, check: bool, refused: Mapping[str, str]) -> Plan:
        return planning.make(self.question, self.problem, self.meter, method, check, refused)

    def _stands(self, certificate: Certificate) -> bool:
        """Is there nothing that another way could do better?"""
        if certificate.passed:
            return True
        if math.isfinite(certificate.deviation):
            return False
        warn(
            NonFiniteWarning,
            f"the {self.question} holds a NaN or an infinity, though the gradient is finite",
        )
        return True

    def _warn_of(self, how: str, certificate: Certificate, last: bool, symmetric: bool = False) -> None:
        next_step = (
            "func is ill-conditioned in this dtype, or its backward is not deterministic"
            if last
            else "it is computed again with fewer assumptions"
        )
        hint = (
            " (a Hessian that is not symmetric comes from a hook, a custom backward or an error in "
            "torch's own)"
            if symmetric
            else ""
        )
        warn(
            CertificateWarning,
            f"the {self.question} computed {how} deviates from plain autograd by "
            f"{certificate.deviation:.2g}, where rounding explains {certificate.bound:.2g}; "
            f"{next_step}{hint}",
        )

    def _run(self, plan: Plan, way: dense.Way, check: bool) -> tuple[list[Any], list[Probe]]:
        """The planned tensors by the plan's method, all others by one product per coordinate."""
        known: Mapping[Any, Tensor] = {}
        probes: list[Probe] = []
        if plan.by("taps"):
            layers = [layer for layer in self.gradient.layers if layer.call.weight in plan.by("taps")]
            answer = taps.answer_to(self.question, layers, check)
            taps.run(answer, layers, self.gradient, self.meter.workspace, self.progress)
            known = answer.parts()
            probes = answer.probes()
        if plan.by("sweep"):
            known, probes = self._swept(plan.by("sweep"), check)
        outcome = dense.run(
            self.question,
            self.gradient,
            way,
            self._chunk_limit() if self.gradient.curved_beside(plan.by("sweep")) else 1,
            self.progress,
            self.create_graph,
            check,
            known,
        )
        return outcome.parts, [*probes, *outcome.probes]

    def _swept(self, leaves: frozenset[int], check: bool) -> tuple[Mapping[Any, Tensor], list[Probe]]:
        tape = self.gradient.tape
        assert tape is not None
        with sweep_route.refusing():
            way = sweep_route.route(tape, self.gradient.value, self.gradient.places, leaves)
            whole = self.question == "blocks"
            taken = sweep_cost.cost(way, self.meter.room, whole)
            if taken.chunks > 1:
                self.progress.expect(taken.chunks)
            if whole:  # blocks are checked where they are joined with the others
                return sweep.blocks(way, leaves, taken.size, self.progress), []
            return sweep.diagonal(way, leaves, check, taken.size, self.progress)

    def _chunk_limit(self) -> int:
        """How many of the dense products may be batched."""
        sizes = [tensor.numel() * tensor.dtype.itemsize for tensor in self.problem.tensors]
        row = sum(sizes) if self.question == "hessian" else max(sizes)
        curved = [self.gradient.parts[i] for i in self.gradient.curved]
        column = bytes_per_column([part for part in curved if part is not None])
        # A row exists twice for a moment: as the pass returns it and in the answer's layout.
        return self.meter.workspace // max(1, column + 2 * row)
