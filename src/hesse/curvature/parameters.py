"""The places where parameters enter: layers, and parameters that are broadcast over a result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from hesse.calls.facts import Map, Site
from hesse.calls.moving import Moving
from hesse.calls.table import site_of
from hesse.calls.weights import layer_call
from hesse.curvature.entry import Entry
from hesse.curvature.layer_space import add_own, mirror
from hesse.look.layer import Layer
from hesse.tape.record import Value
from hesse.tape.samples import Samples

Path = list[tuple[Value, Map | None]]
"""The values from where a parameter enters up to the leaf, each with the view that made it."""


class LayerEntry(Entry):
    """The weight and bias of a layer."""

    def __init__(self, layer: Layer) -> None:
        self.leaves, self.batch_dim, self.like = layer.tensors, layer.samples, layer.gradient
        outputs = layer.columns // layer.positions // layer.groups
        self.shape = torch.Size((layer.groups, outputs, layer.fan_in))
        self.size, self.positions = self.shape.numel(), layer.positions
        self._layer = layer

    def narrowed(self, numbers: range) -> LayerEntry:
        """By input and result."""
        call = replace(
            self._layer.call, input=self.batch_dim.narrow(self._layer.call.input.detach(), numbers)
        )
        like = self.batch_dim.narrow(self.like, numbers)
        return LayerEntry(Layer(call, self.batch_dim.narrowed(numbers), like))

    def gradients(self, columns: Tensor) -> Tensor:
        """Outer products of column and input, summed over positions."""
        return torch.einsum("rntgo,ntgi->rngoi", self._layer.layout(columns), self._layer.a)

    def squares(self, diagonal: Tensor) -> Tensor:
        """Squared inputs."""
        z = self._layer.layout(diagonal.unsqueeze(0)).squeeze(0)
        return torch.einsum("ntgo,ntgi->goi", z, self._layer.a.square())

    def factor(self, core: Tensor, columns: Tensor) -> Tensor:
        """By pairs of positions, where those are fewer than columns."""
        if self._layer.positions > len(columns):
            return super().factor(core, columns)
        if self._layer.positions == 1 and core.dim() == 3:
            u = self._layer.layout(columns)  # r, N, T, G, O
            by_sample = u.flatten(2).transpose(0, 1)
            # In place: to touch new memory takes as long as to multiply.
            diagonal = torch.matmul(core, by_sample).mul_(by_sample).sum(1)
            return self._by_output(diagonal.view(u.shape[1], *u.shape[3:]))
        return self.cross(columns, self._times(core, columns))

    def cross(self, left: Tensor, right: Tensor) -> Tensor:
        """Two sides by pairs of positions, where those are fewer than columns."""
        if self._layer.positions > len(left):
            return super().cross(left, right)
        one, other = self._layer.layout(left), self._layer.layout(right)
        if self._layer.positions == 1:
            return self._by_output((one * other).sum(0).squeeze(1))
        return self._by_pairs(torch.einsum("rntgo,rnsgo->ngots", one, other))

    def dense(self, core: Tensor) -> Tensor:
        """The blocks of every output by itself, over pairs of positions."""
        order = self._order.view(self._layer.positions, self._layer.groups, -1).permute(1, 2, 0)
        if self._layer.positions == 1:
            return self._by_output(core.diagonal(dim1=1, dim2=2)[:, order.squeeze(-1)])
        return self._by_pairs(core[:, order.unsqueeze(-1), order.unsqueeze(-2)])

    def _by_output(self, diagonal: Tensor) -> Tensor:
        """From the diagonals [N, G, O] for a single position."""
        return torch.einsum("ngo,ngi->goi", diagonal, self._layer.a.squeeze(1).square())

    def _by_pairs(self, pairs: Tensor) -> Tensor:
        """From the blocks [N, G, O, T, T]."""
        a = self._layer.a
        across = torch.einsum("ngots,nsgi->ngoti", pairs, a)
        return torch.einsum("ngoti,ntgi->goi", across, a)

    def work(self, rank: int) -> int:
        """By columns, or by pairs of positions."""
        positions = self._layer.positions
        pairs = 2 * self.like.numel() * positions * rank
        return 2 * self.batch_dim.count * self.size * positions * min(rank, positions) + pairs * (
            positions <= rank
        )

    def held(self, rank: int, dense: bool, unit: bool, count: int) -> int:
        """The input, and by columns or by pairs of positions."""
        a = count * self.positions * self.shape[0] * self.shape[2]
        if self.positions > rank:
            return a + super().held(rank, dense, unit, count)
        width, inputs = self.like.numel() // self.batch_dim.count, self.positions * self.shape[2]
        columns = 0 if unit else 2 * rank * width
        pairs = width * (self.positions + inputs) if self.positions > 1 else 0
        return a + count * (columns + pairs)

    def layout(self, stack: Tensor) -> Tensor:
        """By position, group and output."""
        return self._layer.layout(stack).flatten(2)

    def forward(self, direction: Tensor) -> Tensor:
        """The layer with another weight and bias."""
        return torch.einsum("ntgi,goi->ntgo", self._layer.a, direction).flatten(1)

    def backward(self, vectors: Tensor) -> Tensor:
        """Outer products with the inputs."""
        z = vectors.view(*self._layer.a.shape[:3], -1)
        return torch.einsum("ntgo,ntgi->goi", z, self._layer.a)

    def split_stack(self, stack: Tensor) -> dict[int, Tensor]:
        """The weight's, and the bias's that is joined to it."""
        return self._layer.split(stack)

    def within(self, curvature: Tensor) -> Tensor:
        """For one output after another: its positions meet the input, then those of outputs from it on."""
        a, (groups, outputs, inputs) = self._layer.a, self.shape
        block = curvature.new_empty(groups * outputs, inputs, groups * outputs, inputs)
        if groups == self.positions == 1:
            add_own(block, a[:, 0, 0], range(outputs), curvature.transpose(0, 1))
            return block.view(self.size, self.size)
        by_position = curvature.unflatten(2, (-1, groups, outputs)).unflatten(1, (-1, groups * outputs))
        for o in range(groups * outputs):
            start = o if groups == 1 else 0
            moved = torch.einsum("ntshp,nti->nishp", by_position[:, :, o, ..., start:], a[:, :, o // outputs])
            block[start:, :, o] = torch.einsum("nishp,nshq->hpqi", moved, a).flatten(0, 1)
        if groups == 1:
            mirror(block)
        return block.view(self.size, self.size)

    def within_diagonal(self, diagonal: Tensor) -> Tensor:
        """A block for every output by itself."""
        z, a = self._layer.layout(diagonal.unsqueeze(0)).squeeze(0), self._layer.a
        blocks = (
            torch.einsum("nto,nti,ntj->oij", z[:, :, g], a[:, :, g], a[:, :, g]) for g in range(z.shape[2])
        )
        joined: Tensor = torch.block_diag(*(own for block in blocks for own in block))
        return joined


class Spread(Entry):
    """A parameter that is broadcast over the result and multiplied by a slope: scale, shift, positions."""

    def __init__(self, leaf: int, path: Path, batch_dim: Samples, slope: Tensor, trailing: int) -> None:
        """`trailing`: dimensions of the result after those of the parameter."""
        self.leaves = [leaf]
        self._leaf, self._path, self._trailing = leaf, path, trailing
        self.batch_dim, self.like, self.size = batch_dim, slope, path[0][0].tensor.numel()
        own = list(path[0][0].tensor.shape)
        shape = [1] * (slope.dim() - len(own) - trailing) + own + [1] * trailing
        if batch_dim.count > 1:
            kept = batch_dim.outer == batch_dim.inner == 1
            shape[batch_dim.dim : batch_dim.dim + 1] = [] if kept else [1, 1]
        self.shape = torch.Size(shape)
        self.positions = max(1, slope.numel() // batch_dim.count // self.size)
        self._slope = batch_dim.first(slope)

    def narrowed(self, numbers: range) -> Spread:
        """By the slope."""
        slope = self.batch_dim.narrow(self.like, numbers)
        return Spread(self._leaf, self._path, self.batch_dim.narrowed(numbers), slope, self._trailing)

    def gradients(self, columns: Tensor) -> Tensor:
        """Summed over all that the parameter is broadcast over but the samples."""
        spread = self.batch_dim.first(columns, 1) * self._slope
        return spread.sum_to_size(*spread.shape[:2], *self.shape)

    def squares(self, diagonal: Tensor) -> Tensor:
        """Elements that share a coordinate are only added up."""
        return (self.batch_dim.first(diagonal) * self._slope.square()).sum_to_size(1, *self.shape).squeeze(0)

    def dense(self, core: Tensor) -> Tensor:
        """The blocks of every coordinate, over pairs of the elements that it is broadcast over."""
        pairs = core[:, self._shared.unsqueeze(2), self._shared.unsqueeze(1)]
        slope = self._slope.reshape(len(core), -1)[:, self._shared]
        return torch.einsum("nwab,nwa,nwb->w", pairs, slope, slope).view(self.shape)

    @cached_property
    def _shared(self) -> Tensor:
        """For every coordinate, its elements in one sample: [w, m]."""
        rest = self._slope.shape[1:]
        own = [d for d, size in enumerate(self.shape) if size > 1]
        over = [d for d, size in enumerate(self.shape) if size == 1]
        numbers = torch.arange(rest.numel(), device=self._slope.device).view(rest)
        count = torch.Size(self.shape).numel()
        return numbers.permute(*own, *over).reshape(count, -1)

    def layout(self, stack: Tensor) -> Tensor:
        """As they lie."""
        return self.batch_dim.flat(stack, 1)

    def forward(self, direction: Tensor) -> Tensor:
        """Broadcast, and times the slope."""
        return (self._slope * direction).reshape(len(self._slope), -1)

    def backward(self, vectors: Tensor) -> Tensor:
        """Times the slope, and summed."""
        return (vectors.view(self._slope.shape) * self._slope).sum_to_size(1, *self.shape).squeeze(0)

    def split_stack(self, stack: Tensor) -> dict[int, Tensor]:
        """Through the views that the parameter entered by, backwards."""
        found = stack.reshape(-1, *self._path[0][0].tensor.shape)
        for _, view in self._path:
            if view is not None:
                (found,) = view.pull([found]).values()
        return {self._leaf: found}

    def within(self, curvature: Tensor) -> Tensor:
        """By the derivative of the result, coordinate by coordinate."""
        ones = torch.eye(self.size, dtype=curvature.dtype, device=curvature.device)
        columns = torch.stack([self.forward(one) for one in ones.view(-1, *self.shape)], 1)  # N, w, f
        block: Tensor = torch.einsum("nwf,nvf->wv", columns @ curvature, columns)
        return block

    def within_diagonal(self, diagonal: Tensor) -> Tensor:
        """Coordinates do not meet."""
        return self.squares(diagonal).flatten().diag()


def entries(site: Site, uses: Mapping[Value, int]) -> Iterator[Entry]:
    """Where parameters that have no other uses enter a call."""
    if len(site.outputs) != 1 or site.outputs[0] not in site.samples:
        return
    (output,) = site.outputs
    batch_dim = site.samples[output]

    def path(value: Value) -> tuple[int, Path] | None:
        found = _path(value)
        return found if found is not None and all(uses[held] == 1 for held, _ in found[1]) else None

    layer = layer_call(site.call)
    if layer is not None:
        weight = path(layer.through)
        if weight is not None and batch_dim.dim < output.tensor.dim() - layer.layout.own[1]:
            shared = any(uses[v] > 1 for v in site.call.inputs.values() if v.leaf == layer.bias)
            layer = replace(layer, bias=None) if shared else layer
            yield LayerEntry(Layer(layer, batch_dim, output.tensor.detach()))
    else:
        for parameter, slope, trailing in site.first.spread():
            entering = path(parameter)
            at = batch_dim.dim - output.tensor.dim() + trailing + parameter.tensor.dim()
            one_each = batch_dim.count > 1 and at >= 0 and parameter.tensor.shape[at] > 1
            if entering is not None and not one_each:
                yield Spread(*entering, batch_dim, slope, trailing)


def _path(value: Value) -> tuple[int, Path] | None:
    """The leaf that a value is, or is a view of."""
    path: Path = []
    while value.leaf is None:
        call = value.source
        if call is None or len(call.outputs) > 1 or len(call.inputs) > 1:
            return None
        (held,) = call.inputs.values()
        view = site_of(call, [held], {}).first
        if not isinstance(view, Moving) or not view.distinct:
            return None
        path.append((value, view))
        value = held
    return value.leaf, [*path, (value, None)]
