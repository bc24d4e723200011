"""The choice between methods: what each of them offers, and the one that takes the least time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hesse.errors import ArgumentError
from hesse.look.meter import Cost, Meter, total
from hesse.methods import METHODS
from hesse.methods.base import Applicable, Ask, MethodName, Offer, Question, Refused, Run
from hesse.planning.plan import Estimate, Plan, Share
from hesse.problem import Problem
from hesse.selection import Part
from hesse.structure import NoStructure, sought

ASKED = "as asked"
_FAR = 20  # times as long as another way, and
_LONG = 10  # seconds: what takes so much longer needs no closer look


@dataclass(frozen=True)
class Choice:
    """A plan, and how the tensors of its method are answered."""

    plan: Plan
    run: Run


def resumed(problem: Problem, meter: Meter, plan: Plan, part: Part | None) -> Choice:
    """A plan that was given back, of a function that looks the same."""
    ask = Ask(plan.asked, problem, meter, plan.by(plan.method), part, plan.chunk)
    return Choice(plan, METHODS[plan.method].run_of(ask))


def wanted(method: str | Plan) -> str:
    """The name of the method that is asked for, or "auto"; raises where there is none of that name."""
    name = method.method if isinstance(method, Plan) else method
    if name != "auto" and name not in METHODS:
        raise ArgumentError(
            f'method must be "auto", a Plan or one of {", ".join(map(repr, METHODS))}, met {method!r}'
        )
    return name


def choose(
    question: Question,
    problem: Problem,
    meter: Meter,
    method: str,
    check: bool,
    refused: Mapping[MethodName, str] | None = None,
    brief: bool = False,
    part: Part | None = None,
) -> Choice:
    """Compare the methods and choose; nothing is differentiated twice.

    Args:
        question: "hessian", "blocks" or "diagonal".
        problem: the problem.
        meter: holds its gradient, and what may be used.
        method: what the caller asked for.
        check: count the check.
        refused: methods that are out of the question, and why.
        brief: do not look into methods that could hardly save the time of the look.
        part: of a Hessian, the rows and columns.
    """
    ask = Ask(question, problem, meter, part=part)
    offers, settled = _offers(ask, method, refused or {}, brief)
    applicable = {way: offer for way, offer in offers.items() if isinstance(offer, Applicable)}
    checks = {way: _check(ask, offer) if check else Cost() for way, offer in applicable.items()}
    seconds = {
        way: (meter.preparation + offer.cost + checks[way]).seconds for way, offer in applicable.items()
    }
    # Only where the choice is settled, the gradient's graph is not there.
    fitting = [
        way for way, offer in applicable.items() if settled or offer.cost.bytes <= meter.workspace
    ] or ["dense"]
    # A method that is asked for and does not apply gives way to the best that does.
    best = method if method in applicable else min(fitting, key=lambda way: seconds[way])
    chosen, size = applicable[best], answer_bytes(question, problem, part)
    plan = Plan(
        question=question,
        method=best,
        reason=chosen.reason + (_why_dense(method, offers, question) if best == "dense" else ""),
        passes=chosen.cost.passes,
        check_passes=checks[best].passes,
        flops=chosen.cost.flops,
        peak_bytes=size + chosen.cost.bytes,
        answer_bytes=size,
        seconds=seconds[best],
        estimates=tuple(_estimate(way, offers[way], size, seconds) for way in METHODS),
        shares=tuple(_shares(ask, best, applicable, wish=ASKED if method == "dense" else "")),
        part=None if part is None else part.size,
        chunk=chosen.chunk,
    )
    return Choice(plan, chosen.run)


def _offers(
    ask: Ask, method: str, refused: Mapping[MethodName, str], brief: bool
) -> tuple[dict[MethodName, Offer], bool]:
    """What the methods offer, and whether the choice is settled without a look at products."""
    found: dict[MethodName, Offer] = {}
    settled = False
    for other in METHODS:
        if other in refused:
            found[other] = Refused(refused[other])
        elif settled and method == "auto" and brief:
            found[other] = Refused("not looked into: it could hardly save the time of the look")
        elif settled and method == "auto":
            found[other] = Refused(_hopeless(ask.meter))
        elif settled or (method not in ("auto", "sweep", other) and other != "dense"):
            found[other] = Refused("not asked for")
        else:
            found[other] = _offer(other, ask)
        if method in ("auto", other):
            settled |= _settles(found[other], ask.meter, method == other, brief)
    return found, settled


def _offer(name: MethodName, ask: Ask) -> Offer:
    """What a method offers, or why it does not apply."""
    if name == "dense":  # which needs no structure
        return METHODS[name].offer(ask)
    try:
        with sought():
            return METHODS[name].offer(ask)
    except NoStructure as error:
        return Refused(str(error))


def _hopeless(meter: Meter) -> str:
    """Why a method is not looked into that takes a graph of the gradient."""
    return f"not looked into: its products take {meter.products_lower_bound.seconds:.2g} s at least"


def _settles(offer: Offer, meter: Meter, asked: bool, brief: bool) -> bool:
    """Does a method answer everything without products, and asked for, or so fast that those do not matter?

    In about the time that was spent already, or in less than they take in any case; where it is not to be
    `brief`, in far less.
    """
    if not isinstance(offer, Applicable) or offer.cost.passes:
        return False
    seconds = offer.cost.seconds
    if not brief:
        far = meter.products_lower_bound.seconds > max(_FAR * seconds, _LONG)
        return far and offer.cost.bytes <= meter.left
    return asked or (
        offer.cost.bytes <= meter.left
        and (seconds < 2 * meter.preparation.seconds or seconds < meter.products_lower_bound.seconds)
    )


def _why_dense(name: str, offers: Mapping[MethodName, Offer], question: Question) -> str:
    """Why there is nothing better than products, in brackets."""
    if name == "dense":
        return f" ({ASKED})"
    # The sweep's refusal of a full Hessian is no reason, unless the sweep was asked for.
    able = [way for way in offers if way == name or question != "hessian" or way != "sweep"]
    order = sorted(able, key=lambda way: way != name)
    reasons = (offer.why for way in order if isinstance(offer := offers[way], Refused))
    first = next(reasons, "")
    return f" ({first})" if first else ""


def _estimate(way: MethodName, offer: Offer, size: int, seconds: Mapping[MethodName, float]) -> Estimate:
    if isinstance(offer, Refused):
        return Estimate(way, offer.why)
    cost = offer.cost
    return Estimate(way, None, cost.passes, cost.flops, size + cost.bytes, seconds[way])


def _check(ask: Ask, offer: Applicable) -> Cost:
    """One product for the full Hessian, otherwise one for every piece that is computed by itself."""
    pieces: Sequence[int] = offer.pieces[:1] if ask.question == "hessian" else offer.pieces
    if ask.gradient.has_graph:
        return total(ask.meter.products(1, 0, ask.gradient.made(i), 0, limit=1) for i in pieces)
    return total(ask.meter.product_at_least for _ in pieces)


def _shares(
    ask: Ask, best: MethodName, applicable: Mapping[MethodName, Applicable], wish: str
) -> Iterator[Share]:
    """How every tensor is answered."""
    chosen, problem = applicable[best], ask.problem
    others = ask.gradient.curved_beside(chosen.shares)
    slower = {i: f"takes less than by {way}" for way, offer in applicable.items() for i in offer.shares}
    asked = range(len(problem.tensors)) if ask.part is None else ask.part.tensors
    for i, (name, tensor) in enumerate(zip(problem.names, problem.tensors, strict=True)):
        if i not in asked:
            method, why = "none", "not asked for"
        elif i in chosen.shares:
            method, why = best, chosen.shares[i]
        elif i not in others:
            method, why = "zero", "the function is linear in it, or does not depend on it"
        else:
            reasons = (
                wish,
                chosen.left.get(i),
                ask.gradient.untappable.get(i),
                slower.get(i),
                "no weight of a layer",
            )
            method, why = "dense", next(filter(None, reasons))
        yield Share(name, tensor.shape, tensor.dtype, method, why)


def answer_bytes(question: Question, problem: Problem, part: Part | None = None) -> int:
    """Memory of the answer."""
    if part is not None:
        columns = part.columns.chosen
        return part.rows.count * sum(
            len(c.numbers) * problem.tensors[c.tensor].dtype.itemsize for c in columns
        )
    widths = [tensor.dtype.itemsize for tensor in problem.tensors]
    sizes = problem.sizes
    row = sum(size * width for size, width in zip(sizes, widths, strict=True))
    if question == "hessian":
        return sum(sizes) * row
    if question == "blocks":
        return sum(size * size * width for size, width in zip(sizes, widths, strict=True))
    return row
