"""The gradient of a problem, with a graph where products need it: what every method starts from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils import _pytree as pytree

from hesse.calls.weights import LayerCall, tappable
from hesse.errors import IndependentError
from hesse.look.evaluation import Evaluation, Gradients, errors_explained
from hesse.look.layer import Layer
from hesse.look.perturb import NOT_EXPLORED, Exploration
from hesse.probe import random_signs
from hesse.problem import Problem
from hesse.runtime.graph import made, nodes
from hesse.tape.record import Call, Recorder, Value
from hesse.tape.samples import ONE_SAMPLE, Samples


@dataclass(frozen=True)
class Gradient:
    """The gradient of a problem at its point, which can be differentiated once more.

    Its graph is made when something asks for it: a walk over the tape does not.

    Attributes:
        evaluation: the function's value with its graph.
        found: what a first look has found, with a gradient without a graph.
    """

    evaluation: Evaluation
    found: Exploration = NOT_EXPLORED

    @property
    def value(self) -> Tensor:
        """The function's value."""
        return self.evaluation.value

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that are differentiated by."""
        return self.evaluation.leaves

    @property
    def symmetric(self) -> bool:
        """Was nothing met that could make the derivative of the gradient asymmetric?"""
        return self.evaluation.symmetric

    @property
    def tape(self) -> Recorder | None:
        """The calls of the evaluation, where structure was looked for."""
        return self.evaluation.tape

    @property
    def output(self) -> Value | None:
        """Of a model that is taken for linear, on the tape; None where the function is taken as it is."""
        return None

    @cached_property
    def batch_dims(self) -> Mapping[Value, Samples]:
        """Where the samples are in the values of the tape, of those that have to do with them."""
        if len(self.found.batch_dims) != len(self.calls):
            return {}
        return {
            value: batch_dim
            for call, batch_dims in zip(self.calls, self.found.batch_dims, strict=True)
            for value, batch_dim in zip(call.outputs, batch_dims, strict=True)
            if batch_dim is not None
        }

    @property
    def plain(self) -> Gradients:
        """The gradient by each leaf, with or without its graph."""
        return self.parts if self.has_graph else self._without_graph

    @property
    def has_graph(self) -> bool:
        """Has its graph been asked for?"""
        return "_graphed" in vars(self)

    @cached_property
    def _without_graph(self) -> Gradients:
        return self.found.gradient or self.evaluation.gradients([], create_graph=False)[0]

    @property
    def parts(self) -> Gradients:
        """The gradient by each leaf, with its graph."""
        return self._graphed[0]

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers that can be tapped, in their order."""
        return self._graphed[1]

    @property
    def untappable(self) -> Mapping[int, str]:
        """Why a weight of a layer cannot be tapped, by its index."""
        return self._tappable[1]

    @cached_property
    def _tappable(self) -> tuple[Sequence[LayerCall], Mapping[int, str]]:
        calls = self.evaluation.layers
        if not calls:
            return [], {}
        if self.evaluation.watch.nested_gradient:  # which reads weights from inside of the layers' nodes
            return [], {call.weight: "the function takes gradients itself" for call in calls}
        return tappable(calls, self.value, self.leaves)

    @cached_property
    def _graphed(self) -> tuple[Gradients, Sequence[Layer]]:
        calls, _ = self._tappable
        parts, by_output = self.evaluation.gradients([call.output for call in calls], create_graph=True)
        layers = [
            Layer(call, self.found.samples.get(call.order, ONE_SAMPLE), part)
            for call, part in zip(calls, by_output, strict=True)
            if part is not None and part.requires_grad
        ]
        return parts, sorted(layers, key=lambda layer: layer.call.order)

    @cached_property
    def reached(self) -> list[int]:
        """Indices of the tensors that the value depends on."""
        found = set(nodes([self.value]))
        return [
            i
            for i, leaf in enumerate(self.leaves)
            if leaf is self.value or (leaf.requires_grad and _node(leaf) in found)
        ]

    @property
    def curved(self) -> list[int]:
        """Indices of the tensors whose gradient is not constant; all others have zero rows."""
        return [i for i, part in enumerate(self.parts) if part is not None and part.requires_grad]

    def curved_beside(self, known: Collection[int]) -> list[int]:
        """The curved ones that are not known; the graph is asked for only where others are reached."""
        return [i for i in self.curved if i not in known] if set(self.reached) - set(known) else []

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


def _node(leaf: Tensor) -> Node:
    """Where the gradient by a leaf is found in autograd's graph."""
    return get_gradient_edge(leaf).node


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


def require_influence(problem: Problem, gradient: Gradient, curved: bool) -> None:
    """Raise where a tensor has no influence on the value or, if it shall be `curved`, only a linear one."""
    for name, part in zip(problem.names, gradient.plain, strict=True):
        if part is None:
            raise IndependentError(
                f"{name} does not influence the output; leave it out or use strict=False, which gives zeros"
            )
    for i, name in enumerate(problem.names if curved else ()):
        if i not in gradient.curved:
            raise IndependentError(
                f"{name} influences the output linearly, so that the gradient by it does not depend on the "
                f"inputs; leave it out or use strict=False, which gives zeros"
            )


def roundings(gradient: Gradient) -> Iterator[dict[int, Tensor]]:
    """Shifts of the leaves, by their index, to points that are about the same in the precision of the dtype.

    Of several sizes, as what is rounded may be so much coarser than the point that it does not move at all.
    """
    signs = random_signs(gradient.leaves)
    for times in (1, 8, 64):
        yield {
            i: times * torch.finfo(leaf.dtype).eps * sign * leaf.detach()
            for i, (leaf, sign) in enumerate(zip(gradient.leaves, signs, strict=True))
        }


def on_the_graph(parts: Any, leaves: Sequence[Tensor]) -> Any:
    """The parts of an answer, however nested, with those that are constant as functions of the leaves."""
    never = torch.zeros((), dtype=torch.bool, device=leaves[0].device)
    zero = torch.stack([torch.where(never, leaf.sum().double(), 0) for leaf in leaves]).sum()
    return pytree.tree_map(lambda part: part if part.requires_grad else part + zero.to(part.dtype), parts)
