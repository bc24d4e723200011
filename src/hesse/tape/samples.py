"""Where the samples are: found by changing some of them and looking who notices.

The function is evaluated once more while the outputs of its layers are perturbed, for some samples
only. What changes along the tape shows in which dimension of every value the samples lie, and a gradient
that changes for a sample that was left alone shows that samples touch: batch norm in training, a
contrastive loss. No rules for any call are needed, and no second derivative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """The place of `count` samples in a tensor: dimension `dim`, of size `outer * count * inner`.

    Without a dimension the whole tensor is one sample.
    """

    count: int = 1
    dim: int = -1
    outer: int = 1
    inner: int = 1

    def first(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """The tensor as [*lead, count, *rest], after `lead` leading dimensions that are not its own."""
        if self.count == 1:
            return tensor.unsqueeze(lead)
        at = lead + self.dim
        if self.outer == self.inner == 1:
            return tensor.movedim(at, lead)
        return tensor.unflatten(at, (self.outer, self.count, self.inner)).movedim(at + 1, lead)

    def back(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """The inverse of `first`."""
        if self.count == 1:
            return tensor.squeeze(lead)
        at = lead + self.dim
        if self.outer == self.inner == 1:
            return tensor.movedim(lead, at)
        return tensor.movedim(lead, at + 1).flatten(at, at + 2)


ONE_SAMPLE = Samples()


def chosen(count: int) -> Tensor:
    """Which samples to perturb, [count]: a random half, at least one and not all."""
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(count, generator=generator)
    return order < count // 2


def perturbed(tensor: Tensor, samples: Samples, which: Tensor) -> Tensor:
    """The tensor with noise added to the chosen samples, differentiable by it."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
    scale = _STEP * tensor.detach().square().mean().sqrt()
    return tensor + _masked(noise, samples, which) * (scale + (scale == 0))


_STEP = 0.05


def found(before: Tensor, after: Tensor, which: Tensor) -> Samples | None:
    """Where the samples are, from a value before and after the chosen ones were changed.

    Returns:
        None where nothing has changed, `ONE_SAMPLE` where the others have changed too.
    """
    changed = differs(before, after)
    if not bool(changed.any()):
        return None
    count = len(which)
    which = which.to(changed.device)
    for dim, size in enumerate(changed.shape):
        if size % count:
            continue
        along = changed.movedim(dim, 0).flatten(1).any(1)
        for outer in (1, size // count):  # flattened with the samples in front, or behind
            inner = size // count // outer
            places = Samples(count, dim, outer, inner)
            left_alone = ~which.repeat_interleave(inner).repeat(outer)
            if not bool((along & left_alone).any()):
                return places
    return ONE_SAMPLE


def differs(before: Tensor, after: Tensor) -> Tensor:
    """Where two tensors differ by more than rounding."""
    before, after = before.detach(), after.detach()
    tolerance = 100 * torch.finfo(before.dtype).eps
    scale = before.abs() + before.square().mean().sqrt()
    return ~((after - before).abs() <= tolerance * scale)


def noticed(before: Tensor, after: Tensor, samples: Samples, which: Tensor) -> bool:
    """Has a sample that was left alone changed? Compared sample by sample: their scales differ."""
    one, other = (samples.first(t.detach()).flatten(1)[~which.to(t.device)] for t in (before, after))
    eps = torch.finfo(one.dtype).eps
    return bool(((other - one).norm(dim=1) > eps**0.5 * 0.1 * one.norm(dim=1)).any())


def _masked(noise: Tensor, samples: Samples, which: Tensor) -> Tensor:
    first = samples.first(noise)
    mask = which.to(noise).view(-1, *(1,) * (first.dim() - 1))
    return samples.back(first * mask)
