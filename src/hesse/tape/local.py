"""One call by itself: its vector-Jacobian product for a stack of columns, and its curvature.

`local(call, ...)` picks the class by the table of calls. What the table does not know is differentiated
by running that one call again on detached inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hesse.blocks import CannotSweep, Diagonal, Factor, Unit
from hesse.runtime.isolation import writes_to_first
from hesse.tape.record import Call, Value, leaves_of
from hesse.tape.rules import TABLE, Kind, canonical, kind_of
from hesse.tape.samples import Samples


class Local:
    """A call as a function of its live inputs, whatever it is.

    Attributes:
        inputs: the live values among its arguments, each once.
        outputs: what it made.
        kind: its row of the table.
    """

    def __init__(self, call: Call, inputs: Sequence[Value], samples: Mapping[Value, Samples]) -> None:
        self.call = call
        self.inputs = list(inputs)
        self.outputs = call.outputs
        self.samples = samples
        self.kind = kind_of(call)

    def keeps(self, term: Diagonal) -> bool:
        """Is the term pulled through this call still a diagonal one?"""
        return self.kind is Kind.VIEW and len(term.scales) == 1 and len(self.inputs) == 1

    @property
    def unknown(self) -> bool:
        """Is the call in no table, so that its derivatives are taken by autograd?"""
        return type(self) is Local and canonical(self.call.name) not in TABLE

    def added(self) -> tuple[bool, int]:
        """What `curvature` may add, from shapes alone: a diagonal, and how many columns."""
        linear = self.kind in (Kind.VIEW, Kind.LINEAR)
        return False, 0 if linear else sum(self._width(value) for value in self.inputs)

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

    def pull_diagonal(self, term: Diagonal) -> Diagonal:
        """A term that it `keeps`, pulled back."""
        columns = [term.own(v).unsqueeze(0) if v in term.scales else None for v in self.outputs]
        ((value, core),) = self.pull(columns).items()
        return Diagonal(core.squeeze(0), {value: None})

    def curvature(self, adjoints: Sequence[Tensor | None]) -> Iterator[Factor | Diagonal]:
        """The second derivative of `<adjoints, call>` by the inputs, as terms."""
        if self.kind in (Kind.VIEW, Kind.LINEAR):
            return
        leaves, results = self._again
        slopes = self._slopes(leaves, results, adjoints)
        if slopes is None:
            return
        inputs = list(leaves.values())
        if self._joins_samples(slopes, inputs):
            raise CannotSweep(f"{self.call.name} joins samples")
        widths = [self._width(value) for value in leaves]
        seeds = torch.eye(sum(widths), dtype=inputs[0].dtype, device=inputs[0].device).split(widths, 1)
        stacks = [
            self._everywhere(value, seed.view(-1, *self._shape(value)))
            for value, seed in zip(leaves, seeds, strict=True)
        ]
        rows = torch.vmap(lambda *stacks: _grad(slopes, inputs, stacks))(*stacks)
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
        before = _grad(slopes, inputs, ones)
        after = _grad(slopes, inputs, scaled)
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

    def _cross(self, u: Value, w: Value, stack: Tensor) -> Iterator[Factor]:
        """The blocks `K_uw = K_wu`, from the rows of u: `4 u w = (u + w)² - (u - w)²`.

        The rows are brought to the size of one, lest the squares cancel.
        """
        place = self.samples[w]
        rows = place.first(stack, 1)
        size = rows.abs().amax([d for d in range(rows.dim()) if d != 1], keepdim=True)
        stack = place.back(rows / size.where(size > 0, 1), 1)
        half = size.view(-1, 1).expand(-1, len(stack)) / 2
        yield Factor(half, {u: Unit(), w: stack})
        yield Factor(-half, {u: Unit(), w: -stack})

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


class Separable(Local):
    """A sum of elements, each of which depends on one element of every input."""

    def added(self) -> tuple[bool, int]:
        """A diagonal, if the pieces are not straight."""
        others = len(self.call.inputs) == len(self.inputs) == 1 and canonical(self.call.name) == "mul"
        return self.kind is not Kind.PIECEWISE and not others, 0

    def curvature(self, adjoints: Sequence[Tensor | None]) -> Iterator[Factor | Diagonal]:
        """A diagonal for every input, and for every pair of inputs."""
        (adjoint,) = adjoints
        if adjoint is None:
            return
        slopes, seed = self._bending(adjoint)
        leaves, _ = self._again
        for i, u in enumerate(self.inputs):
            if u in slopes and slopes[u].requires_grad:
                others = self.inputs[: i + 1]
                bends = _grad([slopes[u]], [leaves[w] for w in others], [seed])
                for w, bend in zip(others, bends, strict=True):
                    if bool(bend.any()):
                        yield from self._pair(u, w, bend)

    def _bending(self, adjoint: Tensor) -> tuple[Mapping[Value, Tensor], Tensor]:
        """First derivatives, and what to differentiate them with."""
        leaves, results = self._again
        slopes = self._slopes(leaves, results, [adjoint]) or []
        some = next(iter(leaves.values()))
        return dict(zip(leaves, slopes, strict=False)), torch.ones_like(some)

    def _pair(self, u: Value, w: Value, bend: Tensor) -> Iterator[Factor | Diagonal]:
        """The blocks `K_uw = K_wu`, whose elements meet in those of `bend`."""
        if u is w:
            yield Diagonal(_onto(bend.unsqueeze(0), u).squeeze(0), {u: None})
        elif u.tensor.shape == w.tensor.shape == bend.shape:  # 4 u w = (u + w)² - (u - w)²
            yield Diagonal(bend / 2, {u: None, w: None})
            yield Diagonal(-bend / 2, {u: None, w: torch.full_like(bend, -1)})
        else:
            u, w = sorted((u, w), key=lambda value: value.tensor.numel())
            ones = torch.eye(self._width(u), dtype=bend.dtype, device=bend.device)
            stack = self._everywhere(u, ones.view(-1, *self._shape(u)))
            by_u = stack.view(len(stack), *(1,) * (bend.dim() - u.tensor.dim()), *u.tensor.shape)
            yield from self._cross(u, w, _onto(by_u * bend, w))


class Elementwise(Separable):
    """Every element of the result depends on one element of every input."""

    def keeps(self, term: Diagonal) -> bool:
        """Unless an input is broadcast."""
        return all(value.tensor.shape == self.outputs[0].tensor.shape for value in self.inputs)

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Multiply by the slopes."""
        (stack,) = columns
        assert stack is not None
        return {value: _onto(_times(stack, slope), value) for value, slope in self.slopes.items()}

    def pull_diagonal(self, term: Diagonal) -> Diagonal:
        """Multiply the scales by the slopes."""
        scales = dict(term.scales)
        own = scales.pop(self.outputs[0])
        for value, slope in self.slopes.items():
            pulled = slope if own is None else _times(own, slope)
            if value in scales:
                one = torch.ones_like(term.core)
                old = scales[value]
                pulled = (one if pulled is None else pulled) + (one if old is None else old)
            scales[value] = pulled
        return Diagonal(term.core, scales)

    @cached_property
    def slopes(self) -> dict[Value, Tensor | None]:
        """The derivative by every input, of the result's shape; None is one."""
        if self._is_sum:
            return dict.fromkeys(self.inputs)
        return {value: self._tracked[value].detach() for value in self.inputs}

    def spread(self) -> Iterator[tuple[Value, Tensor, int]]:
        """The arguments without samples that the result is linear in."""
        leaves, _ = self._again
        for value in leaves:
            if value not in self.samples and self._is_linear_in(value):
                yield value, self._tracked[value].detach(), 0

    def _is_linear_in(self, value: Value) -> bool:
        slope = self._tracked[value]
        if not slope.requires_grad:
            return True
        leaf = self._again[0][value]
        return torch.autograd.grad(slope.sum(), leaf, retain_graph=True, allow_unused=True)[0] is None

    @property
    def _is_sum(self) -> bool:
        live = [value for value in self.call.inputs.values() if value in self.inputs]
        plain = canonical(self.call.name) == "add" and len(self.call.arguments) == 2
        return plain and len(live) == len(self.inputs)

    @cached_property
    def _tracked(self) -> dict[Value, Tensor]:
        return slopes_of(*self._again)

    def _bending(self, adjoint: Tensor) -> tuple[Mapping[Value, Tensor], Tensor]:
        return {} if self._is_sum else self._tracked, adjoint

    @cached_property
    def _again(self) -> tuple[dict[Value, Tensor], list[Tensor]]:
        arguments = dict.fromkeys(self.call.inputs.values())
        return rerun(self.call, list(arguments), self.outputs[0].tensor.shape)


