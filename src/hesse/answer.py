"""Where plan, method and certificate meet: a problem and a question in, a `Result` out."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict
from weakref import WeakValueDictionary

import torch

from hesse.checks.certificate import Autograd, Certificate, Reference
from hesse.checks.differences import Differences, require_graph
from hesse.errors import ArgumentError, BudgetError
from hesse.look.finite import is_finite
from hesse.look.first import Look, looked_at
from hesse.look.gradient import Gradient, require_influence
from hesse.look.meter import CHUNK, Meter
from hesse.methods import METHODS
from hesse.methods.base import MethodName, Question
from hesse.planning.choice import answer_bytes, choose, resumed, wanted
from hesse.planning.plan import Plan
from hesse.problem import Problem
from hesse.runtime.memory import Budget, show
from hesse.runtime.progress import Progress, ProgressOption
from hesse.runtime.random_state import random_state_kept
from hesse.runtime.total import Total
from hesse.selection import Part
from hesse.work import Work


class Asked(TypedDict, total=False):
    """The keyword-only options that all questions share, as a caller gives them; but for `full_output`."""

    method: str | Plan
    check: bool | str
    memory: int | str | None
    progress: ProgressOption


class AskedFlat(Asked, total=False):
    """The same where answers may be flat."""

    flat: bool


@dataclass(frozen=True)
class Options:
    """The keyword-only options that all questions share."""

    method: str | Plan = "auto"
    check: bool | str = True
    memory: int | str | None = None
    progress: ProgressOption = None
    full_output: bool = False
    flat: bool = False

    def __post_init__(self) -> None:
        if self.check not in (True, False, "first", "differences"):
            raise ArgumentError(f'check must be True, False, "first" or "differences", met {self.check!r}')


@dataclass(frozen=True)
class Result:
    """An answer with how it came about; what `full_output=True` returns.

    Attributes:
        value: the answer, in the caller's container.
        plan: the method that was chosen, and why.
        certificate: what the check found; None with `check=False`.
        passes: Hessian-vector products taken, those of the check included.
        seconds: wall-clock time.
        names: what each tensor is called, in the order of the inputs; in that order their coordinates follow
            each other in a flat answer.
        shapes: the tensors' shapes.
    """

    value: Any
    plan: Plan
    certificate: Certificate | None
    passes: int
    seconds: float
    names: tuple[str, ...] = ()
    shapes: tuple[torch.Size, ...] = ()


def answer(
    question: Question,
    problem: Problem,
    options: Options,
    pack: Callable[[list[Any]], Any],
    create_graph: bool = False,
    strict: bool = False,
    part: Part | None = None,
) -> Any:
    """Answer "hessian", "blocks" or "diagonal"; `pack` makes the caller's container of the parts.

    `part`: of a Hessian, the rows and columns that are asked for.
    """
    answered = _answered if problem.summands is None else _summed
    result = answered(question, problem, options, create_graph, strict, part)
    value = pack(result.value)
    return replace(result, value=value) if options.full_output else value


def _answered(
    question: Question,
    problem: Problem,
    options: Options,
    create_graph: bool,
    strict: bool,
    part: Part | None,
) -> Result:
    """The parts of an answer, one for every tensor or pair of them; with `full_output`, what was learned."""
    began = time.perf_counter()
    if not problem.tensors:
        return Result([], Plan.of_nothing(question), None, 0, 0.0)
    whole = _whole(question, problem, options.method, create_graph, part)
    size = _size(question, problem, options, part)
    budget = _budget(question, problem, options, size)
    progress = Progress(options.progress)
    given = options.method if isinstance(options.method, Plan) and not create_graph else None
    known = given.learned if given else None
    with (
        random_state_kept(),
        progress,
        looked_at(
            problem, budget, whole is None, strict, create_graph, known, _closely(problem, options)
        ) as look,
    ):
        gradient = look.gradient
        if is_finite(gradient.value) and (options.check or strict):
            require_graph(problem, gradient, strict)
        if strict:
            require_influence(problem, gradient, curved=question != "diagonal")
        meter = Meter(gradient, budget, size, look.same)
        same = look.same is not None
        if given is not None and same and given.peak_bytes - given.answer_bytes <= meter.left:
            choice = resumed(problem, meter, given, part)
        else:
            check, refused = bool(options.check), _refused(whole)
            choice = choose(question, problem, meter, wanted(options.method), check, refused, True, part)
        certified = options.check == "first" and same and id(given) in _CERTIFIED
        reference = None if certified else _reference(options.check, problem, gradient)
        work = Work(question, problem, meter, progress, reference, create_graph, part)
        parts, certificate, plan = work.certified(choice)
        plan = _with_learned(plan, look, meter) if options.full_output else plan
    if certified or (certificate is not None and certificate.passed):
        _CERTIFIED.update((id(of), of) for of in (plan, given) if of is not None)
    passes = progress.done + (certificate.probes if certificate else 0)
    seconds = time.perf_counter() - began
    if not options.full_output:  # names take their time
        return Result(parts, plan, certificate, passes, seconds)
    shapes = tuple(tensor.shape for tensor in problem.tensors)
    return Result(parts, plan, certificate, passes, seconds, problem.names, shapes)


def _summed(
    question: Question,
    problem: Problem,
    options: Options,
    create_graph: bool,
    strict: bool,
    part: Part | None,
) -> Result:
    """The parts of the answer for a sum, one summand after the other; the first one's plan serves others."""
    assert problem.summands is not None
    began = time.perf_counter()
    size = _size(question, problem, options, part)
    budget = _budget(question, problem, options, 2 * size)  # there is a summand's beside the sum
    each = replace(options, progress=False, full_output=True, memory=budget.total - size)
    plans: dict[Hashable, Plan] = {}
    first, total, passes = None, Total(create_graph), 0
    certificates: list[Certificate] = []
    with random_state_kept(), Progress(options.progress) as progress:  # data may be shuffled
        progress.expect(len(problem.summands))
        for summand in problem.summands:
            given = plans.get(summand.form, options.method)
            of_one = replace(each, method=given)
            result = _answered(question, summand.problem, of_one, create_graph, strict, part)
            total.add(summand.weight, result.value)
            plans[summand.form] = result.plan
            first, passes = first or result, passes + result.passes
            certificates += [result.certificate] if result.certificate else []
            progress.advance(chunks=1)
    assert first is not None
    parts = total.value
    seconds = time.perf_counter() - began
    worst = max(certificates, key=lambda of: of.deviation / of.bound, default=None)
    if worst is not None:
        worst = replace(worst, probes=sum(of.probes for of in certificates))
    return Result(parts, first.plan, worst, passes, seconds, problem.names, first.shapes)


