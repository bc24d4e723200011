"""Every row of the table of calls is a claim, and is checked on random inputs."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from cases import x
from hesse.calls.elementwise import Elements, Scaling, Separable
from hesse.calls.facts import Linear, Selecting, Straight
from hesse.calls.moving import Moving
from hesse.calls.products import Product
from hesse.calls.table import TABLE, canonical, row_of, site_of
from hesse.tape.record import Recorder
from hesse.tape.samples import ONE_SAMPLE, Samples


def positive(*shape):
    return torch.rand(*shape, dtype=torch.float64) * 0.8 + 0.1


A = (2, 3)  # most calls get tensors of this shape
IMAGE = (2, 4, 4, 4)


def _overwritten(a, b):
    whole = a.clone()
    whole[:, 1] = b
    return whole


# name: (function, shapes of its differentiable arguments)
CALLS = {
    "view": (lambda a: a.view(3, 2), A),
    "reshape": (lambda a: a.reshape(6), A),
    "view_as": (lambda a: a.view_as(torch.empty(6)), A),
    "reshape_as": (lambda a: a.reshape_as(torch.empty(6)), A),
    "flatten": (lambda a: a.flatten(), A),
    "unflatten": (lambda a: a.unflatten(1, (3, 1)), A),
    "squeeze": (lambda a: a.squeeze(1), (2, 1)),
    "unsqueeze": (lambda a: a.unsqueeze(1), A),
    "transpose": (lambda a: a.transpose(0, 1), A),
    "swapaxes": (lambda a: a.swapaxes(0, 1), A),
    "swapdims": (lambda a: a.swapdims(0, 1), A),
    "t": (lambda a: a.t(), A),
    "permute": (lambda a: a.permute(1, 0), A),
    "movedim": (lambda a: a.movedim(0, 1), A),
    "moveaxis": (lambda a: a.moveaxis(0, 1), A),
    "T": (lambda a: a.T, A),
    "mT": (lambda a: a.mT, A),
    "adjoint": (lambda a: a.adjoint(), A),
    "contiguous": (lambda a: a.T.contiguous(), A),
    "clone": (lambda a: a.clone(), A),
    "chunk": (lambda a: a.chunk(2, 1), A),
    "split": (lambda a: a.split(2, 1), A),
    "tensor_split": (lambda a: a.tensor_split(2, 1), A),
    "unbind": (lambda a: a.unbind(1), A),
    "narrow": (lambda a: a.narrow(1, 1, 2), A),
    "select": (lambda a: a.select(1, 1), A),
    "getitem": (lambda a: a[:, 1:], A),
    "diagonal": (lambda a: a.diagonal(), A),
    "flip": (lambda a: a.flip(0), A),
    "roll": (lambda a: a.roll(1), A),
    "pixel_shuffle": (lambda a: F.pixel_shuffle(a, 2), IMAGE),
    "pixel_unshuffle": (lambda a: F.pixel_unshuffle(a, 2), IMAGE),
    "channel_shuffle": (lambda a: F.channel_shuffle(a, 2), IMAGE),
    "to": (lambda a: a.to(torch.float64, copy=True), A),
    "float": (lambda a: a.float(), A),
    "double": (lambda a: a.float().double(), A),
    "type": (lambda a: a.type(torch.float32), A),
    "sum": (lambda a: a.sum(1), A),
    "mean": (lambda a: a.mean(1), A),
    "cat": (lambda a, b: torch.cat([a, b], 1), A, A),
    "stack": (lambda a, b: torch.stack([a, b]), A, A),
    "hstack": (lambda a, b: torch.hstack([a, b]), A, A),
    "vstack": (lambda a, b: torch.vstack([a, b]), A, A),
    "expand": (lambda a: a.expand(4, 2, 3), A),
    "expand_as": (lambda a: a.expand_as(torch.empty(4, 2, 3)), A),
    "repeat": (lambda a: a.repeat(2, 2), A),
    "tile": (lambda a: a.tile(2), A),
    "avg_pool1d": (lambda a: F.avg_pool1d(a, 2), (2, 3, 4)),
    "avg_pool2d": (lambda a: F.avg_pool2d(a, 2), IMAGE),
    "avg_pool3d": (lambda a: F.avg_pool3d(a, 2), (1, 2, 2, 2, 4)),
    "adaptive_avg_pool1d": (lambda a: F.adaptive_avg_pool1d(a, 2), (2, 3, 4)),
    "adaptive_avg_pool2d": (lambda a: F.adaptive_avg_pool2d(a, 2), IMAGE),
    "adaptive_avg_pool3d": (lambda a: F.adaptive_avg_pool3d(a, 1), (1, 2, 2, 2, 4)),
    "pad": (lambda a: F.pad(a, (1, 1)), A),
    "constant_pad_nd": (lambda a: torch.constant_pad_nd(a, (1, 1), 2.0), A),
    "unfold": (lambda a: F.unfold(a, 2), IMAGE),
    "fold": (lambda a: F.fold(a, (2, 2), 1), (1, 3, 4)),
    "cumsum": (lambda a: a.cumsum(1), A),
    "tril": (lambda a: a.tril(), A),
    "triu": (lambda a: a.triu(), A),
    "index_select": (lambda a: a.index_select(0, torch.tensor([1, 1])), A),
    "gather": (lambda a: a.gather(1, torch.tensor([[0, 0], [2, 1]])), A),
    "dstack": (lambda a, b: torch.dstack([a, b]), A, A),
    "column_stack": (lambda a, b: torch.column_stack([a, b]), A, A),
    "broadcast_to": (lambda a: a.broadcast_to(4, 2, 3), A),
    "repeat_interleave": (lambda a: a.repeat_interleave(2, 0), A),
    "diag": (lambda a: a.diag(), (3,)),
    "diag_embed": (lambda a: a.diag_embed(), A),
    "trace": (lambda a: a.trace(), (3, 3)),
    "rot90": (lambda a: a.rot90(), A),
    "take": (lambda a: a.take(torch.tensor([0, 4])), A),
    "take_along_dim": (lambda a: a.take_along_dim(torch.tensor([[0, 0], [2, 1]]), 1), A),
    "masked_select": (lambda a: a.masked_select(torch.tensor([True, False, True])), A),
    "setitem": (_overwritten, A, (2,)),
    "index_copy": (lambda a, b: a.index_copy(1, torch.tensor([2]), b), A, (2, 1)),
    "index_fill": (lambda a: a.index_fill(1, torch.tensor([2]), 0.5), A),
    "index_put": (lambda a, b: a.index_put((torch.tensor([1]),), b), A, (1, 3)),
    "index_add": (lambda a, b: a.index_add(0, torch.tensor([1, 1]), b, alpha=3), A, A),
    "masked_scatter": (lambda a, b: a.masked_scatter(torch.tensor([True, False, True]), b), A, A),
    "select_scatter": (lambda a, b: a.select_scatter(b, 1, 2), A, (2,)),
    "slice_scatter": (lambda a, b: a.slice_scatter(b, 1, 1, 3), A, (2, 2)),
    "diagonal_scatter": (lambda a, b: a.diagonal_scatter(b), A, (2,)),
    "scatter": (lambda a, b: a.scatter(1, torch.tensor([[0], [2]]), b), A, (2, 1)),
    "scatter_add": (lambda a, b: a.scatter_add(1, torch.tensor([[0], [2]]), b), A, (2, 1)),
    **{
        f"max_unpool{dims}d": (
            lambda a, dims=dims: getattr(F, f"max_unpool{dims}d")(a, torch.zeros(2, *dims * (1,)).long(), 2),
            (2, *dims * (1,)),
        )
        for dims in (1, 2, 3)
    },
    "interpolate": (lambda a: F.interpolate(a, scale_factor=2, mode="bilinear"), IMAGE),
    "max": (lambda a: a.max(1), A),
    "min": (lambda a: a.min(1), A),
    "sort": (lambda a: a.sort(1), A),
    "topk": (lambda a: a.topk(2, 1), A),
    "kthvalue": (lambda a: a.kthvalue(2, 1), A),
    "median": (lambda a: a.median(1), A),
    "aminmax": (lambda a: torch.aminmax(a, dim=1), A),
    "cummax": (lambda a: a.cummax(1), A),
    "cummin": (lambda a: a.cummin(1), A),
    "amax": (lambda a: a.amax(1), A),
    "amin": (lambda a: a.amin(1), A),
    "embedding": (lambda a: F.embedding(torch.tensor([1, 0, 1]), a), A),
    "einsum": (lambda a, b: torch.einsum("ni,oi->no", a, b), A, (4, 3)),
    "mv": (lambda a, b: torch.mv(a, b), A, (3,)),
    "dot": (lambda a, b: torch.dot(a, b), (3,), (3,)),
    "vdot": (lambda a, b: torch.vdot(a, b), (3,), (3,)),
    "inner": (lambda a, b: torch.inner(a, b), A, A),
    "outer": (lambda a, b: torch.outer(a, b), (2,), (3,)),
    "ger": (lambda a, b: torch.ger(a, b), (2,), (3,)),
    "kron": (lambda a, b: torch.kron(a, b), (2, 2), (2, 3)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), A, (3, 2)),
    "cross": (lambda a, b: torch.linalg.cross(a, b), A, A),
    "vecdot": (lambda a, b: torch.linalg.vecdot(a, b), A, A),
    "addmm": (lambda a: torch.addmm(torch.ones(4).double(), a, torch.ones(3, 4).double(), alpha=2), A),
    "logsumexp": (lambda a: a.logsumexp(1), A),
    "norm": (lambda a: a.norm(dim=1), A),
    "vector_norm": (lambda a: torch.linalg.vector_norm(a, dim=1, keepdim=True), A),
    "prod": (lambda a: a.prod(1), A),
    "cumprod": (lambda a: a.cumprod(1), A),
    "logcumsumexp": (lambda a: a.logcumsumexp(1), A),
    **{
        name: (lambda a, name=name: getattr(torch.special, name)(a), A)
        for name in ["ndtr", "ndtri", "log_ndtr", "entr"]
    },
    "nll_loss": (lambda a: F.nll_loss(a, torch.tensor([0, 2])), A),
    "matmul": (lambda a, b: a @ b, A, (3, 2)),
    "mm": (lambda a, b: torch.mm(a, b), A, (3, 2)),
    "bmm": (lambda a, b: torch.bmm(a, b), (2, 2, 3), (2, 3, 2)),
    "linear": (lambda a, b: F.linear(a, b), A, (4, 3)),
    "conv1d": (lambda a, b: F.conv1d(a, b), (2, 3, 4), (2, 3, 2)),
    "conv2d": (lambda a, b: F.conv2d(a, b), IMAGE, (2, 4, 2, 2)),
    "conv3d": (lambda a, b: F.conv3d(a, b), (1, 2, 2, 2, 3), (2, 2, 2, 2, 2)),
    "conv_transpose1d": (lambda a, b: F.conv_transpose1d(a, b), (2, 3, 4), (3, 2, 2)),
    "conv_transpose2d": (lambda a, b: F.conv_transpose2d(a, b), (1, 2, 2, 2), (2, 2, 2, 2)),
    "conv_transpose3d": (lambda a, b: F.conv_transpose3d(a, b), (1, 2, 1, 1, 2), (2, 1, 1, 2, 2)),
    "where": (lambda a, b: torch.where(torch.tensor([True, False, True]), a, b), A, A),
    "masked_fill": (lambda a: a.masked_fill(torch.tensor([True, False, True]), 0.0), A),
    "clamp": (lambda a: a.clamp(0.2, 0.5), A),
    "clamp_min": (lambda a: a.clamp_min(0.4), A),
    "clamp_max": (lambda a: a.clamp_max(0.4), A),
    "threshold": (lambda a: F.threshold(a, 0.4, 0.0), A),
    "acosh": (lambda a: (a + 1).acosh(), A),
    "log_sigmoid": (lambda a: F.logsigmoid(a), A),
    "pow": (lambda a: a**3, A),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.3), A, A),
    "addcmul": (lambda a, b, c: torch.addcmul(a, b, c), A, A, A),
    "addcdiv": (lambda a, b, c: torch.addcdiv(a, b, c), A, A, A),
    "mse_loss": (lambda a, b: F.mse_loss(a, b), A, A),
    "max_pool1d": (lambda a: F.max_pool1d(a, 2), (2, 3, 4)),
    "max_pool2d": (lambda a: F.max_pool2d(a, 3, 2, 1), IMAGE),
    "max_pool3d": (lambda a: F.max_pool3d(a, 2, dilation=(1, 1, 2)), (1, 2, 2, 2, 4)),
    "max_pool1d_with_indices": (lambda a: F.max_pool1d(a, 2, 1, return_indices=True)[0], (3, 4)),
    "max_pool2d_with_indices": (lambda a: F.max_pool2d(a, 3, 1, return_indices=True)[0], IMAGE),
    "max_pool3d_with_indices": (lambda a: F.max_pool3d(a, 2, return_indices=True)[0], (2, 2, 2, 4)),
    "adaptive_max_pool1d": (lambda a: F.adaptive_max_pool1d(a, 2), (2, 3, 4)),
    "adaptive_max_pool2d": (lambda a: F.adaptive_max_pool2d(a, 3), IMAGE),
    "adaptive_max_pool3d": (lambda a: F.adaptive_max_pool3d(a, (1, 2, 2)), (1, 2, 2, 2, 4)),
    **{
        f"adaptive_max_pool{dims}d_with_indices": (
            lambda a, dims=dims: getattr(F, f"adaptive_max_pool{dims}d")(a, 2, return_indices=True)[0],
            (2, 2, *dims * (4,)),
        )
        for dims in (1, 2, 3)
    },
    "rmatmul": (lambda a, b: torch.Tensor.__rmatmul__(a, b), (3, 2), A),
    "softmax": (lambda a: a.softmax(1), A),
    "log_softmax": (lambda a: F.log_softmax(a, 1), A),
    "cross_entropy": (lambda a: F.cross_entropy(a, torch.tensor([2, 0])), A),
    "layer_norm": (lambda a: F.layer_norm(a, (3,)), A),
    "rms_norm": (lambda a: F.rms_norm(a, (3,)), A),
    "group_norm": (lambda a: F.group_norm(a, 2), IMAGE),
    "batch_norm": (lambda a: F.batch_norm(a, torch.zeros(3).double(), torch.ones(3).double()), A),
    **{
        name: (lambda a, b, name=name: getattr(torch, name)(a, b), A, A)
        for name in [
            *("add", "sub", "mul", "div", "maximum", "minimum", "atan2", "logaddexp", "logaddexp2", "xlogy"),
            *("hypot", "fmod", "remainder"),
        ]
    },
    **{
        name: (lambda a, name=name: getattr(F, name)(a, torch.full(A, 0.3).double()), A)
        for name in [
            "l1_loss",
            "huber_loss",
            "smooth_l1_loss",
            "binary_cross_entropy",
            "poisson_nll_loss",
            "binary_cross_entropy_with_logits",
            "soft_margin_loss",
        ]
    },
    "xlog1py": (lambda a, b: torch.special.xlog1py(a, b), A, A),
    "kl_div": (lambda a: F.kl_div(a, torch.full(A, 0.3).double(), reduction="sum"), A),
}


def call_of(name):
    """The function of a row, and shapes; a function of torch's of that name where none is listed."""
    if name in CALLS:
        return CALLS[name]
    return getattr(torch, name, None) or getattr(F, name), A


