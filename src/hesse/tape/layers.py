"""See the layer calls of an evaluation: linear maps of their input by a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hesse.runtime.graph import nodes


@dataclass(frozen=True)
class LayerCall:
    """One call `z = input Wᵀ + b`.

    Attributes:
        weight: index of the weight [O, I] among the leaves.
        bias: index of the bias [O], or None.
        input: the input [..., I].
        tap: the place in the graph where z is made; to differentiate by it is to differentiate by a
            zero added to z.
        shape: the shape of z, [..., O].
    """

    weight: int
    bias: int | None
    input: Tensor
    tap: GradientEdge
    shape: torch.Size


class LayerRecorder(TorchFunctionMode):
    """Records the linear layers whose weight is one of the leaves.

    Attributes:
        calls: the calls seen.
        mixed: a call was seen that makes samples depend on each other (batch norm in training).
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self._leaves = leaves
        self._index = {id(leaf): i for i, leaf in enumerate(leaves) if leaf.requires_grad}
        self.calls: list[LayerCall] = []
        self.mixed = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is functional.linear:
            self._note_linear(result, *args, **kwargs)
        elif func is functional.batch_norm and kwargs.get("training", len(args) > 5 and args[5]):
            self.mixed = True
        return result

    def _note_linear(self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        index = self._index.get(id(weight))
        same_dtype = result.dtype == input.dtype == weight.dtype  # no autocast in between
        if index is not None and input.dim() > 1 and result.numel() and same_dtype:
            place = self._index.get(id(bias)) if bias is not None else None
            self.calls.append(
                LayerCall(index, place, input.detach(), get_gradient_edge(result), result.shape)
            )

    def tappable(self, value: Tensor) -> list[LayerCall]:
        """The calls that are the only use of their weight (and bias) on the graph of `value`."""
        if self.mixed or not self.calls:
            return []
        uses = _uses(value)

        def once(index: int) -> bool:
            edge = get_gradient_edge(self._leaves[index])
            return uses.get((edge.node, edge.output_nr)) == 1

        return [
            call if call.bias is None or once(call.bias) else replace(call, bias=None)
            for call in self.calls
            if once(call.weight)
        ]


def _uses(value: Tensor) -> Counter[tuple[Node, int]]:
    """How many places of the graph of `value` each of its tensors goes into."""
    uses: Counter[tuple[Node, int]] = Counter()
    for node in nodes([value]):
        uses.update((after, output) for after, output in node.next_functions if after is not None)
    return uses
