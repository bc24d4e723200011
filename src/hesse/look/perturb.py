"""Where the samples are: found by changing some of them and looking who notices.

The function is evaluated once more while the outputs of its layers are perturbed, for some samples
only. What changes along the tape shows in which dimension of every value the samples lie, and a gradient
that changes for a sample that was left alone shows that samples touch: batch norm in training, a
contrastive loss. No rules for any call are needed, and no second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesse.calls.weights import LayerCall, layer_call
from hesse.look.placing import data_of, lead
from hesse.tape.record import Call, Recorder
from hesse.tape.samples import ONE_SAMPLE, Samples, possible


@dataclass(frozen=True)
class Exploration:
    """What a first look found.

    Attributes:
        samples: where the samples are in every layer's input and output, by the call's order on the tape.
        batch_dims: where they are in the results of every call, in order; None for results that have nothing
            to do with them. Empty where samples were not found.
        touching: name of a call from which on samples touch; None where they do nowhere.
        gradient: by each leaf, without a graph; None where it was not taken.
        changed: the evaluation changed something in place. It was put back, so that its graph may hold what
            has been overwritten.
        why_not: why no samples were found, if something went wrong.
        told: the table told where the samples are, whatever the numbers.
    """

    samples: Mapping[int, Samples] = field(default_factory=dict)
    batch_dims: Sequence[Sequence[Samples | None]] = ()
    touching: str | None = None
    gradient: Sequence[Tensor | None] | None = None
    changed: bool = False
    why_not: str | None = None
    told: bool = False


NOT_EXPLORED = Exploration()


class Perturbing(Recorder):
    """Records an evaluation in which the outputs of some layers are changed for some samples.

    Attributes:
        batch_dims: where the samples are in the input and output of each layer, and of calls by which they
            come in, by its order.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor],
        calls: Sequence[Call],
        layers: Sequence[LayerCall],
        dim: int,
        noise: Noise,
    ) -> None:
        """`calls` and `layers` as they were; of what comes in, the samples are assumed in dimension `dim`."""
        super().__init__(leaves)
        self._before, self._noise = calls, noise
        self._layers = {layer.order: layer for layer in layers}
        entering = [layer for layer in layers if not layer.moves]
        data = _entering_data(entering, layers, calls, dim)
        self._entering = {layer.order for layer in entering or layers[:1]}
        self._dim = dim
        self.count = max(data, key=Tensor.numel).shape[dim] if data else 1
        self.which = chosen(self.count)
        self.batch_dims: dict[int, Samples] = {}

    def seen(self, call: Call, result: Any) -> Any:
        """Change a layer's output."""
        if self.hidden:
            return result
        known = self._before[call.order] if call.order < len(self._before) else None
        if known is None or known.func != call.func or len(known.outputs) != len(call.outputs):
            self._hide("other values lead to other calls")
        elif any(a.tensor.shape != b.tensor.shape for a, b in zip(known.outputs, call.outputs, strict=True)):
            self._hide(f"the shape of the result of {call.name} depends on values")
        if self.hidden:
            return result
        batch_dim, layer = ONE_SAMPLE, self._layers.get(call.order)
        if layer is not None:
            batch_dim = self.batch_dims[call.order] = self._placed(layer, call)
        elif self._meets_data(call, result):
            batch_dim = self.batch_dims[call.order] = Samples(self.count, self._dim)
        if batch_dim.count > 1:
            result = perturbed(result, batch_dim, self.which, self._noise)
            call.outputs[0] = self.note(result, call)
        return result

    def _meets_data(self, call: Call, result: Any) -> bool:
        """Do parameters meet data here, and samples come in with it: positions added to tokens, say?"""
        data = met_by_parameters(call) if self.count > 1 and isinstance(result, Tensor) else []
        return bool(data) and all(
            tensor.dim() > self._dim and tensor.shape[self._dim] == self.count for tensor in (result, *data)
        )

    def _placed(self, layer: LayerCall, call: Call) -> Samples:
        batch_dim: Samples | None = None
        now = layer_call(call)
        if layer.moves and now is not None and now.input.shape == layer.input.shape:
            batch_dim = found(layer.input, now.input, self.which)
        if batch_dim is None and call.order in self._entering:
            batch_dim = Samples(self.count, self._dim)
            fits = self._dim < layer.input.dim() and layer.input.shape[self._dim] == self.count
            batch_dim = batch_dim if fits else None
        return batch_dim if batch_dim is not None and batch_dim.dim < lead(layer) else ONE_SAMPLE