class Bilinear(Local):
    """Linear in each of two inputs: only the cross block."""

    def added(self) -> tuple[bool, int]:
        """Two columns for each of the narrower input."""
        if len(self.inputs) > 2:
            return super().added()
        return False, 2 * min(map(self._width, self.inputs)) if len(self.inputs) == 2 else 0

    def curvature(self, adjoints: Sequence[Tensor | None]) -> Iterator[Factor | Diagonal]:
        """Columns of the narrower input, and what they are for the other one."""
        if len(self.inputs) != 2:
            yield from super().curvature(adjoints) if len(self.inputs) > 2 else ()
            return
        leaves, results = self._again
        slopes = self._slopes(leaves, results, adjoints)
        if slopes is None:
            return
        u, w = sorted(self.inputs, key=self._width)
        ones = torch.eye(self._width(u), dtype=u.tensor.dtype, device=u.tensor.device)
        seeds = self._everywhere(u, ones.view(-1, *self._shape(u)))
        slope, by = slopes[self.inputs.index(u)], leaves[w]
        (stack,) = torch.vmap(lambda seed: _grad([slope], [by], [seed]))(seeds)
        yield from self._cross(u, w, stack)


class LinearMap(Local):
    """A linear layer as a function of its input."""

    def added(self) -> tuple[bool, int]:
        """Nothing."""
        return False, 0

    def pull(self, columns: Sequence[Tensor | None]) -> dict[Value, Tensor]:
        """Multiply by the weight; columns that are the same for all samples only once."""
        (stack,), (value,) = columns, self.inputs
        assert stack is not None
        dim = 1 + self.samples[value].dim
        once = stack.narrow(dim, 0, 1) if dim and stack.stride(dim) == 0 else stack
        return {value: functional.linear(once, self._weight.T).expand(*stack.shape[:-1], -1)}

    def curvature(self, adjoints: Sequence[Tensor | None]) -> Iterator[Factor | Diagonal]:
        """None."""
        return iter(())

    @cached_property
    def _weight(self) -> Tensor:
        args, kwargs = self.call.nested(self.call.arguments)
        weight: Tensor = args[1] if len(args) > 1 else kwargs["weight"]
        return weight.detach()


