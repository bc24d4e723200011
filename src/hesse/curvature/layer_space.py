r"""From layer space to parameter space.

For one layer, `z[n,t,g,o] = sum_i W[g,o,i] a[n,t,g,i] + b[g,o]` (see `calls.weights`), let M be the Hessian
by zeros added to z. Since z is linear in W,

$$\frac{\partial^2 f}{\partial W_{goi}\,\partial W_{hpq}}
  = \sum_n \sum_{t,s} M[(n,t,g,o),(n,s,h,p)]\, a[n,t,g,i]\, a[n,s,h,q].$$

For two layers l and m, m upstream of l, the input of l moves too. With J the derivative of $a_l$ by a zero
added to $z_m$, and $\gamma_l$ the gradient by $z_l$,

$$\frac{\partial^2 f}{\partial W^l_{goi}\,\partial W^m_{hpq}}
  = \sum_n \sum_s T[n,(g,o,i),(s,h,p)]\, a_m[n,s,h,q],$$

$$T = \sum_t M[(t,g,o),(s,h,p)]\, a_l[t,g,i] + \gamma_l[t,g,o]\, J[(t,g,i),(s,h,p)].$$

A bias is the weight of one more input that is always 1. A weight used by several layers has the sum over
all pairs of them.

M and J come in *stacks of columns*: samples do not touch, so a column (s,h,p) is taken for all samples at
once and has the shape of z.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.look.layer import Form, Layer
from hesse.probe import Probe, random_signs

_TILE = 1 << 22  # elements of a block that are made at a time


class WeightDiagonals:
    """The diagonal for the weights and biases of layers, and what to check of it.

    For the check, the product of a weight's block with a direction of random signs is added up on the way:
    signs by output times signs by input, so that the direction in z-space is an outer product too.
    """

    def __init__(self, layers: Iterable[Layer], check: bool) -> None:
        self._check = check
        self._layers: dict[int, list[Layer]] = {}
        for layer in layers:
            self._layers.setdefault(layer.call.weight, []).append(layer)
        self._values: dict[int, Tensor] = {}
        self._products: dict[int, Tensor] = {}
        self._signs: dict[int, tuple[Tensor, Tensor]] = {}
        for weight, calls in self._layers.items():
            a, gamma = calls[0].a, calls[0].gamma
            self._values[weight] = a.new_zeros(*gamma.shape[2:], a.shape[3])
            self._products[weight] = torch.zeros_like(self._values[weight])
            by_output, by_input = random_signs([gamma[0, 0], a[0, 0, 0]])
            self._signs[weight] = by_output, by_input

    def wants(self, rows: Layer, columns: Layer) -> bool:
        """Only blocks within one weight."""
        return rows.call.weight == columns.call.weight

    def add(
        self,
        rows: Sequence[Layer],
        columns: Layer,
        numbers: range,
        M: Sequence[Tensor],
        J: Sequence[Tensor | None],
    ) -> None:
        """Take in columns by a layer, M [c, N, T, G, O] and J [c, N, T, G, I]; `rows`: uses of its weight."""
        weight, per_group = columns.call.weight, columns.gamma.shape[3]
        values, uses = self._values[weight].flatten(0, 1), _Uses.of(rows, J)
        o, t = columns.numbered(numbers)
        for g in range(int(o[0]) // per_group, int(o[-1]) // per_group + 1):
            own = (o // per_group == g).nonzero().squeeze(1)
            width = o[own] % per_group
            d = _joined([_of_output(some[own, :, :, g], width) for some in M], 2)
            d[:, :, columns.positions :] *= 2  # for the mirrored pairs, which are not visited
            if d.shape[2] == 1:
                found = d[:, :, 0] @ uses.a[:, 0, g].square()
            else:
                curvature = uses.curvature(d, g, own, width)
                found = torch.einsum("cni,nci->ci", curvature, columns.a[:, t[own], g])
            values.index_add_(0, o[own], found)
        if self._check:
            self._multiply(uses, columns, numbers, M)

    def _multiply(
        self,
        uses: _Uses,
        columns: Layer,
        numbers: range,
        M: Sequence[Tensor],
    ) -> None:
        """Add these columns' part of the block times the signs."""
        a, gamma, moves = uses.a, uses.gamma, uses.moves
        by_output, by_input = self._signs[columns.call.weight]
        o, t = columns.numbered(numbers)
        g = o // by_output.shape[1]
        inputs = columns.a[:, t, g]  # N, c, I
        w = (inputs @ by_input).T * by_output.flatten()[o, None]
        along = _joined([torch.einsum("cn,cntgo->ntgo", w, some) for some in M], 1)
        product = torch.einsum("ntgo,ntgi->goi", along, a)
        if len(M) > 1:  # the mirrored pairs
            signs = (a @ by_input)[..., None] * by_output
            by_use = signs.split([some.shape[2] for some in M], 1)
            column = w.new_zeros(w.shape)
            for some, part in zip(M[1:], by_use[1:], strict=True):
                column += torch.einsum("cntgo,ntgo->cn", some, part)
            if gamma is not None and moves is not None:
                product += torch.einsum("ntgo,cn,cntgi->goi", gamma, w, moves)
                column += torch.einsum("cntgi,i,ntgo,go->cn", moves, by_input, gamma, by_output)
            product.flatten(0, 1).index_add_(0, o, torch.einsum("cn,nci->ci", column, inputs))
        self._products[columns.call.weight] += product

    def blocks(self) -> dict[tuple[int, int], Tensor]:
        """The diagonal of each weight and bias, by twice the index of the leaf."""
        return {
            (i, i): part
            for w, calls in self._layers.items()
            for i, part in calls[0].split(self._values[w]).items()
        }

    def probes(self) -> list[Probe]:
        """What to compare with plain products, one for each weight; nothing without a check."""
        probes = []
        for weight, calls in self._layers.items() if self._check else ():
            by_output, by_input = self._signs[weight]
            signs = calls[0].split(by_output[..., None] * by_input)
            products = calls[0].split(self._products[weight])
            tensors = list(signs)
            probes.append(
                Probe(
                    tensors,
                    tensors,
                    list(signs.values()),
                    [products[i] for i in tensors],
                    float(self._values[weight].norm()),
                )
            )
        return probes