def facts_of(call):
    inputs = list(dict.fromkeys(call.inputs.values()))
    return site_of(call, inputs, dict.fromkeys([*inputs[:1], *call.outputs], ONE_SAMPLE))


CLOSED = [name for name, row in TABLE.items() if row.first]


@pytest.mark.parametrize("name", CLOSED)
def test_row(name):
    function, *shapes = call_of(name)
    tensors = [positive(*shape).requires_grad_() for shape in shapes]
    with Recorder(tensors) as tape:
        function(*tensors)
    call = next(call for call in tape.calls if canonical(call.name) == name)
    assert row_of(call) is TABLE[name]
    first, second = facts_of(call).first, facts_of(call).second
    assert type(first) in TABLE[name].first
    assert type(second) is TABLE[name].second

    results = [t for t in torch.utils._pytree.tree_leaves(function(*tensors)) if t.requires_grad]
    count = sum(t.numel() for t in tensors)

    def flat(*tensors):
        results = torch.utils._pytree.tree_leaves(function(*tensors))
        return torch.cat([t.double().reshape(-1) for t in results])

    jacobian = torch.autograd.functional.jacobian(flat, tuple(tensors))
    jacobian = torch.cat([part.flatten(1) for part in jacobian], 1)
    weights = x(len(jacobian))
    hessian = torch.autograd.functional.hessian(
        lambda *tensors: (flat(*tensors) * weights).sum(), tuple(tensors)
    )
    blocks = [
        [block.reshape(t.numel(), -1) for block in row] for row, t in zip(hessian, tensors, strict=True)
    ]
    whole = torch.cat([torch.cat(row, 1) for row in blocks])
    assert whole.shape == (count, count)

    if isinstance(first, Linear) or isinstance(second, Straight):
        assert not whole.any()
    if isinstance(first, Selecting):
        assert set(jacobian.unique().tolist()) <= {0.0, 1.0}
    if isinstance(first, Moving):
        assert (jacobian.sum(1) == 1).all()
        assert (jacobian.sum(0) <= 1).all() or not first.distinct
    if isinstance(first, Scaling):
        (result,) = results
        for part in jacobian.split([t.numel() for t in tensors], 1):
            assert part.shape == (result.numel(), result.numel())
            assert not (part - part.diag().diag()).any()
    if isinstance(first, Separable) and isinstance(second, Elements):
        for row in blocks:
            assert not any((block - block.diag().diag()).any() for block in row)
    if isinstance(first, Product) and len(tensors) > 1:
        assert not blocks[0][0].any()
        assert not blocks[1][1].any()