def plan_for(question: Question, problem: Problem, options: Options, part: Part | None = None) -> Plan:
    """The plan for "hessian", "blocks" or "diagonal", without the answer."""
    if not problem.tensors:
        return Plan.of_nothing(question)
    if problem.summands is not None:
        with random_state_kept():
            count, first = len(problem.summands), next(iter(problem.summands))
        plan = plan_for(question, first.problem, options, part)
        return (
            replace(plan, reason=f"{plan.reason}; of the first of {count:,} batches") if count > 1 else plan
        )
    whole = _whole(question, problem, options.method, create_graph=False, part=part)
    size = _size(question, problem, options, part)
    budget = _budget(question, problem, options, size)
    with random_state_kept(), looked_at(problem, budget, True, changes=_closely(problem, options)) as look:
        meter = Meter(look.gradient, budget, size)
        check, refused = bool(options.check), _refused(whole)
        method = wanted(options.method)
        plan = choose(question, problem, meter, method, check, refused, False, part).plan
        return _with_learned(plan, look, meter)


def _size(question: Question, problem: Problem, options: Options, part: Part | None) -> int:
    """Bytes of the answer; a flat one of several tensors is joined from parts that are there beside it."""
    joined = options.flat and len(problem.tensors) > 1
    return answer_bytes(question, problem, part) * (1 + joined)


def _budget(question: Question, problem: Problem, options: Options, size: int) -> Budget:
    """The memory that may be used; raises where it does not hold an answer of this size."""
    budget = Budget(options.memory, problem.tensors[0].device)
    if size > budget.total:
        raise BudgetError(
            f"the {question} of {problem.parameters:,} coordinates takes {show(size)}, "
            f"the memory budget is {show(budget.total)}; {_LESS_THAN[question]}, or raise memory="
        )
    return budget


def _reference(check: bool | str, problem: Problem, gradient: Gradient) -> Callable[[], Reference] | None:
    """What an answer is certified by."""
    if check == "differences":
        return partial(Differences, problem, gradient)
    return partial(Autograd, problem, gradient) if check else None


_FEW = 2 * CHUNK
"""Coordinates that a few batches of products answer."""

_CERTIFIED: WeakValueDictionary[int, Plan] = WeakValueDictionary()
"""Plans whose answers were certified, by their identity, for as long as somebody has them."""


def _with_learned(plan: Plan, look: Look, meter: Meter) -> Plan:
    """A plan with what was learned."""
    again = f"; looked at again, as {look.changed}" if look.changed else ""
    sizes = meter.sizes.found or look.learned.sizes
    learned = replace(look.learned, sizes=sizes, column=meter.learned_column)
    return replace(plan, reason=plan.reason + again, learned=learned)


def _closely(problem: Problem, options: Options) -> bool:
    """May the function be evaluated more often for its structure? A few batches of products take less."""
    return options.method != "auto" or problem.parameters > _FEW


def _refused(whole: str | None) -> dict[MethodName, str]:
    """The methods that cannot be where the function is taken as a whole."""
    return {} if whole is None else dict.fromkeys(set(METHODS) - {"dense"}, whole)


def _whole(
    question: Question, problem: Problem, method: str | Plan, create_graph: bool, part: Part | None
) -> str | None:
    """Why the function is taken as a whole, without a look at its structure."""
    name = wanted(method)
    if isinstance(method, Plan):
        method.require_fit(question, problem, part)
    if create_graph:
        return "create_graph=True keeps every step on one graph"
    return "not asked for" if name == "dense" else None


_LESS_THAN = {
    "hessian": "ask for hessian_diagonal, hessian_blocks or products (hvp) instead",
    "blocks": "ask for hessian_diagonal or products (hvp) instead",
    "diagonal": "ask for fewer tensors at a time",
}
