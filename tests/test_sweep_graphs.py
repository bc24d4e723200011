"""The sweep on random graphs: chains with skips, products, shared inputs, reductions and views."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cases import x
from hesse.curvature.columns import Unit
from hesse.curvature.terms import Cross, Diagonal, LowRank
from hesse.curvature.total import Curvature
from hesse.methods.sweep import walk
from hesse.methods.sweep.cost import cost
from hesse.methods.sweep.route import route_of
from hesse.structure import NoStructure
from sweeping import check, recorded

SAMPLES, WIDTH = 3, 4
ONE = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "softmax": lambda h: h.softmax(1),
    "norm": lambda h: F.layer_norm(h, (WIDTH,)),
    "flip": lambda h: h.flip(1),
    "rows": lambda h: h.view(-1, 2, 2).transpose(1, 2).reshape(-1, WIDTH),
    "attend": lambda h: (h.view(-1, 2, 2) @ h.view(-1, 2, 2)).flatten(1),
    "centre": lambda h: h - h.mean(1, keepdim=True),
    "divide": lambda h: h / (1 + h.square().sum(1, keepdim=True)),
    "pool": lambda h: F.max_pool1d(h.unsqueeze(1), 2).squeeze(1).repeat(1, 2),
    "in place": lambda h: (h * 1.0).sigmoid_(),
    "halves": lambda h: torch.cat(h.chunk(2, 1)[::-1], 1),
}
TWO = {
    "add": lambda g, h: g + h,
    "multiply": lambda g, h: g * h,
    "gate": lambda g, h: g.sigmoid() * h,
    "scale": lambda g, h: g * h.mean(1, keepdim=True),
    "join": lambda g, h: torch.cat([g[:, :2], h[:, 2:]], 1),
    "mix": lambda g, h: (g.view(-1, 2, 2) @ h.view(-1, 2, 2)).flatten(1),
}
LAYERS = ("layer", "affine")
LOSSES = {
    "logsumexp": lambda h: h.logsumexp(1).sum(),
    "square": lambda h: h.square().mean(),
    "cross entropy": lambda h: F.cross_entropy(h, torch.arange(len(h)) % WIDTH),
    "per sample": lambda h: h[:, 1:].sum(1).exp().mean(),
}
STEP = st.tuples(st.sampled_from([*ONE, *TWO, *LAYERS, *LAYERS]), st.integers(0, 9), st.integers(0, 9))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(STEP, min_size=1, max_size=8),
    st.sampled_from(sorted(LOSSES)),
    st.integers(0, 3),
    st.sampled_from([None, 1, 2]),
)
@example([("pool", 0, 0), ("multiply", 0, 1)], "cross entropy", 0, 1)
def test_random_graph(steps, loss, seed, size):
    function, tensors = graph(steps, loss, seed)
    with contextlib.suppress(NoStructure):  # a softmax summed up, say, changes with nothing
        check(function, tensors, SAMPLES, used(function, tensors), size=size)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(STEP, min_size=1, max_size=8), st.sampled_from(sorted(LOSSES)), st.integers(0, 3))
def test_no_more_is_held_than_was_predicted(steps, loss, seed):
    """The walk with ranks in place of columns bounds what the walk itself holds after every call."""
    held = []

    class Watched(Curvature):
        def require_samples(self):
            super().require_samples()
            held.append(sum(map(numbers, self.terms)))

    function, tensors = graph(steps, loss, seed)
    value, tape, samples = recorded(function, tensors, SAMPLES)
    with contextlib.suppress(NoStructure), pytest.MonkeyPatch.context() as patched:
        route = route_of(tape, value, samples)
        predicted = cost(route).peak_bytes
        patched.setattr("hesse.methods.sweep.walk.Curvature", Watched)
        walk.diagonal(route, route.covered)
        assert held
        assert 8 * max(held) <= predicted <= 32 * max(held)


def numbers(term):
    """Of all tensors of a term, those that it shares with itself counted once."""
    parts = {LowRank: ("core", "columns"), Cross: ("left", "right"), Diagonal: ("core", "scales")}[type(term)]
    found = {}
    for part in (getattr(term, name) for name in parts):
        for tensor in part.values() if isinstance(part, dict) else [part]:
            tensor = tensor.scale if isinstance(tensor, Unit) else tensor
            if tensor is not None:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
    return sum(found.values())


def graph(steps, loss, seed):
    """A function of random parameters, and these."""
    output, tensors = output_of(steps, seed)
    return lambda *leaves: LOSSES[loss](output(*leaves)), tensors


def output_of(steps, seed):
    """The same before the loss."""
    torch.manual_seed(seed)
    data = x(SAMPLES, WIDTH)
    shapes = [(WIDTH, WIDTH)]
    for name, *_ in steps:
        shapes += {"layer": [(WIDTH, WIDTH)], "affine": [(WIDTH,), (WIDTH,)]}.get(name, [])
    tensors = tuple(x(*shape) / 2 for shape in shapes)

    def function(first, *rest):
        parameters = iter(rest)
        made = [data @ first]
        for name, i, j in steps:
            # Mostly the latest values, so that the graphs are deep.
            g, h = made[-1 - i % min(len(made), 2)], made[-1 - j % len(made)]
            if name == "layer":
                made.append(F.linear(g, next(parameters)))
            elif name == "affine":
                made.append(g * next(parameters) + next(parameters))
            else:
                made.append(ONE[name](g) if name in ONE else TWO[name](g, h))
        return sum(made[-2:])

    return function, tensors


def used(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    found = torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
    return {i for i, part in enumerate(found) if part is not None}
