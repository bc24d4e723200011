"""The one table of calls: by name, how its arguments are read, its two facts, and what it costs.

A row is a claim about a call; `tests/test_rules.py` checks every one numerically. Of several maps the first
that is for a call's arguments is taken. A call without a row, or for whose arguments no map of its row is, is
differentiated by itself, which is slower and just as exact. No walk decides by a call's name. (Before a call
comes here it may have been taken apart, `tape.composites`, or been taken another way, `runtime.kernels`.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hesse.calls import layouts, norms, reductions, rows
from hesse.calls.convolutions import Convolution
from hesse.calls.elementwise import Elements, OfFactors, Plus, Scaling, Separable, Sum
from hesse.calls.facts import Bend, Linear, Map, Point, Selecting, Site, Straight
from hesse.calls.moving import Moving, Pooling, Scattered, Slice, adaptive_windows, windows
from hesse.calls.products import AddedMatrixMap, Crossed, MatrixMap, MatrixProduct, Product
from hesse.tape.record import Call, Value
from hesse.tape.samples import Samples


def _elements(call: Call) -> int:
    """One operation for each element of the results."""
    return sum(value.tensor.numel() for value in call.outputs)


@dataclass(frozen=True)
class Row:
    """What is known of a call.

    Attributes:
        first: maps, of which the first that is for the arguments is taken.
        second: the bend that goes with them.
        read: makes of the arguments what the facts need to know; None where they are not for the row.
        is_layer: what is read is a layer (`layouts.Read`).
        flops: multiplications and additions.
        convolves: products of it are batched by slower kernels than those of matrices.
    """

    first: Sequence[type[Map]] = ()
    second: type[Bend] = Bend
    read: Callable[..., Any] | None = None
    is_layer: bool = False
    flops: Callable[[Call], int] = _elements
    convolves: bool = False

    @property
    def linear(self) -> bool:
        """Is the call linear in all of its arguments together?"""
        return bool(self.first) and all(first.linear for first in self.first)


def row_of(call: Call) -> Row | None:
    """The row of a call, if there is one."""
    return TABLE.get(canonical(call.name))


def site_of(call: Call, inputs: Sequence[Value], samples: Mapping[Value, Samples]) -> Site:
    """The call with its two facts.

    Args:
        call: the call.
        inputs: the arguments that it is a function of.
        samples: where they are in every live value.
    """
    row = row_of(call) or Row()
    point, listed = Point(call, inputs, samples, row.read), bool(row.first)
    for kind in row.first:
        first = kind.of(point)
        if first is not None:
            return Site(point, first, row.second(point, first), listed)
    first = Map(point)
    return Site(point, first, Bend(point, first), listed)


def flops(call: Call) -> int:
    """Multiplications and additions of a call."""
    row = row_of(call)
    return _elements(call) if row is None else row.flops(call)


def convolves(call: Call) -> bool:
    """Is a call a convolution?"""
    row = row_of(call)
    return row is not None and row.convolves


def canonical(name: str) -> str:
    """One name for the spellings of a call: `add`, `add_`, `__add__`, `__iadd__`, `add.Tensor`."""
    bare = name.partition(".")[0].strip("_").removeprefix("special_").removeprefix("linalg_")
    if name.startswith("__") and bare[:1] in "ri" and bare[1:] in _DUNDERS:
        bare = bare[1:]
    return _SYNONYMS.get(bare, bare)


_DUNDERS = {"add", "sub", "mul", "div", "truediv", "pow"}
_SYNONYMS = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "truediv": "div",
    "true_divide": "div",
    "rsub": "sub",
    "rdiv": "div",
    "negative": "neg",
    "concat": "cat",
    "concatenate": "cat",
    "imatmul": "matmul",
    "absolute": "abs",
    "clip": "clamp",
    "expit": "sigmoid",
    "logsigmoid": "log_sigmoid",
    "gammaln": "lgamma",
    "psi": "digamma",
    "row_stack": "vstack",
    "ravel": "flatten",
    "float_power": "pow",
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "tan2")},
}


def _tensors(call: Call) -> list[Tensor]:
    return [argument for argument in call.arguments if isinstance(argument, Tensor)]


def _contraction(call: Call) -> int:
    return 2 * _elements(call) * _tensors(call)[0].shape[-1]


def _added_contraction(call: Call) -> int:
    return 2 * _elements(call) * _tensors(call)[1].shape[-1]


def _convolution(call: Call) -> int:
    return 2 * _elements(call) * _kernel(_tensors(call)[1])


def _transposed(call: Call) -> int:
    input, weight = _tensors(call)[:2]
    return 2 * input.numel() * _kernel(weight)


def _kernel(weight: Tensor) -> int:
    return weight.numel() // weight.shape[0]


def _attention(call: Call) -> int:
    query, key = _tensors(call)[:2]
    return 4 * query.numel() * key.shape[-2]


def _any_contraction(call: Call) -> int:
    factors = _tensors(call)
    return 2 * _elements(call) * max(factor[:1].numel() if factor.dim() else 1 for factor in factors)


def _all(row: Row, names: str) -> dict[str, Row]:
    return dict.fromkeys(names.split(), row)


_CONVOLVED = (Convolution, Product), Crossed

TABLE: dict[str, Row] = {
    **_all(
        Row((Moving, Linear), Straight),
        """view reshape view_as reshape_as flatten unflatten squeeze unsqueeze transpose swapaxes swapdims t
        permute movedim moveaxis T mT adjoint contiguous clone chunk split tensor_split unbind narrow
        select diagonal flip roll pixel_shuffle pixel_unshuffle channel_shuffle to float double type""",
    ),
    "getitem": Row((Slice, Selecting), Straight),
    **{
        f"max_pool{dims}d{suffix}": Row((Pooling, Selecting), Straight, windows(dims))
        for dims in (1, 2, 3)
        for suffix in ("", "_with_indices")
    },
    **{
        f"adaptive_max_pool{dims}d{suffix}": Row((Pooling, Selecting), Straight, adaptive_windows(dims))
        for dims in (1, 2, 3)
        for suffix in ("", "_with_indices")
    },
    **_all(
        Row((Selecting,), Straight),
        """sum cat stack hstack vstack dstack column_stack expand expand_as broadcast_to repeat tile
        repeat_interleave pad constant_pad_nd unfold cumsum tril triu diag diag_embed trace rot90 fliplr
        flipud index_select gather take take_along_dim masked_select setitem index_copy index_fill index_put
        masked_scatter select_scatter slice_scatter diagonal_scatter scatter_add max_unpool1d max_unpool2d
        max_unpool3d""",
    ),
    "scatter": Row((Scattered,), Straight),
    **_all(
        Row((Linear,), Straight),
        """mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        fold interpolate index_add max min amax amin aminmax sort msort topk kthvalue median cummax
        cummin""",
    ),
    "nll_loss": Row((rows.Chosen,), Straight, rows.read_classes),
    "add": Row((Sum, Plus), Straight),
    "sub": Row((Plus,), Straight),
    **_all(
        Row((Scaling,), Straight),
        """neg relu relu6 leaky_relu hardtanh softshrink hardshrink threshold abs clamp clamp_min clamp_max
        where masked_fill maximum minimum sign floor ceil round trunc frac fmod remainder""",
    ),
    "mul": Row((Scaling,), OfFactors),
    **_all(
        Row((Scaling,), Elements),
        """div pow square sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh
        asin acos atan asinh acosh atanh sigmoid log_sigmoid erf erfc elu selu celu gelu silu mish softplus
        softsign hardswish tanhshrink reciprocal lerp addcmul addcdiv atan2 logaddexp logaddexp2 xlogy xlog1py
        sinc lgamma digamma erfinv logit hypot nan_to_num ndtr ndtri log_ndtr entr""",
    ),
    **_all(
        Row((Separable,), Elements),
        """mse_loss l1_loss huber_loss smooth_l1_loss binary_cross_entropy binary_cross_entropy_with_logits
        kl_div poisson_nll_loss soft_margin_loss""",
    ),
    **_all(Row((MatrixProduct, Product), Crossed, layouts.read_matmul, True, _contraction), "matmul mm"),
    "bmm": Row((MatrixProduct, Product), Crossed, flops=_contraction),
    "rmatmul": Row((Product,), Crossed, flops=_contraction),
    "einsum": Row((Product,), Crossed, flops=_any_contraction),
    **_all(Row((Product,), Crossed, flops=_contraction), "mv dot"),
    **_all(Row((Product,), Crossed), "outer ger inner vdot vecdot kron tensordot cross"),
    "addmm": Row((AddedMatrixMap,), Crossed, layouts.read_addmm, True, _added_contraction),
    "linear": Row((MatrixMap, Product), Crossed, layouts.read_linear, True, _contraction),
    **{
        f"conv{dims}d": Row(*_CONVOLVED, layouts.read_convolution(dims), True, _convolution, True)
        for dims in (1, 2, 3)
    },
    **{
        f"conv_transpose{dims}d": Row(*_CONVOLVED, layouts.read_transposed(dims), True, _transposed, True)
        for dims in (1, 2, 3)
    },
    "softmax": Row((rows.Softmax,), rows.SoftmaxBend, rows.read_softmax),
    "log_softmax": Row((rows.LogSoftmax,), rows.LogSoftmaxBend, rows.read_softmax),
    "cross_entropy": Row((rows.CrossEntropy,), rows.CrossEntropyBend, rows.read_classes),
    "logsumexp": Row((reductions.LogSumExp,), reductions.LogSumExpBend, reductions.read_reduction),
    "norm": Row((reductions.Length,), reductions.LengthBend, reductions.read_norm),
    "vector_norm": Row((reductions.Length,), reductions.LengthBend, reductions.read_vector_norm),
    "prod": Row((reductions.Along,), reductions.AlongBend, reductions.read_reduction),
    **_all(
        Row((reductions.Along,), reductions.AlongBend, reductions.read_cumulative), "cumprod logcumsumexp"
    ),
    "layer_norm": Row((norms.Normalised,), norms.NormalisedBend, norms.read_layer_norm),
    "rms_norm": Row((norms.Normalised,), norms.NormalisedBend, norms.read_rms_norm),
    "group_norm": Row((norms.Normalised,), norms.NormalisedBend, norms.read_group_norm),
    "batch_norm": Row((norms.Standardised,), Straight, norms.read_batch_norm),
    "embedding": Row((Selecting,), Straight, layouts.read_embedding, True),
    # Layers, and calls whose cost is known, that have no closed form.
    "bilinear": Row(read=layouts.read_bilinear, is_layer=True, flops=_any_contraction),
    "baddbmm": Row(flops=_added_contraction),
    "scaled_dot_product_attention": Row(flops=_attention),
}