@dataclass(frozen=True)
class _Uses:
    """The uses of a weight from some call on, one after the other along their positions.

    Attributes:
        a: their inputs, [N, T, G, I].
        gamma: the gradients by their outputs, [N, T, G, O], of those whose inputs move; or None.
        moves: how these follow some columns, [c, N, T, G, I]; or None.
    """

    a: Tensor
    gamma: Tensor | None
    moves: Tensor | None

    @staticmethod
    def of(layers: Sequence[Layer], J: Sequence[Tensor | None]) -> _Uses:
        """Those of layers, with J of each."""
        a = _joined([layer.a for layer in layers], 1)
        moving = [layer for layer, moves in zip(layers, J, strict=True) if moves is not None]
        if not moving:
            return _Uses(a, None, None)
        moves = _joined([some for some in J if some is not None], 2)
        return _Uses(a, _joined([layer.gamma for layer in moving], 1), moves)

    def curvature(self, d: Tensor, group: int, own: Tensor, width: Tensor) -> Tensor:
        """What is to be multiplied by a column's own input: [c, N, I].

        `d` is M between each of some columns of a group and the positions of its own output, [c, N, T];
        `own`: which columns these are, `width`: the output of each.
        """
        found = torch.einsum("cnt,nti->cni", d, self.a[:, :, group])
        if self.gamma is not None and self.moves is not None:
            slope = 2 * self.gamma[:, :, group][..., width]
            found += torch.einsum("ntc,cnti->cni", slope, self.moves[own, :, :, group])
        return found


