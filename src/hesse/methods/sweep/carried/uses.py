r"""Where leaves enter calls more than once or not linearly, and how results follow their coordinates.

With c the adjoints of a call $\varphi(u, w)$, let q be the gradient of $\langle c, \varphi \rangle$ by a leaf
w. It is linear in c. What a walk needs to know of a coordinate $w_k$ is the derivative of $q_k$ by all three:

$$\frac{\partial q_k}{\partial c} = \frac{\partial\varphi}{\partial w_k}, \qquad
  \frac{\partial q_k}{\partial u}
    = \frac{\partial^2 \langle c, \varphi \rangle}{\partial w_k\,\partial u}, \qquad
  \frac{\partial q_k}{\partial w} = \frac{\partial^2 \langle c, \varphi \rangle}{\partial w_k\,\partial w}.$$

That is one backward pass for every coordinate, over this call alone and what lies between it and the leaf: a
transposed weight, the exponential of a scale, a penalty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesse.calls.facts import Site
from hesse.calls.layouts import LinearLayout
from hesse.calls.weights import LayerCall, layer_call
from hesse.tape.record import Call, Value
from hesse.tape.replay import rerun
from hesse.tape.samples import Samples


@dataclass(frozen=True)
class Use:
    """A leaf enters a call, itself or through values that have no samples.

    Attributes:
        leaf: the leaf.
        site: the call, as a function of its live inputs.
    """

    leaf: Value
    site: Site

    @property
    def leaves(self) -> list[int]:
        """Indices of the leaves that are looked at together."""
        assert self.leaf.leaf is not None
        return [self.leaf.leaf]

    @property
    def size(self) -> int:
        """Coordinates of the leaf."""
        return self.leaf.tensor.numel()

    def at(self, adjoints: Sequence[Tensor | None]) -> Derivative:
        """How the call follows the leaf, given the adjoints of its results."""
        return Derivative(self, adjoints)


@dataclass(frozen=True)
class LayerUse(Use):
    """The leaf is the weight of a layer, all of whose uses are such layers.

    Attributes:
        layer: the layer, with the bias if that goes wherever the weight goes.
        samples: their place in its result.
    """

    layer: LayerCall
    samples: Samples

    @property
    def leaves(self) -> list[int]:
        """The weight, and its bias."""
        return [self.layer.weight] + ([] if self.layer.bias is None else [self.layer.bias])

    @property
    def input(self) -> Value | None:
        """The layer's input, if it is live."""
        return next((value for value in self.site.inputs if value.tensor is self.layer.input), None)


@dataclass(frozen=True)
class Rows:
    """How a call follows a leaf in some directions, as stacks with a row for each.

    Attributes:
        results: the derivative of every result.
        inputs: the second derivative by the direction and every live input; none where it is zero.
        own: by the direction and the leaf, [rows, size]; None where the leaf enters linearly.
    """

    results: Mapping[Value, Tensor]
    inputs: Mapping[Value, Tensor]
    own: Tensor | None


class Derivative:
    """The gradient by a leaf of a call's results times adjoints, to be differentiated.

    Attributes:
        held: how many numbers come with a direction.
    """

    def __init__(self, use: Use, adjoints: Sequence[Tensor | None]) -> None:
        self._outputs, self._shape = use.site.outputs, use.leaf.tensor.shape
        leaf = use.leaf.tensor
        between = [value for value in use.site.call.inputs.values() if value not in use.site.samples]
        leaves, results = rerun(use.site.call, use.site.inputs, attached=between)
        cotangents = [
            (torch.zeros_like(result) if g is None else g.detach().clone()).requires_grad_()
            for result, g in zip(results, adjoints, strict=True)
        ]
        with torch.enable_grad():
            (self._gradient,) = torch.autograd.grad(results, [leaf], cotangents, create_graph=True)
            total = self._gradient.sum()
        curved = torch.autograd.grad(total, [*leaves.values(), leaf], retain_graph=True, allow_unused=True)
        self._inputs = [value for value, part in zip(leaves, curved, strict=False) if part is not None]
        self._bent = curved[-1] is not None
        self._by = [*cotangents, *(leaves[value] for value in self._inputs), *([leaf] if self._bent else [])]
        self.held = leaf.numel() + sum(tensor.numel() for tensor in self._by)

    def rows(self, directions: Tensor) -> Rows:
        """For directions [rows, size]."""
        seeds = directions.view(-1, *self._shape)
        if len(seeds) == 1:
            found = iter([part.unsqueeze(0) for part in self._row(seeds[0])])
        else:
            found = iter(torch.vmap(self._row)(seeds))
        return Rows(
            {value: next(found) for value in self._outputs},
            {value: next(found) for value in self._inputs},
            next(found).reshape(directions.shape) if self._bent else None,
        )

    def _row(self, seed: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._gradient, self._by, seed, retain_graph=True, materialize_grads=True)


