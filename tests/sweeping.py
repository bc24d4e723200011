"""Record a function twice, with some samples perturbed, and sweep: what the library does around a sweep."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hesse.look.perturb import chosen, everywhere, perturbed
from hesse.methods.sweep import route as sweep_route
from hesse.methods.sweep import walk as sweep
from hesse.tape.record import Recorder
from hesse.tape.samples import Samples
from oracle import hessian_matrix


class Perturb(TorchFunctionMode):
    """Changes what comes out where parameters meet data, for some of the `count` samples."""

    def __init__(self, leaves, count):
        super().__init__()
        self.count, self.after = count, []
        self.which = chosen(count) if count > 1 else torch.ones(1, dtype=torch.bool)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        active = [a for a in flat if a.requires_grad]
        if any(a is b for a in active for b in self.after):
            self.after += [r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, torch.Tensor)]
        elif active and isinstance(result, torch.Tensor):
            data = [a for a in flat if not a.requires_grad and self.count in a.shape[:2]]
            if data and self.count in result.shape[:2]:
                dim = data[0].shape.index(self.count)
                result = perturbed(result, Samples(self.count, dim), self.which)
                self.after.append(result)
        return result


def recorded(function, tensors, count):
    """The loss, its tape, and where the samples are."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        before, after = Recorder(leaves), Recorder(leaves)
        with before:
            value = function(*leaves)
        perturb = Perturb(leaves, count)
        with perturb, after:
            function(*leaves)
    found = everywhere(before.calls, after.calls, perturb.which)
    places = {
        value: place
        for call, those in zip(before.calls, found, strict=True)
        for value, place in zip(call.outputs, those, strict=True)
    }
    return value, before, places


def swept(function, tensors, count):
    """The diagonal of every covered leaf, by index, and the probes of the sweep."""
    value, tape, samples = recorded(function, tensors, count)
    with sdpa_kernel(SDPBackend.MATH):
        way = sweep_route.route_of(tape, value, samples)
        return sweep.diagonal(way, way.covered)


def check(function, tensors, count, covered=None, live=(), size=None):
    """The sweep equals plain double backward, for all tensors or the ones that must be covered.

    `live`: the tensors that must be kept alive on the way, all others may not be; `size`: how many samples
    it takes at a time. Returns its route.
    """
    value, tape, samples = recorded(function, tensors, count)
    with sdpa_kernel(SDPBackend.MATH):
        way = sweep_route.route_of(tape, value, samples, set(live))
        assert way.live == set(live)
        found, probes = sweep.diagonal(way, way.covered, size=size)
        squares = sweep.blocks(way, way.covered, size=size)
    assert set(found) == set(range(len(tensors)) if covered is None else covered)
    matrix = hessian_matrix(function, tensors)
    sizes = [t.numel() for t in tensors]
    exact = matrix.diagonal().split(sizes)
    scale = max(matrix.abs().max().item(), 1e-4)  # some are zero but for rounding
    for i, part in found.items():
        assert part.shape == tensors[i].shape
        error = (part.flatten() - exact[i]).abs().max().item() / scale
        assert error < 1e-9, (i, error)
    blocks = [rows.split(sizes, 1) for rows in matrix.split(sizes)]
    assert {i for i, _ in squares} == set(found)
    for (i, j), square in squares.items():
        assert (square - blocks[i][j]).abs().max().item() / scale < 1e-9, i
    for probe in probes:
        for j, computed in zip(probe.columns, probe.computed, strict=True):
            product = sum(blocks[j][i] @ s.flatten() for i, s in zip(probe.rows, probe.signs, strict=True))
            assert (computed.flatten() - product).abs().max().item() / scale < 1e-9
    return way
