"""Calls whose results hold elements of their argument: what is pulled back is only moved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hesse.calls.facts import Map, Point, Scales, Selecting
from hesse.calls.slopes import times
from hesse.structure import NoStructure
from hesse.tape.record import Value, leaves_of
from hesse.tape.replay import contents, require_same
from hesse.tape.samples import Samples, place_of


class Moving(Selecting):
    """A view of one argument, or a copy of one: chunks and slices, transposed, reshaped, flipped."""

    distinct = True
    """Is no element taken twice?"""

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Where its argument is live, and nothing else (what `view_as` takes a shape of, say)."""
        return cls(point) if len(point.inputs) == len(point.call.inputs) == 1 else None

    def placed(self) -> Sequence[Samples] | None:
        """Where the numbers of the samples go."""
        (value,) = self.point.inputs
        place = self.point.samples[value]
        numbers = place.numbered(value.tensor.shape).to(value.tensor.device)
        return [place_of(result, place.count) for result in self._moved(numbers)]

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Move every element to where it came from."""
        (value,) = self.point.inputs
        moved = [(c, places) for c, places in zip(columns, self._places, strict=True) if c is not None]
        shape = value.tensor.shape
        if self._order is not None:
            ((stack, _),) = moved
            permuted = stack.permute(0, *(1 + dim for dim in self._order))
            return {value: permuted.reshape(len(stack), *shape)}
        whole = moved[0][0].new_zeros(len(moved[0][0]), shape.numel())
        for stack, places in moved:
            self._put(whole, places.flatten(), stack.flatten(1))
        return {value: whole.view(-1, *shape)}

    def _put(self, whole: Tensor, places: Tensor, parts: Tensor) -> None:
        """Parts [r, n] into whole [r, all]."""
        whole.index_copy_(1, places, parts)

    def keeps(self, values: Collection[Value]) -> bool:
        """Diagonals over the result alone."""
        return len(values) == 1

    def pull_diagonal(self, core: Tensor, scales: Scales) -> tuple[Tensor, Scales]:
        """Move what is on the diagonal."""
        ((output, scale),) = scales.items()
        own = times(times(core, scale), scale).unsqueeze(0)
        ((value, moved),) = self.pull([own if v is output else None for v in self.point.outputs]).items()
        return moved.squeeze(0), {value: None}

    def pull_coordinates(self, scale: Tensor | None) -> Scales | None:
        """As they are, where the elements of a sample keep their order."""
        if not self._keeps_order:
            return None
        (value,) = self.point.inputs
        return {value: None if scale is None else self.pull([scale.unsqueeze(0)])[value][0]}

    @cached_property
    def _keeps_order(self) -> bool:
        (value,), samples = self.point.inputs, self.point.samples
        if len(self.point.outputs) > 1 or samples[value].count != samples[self.point.outputs[0]].count:
            return False
        before = samples[value].flat(self._numbers)
        return torch.equal(before, samples[self.point.outputs[0]].flat(self._places[0]))

    @cached_property
    def _order(self) -> list[int] | None:
        """The dimensions of the only result as they lie in the argument, if they are all that has changed."""
        places = self._places[0]
        order = sorted(range(places.dim()), key=lambda dim: -places.stride()[dim])
        kept = torch.equal(places.permute(order).flatten(), self._numbers.flatten())
        return order if kept else None

    @cached_property
    def _places(self) -> list[Tensor]:
        """Where in the argument the elements of every result are."""
        return [result.long() for result in self._moved(self._numbers.double())]

    def _moved(self, numbers: Tensor) -> list[Tensor]:
        """What the call makes of something of its argument's shape."""
        call = self.point.call
        results = leaves_of(call.again([numbers, *call.arguments[1:]]))
        if [r.shape for r in results] != [v.tensor.shape for v in self.point.outputs]:
            raise NoStructure(f"{call.name} made other results when it was run again")
        return results

    @cached_property
    def _numbers(self) -> Tensor:
        (value,) = self.point.inputs
        return torch.arange(value.tensor.numel(), device=value.tensor.device).view(value.tensor.shape)


class Slice(Moving):
    """An index."""

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Made of numbers and slices alone: tensors, arrays and lists may take an element twice."""
        (_, index), _ = point.call.nested(point.call.arguments)
        parts = index if isinstance(index, tuple) else (index,)
        plain = all(part is None or part is ... or type(part) in (int, slice) for part in parts)
        return super().of(point) if plain else None


class Scattered(Selecting):
    """Elements of one argument put into another one."""

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """Unless they are multiplied with what is there."""
        return None if any(isinstance(argument, str) for argument in point.call.arguments) else cls(point)


class Pooling(Moving):
    """The largest element of every window, which may be that of several: these are added up."""

    distinct = False

    def _put(self, whole: Tensor, places: Tensor, parts: Tensor) -> None:
        whole.index_add_(1, places, parts)

    def _moved(self, numbers: Tensor) -> list[Tensor]:
        return [self.point.read.pool(numbers)[0]]

    @cached_property
    def _order(self) -> list[int] | None:
        """Elements are left out."""
        return None

    @cached_property
    def _places(self) -> list[Tensor]:
        """See `Moving`: torch counts within an image."""
        call, read = self.point.call, self.point.read
        pooled, within = read.pool(contents(call, 0))
        require_same(call, [pooled])
        images = self._numbers.flatten(-read.dims)[..., :1]
        return [within + images.view(*images.shape[:-1], *(1,) * read.dims)]


@dataclass(frozen=True)
class Windows:
    """What a maximum over windows was called with.

    Attributes:
        dims: of an image.
        pool: from images to the maxima, and where in their image they are.
    """

    dims: int
    pool: Callable[[Tensor], tuple[Tensor, Tensor]]


def windows(dims: int) -> Callable[..., Windows]:
    """The reader of `max_pool1d`, `max_pool2d` or `max_pool3d`, with and without indices."""
    pool = getattr(functional, f"max_pool{dims}d_with_indices")

    def read(
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = True,
    ) -> Windows:
        """As the functions of `torch.nn.functional` have their arguments."""
        given = kernel_size, stride or None, padding, dilation, ceil_mode
        return Windows(dims, lambda images: pool(images, *given))

    return read


def adaptive_windows(dims: int) -> Callable[..., Windows]:
    """The reader of `adaptive_max_pool1d`, `adaptive_max_pool2d` or `adaptive_max_pool3d`, likewise."""
    pool = getattr(functional, f"adaptive_max_pool{dims}d_with_indices")

    def read(input: Any, output_size: Any, return_indices: bool = True) -> Windows:
        """As the functions of `torch.nn.functional` have their arguments."""
        return Windows(dims, lambda images: pool(images, output_size))

    return read
