"""The plan: which method answers a question, and what it will take."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hesse.cost import Cost, Meter, total
from hesse.errors import ArgumentError
from hesse.gradient import Gradient
from hesse.layers import Layer
from hesse.methods import dense, taps
from hesse.problem import Problem
from hesse.runtime.memory import show

METHODS = ("dense", "taps")


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

    def by(self, method: str) -> frozenset[int]:
        """Indices of the tensors that a method answers."""
        return frozenset(i for i, share in enumerate(self.shares) if share.method == method)

    def require_fit(self, question: str, problem: Problem) -> None:
        """Raise where the plan was made for another question or other tensors."""
        if question != self.question:
            raise ArgumentError(
                f"method is a plan for the {self.question}, met the {question}; make one with "
                f"hesse.plan({question!r}, ...)"
            )
        planned = [(share.shape, share.dtype) for share in self.shares]
        if planned != [(tensor.shape, tensor.dtype) for tensor in problem.tensors]:
            raise ArgumentError(
                "method is a plan for tensors of other shapes or dtypes; make a new one with hesse.plan"
            )

    def __str__(self) -> str:
        """A table of the methods, the choice, and the tensors."""
        count = sum(share.shape.numel() for share in self.shares)
        lines = [
            f"{self.question} of {count:,} coordinates in {len(self.shares)} tensors; "
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
        products = "product" if self.check_passes == 1 else "products"
        lines += [
            "",
            *textwrap.wrap(
                f"{self.method}: {self.reason}; the check takes {self.check_passes} {products}", 98
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
    workspace: int,
    check: bool,
    whole: str | None = None,
) -> Plan:
    """Compare the methods and choose; nothing is differentiated twice.

    Args:
        question: "hessian", "blocks" or "diagonal".
        problem: the problem.
        meter: holds its gradient.
        method: what the caller asked for.
        workspace: bytes that the answer's making may use beside the answer.
        check: count the check.
        whole: why the function has to be taken as a whole, or None.
    """
    name = wanted(method)
    gradient = meter.gradient
    size = answer_bytes(question, problem)
    plain = dense.costs(question, gradient, meter, workspace)
    checks = {"dense": _check(question, gradient, meter, list(plain)) if check else Cost()}
    ways: dict[str, tuple[Cost, list[Layer]]] = {"dense": (total(plain.values()), [])}

    why_not, layers = taps.usable(question, gradient)
    if whole or name == "dense":
        why_not, layers = whole or "not asked for", []
    elif isinstance(method, Plan):
        layers = [layer for layer in layers if layer.call.weight in method.by("taps")]
        missing = method.by("taps") - {i for layer in layers for i in layer.tensors}
        if missing:
            raise ArgumentError(
                f"method is a plan that takes {problem.names[min(missing)]} by taps, but it is no weight of "
                f"a layer here ({why_not or 'or is used elsewhere too'}); make a new plan with hesse.plan"
            )
    elif layers:
        layers = _paying(question, layers, plain, meter)
        why_not = None if layers else "one product per coordinate is as fast for every layer"
    if layers and not why_not:
        tapped = {i for layer in layers for i in layer.tensors}
        rest = [cost for i, cost in plain.items() if i not in tapped]
        ways["taps"] = taps.cost(question, layers, meter) + total(rest), layers
        joined = {layer.call.weight for layer in layers} if question == "diagonal" else tapped
        pieces = [*joined, *(i for i in plain if i not in tapped)]
        checks["taps"] = _check(question, gradient, meter, pieces) if check else Cost()

    def seconds(way: str) -> float:
        return ways[way][0].seconds + checks[way].seconds

    best = min(ways, key=seconds)
    if name in METHODS:
        best = name if name in ways else "dense"
    cost, layers = ways[best]
    return Plan(
        question=question,
        method=best,
        reason=_reason(best, layers, problem, plain, why_not),
        passes=cost.passes,
        check_passes=checks[best].passes,
        flops=cost.flops,
        peak_bytes=size + cost.bytes,
        answer_bytes=size,
        seconds=seconds(best),
        estimates=tuple(
            Estimate(way, None, c.passes, c.flops, size + c.bytes, seconds(way))
            if (c := ways[way][0] if way in ways else None)
            else Estimate(way, why_not)
            for way in METHODS
        ),
        shares=tuple(_shares(problem, gradient, layers, whole)),
    )


def _paying(question: str, layers: Sequence[Layer], plain: Mapping[int, Cost], meter: Meter) -> list[Layer]:
    """The layers for whose weights taps take less time than one product per coordinate."""
    kept = list(layers)
    for weight in dict.fromkeys(layer.call.weight for layer in layers):
        own = [layer for layer in kept if layer.call.weight == weight]
        others = [layer for layer in kept if layer.call.weight != weight]
        dense_seconds = sum(
            plain[i].seconds for i in {i for layer in own for i in layer.tensors} & set(plain)
        )
        if taps.cost(question, own, meter, beside=others).seconds > dense_seconds:
            kept = others
    return kept


def _check(question: str, gradient: Gradient, meter: Meter, pieces: Sequence[int]) -> Cost:
    """One product for the full Hessian, otherwise one for every piece that is computed by itself."""
    if question == "hessian":
        pieces = pieces[:1]
    return total(meter.products(1, 0, gradient.made(i), 0, limit=1) for i in pieces)


def _reason(
    best: str, layers: Sequence[Layer], problem: Problem, plain: Mapping[int, Cost], why_not: str | None
) -> str:
    if best == "dense":
        tail = f" ({why_not})" if why_not else ""
        return f"one product per coordinate, right for any function{tail}"
    tapped = {i for layer in layers for i in layer.tensors}
    coordinates = sum(problem.sizes[i] for i in tapped)
    rest = sum(problem.sizes[i] for i in plain if i not in tapped)
    other = f"; the other {rest:,} coordinates take one each" if rest else ""
    uses = "layer" if len(layers) == 1 else "layers"
    return (
        f"{len(layers)} {uses} with {coordinates:,} coordinates take one product per output and position"
        f"{other}"
    )


def _shares(
    problem: Problem, gradient: Gradient, layers: Sequence[Layer], whole: str | None
) -> Iterator[Share]:
    tapped: dict[int, list[Layer]] = {}
    for layer in layers:
        for i in layer.tensors:
            tapped.setdefault(i, []).append(layer)
    tappable = {i for layer in gradient.layers for i in layer.tensors}
    for i, (name, tensor) in enumerate(zip(problem.names, problem.tensors, strict=True)):
        method = "taps" if i in tapped else "dense"
        if i in tapped:
            columns, call = sum(layer.columns for layer in tapped[i]), tapped[i][0].call
            role = "weight" if i == call.weight else "bias"
            times = f" used {len(tapped[i])} times" if len(tapped[i]) > 1 else ""
            why = f"{role} of {call.name}{times}: {columns:,} columns instead of {tensor.numel():,}"
        elif i not in gradient.curved:
            method, why = "zero", "the function is linear in it, or does not depend on it"
        elif whole:
            why = whole
        elif i in tappable:
            why = "a product per coordinate is as fast"
        else:
            why = gradient.apart.get(i, "no weight of a layer")
        yield Share(name, tensor.shape, tensor.dtype, method, why)


def answer_bytes(question: str, problem: Problem) -> int:
    """Memory of the answer."""
    widths = [tensor.dtype.itemsize for tensor in problem.tensors]
    sizes = problem.sizes
    row = sum(size * width for size, width in zip(sizes, widths, strict=True))
    if question == "hessian":
        return sum(sizes) * row
    if question == "blocks":
        return sum(size * size * width for size, width in zip(sizes, widths, strict=True))
    return row
