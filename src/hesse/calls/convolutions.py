"""Convolutions as linear maps of their input: every column is an image of one large batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn import grad as gradients

from hesse.calls import layouts
from hesse.calls.facts import Map, Point
from hesse.calls.products import Product
from hesse.tape.record import Value
from hesse.tape.replay import content
from hesse.tape.samples import ONE_SAMPLE, Samples


class Convolution(Product):
    """A convolution of images [B, channels, *places] by a weight that is not live, with the samples in B."""

    thin = True
    by_factors = False

    def __init__(self, point: Point, weight: Tensor, layout: layouts.ConvolutionLayout) -> None:
        super().__init__(point)
        self._weight, self._layout = weight, layout

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Of a batch, where torch has the transposed map."""
        call = point.call
        live = [position for position, value in call.inputs.items() if value in point.inputs]
        if live != [0] or point.read is None or call.arguments[0].dim() != call.arguments[1].dim():
            return None
        weight, _, _, layout = point.read
        even = all(before == after for before, after in layout.padding)
        if layout.spread is None and not even:
            return None
        return cls(point, content(weight), layout)

    def placed(self) -> Sequence[Samples] | None:
        """As in the input, where they are images."""
        (value,) = self.point.inputs
        place = self.point.samples[value]
        return [ONE_SAMPLE if place.dim else place]

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Columns that are the same for all samples only once."""
        (stack,), (value,) = columns, self.point.inputs
        assert stack is not None
        once = stack[:, :1] if stack.stride(1) == 0 else stack
        return {value: self._pulled_images(once).expand(*stack.shape[:2], *value.tensor.shape[1:])}

    def pull_right(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """As they lie, where every image is a sample."""
        (output,) = self.point.outputs
        if len(rows) < len(output.tensor):
            return super().pull_right(rows)
        return self._pulled_images(contiguous(rows).unflatten(2, output.tensor.shape[1:])).flatten(2)

    def _pulled_images(self, images: Tensor) -> Tensor:
        """Images [*, *, channels, *places]."""
        (value,) = self.point.inputs
        pulled = self._transposed(images.flatten(0, 1), value.tensor.shape[1:])
        restored: Tensor = pulled.unflatten(0, images.shape[:2])
        return restored

    def _transposed(self, results: Tensor, shape: torch.Size) -> Tensor:
        """A batch of results, pulled back to inputs of a shape."""
        weight, kind = self._weight, self._layout
        places = len(kind.stride)
        if kind.spread is not None:  # the other way round, it is a plain convolution
            spans = [gap * (size - 1) for gap, size in zip(kind.dilation, kind.shape[2:], strict=True)]
            padding = [span - sides[0] for span, sides in zip(spans, kind.padding, strict=True)]
            found: Tensor = getattr(functional, f"conv{places}d")(
                results, weight, None, kind.spread, padding, kind.dilation, kind.groups
            )
            return found
        padding = [sides[0] for sides in kind.padding]
        found = getattr(gradients, f"conv{places}d_input")(
            (len(results), *shape), weight, results, kind.stride, padding, kind.dilation, kind.groups
        )
        return found


def contiguous(block: Tensor) -> Tensor:
    """A large block [N, f, k] in order; torch copies one transposed matrix faster than a stack of them."""
    if block.is_contiguous() or block[0].numel() < 1 << 16:
        return block
    copy = torch.empty(block.shape, dtype=block.dtype, device=block.device)
    for to, matrix in zip(copy, block, strict=True):
        to.copy_(matrix)
    return copy
