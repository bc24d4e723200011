"""One call by itself: its vector-Jacobian product for a stack of columns, and its curvature.

`local(call, ...)` picks the class by the table of calls. What the table does not know is differentiated
by running that one call again on detached inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hesse.calls.table import TABLE, Kind, canonical, kind_of
from hesse.curvature.terms import Diagonal, Factor, Term, Unit
from hesse.runtime.watch import writes_to_first
from hesse.structure import NoStructure
from hesse.tape.record import Call, Value, leaves_of
from hesse.tape.samples import Samples

Added = tuple[Sequence[Sequence[Value]], int]
"""The values of each diagonal term, and the number of all other columns."""


class Local:
    """A call as a function of its live inputs, whatever it is.

    Attributes:
        inputs: the live values among its arguments, each once.
        outputs: what it made.
        kind: its row of the table.
    """

    thin = False
    """Is a column pulled back with far less work than its product with a dense block?"""

    def __init__(self, call: Call, inputs: Sequence[Value], samples: Mapping[Value, Samples]) -> None:
        self.call = call
        self.inputs = list(inputs)
        self.outputs = call.outputs
        self.samples = samples
        self.kind = kind_of(call)

    def keeps(self, values: Collection[Value]) -> bool:
        """Is a diagonal term of these values, pulled through this call, still a diagonal one?"""
        return self.kind is Kind.VIEW and len(values) == 1 and len(self.inputs) == 1

    def pull_unit(self, unit: Unit) -> dict[Value, Unit] | None:
        """The coordinates of the only result, pulled back to all inputs, if they are coordinates there."""
        return None

    @property
    def unknown(self) -> bool:
        """Is the call in no table, so that its derivatives are taken by autograd?"""
        return type(self) is Local and canonical(self.call.name) not in TABLE

    def added(self) -> Added:
        """What `curvature` may add, from shapes alone."""
        linear = self.kind in (Kind.VIEW, Kind.LINEAR)
        return (), 0 if linear else sum(self._width(value) for value in self.inputs)

    def spread(self) -> Iterator[tuple[Value, Tensor, int]]:
        """The parameters that are broadcast over the result and multiplied by a slope.

        Each with its slope, and how many dimensions the result has behind those of the parameter.
        """
        return iter(())

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Stacks of columns of the outputs, pulled back to the inputs; None is zero."""
        leaves, results = self._again
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
        """A block [N, k, f] times the Jacobian of the only result, sample by sample; may overwrite it."""
        ((value,), (output,)) = self.inputs, self.outputs
        stack = rows.transpose(0, 1).reshape(rows.shape[1], len(rows), *self._shape(output))
        pulled = self.pull([self.samples[output].back(stack, 1)])[value]
        return self.samples[value].flat(pulled, 1).transpose(0, 1)

    def pull_left(self, columns: Tensor, out: Tensor | None = None) -> Tensor:
        """The transposed Jacobian times a block [N, f, k], likewise."""
        return self.pull_right(columns.transpose(1, 2)).transpose(1, 2)

    def pull_diagonal(self, term: Diagonal) -> Diagonal:
        """A term that it `keeps`, pulled back."""
        columns = [term.own(v).unsqueeze(0) if v in term.scales else None for v in self.outputs]
        ((value, core),) = self.pull(columns).items()
        return Diagonal(core.squeeze(0), {value: None})

    def curvature(self, adjoints: Sequence[Tensor | None]) -> Iterator[Term]:
        """The second derivative of `<adjoints, call>` by the inputs, as terms."""
        if self.kind in (Kind.VIEW, Kind.LINEAR):
            return
        leaves, results = self._again
        slopes = self._slopes(leaves, results, adjoints)
        if slopes is None:
            return
        inputs = list(leaves.values())
        if self._joins_samples(slopes, inputs):
            raise NoStructure(f"{self.call.name} joins samples")
        widths = [self._width(value) for value in leaves]
        seeds = torch.eye(sum(widths), dtype=inputs[0].dtype, device=inputs[0].device).split(widths, 1)
        stacks = [
            self._everywhere(value, seed.view(-1, *self._shape(value)))
            for value, seed in zip(leaves, seeds, strict=True)
        ]
        rows = torch.vmap(lambda *stacks: grad(slopes, inputs, stacks))(*stacks)
        flat = [self.samples[value].flat(row, 1) for value, row in zip(leaves, rows, strict=True)]
        core = torch.cat(flat, 2).transpose(0, 1)
        if bool(core.any()):
            starts = [sum(widths[:i]) for i in range(len(widths))]
            yield Factor(core, {v: Unit(start) for v, start in zip(leaves, starts, strict=True)})

    def _joins_samples(self, slopes: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
        """Does the curvature of a call whose result has no samples join those of its inputs?

        Scaling every sample of a vector by a factor of its own must scale every sample of the product.
        """
        count = max(self.samples[v].count for v in self.inputs)
        if all(v not in self.samples or self.samples[v].count == count for v in self.outputs):
            return False
        generator = torch.Generator().manual_seed(5)
        factors = torch.rand(count, generator=generator) + 0.5
        ones, scaled = [], []
        for value, tensor in zip(self.inputs, inputs, strict=True):
            vector = torch.randn(tensor.shape, generator=generator).to(tensor)
            ones.append(vector)
            scaled.append(self._by_sample(value, vector, factors))
        before = grad(slopes, inputs, ones)
        after = grad(slopes, inputs, scaled)
        eps = torch.finfo(inputs[0].dtype).eps
        return any(
            bool((self._by_sample(v, b, factors) - a).norm() > eps**0.5 * b.norm())
            for v, b, a in zip(self.inputs, before, after, strict=True)
        )

    def _by_sample(self, value: Value, tensor: Tensor, factors: Tensor) -> Tensor:
        place = self.samples[value]
        if place.count < len(factors):
            return tensor
        first = place.first(tensor)
        return place.back(first * factors.to(first).view(-1, *(1,) * (first.dim() - 1)))

    def _slopes(
        self, leaves: Mapping[Value, Tensor], results: Sequence[Tensor], adjoints: Sequence[Tensor | None]
    ) -> Sequence[Tensor] | None:
        """`<adjoints, call>` differentiated by the inputs, with a graph; None if it is linear."""
        pairs = [(r, g) for r, g in zip(results, adjoints, strict=True) if g is not None]
        if not pairs:
            return None
        made, given = zip(*pairs, strict=True)
        with torch.enable_grad():
            slopes = torch.autograd.grad(
                made, list(leaves.values()), given, create_graph=True, materialize_grads=True
            )
        return slopes if any(slope.requires_grad for slope in slopes) else None

    @cached_property
    def _again(self) -> tuple[dict[Value, Tensor], list[Tensor]]:
        """The call once more on leaves of its own: these, and its results."""
        return rerun(self.call, self.inputs)

    def _shape(self, value: Value) -> torch.Size:
        """Shape of one sample."""
        return self.samples[value].first(value.tensor.detach()).shape[1:]

    def _width(self, value: Value) -> int:
        return value.tensor.numel() // self.samples[value].count

    def _everywhere(self, value: Value, stack: Tensor) -> Tensor:
        """A stack for one sample, the same for all."""
        place = self.samples[value]
        return place.back(stack.unsqueeze(1).expand(-1, place.count, *stack.shape[1:]), 1)


def rerun(
    call: Call,
    inputs: Sequence[Value],
    shape: torch.Size | None = None,
    attached: Collection[Value] = (),
) -> tuple[dict[Value, Tensor], list[Tensor]]:
    """The call once more, the inputs being leaves of their own, broadcast to `shape` where one is given.

    `attached`: the arguments that keep their graph.
    """
    with torch.enable_grad():
        leaves: dict[Value, Tensor] = {}
        arguments = list(call.arguments)
        if isinstance(arguments[0], Tensor) and writes_to_first(call.func):
            arguments[0] = arguments[0].clone()
        for position, value in call.inputs.items():
            content = contents(call, position)
            overwritten = call.arguments[position] is not value.tensor  # then the tape keeps a copy
            if value in inputs:
                if value not in leaves:
                    content = content.detach()
                    leaves[value] = (content if shape is None else content.expand(shape)).requires_grad_()
                content = leaves[value]
            elif value in attached:
                content = value.tensor
            arguments[position] = content.clone() if overwritten else content
        results = results_of(call, arguments)
    if len(results) != len(call.outputs):
        raise NoStructure(f"{call.name} made other results when it was run again")
    for result, output in zip(results, call.outputs, strict=True):
        same = output.changed or torch.equal(result, output.tensor)
        if not same and not torch.allclose(result, output.tensor, 1e-4, 1e-6, equal_nan=True):
            raise NoStructure(f"{call.name} gave another result when it was run again")
    return leaves, results


def contents(call: Call, position: int) -> Tensor:
    """An argument as the call met it."""
    content: Tensor = call.arguments[position]
    value = call.inputs.get(position)
    if value is not None and value.changed and content is value.tensor:
        raise NoStructure(f"an input of {call.name} has been overwritten since")
    return content.detach()


def results_of(call: Call, arguments: Sequence[Any]) -> list[Tensor]:
    """What the call makes of other arguments, where it requires grad."""
    result = call.again(arguments)
    made = [arguments[0]] if call.func is Tensor.__setitem__ else leaves_of(result)
    return [t for t in made if isinstance(t, Tensor) and t.requires_grad]


def slopes_of(leaves: Mapping[Value, Tensor], results: Sequence[Tensor]) -> dict[Value, Tensor]:
    """Of a call of single elements that was run again: the derivative by each input, with a graph."""
    (result,) = results
    with torch.enable_grad():
        slopes = torch.autograd.grad(
            result,
            list(leaves.values()),
            torch.ones_like(result),
            create_graph=True,
            materialize_grads=True,
        )
    return dict(zip(leaves, slopes, strict=True))


def grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Vectors times the derivative of outputs, of those that have one."""
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    tracked, given = zip(*pairs, strict=True)
    return torch.autograd.grad(tracked, inputs, given, retain_graph=True, materialize_grads=True)


def onto(stack: Tensor, value: Value) -> Tensor:
    """Undo broadcasting: sum over what the value does not have."""
    shape = value.tensor.shape
    if stack.shape[1:] == shape:
        return stack
    padded = (1,) * (stack.dim() - 1 - len(shape))
    return stack.sum_to_size(len(stack), *padded, *shape).view(len(stack), *shape)
