"""One evaluation of a problem with the graph of its gradient: what every product starts from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from hesse.errors import (
    HesseError,
    IndependentError,
    NotDeterministicError,
    NotTwiceDifferentiableError,
    OutputError,
)
from hesse.layers import Layer
from hesse.problem import Problem
from hesse.runtime.graph import made, nodes
from hesse.runtime.isolation import Watch, isolated
from hesse.tape.layers import layer_call, tappable
from hesse.tape.record import Call, Recorder, Value
from hesse.tape.samples import ONE_SAMPLE, Exploration, Samples


@dataclass(frozen=True)
class Gradient:
    """The gradient of a problem at its point, differentiable once more.

    Attributes:
        value: the function's value.
        leaves: the tensors that were differentiated by.
        parts: the gradient by each leaf; None where a leaf has no influence or requires no grad.
        symmetric: nothing was met that could make the derivative of the gradient asymmetric.
        layers: the layers that can be tapped, in their order.
        tape: the calls of the evaluation, where structure was looked for.
        places: where the samples are in the values of the tape, of those that have to do with them.
        apart: why a weight of a layer cannot be tapped, by its index.
    """

    value: Tensor
    leaves: tuple[Tensor, ...]
    parts: tuple[Tensor | None, ...]
    symmetric: bool
    layers: tuple[Layer, ...] = ()
    tape: Recorder | None = None
    places: Mapping[Value, Samples] = field(default_factory=dict)
    apart: Mapping[int, str] = field(default_factory=dict)

    @property
    def curved(self) -> list[int]:
        """Indices of the tensors whose gradient is not constant; all others have zero rows."""
        return [i for i, part in enumerate(self.parts) if part is not None and part.requires_grad]

    @property
    def calls(self) -> Sequence[Call]:
        """The calls on the tape."""
        return self.tape.calls if self.tape else ()

    @property
    def outputs(self) -> list[Tensor]:
        """All gradients that products start from."""
        parts = [part for i in self.curved if (part := self.parts[i]) is not None]
        return [*parts, *(layer.gradient for layer in self.layers)]

    def made(self, index: int) -> int:
        """When the gradient by a tensor was made."""
        part = self.parts[index]
        return made(None if part is None else part.grad_fn)

    @cached_property
    def first_uses(self) -> dict[int, int]:
        """When each tensor was first used, of those whose use is on the tape."""
        found: dict[int, int] = {}
        for call in self.calls:
            for value in call.inputs.values():
                if value.leaf is not None:
                    found.setdefault(value.leaf, made(call.outputs[0].edge.node))
        return found

    def product(
        self,
        vectors: Sequence[Tensor],
        rows: Sequence[int],
        columns: Sequence[int],
        create_graph: bool = False,
        last: bool = False,
    ) -> list[Tensor]:
        """Vectors times the block of these rows and columns, by one plain double backward.

        `last`: no other product will be asked for, and the graph may be freed on the way.
        """
        pairs = [
            (self.parts[i], vector)
            for i, vector in zip(rows, vectors, strict=True)
            if self.parts[i] is not None and self.parts[i].requires_grad  # type: ignore[union-attr]
        ]
        reachable = [j for j in columns if self.leaves[j].requires_grad]
        found: dict[int, Tensor | None] = {}
        if pairs and reachable:
            outputs, cotangents = zip(*pairs, strict=True)
            with errors_explained(), torch.enable_grad():
                results = torch.autograd.grad(
                    outputs,
                    [self.leaves[j] for j in reachable],
                    cotangents,
                    retain_graph=create_graph or not last,
                    create_graph=create_graph,
                    allow_unused=True,
                )
            found = dict(zip(reachable, results, strict=True))
        products = (found.get(j) for j in columns)
        return [
            torch.zeros_like(self.leaves[j]) if product is None else product
            for j, product in zip(columns, products, strict=True)
        ]

    def tapped(
        self, layers: Sequence[Layer], vectors: Sequence[Tensor], others: Sequence[Layer]
    ) -> list[Tensor]:
        """Vectors of the shapes of layers' outputs times the Hessian by the outputs of these and others."""
        with errors_explained():
            return _by_outputs([layer.gradient for layer in layers], vectors, others)

    def moved(self, layer: Layer, vector: Tensor, others: Sequence[Layer]) -> list[Tensor]:
        """A vector of the shape of a layer's input times the derivative of that by the outputs of others."""
        return _by_outputs([layer.call.input], [vector], others)