class WeightBlocks:
    """Blocks of the Hessian between the weights and biases of layers.

    `within`: only the blocks of each tensor with itself.
    """

    def __init__(self, layers: Iterable[Layer], within: bool) -> None:
        self._within = within
        layers = list(layers)
        self._layers = {layer.form: layer for layer in layers}
        self._uses = Counter(layer.form for layer in layers)
        # By form of the weights, each joined with its bias: (G O, I, H P, Q). Of a layer with itself, the
        # rows of outputs from the column's on: the rest follows by symmetry.
        self._blocks: dict[tuple[Form, Form, bool], Tensor] = {}
        self._begun: set[tuple[tuple[Form, Form, bool], int]] = set()  # columns that hold something

    def wants(self, rows: Layer, columns: Layer) -> bool:
        """All pairs, or those within one weight."""
        return not self._within or rows.call.weight == columns.call.weight

    def add(
        self,
        rows: Sequence[Layer],
        columns: Layer,
        numbers: range,
        M: Sequence[Tensor],
        J: Sequence[Tensor | None],
    ) -> None:
        """Take in columns by a layer of it and later ones: M [c, N, T, G, O] and J [c, N, T, G, I]."""
        for row, some, moves in zip(rows, M, J, strict=True):
            self._add(row, columns, numbers, some, moves)

    def _add(self, rows: Layer, columns: Layer, numbers: range, M: Tensor, J: Tensor | None) -> None:
        # A weight's block between two of its uses is kept apart: it is added with its transpose.
        key = (rows.form, columns.form, rows is not columns)
        block = self._block(key, rows, columns)
        groups, inputs = rows.a.shape[2:]
        half = rows is columns and groups == 1
        if half and self._is_made_whole(rows):
            add_own(block, rows.a[:, 0, 0], numbers, M[:, :, 0, 0])
            return
        per_group = columns.gamma.shape[3]
        for p, places, positions in columns.outputs(numbers):
            start = p if half else 0
            T = _rows(rows, M[places, ..., start:], None if J is None else J[places], start)
            a_m = columns.a[:, positions, p // per_group].flatten(0, 1)
            T = T.flatten(2).flatten(0, 1)
            block.flatten(0, 1)[start * inputs :, p].addmm_(T.T, a_m, beta=int((key, p) in self._begun))
            self._begun.add((key, p))

    def _is_made_whole(self, layer: Layer) -> bool:
        """Is a layer's own block made by `add_own`, which leaves no half to be copied?"""
        return layer.positions == 1 and self._uses[layer.form] == 1

    def _block(self, key: tuple[Form, Form, bool], rows: Layer, columns: Layer) -> Tensor:
        if key not in self._blocks:
            shapes = [(layer.gamma.shape[2:].numel(), layer.a.shape[3]) for layer in (rows, columns)]
            self._blocks[key] = rows.a.new_empty(*shapes[0], *shapes[1])
        return self._blocks[key]

    def blocks(self) -> dict[tuple[int, int], Tensor]:
        """The blocks computed, by indices of the leaves, as matrices; of (i, j) and (j, i) only one."""
        found: dict[tuple[int, int], Tensor] = {}
        while self._blocks:
            (w, x, crossed), block = self._blocks.popitem()
            own = self._layers[w]
            if not crossed and own.groups == 1 and not self._is_made_whole(own):
                mirror(block)
            for (i, j), part in self._split(block, self._layers[w], self._layers[x]).items():
                if i <= j:
                    _put(found, i, j, part)
                if crossed and i >= j:
                    _put(found, j, i, part.T)
        return {pair: part for pair, part in found.items() if not self._within or pair[0] == pair[1]}

    def probes(self) -> list[Probe]:
        """None: the blocks are checked together with all others, where they are joined."""
        return []

    def _split(self, block: Tensor, rows: Layer, columns: Layer) -> dict[tuple[int, int], Tensor]:
        block = block.unflatten(2, (columns.groups, -1)).unflatten(0, (rows.groups, -1))
        return {
            (i, j): part.permute(*range(values.dim() - 3, part.dim()), *range(values.dim() - 3)).reshape(
                -1, values.shape[3:].numel()
            )
            for j, values in columns.split(block).items()
            for i, part in rows.split(values.permute(*range(3, values.dim()), 0, 1, 2)).items()
        }


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _of_output(M: Tensor, width: Tensor) -> Tensor:
    """Of columns [c, N, T, O], each by the output of its own: [c, N, T]."""
    return M.gather(3, width.view(-1, 1, 1, 1).expand(-1, *M.shape[1:3], 1)).squeeze(3)


def _rows(layer: Layer, M: Tensor, J: Tensor | None, start: int) -> Tensor:
    """T of columns that have one output: [N, s, G, O, I]."""
    a, gamma = layer.a, layer.gamma[..., start:]
    if M.shape[0] == M.shape[2] == 1:  # no positions to sum over
        T = M[0, :, 0, :, :, None] * a[:, 0, :, None]
        if J is not None:
            T.addcmul_(gamma[:, 0, ..., None], J[0, :, 0, :, None])
        return T.unsqueeze(1)
    T = torch.einsum("sntgo,ntgi->nsgoi", M, a)
    if J is not None:
        T += torch.einsum("ntgo,sntgi->nsgoi", gamma, J)
    return T


def add_own(block: Tensor, a: Tensor, numbers: range, M: Tensor) -> None:
    """The block of a layer with one position, symmetric in its outputs and in its inputs.

    `a` is [N, I], M is [c, N, O]. Products of inputs are made once for all pairs of outputs.
    """
    outer = (a[:, :, None] * a[:, None, :]).flatten(1)
    inputs = a.shape[1]
    most = max(1, _TILE // (inputs * inputs * block.shape[0]))
    for start in range(numbers.start, numbers.stop, most):
        stop = min(start + most, numbers.stop)
        columns = torch.arange(start, stop, device=a.device)
        row, o = (columns[:, None] <= torch.arange(block.shape[0], device=a.device)).nonzero().T
        p = columns[row]
        values = (M[p - numbers.start, :, o] @ outer).view(-1, inputs, inputs)
        block[o, :, p] = values
        block[p, :, o] = values


def mirror(block: Tensor) -> None:
    """Fill in the columns of later outputs from their rows."""
    outputs, inputs = block.shape[:2]
    matrix = block.flatten(2).flatten(0, 1)
    for p in range(outputs):
        own, later = slice(p * inputs, (p + 1) * inputs), slice((p + 1) * inputs, None)
        matrix[own, later] = matrix[later, own].T


def _put(found: dict[tuple[int, int], Tensor], i: int, j: int, part: Tensor) -> None:
    found[i, j] = found[i, j] + part if (i, j) in found else part
