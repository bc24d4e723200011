r"""Some rows and columns of the Hessian from layer space.

Rows by weights of the layer m need the columns of M and J (see `layers`) by those outputs p of m alone that
the rows belong to. With l a layer whose weights the columns belong to,

$$H[(m,p,q),(l,o,i)] = \sum_n \sum_{s,t} M[(n,t,o),(n,s,p)]\, a_l[n,t,i]\, a_m[n,s,q] + \dots,$$

the dots being $\gamma_l J_l\, a_m$ where m is before l, and $\gamma_m J_m\, a_l$ where l is before m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from hesse.look.layer import Layer

Numbers = Mapping[int, Tensor]
"""Of coordinates, by their tensor."""


class Owned:
    """Some coordinates of the weight and bias of one layer, one tensor's behind the other's.

    Attributes:
        tensors: those that have some.
        sizes: how many each has.
        places: of each coordinate in the layer's own layout, [G, O, I]; -1 for what the layer does not use.
    """

    def __init__(self, layer: Layer, numbers: Numbers) -> None:
        self._layer = layer
        self.tensors = tuple(i for i in layer.tensors if i in numbers)
        self.sizes = [len(numbers[i]) for i in self.tensors]
        self._inputs = layer.fan_in
        shape = (layer.groups, layer.columns // layer.positions // layer.groups, self._inputs)
        marks = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device=layer.gradient.device)
        placed = layer.split(1 + marks.view(shape))
        self.places = torch.cat([placed[i].flatten()[numbers[i]].long() - 1 for i in self.tensors])

    @cached_property
    def outputs(self) -> list[int]:
        """The outputs, over all groups, that some coordinate belongs to."""
        used: list[int] = (self.places[self.places >= 0] // self._inputs).unique().tolist()
        return used

    @property
    def columns(self) -> list[int]:
        """Numbers of the columns of M for these, all positions of an output together."""
        positions = self._layer.positions
        return [o * positions + t for o in self.outputs for t in range(positions)]

    def of_output(self, output: int) -> tuple[Tensor, Tensor]:
        """Which of the coordinates belong to an output, and by which inputs."""
        own = ((self.places >= 0) & (self.places // self._inputs == output)).nonzero().squeeze(1)
        return own, self.places[own] % self._inputs

    @cached_property
    def used(self) -> tuple[Tensor, Tensor]:
        """Which of the coordinates the layer uses, and their places."""
        own = (self.places >= 0).nonzero().squeeze(1)
        return own, self.places[own]


class LayerPart:
    """A part of the Hessian between weights and biases of layers.

    Attributes:
        rows: the layers that rows belong to, with those; `columns`: those that columns belong to.
    """

    def __init__(self, layers: Sequence[Layer], rows: Numbers, columns: Numbers) -> None:
        self.rows, self.columns = (
            {layer: Owned(layer, numbers) for layer in layers if not numbers.keys().isdisjoint(layer.tensors)}
            for numbers in (rows, columns)
        )
        self._joined: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def wants(self, one: Layer, other: Layer) -> bool:
        """Is a block between two layers needed, whichever has the rows?"""
        return (one in self.rows and other in self.columns) or (other in self.rows and one in self.columns)

    def add(self, row: Layer, column: Layer, numbers: Sequence[int], M: Tensor, moved: Tensor | None) -> None:
        """Take in some columns of M by the outputs of `row`: [c, N, T, G, O], laid out by those of `column`.

        `moved`: J of the inputs of `column` by the same outputs, [c, N, T, G, I].
        """
        every = torch.tensor(numbers, device=M.device)
        outputs, positions = every // row.positions, every % row.positions
        _, places = self.columns[column].used
        for output in outputs.unique().tolist():
            own = outputs == output
            T = torch.einsum("sntgo,ntgi->nsgoi", M[own], column.a)
            if moved is not None:
                T += torch.einsum("ntgo,sntgi->nsgoi", column.gamma, moved[own])
            which, inputs = self.rows[row].of_output(output)
            a = row.a[:, positions[own], output // row.gamma.shape[3]]
            block = torch.einsum("nsq,nsf->qf", a[:, :, inputs], T.flatten(2)[:, :, places])
            self._put(row, column, which, block)

    def add_moves(self, row: Layer, column: Layer, moves: Tensor) -> None:
        """Take in J of the inputs of `row` by the outputs of `column`, a layer before it: [c, N, T, G, I]."""
        per_group = row.gamma.shape[3]
        _, places = self.columns[column].used
        for output in self.rows[row].outputs:
            gamma = row.gamma[:, :, output // per_group, output % per_group]
            which, inputs = self.rows[row].of_output(output)
            turned = torch.einsum("nt,cntq->cnq", gamma, moves[:, :, :, output // per_group, inputs])
            # Columns run over positions first.
            turned = turned.unflatten(0, (column.groups, -1, column.positions))
            block = torch.einsum("gotnq,ntgi->qgoi", turned, column.a).flatten(1)
            self._put(row, column, which, block[:, places])

    def _put(self, row: Layer, column: Layer, which: Tensor, block: Tensor) -> None:
        mine, theirs = self.rows[row], self.columns[column]
        key = mine.tensors, theirs.tensors
        if key not in self._joined:
            self._joined[key] = block.new_zeros(len(mine.places), len(theirs.places))
        own, _ = theirs.used
        self._joined[key][which[:, None], own] += block

    def blocks(self) -> dict[tuple[int, int], Tensor]:
        """The part, by the tensors of its rows and columns."""
        found: dict[tuple[int, int], Tensor] = {}
        down, across = (
            {owned.tensors: owned.sizes for owned in side.values()} for side in (self.rows, self.columns)
        )
        for (rows, columns), joined in self._joined.items():
            for i, some in zip(rows, joined.split(down[rows]), strict=True):
                for j, block in zip(columns, some.split(across[columns], 1), strict=True):
                    found[i, j] = found[i, j] + block if (i, j) in found else block
        return found