def assumptions(values):
    """Places for the samples of some values, or of some of them, all of one number."""
    choices = [[None, *(d for d, size in enumerate(v.tensor.shape) if size > 1)] for v in values]
    for dims in itertools.product(*choices):
        sizes = {v.tensor.shape[d] for v, d in zip(values, dims, strict=True) if d is not None}
        if len(sizes) == 1:
            (count,) = sizes
            yield {v: Samples(count, d) for v, d in zip(values, dims, strict=True) if d is not None}


def numbers_of(place, tensor):
    """The sample of every element; -1 where they are not apart."""
    if place.count == 1:
        return torch.full((tensor.numel(),), -1)
    return place.numbered(tensor.shape).flatten().long()


@pytest.mark.parametrize("name", CLOSED)
def test_where_samples_go(name):
    """An element of a sample is a function of that sample alone, and bends join no more than they may."""
    function, *shapes = call_of(name)
    tensors = [positive(*shape).requires_grad_() for shape in shapes]
    with Recorder(tensors) as tape:
        results = [
            t for t in torch.utils._pytree.tree_leaves(function(*tensors)) if isinstance(t, torch.Tensor)
        ]
    call = next(call for call in tape.calls if canonical(call.name) == name)
    if len(tape.calls) > 1:
        return  # the row is that of one call among them
    values = list(dict.fromkeys(call.inputs.values()))
    told = 0
    for places in assumptions(values):
        site = site_of(call, list(places), places)
        found = site.first.placed()
        if found is None:
            continue
        told += 1
        sampled = [v.tensor for v in places]

        def flat(*some, sampled=sampled):
            given = [dict(zip(map(id, sampled), some, strict=True)).get(id(t), t) for t in tensors]
            made = torch.utils._pytree.tree_leaves(function(*given))
            return torch.cat([t.double().reshape(-1) for t in made if t.requires_grad])

        jacobian = torch.autograd.functional.jacobian(flat, tuple(sampled))
        jacobian = torch.cat([part.flatten(1) for part in jacobian], 1)
        own = torch.cat([numbers_of(place, v.tensor) for v, place in places.items()])
        made = [t for t in results if t.requires_grad]
        of = torch.cat([numbers_of(place, t) for place, t in zip(found, made, strict=True)])
        assert not jacobian[(of[:, None] != own) & (of[:, None] >= 0)].any()
        weights = x(len(jacobian))
        hessian = torch.autograd.functional.hessian(
            lambda *some, flat=flat, weights=weights: (flat(*some) * weights).sum(), tuple(sampled)
        )
        sizes = [t.numel() for t in sampled]
        whole = torch.cat(
            [torch.cat([b.reshape(n, -1) for b in row], 1) for n, row in zip(sizes, hessian, strict=True)]
        )
        if site.second.vanishes:
            assert not whole.any()
        if site.second.within:
            assert not whole[own[:, None] != own].any()
    assert told or name == "rmatmul"  # nobody calls it by itself


def test_an_index_may_take_an_element_twice():
    a = positive(3).requires_grad_()
    with Recorder([a]) as tape:
        a[torch.tensor([0, 0])], a[1:]
    assert [isinstance(facts_of(call).first, Moving) for call in tape.calls] == [False, True]