def _entering_data(
    entering: Sequence[LayerCall], layers: Sequence[LayerCall], calls: Sequence[Call], dim: int
) -> list[Tensor]:
    """The data, with samples in dimension `dim`.

    They come in by layers, or by what parameters are added to; else the first layer has them.
    """
    data = [layer.input for layer in entering if dim < lead(layer)]
    if data:
        return data
    met = next(filter(None, map(met_by_parameters, calls)), [layer.input for layer in layers[:1]])
    return [tensor for tensor in met if dim < tensor.dim() - 1]


def met_by_parameters(call: Call) -> list[Tensor]:
    """The data of a call whose other arguments are parameters."""
    return data_of(call) if all(value.leaf is not None for value in call.inputs.values()) else []


def chosen(count: int) -> Tensor:
    """Which samples to perturb, [count]: a random half, at least one and not all."""
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(count, generator=generator)
    return order < count // 2


Noise = Callable[[Tensor, Tensor], Tensor]
"""From a tensor and standard noise to what is near the tensor, differentiable by it."""


def pushed(tensor: Tensor, noise: Tensor) -> Tensor:
    """By a twentieth of the tensor's size, so that rounding does not matter."""
    size = torch.linalg.vector_norm(tensor.detach()).item() / math.sqrt(tensor.numel())
    return tensor.add(noise, alpha=0.05 * size or 1.0)


def nudged(tensor: Tensor, noise: Tensor) -> Tensor:
    """By a thousandth of each element: no sign changes, so that branches and checks mostly go as before."""
    return tensor.addcmul(tensor.detach(), noise.clamp(-3, 3), value=1e-3)


def perturbed(tensor: Tensor, samples: Samples, which: Tensor, noise: Noise = pushed) -> Tensor:
    """The tensor with noise added to the chosen samples, differentiable by it."""
    generator = torch.Generator().manual_seed(4)
    standard = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
    samples.first(standard)[_left_alone(which, standard)] = 0
    return noise(tensor, standard)


def found(before: Tensor, after: Tensor, which: Tensor) -> Samples | None:
    """Where the samples are, from a value before and after the chosen ones were changed.

    Returns:
        None where nothing has changed, `ONE_SAMPLE` where the others have changed too.
    """
    before, after = before.detach(), after.detach()
    if torch.equal(before, after):
        return None
    alone = _left_alone(which, before)
    places = list(possible(before.shape, len(which)))
    for batch_dim in places:  # what was left alone is mostly the same to the bit
        if torch.equal(batch_dim.some(before, alone), batch_dim.some(after, alone)):
            return batch_dim
    changed = differs(before, after)
    if not bool(changed.any()):
        return None
    for batch_dim in places:
        if not bool(batch_dim.some(changed, alone).any()):
            return batch_dim
    return ONE_SAMPLE


def _left_alone(which: Tensor, like: Tensor) -> Tensor:
    """The numbers of the samples that are not chosen, where `like` is."""
    return (~which).nonzero().squeeze(1).to(like.device)


def differs(before: Tensor, after: Tensor) -> Tensor:
    """Where two tensors differ by more than rounding; masked scores are infinite in both."""
    before, after = before.detach(), after.detach()
    if before.is_complex():
        return differs(*(torch.view_as_real(t.resolve_conj()) for t in (before, after))).any(-1)
    tolerance = 100 * torch.finfo(before.dtype).eps
    finite = before.nan_to_num(0, 0, 0)
    scale = finite.abs() + finite.square().mean().sqrt()
    return ~((after == before) | ((after - before).abs() <= tolerance * scale))


def noticed(before: Tensor | None, after: Tensor | None, samples: Samples, which: Tensor) -> bool:
    """Has a sample that was left alone changed? Compared sample by sample: their scales differ."""
    if before is None or after is None:
        return False
    alone = _left_alone(which, before)
    one, other = (samples.some(t.detach(), alone) for t in (before, after))
    if torch.equal(one, other):
        return False
    one, other = one.flatten(1), other.flatten(1)
    eps = torch.finfo(one.dtype).eps
    return bool(((other - one).norm(dim=1) > eps**0.5 * 0.1 * one.norm(dim=1)).any())


def everywhere(before: Sequence[Call], after: Sequence[Call], which: Tensor) -> list[list[Samples | None]]:
    """Where the samples are in the results of all calls, from those of the perturbed evaluation."""
    return [
        # Of one that was overwritten the later contents serve as well.
        [
            found(value.tensor, now.tensor, which)
            for value, now in zip(one.outputs, other.outputs, strict=True)
        ]
        for one, other in zip(before, after, strict=True)
    ]