def rerun(
    call: Call, inputs: Sequence[Value], shape: torch.Size | None = None
) -> tuple[dict[Value, Tensor], list[Tensor]]:
    """The call once more, the inputs being leaves of their own, broadcast to `shape` where one is given."""
    with torch.enable_grad():
        leaves: dict[Value, Tensor] = {}
        arguments = list(call.arguments)
        if isinstance(arguments[0], Tensor) and writes_to_first(call.func):
            arguments[0] = arguments[0].clone()
        for position, value in call.inputs.items():
            content = call.arguments[position]
            overwritten = content is not value.tensor  # then the tape keeps a copy
            if value.changed and not overwritten:
                raise CannotSweep(f"an input of {call.name} has been overwritten since")
            if value in inputs:
                if value not in leaves:
                    content = content.detach()
                    leaves[value] = (content if shape is None else content.expand(shape)).requires_grad_()
                content = leaves[value]
            arguments[position] = content.clone() if overwritten else content
        results = results_of(call, arguments)
    if len(results) != len(call.outputs):
        raise CannotSweep(f"{call.name} made other results when it was run again")
    for result, output in zip(results, call.outputs, strict=True):
        same = output.changed or torch.equal(result, output.tensor)
        if not same and not torch.allclose(result, output.tensor, 1e-4, 1e-6, equal_nan=True):
            raise CannotSweep(f"{call.name} gave another result when it was run again")
    return leaves, results


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


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    tracked, given = zip(*pairs, strict=True)
    return torch.autograd.grad(tracked, inputs, given, retain_graph=True, materialize_grads=True)


def _onto(stack: Tensor, value: Value) -> Tensor:
    """Undo broadcasting: sum over what the value does not have."""
    shape = value.tensor.shape
    if stack.shape[1:] == shape:
        return stack
    padded = (1,) * (stack.dim() - 1 - len(shape))
    return stack.sum_to_size(len(stack), *padded, *shape).view(len(stack), *shape)


def _times(one: Tensor, other: Tensor | None) -> Tensor:
    return one if other is None else one * other
