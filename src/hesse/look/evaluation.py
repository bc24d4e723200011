"""One evaluation of a problem, with its graph and, where structure is of interest, its calls."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from hesse.calls.weights import LayerCall, layer_call, may_be_layer
from hesse.errors import (
    HesseError,
    IndependentError,
    NotDeterministicError,
    NotTwiceDifferentiableError,
    OutputError,
    PrecisionWarning,
    warn,
)
from hesse.problem import ModelOutput, Problem, Summand
from hesse.runtime.graph import nodes, variables
from hesse.runtime.isolation import isolated
from hesse.runtime.plain import called_plainly
from hesse.runtime.random_state import random_state_kept
from hesse.runtime.total import Total
from hesse.runtime.watch import Watch
from hesse.structure import NoStructure, sought
from hesse.tape.composites import LAYERED, TakenApart
from hesse.tape.record import Call, Recorder, Value

Gradients = Sequence[Tensor | None]
"""By some tensors; None for those without influence, or that require no grad."""


@dataclass(frozen=True)
class Evaluation:
    """The function at its point, with the graph of its value.

    Attributes:
        value: the function's value.
        leaves: the tensors that it is differentiated by.
        customs: the autograd Functions written in Python that the value depends on.
        watch: what it did beside giving a value.
        seconds: what it took.
        tape: its calls, where they were recorded.
        untaped: why they were not, where that was asked for.
        output: what the model gave, up to which the function is taken for linear; None for a function that is
            taken as it is.
    """

    value: Tensor
    leaves: tuple[Tensor, ...]
    customs: Set[type]
    watch: Watch
    seconds: float
    tape: Recorder | None
    untaped: str | None = None
    output: ModelOutput | None = None

    @property
    def symmetric(self) -> bool:
        """Was nothing met that could make the derivative of the gradient asymmetric?"""
        return not self.customs and len({leaf.dtype for leaf in self.leaves}) == 1

    @cached_property
    def layers(self) -> Sequence[LayerCall]:
        """The calls of layers, in order."""
        calls = self.tape.calls if self.tape else ()
        return [layer for call in calls if (layer := layer_call(call)) is not None]

    def gradients(self, values: Sequence[Value], create_graph: bool) -> tuple[Gradients, Gradients]:
        """By each leaf, and by some values of the tape."""
        active = [i for i, leaf in enumerate(self.leaves) if leaf.requires_grad]
        if not (self.value.requires_grad and active):
            return (None,) * len(self.leaves), (None,) * len(values)
        by: list[Any] = [*(self.leaves[i] for i in active), *(value.edge for value in values)]
        found = torch.autograd.grad(
            self.value, by, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        by_leaf = dict(zip(active, found, strict=False))
        return tuple(map(by_leaf.get, range(len(self.leaves)))), found[len(active) :]


@contextmanager
def evaluated(
    problem: Problem, strict: bool = False, create_graph: bool = False, recorded: bool = False
) -> Iterator[Evaluation]:
    """Evaluate the problem to differentiate it twice; the caller's state is put back when the block ends."""
    with isolated(third_order=create_graph) as watch, errors_explained():
        leaves = problem.leaves(connected=create_graph)
        if strict:
            problem.require_grad(leaves)
        began = time.perf_counter()
        value, tape, untaped = _recorded(problem, leaves, watch) if recorded else (None, None, None)
        if value is None:
            value = evaluate(problem, leaves, watch)
        seconds = time.perf_counter() - began
        if not value.requires_grad and watch.ungraphed is not None:
            raise OutputError(
                f"func computed its result while gradients were off (first at {watch.ungraphed}): "
                f"remove torch.no_grad() or torch.inference_mode() from inside the function"
            )
        if strict and not value.requires_grad:
            raise IndependentError("the output of func does not depend on any input; use strict=False")
        customs = _custom_functions(value)
        for custom in customs:
            if _only_once(custom):
                raise NotTwiceDifferentiableError(
                    f"{custom.__name__} is marked with @once_differentiable, so its second derivative "
                    f"does not exist; write its backward in differentiable operations and drop the mark"
                )
        if customs:  # a backward inside of theirs writes gradients into leaves
            watch.keep_gradients([*leaves, *variables([value])])
        yield Evaluation(value, leaves, customs, watch, seconds, tape, untaped, _output(problem))


