r"""Weights of linear layers that are used several times: live leaves with a row for every output and input.

Where the uses of a weight have fewer outputs and inputs than it has coordinates, the walk keeps for every use
that it has met the rows of M, the curvature by its outputs, and of J, the derivative of its inputs, by the
values that are alive (`hesse.curvature.layer_space`). With $\gamma$ the adjoint of a use t and s any
before it, all have

$$\frac{\partial^2 f}{\partial W_{oi}\,\partial W_{pq}} = \sum_t M_{to,tp}\, a_{ti}\, a_{tq}
  + \sum_{s < t} \bigl( M_{to,sp}\, a_{ti} + \gamma_{to}\, J_{ti,sp} \bigr)\, a_{sq} + \dots,$$

the dots being the last sum with (o, i) and (p, q) exchanged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hesse.curvature.columns import Unit
from hesse.curvature.layer_space import WeightBlocks
from hesse.curvature.parameters import LayerEntry
from hesse.curvature.total import Curvature
from hesse.look.layer import Layer
from hesse.methods.sweep.carried.live import Adjoints, Ahead, LiveLeaf, Strand
from hesse.methods.sweep.carried.uses import LayerUse
from hesse.probe import Probe, random_signs
from hesse.tape.record import Value


class LayerRows(Strand):
    """Of one use: a row of M for every output and, if other uses move its input, of J for every input."""

    def __init__(self, layer: Layer, entry: LayerEntry) -> None:
        super().__init__()
        self.layer, self.entry = layer, entry

    def begin(self, use: LayerUse, curvature: Curvature, ahead: Ahead) -> None:
        """Take the curvature by the outputs, while they are alive."""
        (z,), input = use.site.outputs, use.input
        outputs = curvature.frame.stack(z, Unit(), self.layer.columns)
        self.add(curvature.along({z: outputs}, ahead))
        if input is not None and ahead(input):
            inputs = self.layer.input_seeds(range(self.layer.inputs))
            self.by.setdefault(input, outputs.new_zeros(len(outputs), *input.tensor.shape))
            for value, rows in self.by.items():
                more = inputs if value is input else inputs.new_zeros(len(inputs), *value.tensor.shape)
                self.by[value] = torch.cat([rows, more])

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as those of M, [T, O, *rest], and of J, [T, I, *rest]; no I where nothing moves the input."""
        positions, outputs = self.layer.positions, self.layer.columns
        M, J = rows.split([outputs, len(rows) - outputs])
        shapes = [(positions, len(part) // positions) for part in (M, J)]
        return M.unflatten(0, shapes[0]), J.unflatten(0, shapes[1])


class Joined(Layer):
    """Uses of one weight as one layer, their positions one behind the other."""

    def __init__(self, uses: Sequence[Layer]) -> None:
        super().__init__(uses[0].call, uses[0].samples, uses[0].gradient)
        self.a = torch.cat([layer.a for layer in uses], 1)
        self.gamma = torch.cat([layer.gamma for layer in uses], 1)


class ByOutputs(LiveLeaf):
    """A weight, perhaps with its bias, that enters nothing but linear layers of one form."""

    strands: list[LayerRows]

    def __init__(self) -> None:
        self.strands = []

    def enter(self, use: LayerUse, curvature: Curvature, adjoints: Adjoints, ahead: Ahead) -> None:
        """See `LiveLeaf`."""
        (adjoint,), (z,) = adjoints, use.site.outputs
        layer = Layer(use.layer, use.samples, torch.zeros_like(z.tensor) if adjoint is None else adjoint)
        now = LayerRows(layer, LayerEntry(layer))
        self.add(now, curvature, z)
        met = [(strand, strand.by[z]) for strand in self.strands if z in strand.by]
        if met:
            self.add_pairs(met, now)
        now.begin(use, curvature, ahead)
        if now.by:
            self.strands.append(now)

    @abstractmethod
    def add(self, now: LayerRows, curvature: Curvature, z: Value) -> None:
        """What the curvature by the outputs z of one use adds."""

    @abstractmethod
    def add_pairs(self, met: Sequence[tuple[LayerRows, Tensor]], now: LayerRows) -> None:
        """What the uses that were met add, by their rows at the outputs of the one that is now."""


class DiagonalByOutputs(ByOutputs):
    """Its diagonal, and for a check the product of its block with random signs."""

    def __init__(self, use: LayerUse, check: bool) -> None:
        super().__init__()
        entry = LayerEntry(Layer(use.layer, use.samples, use.site.outputs[0].tensor.detach()))
        self._split = entry.split
        self._own, self._product = entry.like.new_zeros(2, *entry.shape)
        (self._signs,) = random_signs([self._own])
        self._check = check

    def add(self, now: LayerRows, curvature: Curvature, z: Value) -> None:
        """See `ByOutputs`."""
        block = curvature.at(z)
        self._own += now.entry.diagonal(block)
        if self._check:
            self._product += now.entry.product(block, self._signs)

    def add_pairs(self, met: Sequence[tuple[LayerRows, Tensor]], now: LayerRows) -> None:
        """See `ByOutputs`."""
        for strand, rows in met:
            self._add_diagonal(strand, now.layer, rows)
            if self._check:
                self._add_product(strand, now.entry, rows)

    def _add_diagonal(self, met: LayerRows, layer: Layer, rows: Tensor) -> None:
        """Twice the pair."""
        M, J = met.split(layer.layout(rows).squeeze(3))  # T, O or I, N, S, O
        M, inputs = M.diagonal(dim1=1, dim2=4), J.shape[1]
        a, gamma, by = met.layer.a.squeeze(2), met.layer.gamma.squeeze(2), layer.a.squeeze(2)
        if met.layer.positions == 1:  # einsum goes from left to right
            self._own += 2 * torch.einsum("nti,nsi,tnso->oi", a, by, M)
        else:
            self._own += 2 * torch.einsum("tnso,nti,nsi->oi", M, a, by)
        self._own[..., :inputs] += 2 * torch.einsum("tinso,nto,nsi->oi", J, gamma, by[..., :inputs])

    def _add_product(self, met: LayerRows, entry: LayerEntry, rows: Tensor) -> None:
        """The pair and its transpose."""
        rows, gamma = entry.layout(rows), met.layer.gamma.squeeze(2)
        M, J = met.split(torch.einsum("rnf,nf->rn", rows, entry.forward(self._signs)))
        inputs = J.shape[1]
        self._product += met.entry.backward(M.flatten(0, 1).T)
        self._product[..., :inputs] += torch.einsum("nto,tin->oi", gamma, J)
        moved = torch.einsum("nto,oi->tin", gamma, self._signs[0, :, :inputs])
        signed = torch.cat([met.entry.forward(self._signs).T, moved.flatten(0, 1)])
        self._product += entry.backward(torch.einsum("rnf,rn->nf", rows, signed))

    def parts(self) -> dict[int, Tensor]:
        """See `LiveLeaf`."""
        return self._split(self._own)

    def probes(self) -> list[Probe]:
        """See `LiveLeaf`."""
        if not self._check:
            return []
        signs, product = self._split(self._signs), self._split(self._product)
        tensors, norm = list(signs), float(self._own.norm())
        return [Probe(tensors, tensors, list(signs.values()), [product[i] for i in tensors], norm)]


class MatrixByOutputs(ByOutputs):
    """The blocks of weight and bias, each with itself."""

    def __init__(self, use: LayerUse, check: bool) -> None:
        """`check`: is made where the blocks are joined with others."""
        super().__init__()
        layer = Layer(use.layer, use.samples, use.site.outputs[0].tensor.detach())
        self._sum = WeightBlocks([layer] * 2, within=True)  # twice, as blocks of single uses are not added up

    def add(self, now: LayerRows, curvature: Curvature, z: Value) -> None:
        """See `ByOutputs`."""
        units = curvature.frame.stack(z, Unit(), now.layer.columns)
        rows = curvature.along({z: units}, lambda value: value is z).get(z, torch.zeros_like(units))
        M, _ = self._columns(now, now.layer, rows)
        self._sum.add([now.layer], now.layer, range(now.layer.columns), [M], [None])

    def add_pairs(self, met: Sequence[tuple[LayerRows, Tensor]], now: LayerRows) -> None:
        """See `ByOutputs`; all that were met as one layer."""
        parts = [self._columns(strand, now.layer, rows) for strand, rows in met]
        M, J = (torch.cat(those, 2) for those in zip(*parts, strict=True))
        rows = Joined([strand.layer for strand, _ in met])
        self._sum.add([rows], now.layer, range(now.layer.columns), [M], [J])

    def _columns(self, met: LayerRows, layer: Layer, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of M and J as columns by the outputs of a layer: [c, N, T, G, O] and [c, N, T, G, I]."""
        columns = layer.jacobian(layer, rows)  # c, N, rows
        M, J = columns.split([met.layer.columns, columns.shape[2] - met.layer.columns], 2)
        if not J.shape[2]:
            J = columns.new_zeros(*columns.shape[:2], met.layer.inputs)
        return M.unflatten(2, (met.layer.positions, 1, -1)), met.layer.jacobian_columns(J)

    def parts(self) -> dict[int, Tensor]:
        """See `LiveLeaf`."""
        return {i: part for (i, _), part in self._sum.blocks().items()}
