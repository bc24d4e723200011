"""The plan: which method answers a question, and what it will take."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass

import torch

from hesse.curvature.layer_space import Layer
from hesse.curvature.parameters import Entry
from hesse.errors import ArgumentError
from hesse.look.gradient import Gradient
from hesse.look.meter import Cost, Meter, total
from hesse.methods import dense
from hesse.methods.base import Option
from hesse.methods.sweep import cost as sweep_cost
from hesse.methods.sweep import route as sweep_route
from hesse.methods.taps import run as taps
from hesse.planning.parts import dense_part, taps_part
from hesse.problem import Problem
from hesse.runtime.memory import show
from hesse.selection import Part
from hesse.structure import NoStructure, sought

METHODS = ("sweep", "taps", "dense")
ASKED = "as asked"


@dataclass(frozen=True)
class Estimate:
    """What one method would take for the whole question.

    Attributes:
        method: its name.
        why_not: why it cannot answer, or None.
        passes: Hessian-vector products (or backward passes that cost as much), without the check.
        flops: floating-point operations.
        peak_bytes: memory beside the graph of the gradient, the answer included.
        seconds: predicted time, the check included.
    """

    method: str
    why_not: str | None = None
    passes: int = 0
    flops: float = 0.0
    peak_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Share:
    """One tensor's part in a plan.

    Attributes:
        name: what the tensor is called.
        shape: its shape.
        dtype: its dtype.
        method: the method for its coordinates.
        why: why not a faster one, or how it enters.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    method: str
    why: str


@dataclass(frozen=True)
class Plan:
    """The method chosen for a problem, and what every method would take.

    A plan is plain data. Given back as `method=plan` it fixes the method of every tensor. It is valid
    for the same question about a problem with the same number of tensors of the same shapes and dtypes;
    the values may be others. Whatever the plan says, the result is certified.

    Attributes:
        question: "hessian", "blocks" or "diagonal" (a trace is the sum of a diagonal).
        method: the method's name; a faster method may leave some tensors to "dense", see `shares`.
        reason: why this method.
        passes: Hessian-vector products it takes, without the check.
        check_passes: products that the check takes.
        flops: floating-point operations, without the check.
        peak_bytes: memory beside the graph of the gradient, the answer included.
        answer_bytes: memory of the answer.
        seconds: predicted time, scaled by the time of one gradient of this function.
        estimates: the same for every method.
        shares: the method of every tensor.
        part: how many rows and columns of a Hessian are asked for, if not all.
    """

    question: str
    method: str
    reason: str
    passes: int
    check_passes: int
    flops: float
    peak_bytes: int
    answer_bytes: int
    seconds: float
    estimates: tuple[Estimate, ...]
    shares: tuple[Share, ...]
    part: tuple[int, int] | None = None

    def by(self, method: str) -> frozenset[int]:
        """Indices of the tensors that a method answers."""
        return frozenset(i for i, share in enumerate(self.shares) if share.method == method)

    def require_fit(self, question: str, problem: Problem, part: Part | None = None) -> None:
        """Raise where the plan was made for another question or part of it, or for other tensors."""
        if question != self.question:
            raise ArgumentError(
                f"method is a plan for the {self.question}, met the {question}; make one with "
                f"hesse.plan({question!r}, ...)"
            )
        if self.part != (None if part is None else part.size):
            what = "all" if self.part is None else "{:,} rows and {:,} columns".format(*self.part)
            raise ArgumentError(
                f"method is a plan for {what} of the hessian; make one with hesse.plan, with the same rows "
                f"and columns"
            )
        planned = [(share.shape, share.dtype) for share in self.shares]
        if planned != [(tensor.shape, tensor.dtype) for tensor in problem.tensors]:
            raise ArgumentError(
                "method is a plan for tensors of other shapes or dtypes; make a new one with hesse.plan"
            )

    def __str__(self) -> str:
        """A table of the methods, the choice, and the tensors."""
        count = sum(share.shape.numel() for share in self.shares)
        some = "" if self.part is None else "{:,} rows and {:,} columns of the ".format(*self.part)
        lines = [
            f"{some}{self.question} of {count:,} coordinates in {counted(len(self.shares), 'tensor')}; "
            f"the answer takes {show(self.answer_bytes)}",
            "",
            _METHOD_ROW.format("method", "passes", "FLOPs", "peak memory", "seconds"),
        ]
        for e in self.estimates:
            mark = "* " if e.method == self.method else "  "
            if e.why_not:
                lines.append(f"{mark}{e.method:<8} {e.why_not}")
            else:
                cells = f"{e.passes:,}", f"{e.flops:.2g}", show(e.peak_bytes), f"{e.seconds:.2g}"
                lines.append(mark + _METHOD_ROW.format(e.method, *cells).strip())
        lines += [
            "",
            *textwrap.wrap(
                f"{self.method}: {self.reason}; the check takes {counted(self.check_passes, 'product')}", 98
            ),
            "",
        ]
        width = max((len(share.name) for share in self.shares), default=0)
        shapes = [str(list(share.shape)) for share in self.shares]
        across = max(map(len, shapes), default=0)
        lines += [
            f"  {share.name:<{width}}  {shape:<{across}}  {share.method:<6} {share.why}"
            for share, shape in zip(self.shares, shapes, strict=True)
        ]
        return "\n".join(line.rstrip() for line in lines)


