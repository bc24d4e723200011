r"""The Gauss-Newton matrix in place of the Hessian: the model is taken for linear, the loss for what it is.

With z the model's output, J its derivative by the tensors and L the loss, it is
$G = J^T\, (\partial^2 L/\partial z^2)\, J$ (Schraudolph, 2002). Its products are three backward passes over
the graph of one evaluation: $J^T u$ is linear in u, so that its derivative by u along v is $J v$.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hesse.calls.weights import LayerCall
from hesse.look.evaluation import Evaluation, Gradients, errors_explained
from hesse.look.gradient import Gradient
from hesse.look.layer import Layer
from hesse.look.perturb import NOT_EXPLORED, Exploration
from hesse.structure import NoStructure
from hesse.tape.record import Value


def gradient_of(evaluation: Evaluation, found: Exploration = NOT_EXPLORED) -> Gradient:
    """What products start from: those of the Hessian, or of the Gauss-Newton matrix."""
    return (Gradient if evaluation.output is None else GaussNewton)(evaluation, found)


@dataclass(frozen=True)
class GaussNewton(Gradient):
    """The products of the Gauss-Newton matrix.

    The gradient's parts are $J^T u$ for a u that is zero: what they depend on is what has products.
    """

    @property
    def output(self) -> Value:
        """The model's output on the tape."""
        assert self.evaluation.output is not None
        edge = self.evaluation.output.edge
        for call in self.calls:
            for value in call.outputs:
                if edge is not None and value.edge[:2] == edge[:2]:
                    return value
        raise NoStructure("the output of the model was made by no call that can be seen")

    @cached_property
    def _tappable(self) -> tuple[Sequence[LayerCall], dict[int, str]]:
        return [], {}

    @cached_property
    def _graphed(self) -> tuple[Gradients, Sequence[Layer]]:
        return self._pulled[1], []

    @cached_property
    def _pulled(self) -> tuple[Tensor | None, Gradients]:
        """A vector u like the output, and $J^T u$ by each leaf."""
        output = self.evaluation.output
        assert output is not None
        active = [i for i, leaf in enumerate(self.leaves) if leaf.requires_grad]
        if output.edge is None or not active or self._by_output is None:
            return None, (None,) * len(self.leaves)
        assert output.like is not None
        u = torch.zeros_like(output.like, requires_grad=True)
        leaves = [self.leaves[i] for i in active]
        with errors_explained(), torch.enable_grad():
            found = torch.autograd.grad([output.edge], leaves, [u], create_graph=True, allow_unused=True)
        by_leaf = dict(zip(active, found, strict=True))
        return u, tuple(map(by_leaf.get, range(len(self.leaves))))

    @cached_property
    def _by_output(self) -> Tensor | None:
        """The derivative of the loss by the output; None where it is constant."""
        output = self.evaluation.output
        if output is None or output.edge is None or not self.value.requires_grad:
            return None
        with errors_explained(), torch.enable_grad():
            (found,) = torch.autograd.grad(
                [self.value], [output.edge], retain_graph=True, create_graph=True, allow_unused=True
            )
        return found if found is not None and found.requires_grad else None

    def product(
        self,
        vectors: Sequence[Tensor],
        rows: Sequence[int],
        columns: Sequence[int],
        create_graph: bool = False,
        last: bool = False,
    ) -> list[Tensor]:
        """Vectors times the block of these rows and columns, by three backward passes."""
        u, pulled = self._pulled
        output, slope = self.evaluation.output, self._by_output
        pairs = [(part, v) for i, v in zip(rows, vectors, strict=True) if (part := pulled[i]) is not None]
        reachable = [j for j in columns if pulled[j] is not None]
        found: dict[int, Tensor] = {}
        if u is not None and slope is not None and output is not None and pairs and reachable:
            assert output.edge is not None
            parts, cotangents = zip(*pairs, strict=True)
            keep = {
                "retain_graph": create_graph or not last,
                "create_graph": create_graph,
                "materialize_grads": True,
            }
            with errors_explained(), torch.enable_grad():
                (pushed,) = torch.autograd.grad(parts, [u], cotangents, **keep)
                (bent,) = torch.autograd.grad([slope], [output.edge], [pushed], **keep)
                leaves = [self.leaves[j] for j in reachable]
                results = torch.autograd.grad([output.edge], leaves, [bent], **keep)
            found = dict(zip(reachable, results, strict=True))
        return [found[j] if j in found else torch.zeros_like(self.leaves[j]) for j in columns]