def _by_outputs(
    tensors: Sequence[Tensor], vectors: Sequence[Tensor], layers: Sequence[Layer]
) -> list[Tensor]:
    """Vectors times the derivatives of tensors by the outputs of layers, also where there is none."""
    found = torch.autograd.grad(
        tensors, [layer.call.output.edge for layer in layers], vectors, retain_graph=True, allow_unused=True
    )
    return [
        torch.zeros_like(layer.gradient) if part is None else part
        for layer, part in zip(layers, found, strict=True)
    ]


@contextmanager
def evaluated(
    problem: Problem,
    strict: bool = False,
    create_graph: bool = False,
    found: Exploration | None = None,
) -> Iterator[Gradient]:
    """Evaluate the problem and its gradient; the caller's state is put back when the block ends.

    `found`: what a first look has found. With it the calls are recorded and the gradient is taken by the
    outputs of the layers too.
    """
    with isolated(third_order=create_graph) as watch, errors_explained():
        yield _differentiate(problem, watch, strict, create_graph, found)


def evaluate(problem: Problem, leaves: tuple[Tensor, ...], watch: Watch) -> Tensor:
    """The function's value at the leaves, also where it changes its inputs in place."""
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


def require_deterministic(value: Tensor, again: Tensor) -> None:
    """Raise where two evaluations at the same point differ by more than rounding."""
    tolerance = 100 * torch.finfo(value.dtype).eps
    if not torch.allclose(value.detach(), again, rtol=tolerance, atol=0.0, equal_nan=True):
        raise NotDeterministicError(
            f"func is not deterministic: two evaluations at the same point gave {value.item():.9g} "
            f"and {again.item():.9g}. If dropout is the reason, call model.eval(); if other random "
            f"numbers are, draw them once outside, or seed them inside the function"
        )


def _differentiate(
    problem: Problem, watch: Watch, strict: bool, create_graph: bool, found: Exploration | None
) -> Gradient:
    leaves = problem.leaves(connected=create_graph)
    if strict:
        for leaf, name in zip(leaves, problem.names, strict=True):
            if not leaf.requires_grad:
                raise IndependentError(
                    f"{name} does not require grad; call {name}.requires_grad_() or use strict=False"
                )
    recorder = Recorder(leaves)
    with nullcontext() if found is None else recorder:
        value = evaluate(problem, leaves, watch)
    active = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
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
    parts: list[Tensor | None] = [None] * len(leaves)
    layers: list[Layer] = []
    apart: dict[int, str] = {}
    if value.requires_grad and active:
        samples = found.samples if found else {}
        calls = [layer for call in recorder.calls if (layer := layer_call(call)) is not None]
        if watch.nested_gradient:  # which reads the weights once more, from inside of the layers' own nodes
            apart = {call.weight: "the function takes gradients itself" for call in calls}
            calls = []
        else:
            calls, apart = tappable(calls, value, leaves)
        by: list[Any] = [*(leaves[i] for i in active), *(call.output.edge for call in calls)]
        gradients = torch.autograd.grad(value, by, create_graph=True, allow_unused=True)
        seen = {
            call: part
            for call, part in zip(calls, gradients[len(active) :], strict=True)
            if part is not None and part.requires_grad
        }
        layers = sorted(
            (Layer(call, samples.get(call.order, ONE_SAMPLE), part) for call, part in seen.items()),
            key=lambda layer: layer.call.order,
        )
        for i, part in zip(active, gradients[: len(active)], strict=True):
            parts[i] = part
            if strict and part is None:
                raise IndependentError(
                    f"{problem.names[i]} does not influence the output; leave it out or use "
                    f"strict=False, which gives zeros"
                )
    mixed = len({leaf.dtype for leaf in leaves}) > 1
    return Gradient(
        value,
        leaves,
        tuple(parts),
        not customs and not mixed,
        tuple(layers),
        None if found is None else recorder,
        _placed(recorder, found),
        apart,
    )


def _placed(recorder: Recorder, found: Exploration | None) -> dict[Value, Samples]:
    """The places of samples that a first look has found, by the values of this evaluation."""
    if found is None or len(found.places) != len(recorder.calls):
        return {}
    return {
        value: place
        for call, places in zip(recorder.calls, found.places, strict=True)
        for value, place in zip(call.outputs, places, strict=True)
        if place is not None
    }


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