def value_and_gradient(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """The value and its derivative by every tensor; of a sum, one summand after the other."""
    total = Total()
    with random_state_kept():
        for summand in problem.summands or [Summand(1.0, problem, None)]:
            with evaluated(summand.problem) as evaluation:
                parts, _ = evaluation.gradients([], create_graph=False)
                value = evaluation.value.detach()
            pairs = zip(parts, problem.tensors, strict=True)
            full = [torch.zeros_like(leaf) if part is None else part for part, leaf in pairs]
            total.add(summand.weight, (value, full))
    found: tuple[Tensor, list[Tensor]] = total.value
    return found


def evaluated_plainly(problem: Problem, calls: frozenset[str]) -> Evaluation | None:
    """The same without isolation, of a function that needs none as long as it calls nothing but these."""
    leaves = problem.leaves()
    began = time.perf_counter()
    value = called_plainly(lambda: problem.evaluate_at(leaves), calls)
    if value is None:
        return None
    seconds = time.perf_counter() - began
    return Evaluation(value, leaves, frozenset(), Watch(False, ()), seconds, None, output=_output(problem))


def _output(problem: Problem) -> ModelOutput | None:
    return problem.model_output and problem.model_output.taken()


_Recorded = tuple[Tensor | None, Recorder | None, str | None]


def _recorded(problem: Problem, leaves: tuple[Tensor, ...], watch: Watch) -> _Recorded:
    """The value and its tape, or neither and the reason: what then goes wrong is the function's own doing."""
    tape = Recorder(leaves)
    try:
        with sought(), tape:
            return evaluate(problem, leaves, watch), tape, None
    except NoStructure as error:
        watch.restore()
        return None, None, str(error)


def evaluate(problem: Problem, leaves: tuple[Tensor, ...], watch: Watch) -> Tensor:
    """The function's value at the leaves, also where it changes its inputs in place."""
    with torch._C.DisableTorchFunction():  # to read an attribute is a call, which would be recorded
        watch.expect(leaves)
    with watch:
        try:
            value = problem.evaluate_at(leaves)
        except RuntimeError as error:
            # A leaf refuses to be changed in place: give the function copies.
            if problem.closure or "is being used in an in-place operation" not in str(error):
                raise
            value = problem.evaluate_at([leaf.clone() for leaf in leaves])
    if watch.fused_norm and watch.nested_gradient and not watch.third_order:
        watch.restore()
        watch.third_order = True
        return evaluate(problem, leaves, watch)
    return value


def calls_of(problem: Problem) -> Sequence[Call]:
    """The calls of an evaluation, for what can be learned from them alone."""
    with isolated() as watch, errors_explained():
        leaves = problem.leaves()
        tape = Recorder(leaves)
        with tape:
            evaluate(problem, leaves, watch)
    return tape.calls


def remark(evaluation: Evaluation) -> None:
    """Warn where the function computes in fewer digits than it was given."""
    coarse = evaluation.watch.coarse_on_the_way_to(evaluation.value)
    if coarse is not None:
        finest = min((leaf.dtype for leaf in evaluation.leaves), key=lambda dtype: torch.finfo(dtype).eps)
        digits = -math.log10(torch.finfo(coarse.dtype).eps)
        warn(
            PrecisionWarning,
            f"func is given {finest} and computes in {coarse.dtype} from its call of torch's {coarse.name} "
            f"on: second derivatives carry about {digits:.0f} digits; leave out what casts (.float(), "
            f"autocast) for more",
        )


@dataclass(frozen=True)
class Glance:
    """What an evaluation tells that nothing is kept of.

    Attributes:
        value: the function's value.
        layered: it calls what may be a layer, or hides one.
        seconds: what it took.
    """

    value: Tensor
    layered: bool
    seconds: float


def glanced(problem: Problem, create_graph: bool = False, recorded: bool = False) -> Glance:
    """Evaluate the problem for its value alone, by the calls of an evaluation that is `recorded`, or not."""
    apart = TakenApart() if recorded else nullcontext()
    with isolated(third_order=create_graph) as watch, errors_explained(), apart:
        began = time.perf_counter()
        value = evaluate(problem, problem.leaves(), watch).detach()
        seconds = time.perf_counter() - began
        layered = any(func in LAYERED or may_be_layer(func) for func in watch.called)
        return Glance(value, layered, seconds)


def require_deterministic(value: Tensor, again: Tensor) -> None:
    """Raise where two evaluations at the same point differ by more than rounding."""
    tolerance = 100 * torch.finfo(value.dtype).eps
    if not torch.allclose(value.detach(), again, rtol=tolerance, atol=0.0, equal_nan=True):
        raise NotDeterministicError(
            f"func is not deterministic: two evaluations at the same point gave {value.item():.9g} "
            f"and {again.item():.9g}. If dropout is the reason, call model.eval(); if other random "
            f"numbers are, draw them once outside, or seed them inside the function"
        )


def _custom_functions(value: Tensor) -> set[type]:
    """The autograd Functions written in Python on the graph of `value`."""
    return {
        type(node)._forward_cls  # type: ignore[attr-defined]
        for node in nodes([value])
        if isinstance(node, BackwardCFunction)
    }


def _only_once(function: type) -> bool:
    wrapper = getattr(function, "backward", None)
    code = getattr(wrapper, "__code__", None)
    return hasattr(wrapper, "__wrapped__") and code is not None and "torch" in code.co_filename


_NO_DOUBLE_BACKWARD = re.compile(r"derivative for '?(?:aten::)?(\w+?)'? is not implemented")


@contextmanager
def errors_explained() -> Iterator[None]:
    """Say which operation cannot be differentiated twice, and what helps."""
    try:
        yield
    except HesseError:
        raise
    except RuntimeError as error:  # NotImplementedError included
        message = str(error)
        missing = _NO_DOUBLE_BACKWARD.search(message)
        if missing:
            name = missing[1].strip("_").removesuffix("_backward")
            raise NotTwiceDifferentiableError(
                f"{name} has no double backward in torch, so a function that uses it has no "
                f"second derivative here; write it with other operations (torch says: {message})"
            ) from error
        if "use_reentrant" in message:
            raise NotTwiceDifferentiableError(
                "reentrant checkpointing cannot be differentiated twice; pass "
                "use_reentrant=False to torch.utils.checkpoint"
            ) from error
        raise