def counted(number: int, thing: str) -> str:
    """A number of things."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


_METHOD_ROW = "  {:<8} {:>12} {:>10} {:>12} {:>9}"


def wanted(method: str | Plan) -> str:
    """The name of the method that is asked for; raises where there is none of that name."""
    name = method.method if isinstance(method, Plan) else method
    if name != "auto" and name not in METHODS:
        raise ArgumentError(
            f'method must be "auto", a Plan or one of {", ".join(map(repr, METHODS))}, met {method!r}'
        )
    return name


def make(
    question: str,
    problem: Problem,
    meter: Meter,
    method: str | Plan,
    check: bool,
    refused: Mapping[str, str] | None = None,
    brief: bool = False,
    part: Part | None = None,
) -> Plan:
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
    name = wanted(method)
    gradient = meter.gradient
    size = answer_bytes(question, problem, part)
    found: dict[str, Option | str] = dict(refused or {})
    settled = False
    for other in METHODS:
        if other not in found:
            sought = name in ("auto", "sweep", other) or other == "dense"
            planned = method.by(other) if isinstance(method, Plan) else None
            if settled and name == "auto":
                found[other] = "not looked into: it could hardly save the time of the look"
            elif sought and not settled:
                found[other] = _option(other, question, problem, meter, planned, part)
            else:
                found[other] = "not asked for"
        if brief and name in ("auto", other):
            settled |= _settles(found[other], meter, asked=name == other)
    options = {way: option for way, option in found.items() if isinstance(option, Option)}
    if isinstance(method, Plan):
        missing = method.by(name) - options[name].shares.keys() if name in options else method.by(name)
        if missing and name != "dense":
            raise ArgumentError(
                f"method is a plan that takes {problem.names[min(missing)]} by {name}, which does not apply "
                f"({found[name] if name not in options else 'it is used in another way'}); make a new plan "
                f"with hesse.plan"
            )
    checks = {way: _check(question, meter, option) if check else Cost() for way, option in options.items()}
    seconds = {
        way: (meter.preparation + option.cost + checks[way]).seconds for way, option in options.items()
    }
    # Only where the choice is settled, the gradient's graph is not there.
    fitting = [way for way in options if settled or options[way].cost.bytes <= meter.workspace] or ["dense"]
    # A method that is asked for and does not apply gives way to the best that does.
    best = name if name in options else min(fitting, key=seconds.__getitem__)
    chosen = options[best]
    able = [way for way in found if way == name or question != "hessian" or way != "sweep"]
    refusals = [found[way] for way in (name, *able) if isinstance(found.get(way), str) and way != "dense"]
    without = ASKED if name == "dense" else next(iter(refusals), "")
    return Plan(
        question=question,
        method=best,
        reason=chosen.reason + (f" ({without})" if best == "dense" and without else ""),
        passes=chosen.cost.passes,
        check_passes=checks[best].passes,
        flops=chosen.cost.flops,
        peak_bytes=size + chosen.cost.bytes,
        answer_bytes=size,
        seconds=seconds[best],
        estimates=tuple(
            Estimate(way, None, o.cost.passes, o.cost.flops, size + o.cost.bytes, seconds[way])
            if isinstance(o := found[way], Option)
            else Estimate(way, o)
            for way in METHODS
        ),
        shares=tuple(
            _shares(problem, gradient, chosen, options.values(), ASKED if name == "dense" else "", part)
        ),
        part=None if part is None else part.size,
    )


def _option(
    name: str,
    question: str,
    problem: Problem,
    meter: Meter,
    planned: Collection[int] | None,
    part: Part | None,
) -> Option | str:
    """What a method offers, or why it does not apply."""
    if name == "dense":
        return _dense(question, problem, meter) if part is None else dense_part(part, meter)
    try:
        with sought():
            if name == "taps" and part is not None:
                return taps_part(part, problem, meter, planned)
            return (_sweep if name == "sweep" else _taps)(question, problem, meter, planned)
    except NoStructure as error:
        return str(error)


def _settles(option: Option | str, meter: Meter, asked: bool) -> bool:
    """Does a method answer everything without products, and asked for, or so fast that those do not matter?

    In about the time that was spent already, or in less than they take in any case.
    """
    if not isinstance(option, Option) or option.cost.passes:
        return False
    seconds = option.cost.seconds
    return asked or (
        option.cost.bytes <= meter.left
        and (seconds < 4 * meter.preparation.seconds or seconds < taps.least(meter).seconds)
    )


def _dense(question: str, problem: Problem, meter: Meter) -> Option:
    costs = dense.costs(question, meter, meter.workspace)
    return Option(
        "dense", total(costs.values()), {}, list(costs), "one product per coordinate, right for any function"
    )


def _taps(question: str, problem: Problem, meter: Meter, planned: Collection[int] | None) -> Option | str:
    why_not, layers = taps.usable(question, meter.gradient)
    if why_not:
        return meter.gradient.found.why_not or why_not
    beside = dense.costs(question, meter, meter.workspace, joined=True)
    if planned is None:
        layers = _paying(question, layers, beside, meter)
    else:
        layers = [layer for layer in layers if layer.call.weight in planned]
    if not layers:
        return "one product per coordinate is as fast for every layer"
    uses: dict[int, list[Layer]] = {}
    for layer in layers:
        for i in layer.tensors:
            uses.setdefault(i, []).append(layer)
    joined = {layer.call.weight for layer in layers} if question == "diagonal" else set(uses)
    return Option(
        "taps",
        taps.cost(question, layers, meter) + total(cost for i, cost in beside.items() if i not in uses),
        {i: _by_taps(i, those, problem.sizes[i]) for i, those in uses.items()},
        [*joined, *(i for i in beside if i not in uses)],
        f"{counted(len(layers), 'layer')} with {sum(problem.sizes[i] for i in uses):,} coordinates take one "
        f"product per output and "
        f"position{_others(problem, beside, uses)}",
        {i: "a product per coordinate is as fast" for layer in meter.gradient.layers for i in layer.tensors},
    )


def _by_taps(index: int, uses: Sequence[Layer], size: int) -> str:
    call, columns = uses[0].call, sum(layer.columns for layer in uses)
    times = f" used {len(uses)} times" if len(uses) > 1 else ""
    role = "weight" if index == call.weight else "bias"
    return f"{role} of {call.name}{times}: {counted(columns, 'column')} instead of {size:,}"


def _paying(question: str, layers: Sequence[Layer], beside: Mapping[int, Cost], meter: Meter) -> list[Layer]:
    """The layers for whose weights taps take less time than one product per coordinate."""
    kept = list(layers)
    for own in taps.together(layers):
        others = [layer for layer in kept if layer not in own]
        rows = {i for layer in own for i in layer.tensors} & beside.keys()
        if taps.cost(question, own, meter, beside=others).seconds > total(beside[i] for i in rows).seconds:
            kept = others
    return kept


def _sweep(question: str, problem: Problem, meter: Meter, planned: Collection[int] | None) -> Option | str:
    gradient = meter.gradient
    if question == "hessian":
        return "gives diagonals and blocks, not the full Hessian"
    if gradient.found.touching:
        return f"samples touch after {gradient.found.touching}"
    if gradient.tape is None or not gradient.places:
        return gradient.found.why_not or "no samples were found that do not touch"
    walk = _walk(question, meter, planned)
    way = walk.way
    covered = way.covered if planned is None else way.covered & set(planned)
    beside: Mapping[int, Cost] = {}
    if not covered.issuperset(gradient.reached):
        costs = dense.costs(question, meter, meter.workspace)
        beside = {i: cost for i, cost in costs.items() if i not in covered}
    pieces = [
        *(entry.leaves[0] for entry in way.probed(covered)),
        *(leaves[0] for leaves in walk.live),
        *beside,
    ]
    if question == "blocks":
        pieces = [*covered, *beside]
    unknown = f", {', '.join(walk.taken.unknown)} by autograd" if walk.taken.unknown else ""
    chunks = f", in {walk.taken.chunks} chunks of {walk.taken.size} samples" if walk.taken.chunks > 1 else ""
    return Option(
        "sweep",
        walk.cost + total(beside.values()),
        {
            i: "carried along the way" if i in way.live else "read from the curvature on the way"
            for i in covered
        },
        pieces,
        f"one walk back over {counted(len(way.steps), 'call')}{unknown}{chunks}, without products"
        f"{_others(problem, beside, covered)}",
        dict.fromkeys(
            beside, "enters several times or not linearly; products take less than carrying it along"
        ),
    )


@dataclass(frozen=True)
class _Walk:
    """A sweep, and what it takes: for the leaves that it keeps alive, and altogether."""

    way: sweep_route.Route
    taken: sweep_cost.Cost
    live: Mapping[tuple[int, ...], Cost]
    cost: Cost


def _walk(question: str, meter: Meter, planned: Collection[int] | None) -> _Walk:
    """The sweep that keeps those leaves alive for which that takes less than products, in what is left."""
    walk = _walked(question, meter, frozenset(meter.gradient.reached if planned is None else planned))
    while planned is None:
        losing = [leaves for leaves, cost in walk.live.items() if cost.seconds > _products(meter, leaves)]
        if not losing and walk.live and walk.cost.bytes > meter.room:
            without = walk.cost.bytes - sum(cost.bytes for cost in walk.live.values())
            largest = max(walk.live, key=lambda leaves: walk.live[leaves].bytes)
            losing = [largest] if without <= meter.room else [*walk.live]  # then chunks of samples may fit
        if not losing:
            break
        walk = _walked(question, meter, walk.way.live.difference(*losing))
    if planned is None and walk.live:
        with suppress(NoStructure):
            short = _walked(question, meter, frozenset())
            beside = sum(_products(meter, leaves) for leaves in walk.live)
            walk = min(walk, short, key=lambda w: w.cost.seconds + beside * (w is short))
    return walk


def _walked(question: str, meter: Meter, live: Set[int]) -> _Walk:
    gradient = meter.gradient
    assert gradient.tape is not None
    way = sweep_route.route(gradient.tape, gradient.value, gradient.places, live)
    taken = sweep_cost.cost(way, meter.room, blocks=question == "blocks")
    width = gradient.value.element_size()
    kept = {
        leaves: meter.arithmetic(work.operations, work.moved * width, work.held * width, work.calls)
        for leaves, work in taken.live.items()
    }
    cost = meter.walk(taken.calls, taken.pulls, taken.flops, taken.peak_bytes)
    if question == "blocks":
        cost = cost + total(_matrix(entry, meter, taken.chunks) for entry in way.entries)
    return _Walk(way, taken, kept, cost + total(kept.values()))


def _products(meter: Meter, leaves: Sequence[int]) -> float:
    """Seconds of one product per coordinate, which is about twice a pass over the function's graph."""
    gradient = meter.gradient
    return 2 * sum(
        meter.least(gradient.leaves[i].numel(), gradient.first_uses.get(i, 0)).seconds for i in leaves
    )