class Uses:
    """Where some leaves enter the calls of a tape that have samples."""

    def __init__(self, calls: Sequence[Call], samples: Mapping[Value, Samples], live: Set[int]) -> None:
        self._samples = samples
        self._entering, _ = entering(calls, samples, live)
        self._layers = _tied_layers(self._entering, samples)

    def of(self, site: Site) -> Iterator[Use]:
        """Those of a call."""
        layer = self._layers.get(site.call)
        for leaf in dict.fromkeys(self._entering.get(site.call, ())):
            if layer is None or leaf.leaf not in (layer.weight, layer.bias):
                yield Use(leaf, site)
            elif leaf.leaf == layer.weight:
                yield LayerUse(leaf, site, layer, self._samples[layer.output])


def entering(
    calls: Sequence[Call], samples: Container[Value], live: Set[int] | None = None
) -> tuple[dict[Call, list[Value]], set[Value]]:
    """Which of some leaves, or of all, enter each call that has samples; twice, if by two arguments.

    Without those that enter some call by a value that has been overwritten since: these come second.
    """
    found: dict[Call, list[Value]] = {}
    behind: dict[Value, list[Value]] = {}  # the leaves that values without samples are made of
    lost: set[Value] = set()
    for call in calls:
        apart = not any(value in samples for value in call.outputs)
        met: list[Value] = []
        for position, value in call.inputs.items():
            wanted = value.leaf is not None and (live is None or value.leaf in live)
            leaves = [value] if wanted else behind.get(value, [])
            met += leaves
            if not apart and (value.changed or call.arguments[position] is not value.tensor):
                lost.update(leaves)
        if apart:
            behind.update({output: list(dict.fromkeys(met)) for output in call.outputs})
        else:
            found[call] = met
    return {call: [leaf for leaf in met if leaf not in lost] for call, met in found.items()}, lost


def _tied_layers(
    entering: Mapping[Call, Sequence[Value]], samples: Mapping[Value, Samples]
) -> dict[Call, LayerCall]:
    """The calls by weights that enter nothing but layers of one form, with fewer outputs than coordinates."""
    uses: dict[Value, list[Call]] = defaultdict(list)
    for call, leaves in entering.items():
        for leaf in leaves:
            uses[leaf].append(call)
    found: dict[Call, LayerCall] = {}
    for weight, calls in uses.items():
        layers = {
            call: layer
            for call in calls
            if (layer := _layer(call, samples)) is not None and layer.weight == weight.leaf
        }
        if len(layers) == len(calls) and _is_tied(list(layers.values()), weight, samples):
            found |= _with_bias(layers, calls, uses)
    return found


def _is_tied(layers: Sequence[LayerCall], weight: Value, samples: Mapping[Value, Samples]) -> bool:
    """Are these uses of a weight of one form, and have they fewer outputs and inputs than it coordinates?"""
    forms = {(layer.layout, samples[layer.output].count) for layer in layers}
    # On the average half of the uses come later, and each has a column for every output and input.
    columns = sum(_columns(layer, samples) for layer in layers) // 2
    return len(layers) > 1 and len(forms) == 1 and columns < weight.tensor.numel()


def _with_bias(
    layers: Mapping[Call, LayerCall], calls: Sequence[Call], uses: Mapping[Value, Sequence[Call]]
) -> dict[Call, LayerCall]:
    """The layers, with their bias if that goes wherever the weight goes."""
    (bias, *others) = {layer.bias for layer in layers.values()}
    joined = not others and any(v.leaf == bias and those == calls for v, those in uses.items())
    return dict(layers) if joined else {call: replace(layer, bias=None) for call, layer in layers.items()}


def _layer(call: Call, samples: Mapping[Value, Samples]) -> LayerCall | None:
    """The layer that a call is, if its input is a value as it stands and has its samples apart."""
    layer = layer_call(call)
    if (
        layer is None
        or not isinstance(layer.layout, LinearLayout)
        or samples[layer.output].dim >= layer.output.tensor.dim() - layer.layout.own[1]
    ):
        return None
    plain = not layer.moves or any(v.tensor is layer.input and not v.changed for v in call.inputs.values())
    return layer if plain else None


def _columns(layer: LayerCall, samples: Mapping[Value, Samples]) -> int:
    moved = layer.input.numel() if layer.moves else 0
    return (layer.output.tensor.numel() + moved) // samples[layer.output].count
