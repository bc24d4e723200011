r"""Taps: one product a neuron, for the diagonal of layers that are linear in their weight.

Let $z = a W^T + b$ be a layer's output and $H_z$ the Hessian of the function by a zero added to z.
Then, with n over samples and t, s over the positions of one sample that share the weight,

$$\mathrm{diag}_W[o,i] = \sum_n \sum_{t,s} H_z[(n,t,o),(n,s,o)]\, a[n,t,i]\, a[n,s,i], \qquad
  \mathrm{diag}_b[o] = \sum_n \sum_{t,s} H_z[(n,t,o),(n,s,o)].$$

Samples that do not touch share a product, so a layer takes T O products instead of O I + O, and each
differentiates only the part of the graph above the tap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesse.certificate import Probe, random_signs
from hesse.gradient import TappedLayer
from hesse.runtime.batches import batched, clock
from hesse.runtime.chunks import ChunkSize
from hesse.runtime.memory import bytes_per_column
from hesse.runtime.progress import Progress


def products(layer: TappedLayer) -> int:
    """How many products the layer takes, one for every output and position."""
    return layer.positions * layer.outputs


def pays(layer: TappedLayer) -> bool:
    """Does it take fewer products than one for every weight?"""
    return layer.positions < layer.call.input.shape[-1]


def samples_touch(layer: TappedLayer) -> bool:
    """Does the curvature join different samples? Two products tell.

    Scaling every sample's vector by a random factor of its own must scale every sample's product by
    just that.
    """
    generator = torch.Generator().manual_seed(2)
    one = torch.randn(layer.call.shape[1:], generator=generator)  # signs may lie in a null space
    factors = torch.rand(layer.samples, generator=generator) + 0.5
    factors = factors.to(layer.gradient).view(-1, *(1,) * (layer.gradient.dim() - 1))
    everywhere = one.to(layer.gradient).expand_as(layer.gradient)
    (same,), (scaled,) = layer.product(everywhere), layer.product(factors * everywhere)
    eps = torch.finfo(same.dtype).eps
    return bool((scaled - factors * same).norm() > eps**0.5 * same.norm())


def run(
    layers: Sequence[TappedLayer], workspace: int, progress: Progress
) -> tuple[dict[int, Tensor], list[Probe]]:
    """The diagonal for the weights and biases of these layers, by index, and what to check of it."""
    parts: dict[int, Tensor] = {}
    probes = [_diagonal(layer, workspace, progress, parts) for layer in layers]
    return parts, probes


def _diagonal(layer: TappedLayer, workspace: int, progress: Progress, parts: dict[int, Tensor]) -> Probe:
    samples, positions, outputs = layer.samples, layer.positions, layer.outputs
    a = layer.call.input.reshape(samples, positions, -1)
    of_weight = a.new_zeros(outputs, a.shape[-1])
    of_bias = a.new_zeros(outputs)

    # For the check, the product of the layer's block with a direction s τᵀ (and s for the bias) is
    # added up on the way: a z-direction of s[o] w[n, t].
    by_output, by_input = random_signs([of_bias, a[0, 0]])
    w = a @ by_input + (layer.call.bias is not None)
    total = a.new_zeros(samples, positions, outputs)

    # A product holds its pass, its seed, its row and two layouts of them.
    column = bytes_per_column([layer.gradient]) + 4 * total.numel() * total.dtype.itemsize
    chunks, start = ChunkSize(workspace // column, total=products(layer)), 0
    while start < products(layer):
        began = clock(a)
        numbers = torch.arange(start, min(start + chunks.size, products(layer)), device=a.device)
        o, t = numbers // positions, numbers % positions
        seeds = a.new_zeros(len(numbers), samples, positions, outputs)
        seeds[torch.arange(len(numbers), device=a.device), :, t, o] = 1
        found = batched(layer.product, [seeds.view(-1, *layer.call.shape)], chunks)
        if found is None:
            continue
        rows = found[0].view(seeds.shape)
        d = rows.gather(3, o.view(-1, 1, 1, 1).expand(-1, samples, positions, 1)).squeeze(3)
        if positions == 1:
            of_weight.index_add_(0, o, d[:, :, 0] @ a[:, 0].square())
        else:
            of_weight.index_add_(0, o, torch.einsum("jns,nji,nsi->ji", d, a[:, t], a))
        of_bias.index_add_(0, o, d.sum((1, 2)))
        total += torch.einsum("nj,jnso->nso", by_output[o] * w[:, t], rows)
        start += len(numbers)
        chunks.report(len(numbers), clock(a) - began, regime=layer.call.weight)
        progress.advance(len(numbers))

    indices, signs = [layer.call.weight], [by_output.outer(by_input)]
    computed = [torch.einsum("nso,nsi->oi", total, a)]
    parts[layer.call.weight] = of_weight
    if layer.call.bias is not None:
        indices.append(layer.call.bias)
        signs.append(by_output)
        computed.append(total.sum((0, 1)))
        parts[layer.call.bias] = of_bias
    return Probe(indices, indices, signs, computed, float(of_weight.norm()))
