r"""What a walker asks of a call $v = \varphi(u_1, u_2, \dots)$: two facts about it at its point.

`first` is a map: the Jacobian J, by which columns are pulled back from the results to the inputs. `second` is
a bend: the second derivative of $\langle c, \varphi \rangle$ for given adjoints c. What is here holds for any
call and is found by running it again under autograd; the table (`calls.table`) knows closed forms for most.
Calls know nothing of what walkers carry: a bend is handed over in a few plain `Piece`s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hesse.calls.diagonals import diagonal_of, enters_once, random_like, squared_rows
from hesse.calls.pieces import Piece, Whole
from hesse.calls.slopes import both, fitted, grad, slopes_against
from hesse.calls.trial import tried
from hesse.structure import NoStructure
from hesse.tape.record import Call, Value
from hesse.tape.replay import rerun
from hesse.tape.samples import Samples

Scales = dict[Value, Tensor | None]
"""What elements are multiplied by; None is one."""


@dataclass(frozen=True)
class Forecast:
    """What a bend will hand over, from shapes alone.

    Attributes:
        diagonals: the values of each diagonal.
        rank: columns of all else together.
    """

    diagonals: Sequence[Sequence[Value]] = ()
    rank: int = 0


class Point:
    """A call as a function of its live inputs, at its point.

    Attributes:
        call: the call.
        inputs: the live values among its arguments, each once.
        outputs: what it made.
        samples: where the samples are in live values.
    """

    def __init__(
        self,
        call: Call,
        inputs: Sequence[Value],
        samples: Mapping[Value, Samples],
        reader: Callable[..., Any] | None = None,
    ) -> None:
        self.call, self.inputs, self.outputs = call, list(inputs), call.outputs
        self.samples, self._reader = samples, reader

    @cached_property
    def read(self) -> Any:
        """What the reader of its row makes of its arguments."""
        return None if self._reader is None else self.call.read_by(self._reader)

    @cached_property
    def again(self) -> tuple[dict[Value, Tensor], list[Tensor]]:
        """The call once more on leaves of its own: these, and its results."""
        return rerun(self.call, self.inputs)

    @property
    def place(self) -> Samples | None:
        """Where the samples are in all live inputs; None where they are in several places."""
        places = {self.samples[value] for value in self.inputs}
        return places.pop() if len(places) == 1 else None

    def broadcast(self, value: Value) -> Samples | None:
        """Where the samples of an input are in the only result, to which it is broadcast; None: repeated."""
        place, one, other = self.samples[value], value.tensor.shape, self.outputs[0].tensor.shape
        dim = place.dim + len(other) - len(one)
        return replace(place, dim=dim) if other[dim] == one[place.dim] else None

    def shape(self, value: Value) -> torch.Size:
        """Of one sample."""
        return self.samples[value].first(value.tensor.detach()).shape[1:]

    def width(self, value: Value) -> int:
        """Coordinates of one sample."""
        return value.tensor.numel() // self.samples[value].count

    def everywhere(self, value: Value, stack: Tensor) -> Tensor:
        """A stack for one sample, the same for all."""
        batch_dim = self.samples[value]
        return batch_dim.back(stack.unsqueeze(1).expand(-1, batch_dim.count, *stack.shape[1:]), 1)

    def one_hot(self, value: Value, dtype: torch.dtype) -> Tensor:
        """The coordinates of a value as columns, [width, *value]."""
        ones = torch.eye(self.width(value), dtype=dtype, device=value.tensor.device)
        return self.everywhere(value, ones.view(-1, *self.shape(value)))


class Map:
    """The first derivative of a call: here by autograd, whatever the call."""

    linear = False
    """Is the call linear in all of its arguments together?"""
    by_numbers = False
    """May numbers of an index have a say in where samples go?"""
    by_factors = False
    """May those of a factor?"""
    thin = False
    """Is a column pulled back with far less work than its product with a dense block?"""

    def __init__(self, point: Point) -> None:
        self.point = point

    @classmethod
    def of(cls, point: Point) -> Map | None:
        """The map of a call; None where this kind of map is not that of these arguments."""
        return cls(point)

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """`Jᵀ` times stacks of columns of the outputs, [r, *output]; None is zero."""
        leaves, results = self.point.again
        pairs = [(r, c) for r, c in zip(results, columns, strict=True) if c is not None]
        made, stacks = zip(*pairs, strict=True)

        def product(*cotangents: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(
                made, list(leaves.values()), cotangents, retain_graph=True, materialize_grads=True
            )

        if len(stacks[0]) == 1:
            found = [part.unsqueeze(0) for part in product(*(stack[0] for stack in stacks))]
        else:
            found = list(torch.vmap(product)(*stacks))
        return dict(zip(leaves, found, strict=True))

    def pull_right(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """A block [N, k, f] times J, sample by sample, of one input and result; may overwrite it."""
        ((value,), (output,)) = self.point.inputs, self.point.outputs
        stack = rows.transpose(0, 1).reshape(rows.shape[1], len(rows), *self.point.shape(output))
        pulled = self.pull([self.point.samples[output].back(stack, 1)])[value]
        return self.point.samples[value].flat(pulled, 1).transpose(0, 1)

    def pull_left(self, columns: Tensor, out: Tensor | None = None) -> Tensor:
        """`Jᵀ` times a block [N, f, k], of one input and result; may overwrite it."""
        return self.pull_right(columns.transpose(1, 2)).transpose(1, 2)

    def keeps(self, values: Collection[Value]) -> bool:
        """Are diagonals over these values, the results among them, pulled back to diagonals?"""
        return False

    def pull_diagonal(self, core: Tensor, scales: Scales) -> tuple[Tensor, Scales]:
        """What it `keeps`: from `diag(s_u c s_w)` over the values of `scales` to the same over the inputs."""
        raise NotImplementedError

    def pull_coordinates(self, scale: Tensor | None) -> Scales | None:
        """From the scaled coordinates of the only result to those of every input, if they are such."""
        return None

    def spread(self) -> Iterator[tuple[Value, Tensor, int]]:
        """The parameters that are broadcast over the result and multiplied by a slope.

        Each with its slope, and how many dimensions the result has behind those of the parameter.
        """
        return iter(())

    def placed(self) -> Sequence[Samples] | None:
        """Where the samples of the live inputs, which are apart, are in every result; None: nobody knows.

        A result has them apart, or is one sample: it adds them up, or is made of some of them.
        """
        return None

    def squared(self, given: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """`(J ∘ J)ᵀ` times diagonals of the results; None is zero."""
        ones = self._pulled([torch.ones_like(v.tensor) for v in self.point.outputs])
        pulled = self._pulled(given)
        return {
            value: fitted(ones[value] * pulled[value], value)
            if self._enters_once(value, ones[value])
            else fitted(squared_rows(self.point.again[1], given, self.point.again[0][value]), value)
            for value in self.point.inputs
        }

    def _enters_once(self, value: Value, ones: Tensor) -> bool:
        if sum(v.tensor.numel() for v in self.point.outputs) == 1:
            return True
        some = [random_like(v.tensor) for v in self.point.outputs]
        return enters_once(ones, *(self._pulled(s)[value] for s in (some, [r.square() for r in some])))

    def _pulled(self, vectors: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """`Jᵀ` times one vector for each output, by autograd."""
        leaves, results = self.point.again
        made, given = both(results, vectors)
        found = torch.autograd.grad(
            made, list(leaves.values()), given, retain_graph=True, materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True))


class Bend:
    """The second derivative of a call: here by autograd, whatever the call."""

    within = False
    """Does it join no samples where the map tells where they are?"""

    def __init__(self, point: Point, first: Map) -> None:
        self.point, self.first = point, first

    @property
    def vanishes(self) -> bool:
        """Is it zero everywhere?"""
        results = self.point.again[1]
        return slopes_against(self.point.again[0], results, [torch.ones_like(r) for r in results]) is None

    def forecast(self) -> Forecast:
        """What `against` may hand over."""
        return Forecast(rank=sum(map(self.point.width, self.point.inputs)))

    def against(self, adjoints: Sequence[Tensor | None]) -> Iterator[Piece]:
        """The second derivative of `<adjoints, call>` by the inputs, in pieces; None is zero."""
        leaves, results = self.point.again
        slopes = slopes_against(leaves, results, adjoints)
        if slopes is None:
            return
        inputs, values = list(leaves.values()), list(leaves)
        if self._joins_samples(slopes, inputs):
            raise NoStructure(f"{self.point.call.name} joins samples")
        widths = [self.point.width(value) for value in values]
        seeds = torch.eye(sum(widths), dtype=inputs[0].dtype, device=inputs[0].device).split(widths, 1)
        stacks = [
            self.point.everywhere(value, seed.view(-1, *self.point.shape(value)))
            for value, seed in zip(values, seeds, strict=True)
        ]
        rows = torch.vmap(lambda *stacks: grad(slopes, inputs, stacks))(*stacks)
        flat = [self.point.samples[value].flat(row, 1) for value, row in zip(values, rows, strict=True)]
        core = torch.cat(flat, 2).transpose(0, 1)
        if bool(core.any()):
            yield Whole(dict(zip(values, widths, strict=True)), core)

    def diagonal(self, adjoints: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """The second derivatives of `<adjoints, call>` by single elements of the inputs."""
        leaves, results = self.point.again
        slopes = slopes_against(leaves, results, adjoints)
        return {
            value: fitted(diagonal_of(slope, leaf), value)
            for (value, leaf), slope in zip(leaves.items(), slopes or (), strict=False)
            if slope.requires_grad
        }

    def _joins_samples(self, slopes: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
        """Does the second derivative of a call whose result has no samples join those of its inputs?

        Scaling every sample of a vector by a factor of its own must scale every sample of the product.
        """
        point = self.point
        count = max(point.samples[v].count for v in point.inputs)
        if all(v not in point.samples or point.samples[v].count == count for v in point.outputs):
            return False
        generator = torch.Generator().manual_seed(5)
        factors = torch.rand(count, generator=generator) + 0.5
        ones, scaled = [], []
        for value, tensor in zip(point.inputs, inputs, strict=True):
            vector = torch.randn(tensor.shape, generator=generator).to(tensor)
            ones.append(vector)
            scaled.append(self._by_sample(value, vector, factors))
        before = grad(slopes, inputs, ones)
        after = grad(slopes, inputs, scaled)
        eps = torch.finfo(inputs[0].dtype).eps
        return any(
            bool((self._by_sample(v, b, factors) - a).norm() > eps**0.5 * b.norm())
            for v, b, a in zip(point.inputs, before, after, strict=True)
        )

    def _by_sample(self, value: Value, tensor: Tensor, factors: Tensor) -> Tensor:
        batch_dim = self.point.samples[value]
        return tensor if batch_dim.count < len(factors) else batch_dim.times(tensor, factors)


@dataclass(frozen=True, eq=False)
class Site:
    """A call with its two facts.

    Attributes:
        point: the call as a function of its live inputs.
        first: the map.
        second: the bend.
        listed: the table has maps for calls of its name.
    """

    point: Point
    first: Map
    second: Bend
    listed: bool

    @property
    def call(self) -> Call:
        """The call."""
        return self.point.call

    @property
    def inputs(self) -> list[Value]:
        """The live values among its arguments, each once."""
        return self.point.inputs

    @property
    def outputs(self) -> list[Value]:
        """What it made."""
        return self.point.outputs

    @property
    def samples(self) -> Mapping[Value, Samples]:
        """Where the samples are in live values."""
        return self.point.samples

    @property
    def by_autograd(self) -> bool:
        """Is nothing known of it, so that its derivatives are taken by autograd?"""
        return bool(self.inputs) and not self.listed and type(self.first) is Map


class Straight(Bend):
    """No second derivative."""

    @property
    def vanishes(self) -> bool:
        """Everywhere."""
        return True

    def forecast(self) -> Forecast:
        """Nothing."""
        return Forecast()

    def against(self, adjoints: Sequence[Tensor | None]) -> Iterator[Piece]:
        """Nothing."""
        return iter(())

    def diagonal(self, adjoints: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Nothing."""
        return {}


class Linear(Map):
    """A call that is linear in all of its arguments together, or piecewise as the largest element is."""

    linear = by_numbers = True

    def placed(self) -> Sequence[Samples] | None:
        """By a trial: numbers at random do not cancel, and what a linear map does is the same everywhere."""
        return tried(self.point.call, self.point.inputs, self.point.samples)


class Selecting(Linear):
    """A linear call whose Jacobian holds zeros and ones only, which are their own squares."""

    def squared(self, given: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """As columns are pulled back."""
        return {value: fitted(part, value) for value, part in self._pulled(given).items()}


def squared_parameters(first: Map, k: Tensor) -> dict[Value, Tensor]:
    """A diagonal of the result times the squared slopes of the parameters that are spread over it."""
    found = {}
    for parameter, slope, trailing in first.spread():
        shape = parameter.tensor.shape
        found[parameter] = (slope.square() * k).sum_to_size(*shape, *(1,) * trailing).view(shape)
    return found
