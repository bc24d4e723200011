"""The table of calls: how each enters its differentiable arguments.

A row is a claim about a call; `tests/test_rules.py` checks every one numerically. A call without a row is
`GENERAL`: whoever walks the tape differentiates that one call, which is slower and just as exact.
"""

from __future__ import annotations

from enum import Enum

from hesse.tape.record import Call


class Kind(Enum):
    """How a call enters its differentiable arguments."""

    VIEW = "every element of the result is one element of the argument, none of them twice"
    LINEAR = "linear in all of its arguments together"
    PIECEWISE = "elementwise, and of straight pieces, without curvature"
    ELEMENTWISE = "after broadcasting, every element of the result comes from one element of each argument"
    SEPARABLE = "a sum of elements, each from one element of every argument"
    BILINEAR = "linear in each of two arguments"
    GENERAL = "anything"


def kind_of(call: Call) -> Kind:
    """The row of a call."""
    name = canonical(call.name)
    if name == "getitem" and not _is_plain_index(call):
        return Kind.LINEAR  # may take an element twice
    return TABLE.get(name, Kind.GENERAL)


def _is_plain_index(call: Call) -> bool:
    """Is it made of numbers and slices alone, and not of tensors, arrays or lists?"""
    (_, index), _ = call.nested(call.arguments)
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is ... or type(part) in (int, slice) for part in parts)


def canonical(name: str) -> str:
    """One name for the spellings of a call: `add`, `add_`, `__add__`, `__radd__`, `__iadd__`."""
    bare = name.strip("_")
    if name.startswith("__") and bare[:1] in "ri" and bare[1:] in _DUNDERS:
        bare = bare[1:]
    return _SYNONYMS.get(bare, bare)


_DUNDERS = {"add", "sub", "mul", "div", "truediv", "pow", "matmul"}
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
}


def _rows(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


TABLE: dict[str, Kind] = {
    **_rows(
        Kind.VIEW,
        """view reshape view_as reshape_as flatten unflatten squeeze unsqueeze transpose swapaxes swapdims t
        permute movedim moveaxis T mT adjoint contiguous clone chunk split tensor_split unbind narrow
        select getitem diagonal flip roll pixel_shuffle pixel_unshuffle channel_shuffle to float
        double type""",
    ),
    **_rows(
        Kind.LINEAR,
        """sum mean cat stack hstack vstack expand expand_as repeat tile avg_pool1d avg_pool2d avg_pool3d
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d pad constant_pad_nd unfold fold cumsum
        tril triu index_select gather nll_loss""",
    ),
    **_rows(
        Kind.PIECEWISE,
        """add sub neg relu relu6 leaky_relu hardtanh softshrink hardshrink threshold abs clamp
        clamp_min clamp_max where masked_fill maximum minimum""",
    ),
    **_rows(
        Kind.ELEMENTWISE,
        """mul div pow square sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh
        asin acos atan asinh acosh atanh sigmoid log_sigmoid erf erfc elu selu celu gelu silu mish softplus
        softsign hardswish tanhshrink reciprocal lerp addcmul addcdiv atan2 logaddexp xlogy sinc""",
    ),
    **_rows(
        Kind.SEPARABLE,
        """mse_loss l1_loss huber_loss smooth_l1_loss binary_cross_entropy binary_cross_entropy_with_logits
        kl_div poisson_nll_loss soft_margin_loss""",
    ),
    **_rows(
        Kind.BILINEAR,
        """matmul mm bmm linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d""",
    ),
}