def _matrix(entry: Entry, meter: Meter, chunks: int) -> Cost:
    """What it takes to make a block of what was read on the way, with its parameters joined."""
    count, width = entry.place.count, entry.like.element_size()
    again = 8 * entry.like.numel() * entry.size * (entry.positions > 1)
    moved = width * (6 * chunks * entry.size**2 + again)
    calls = chunks * 8 * entry.like.numel() // count // entry.positions
    return meter.arithmetic(2 * count * entry.positions * entry.size**2, moved, calls=calls)


def _others(problem: Problem, beside: Mapping[int, Cost], taken: Collection[int]) -> str:
    rest = sum(problem.sizes[i] for i in beside if i not in taken)
    return f"; the other {rest:,} coordinates take one product each" if rest else ""


def _check(question: str, meter: Meter, option: Option) -> Cost:
    """One product for the full Hessian, otherwise one for every piece that is computed by itself."""
    pieces = option.pieces[:1] if question == "hessian" else option.pieces
    return total(meter.products(1, 0, meter.gradient.made(i), 0, limit=1) for i in pieces)


def _shares(
    problem: Problem,
    gradient: Gradient,
    chosen: Option,
    options: Collection[Option],
    wish: str,
    part: Part | None,
) -> Iterator[Share]:
    others = gradient.curved_beside(chosen.shares)
    slower = {i: f"takes less than by {option.method}" for option in options for i in option.shares}
    asked = range(len(problem.tensors)) if part is None else part.tensors
    for i, (name, tensor) in enumerate(zip(problem.names, problem.tensors, strict=True)):
        if i not in asked:
            method, why = "none", "not asked for"
        elif i in chosen.shares:
            method, why = chosen.method, chosen.shares[i]
        elif i not in others:
            method, why = "zero", "the function is linear in it, or does not depend on it"
        else:
            reasons = wish, chosen.left.get(i), gradient.apart.get(i), slower.get(i), "no weight of a layer"
            method, why = "dense", next(filter(None, reasons))
        yield Share(name, tensor.shape, tensor.dtype, method, why)


def answer_bytes(question: str, problem: Problem, part: Part | None = None) -> int:
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
