"""Calls that hide others: the same in terms of calls that have rows in the table, or that are layers.

A function here declines, by `NotImplemented` and before it calls anything, what it does not take apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

State = tuple[Tensor, ...]


class TakenApart(TorchFunctionMode):
    """Evaluates calls that hide others by these, so that numbers are the same to the last bit every time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = self.parts(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if result is NotImplemented else result

    def parts(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result by the parts, which come here too; `NotImplemented` for calls that stay as they are."""
        if func not in COMPOSITES or not torch.is_grad_enabled():
            return NotImplemented
        with self:
            return COMPOSITES[func](*args, **kwargs)


def _opened(function: Any) -> FunctionType:
    """A copy of a composite function that runs, where the original would hand itself to the mode."""
    unasked = {name: _never for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = FunctionType(
        function.__code__, {**function.__globals__, **unasked}, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _never(*tensors: Any) -> bool:
    return False


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention as products and a softmax; a query that may look at nothing gets zeros."""
    if dropout_p or (attn_mask is not None and not _is_mask(attn_mask, query, is_causal)):
        return NotImplemented
    if enable_gqa:
        key, value = (_repeated(heads, query.shape[-3]) for heads in (key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value
    if attn_mask is None:
        return torch.softmax(scores, -1) @ value
    if attn_mask.dtype == torch.bool:
        blind = ~attn_mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~(attn_mask | blind), -torch.inf)
    else:
        blind = attn_mask.detach().isneginf().all(-1, keepdim=True)
        scores = scores + attn_mask.masked_fill(blind, 0).to(scores.dtype)
    return torch.softmax(scores, -1).masked_fill(blind, 0) @ value


def _is_mask(mask: Tensor, query: Tensor, is_causal: bool) -> bool:
    """Does torch take this mask?"""
    return not is_causal and mask.dtype in (torch.bool, torch.float32, query.dtype)


def _repeated(heads: Tensor, count: int) -> Tensor:
    """Every head `[..., heads, positions, width]` several times in a row, to make `count` of them."""
    times = count // heads.shape[-3]
    return heads.unsqueeze(-3).expand(*heads.shape[:-2], times, *heads.shape[-2:]).flatten(-4, -3)


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """Attention that gives its weights makes its scores by this, the mask added."""
    return input + torch.bmm(batch1, batch2) if beta == alpha == 1 else NotImplemented


def _addbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    return input + torch.bmm(batch1, batch2).sum(0) if beta == alpha == 1 else NotImplemented


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    """A weight for all, or for every channel."""
    channels = weight if weight.numel() == 1 else weight.view(-1, *(1,) * max(0, input.dim() - 2))
    return torch.where(input > 0, input, channels * input)


def _glu(input: Tensor, dim: int = -1) -> Any:
    if input.shape[dim] % 2:
        return NotImplemented  # an error
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


def _variance(
    input: Tensor, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Any:
    """The mean of squared distances from the mean, of dimensions that are told."""
    dims = [dim] if type(dim) is int else dim
    if not isinstance(dims, (tuple, list)) or not dims or not input.is_floating_point():
        return NotImplemented
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    count = math.prod(input.shape[d] for d in dims)
    if count - correction <= 0:
        return NotImplemented  # what is not finite is torch's to tell
    centred = input - input.mean(dims, keepdim=True)
    return centred.square().sum(dims, keepdim=keepdim) / (count - correction)


def _deviation(*args: Any, **kwargs: Any) -> Any:
    """The root of the variance; where that is zero torch's own has a derivative, and the root has none."""
    with torch.no_grad():
        if not bool(torch.std(*args, **kwargs).all()):
            return NotImplemented
    variance = _variance(*args, **kwargs)
    return variance if variance is NotImplemented else variance.sqrt()


Formula = Callable[[Tensor, Tensor, State], State]
"""From what the input and the last hidden state give, and the last state, to the next."""


def _cell(
    formula: Formula,
    input: Tensor,
    state: State,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> State:
    """One step: two linear layers, the formula, and perhaps a projection of what is shown."""
    given, own = functional.linear(input, w_ih, b_ih), functional.linear(state[0], w_hh, b_hh)
    hidden, *memory = formula(given, own, state)
    return hidden if w_hr is None else functional.linear(hidden, w_hr), *memory


def _rnn(activation: Callable[[Tensor], Tensor], given: Tensor, own: Tensor, state: State) -> State:
    return (activation(given + own),)


def _gru(given: Tensor, own: Tensor, state: State) -> State:
    (hidden,) = state
    sizes = [2 * hidden.shape[-1], hidden.shape[-1]]
    (gates, candidate), (own_gates, own_candidate) = given.split(sizes, -1), own.split(sizes, -1)
    reset, keep = torch.sigmoid(gates + own_gates).chunk(2, -1)
    return (torch.lerp(torch.tanh(candidate + reset * own_candidate), hidden, keep),)


def _lstm(given: Tensor, own: Tensor, state: State) -> State:
    _, memory = state
    take, keep, candidate, show = (given + own).chunk(4, -1)
    memory = torch.sigmoid(keep) * memory + torch.sigmoid(take) * torch.tanh(candidate)
    return torch.sigmoid(show) * torch.tanh(memory), memory


def _step(cell: Callable[..., State], input: Tensor, hx: Tensor | State, *weights: Tensor | None) -> Any:
    """One step of one layer."""
    return cell(input, (hx,), *weights)[0] if isinstance(hx, Tensor) else cell(input, hx, *weights)


def _recurrent(
    cell: Callable[..., State],
    input: Tensor,
    hx: Tensor | State,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """All layers, both ways, step by step.

    A step keeps the dimension of time, and the caller's order of dimensions, so that samples stay in one
    place. Its input is multiplied by itself, not with those of all steps at once: a sum of two layers is
    differentiated by once for both.
    """
    time = int(batch_first)
    if not isinstance(has_biases, bool) or (train and dropout and num_layers > 1):
        return NotImplemented  # a packed sequence, which has its parameters there; random numbers
    if not 0 < input.shape[time] <= params[0].shape[-1] + params[1].shape[-1]:
        return NotImplemented  # an error; more outputs of steps to differentiate by than weights

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1) if batch_first else tensor

    hx = (hx,) if isinstance(hx, Tensor) else hx
    initial = list(zip(*(turned(tensor).split(1, time) for tensor in hx), strict=True))
    size = len(params) // len(initial)
    final: list[State] = []
    for _ in range(num_layers):
        results = []
        for backwards in (False, True)[: 1 + bidirectional]:
            state = initial[len(final)]
            w_ih, w_hh, *others = params[size * len(final) : size * (len(final) + 1)]
            weights = [w_ih, w_hh, *(others if has_biases else (None, None, *others))]
            order = slice(None, None, -1 if backwards else 1)
            steps = []
            for step in input.split(1, time)[order]:
                state = cell(step, state, *weights)
                steps.append(state[0])
            results.append(torch.cat(steps[order], time))
            final.append(state)
        input = torch.cat(results, -1) if bidirectional else results[0]
    # In memory, steps and layers come first, as with torch's own.
    output = turned(turned(input).contiguous())
    return output, *(turned(torch.cat(states, time)).contiguous() for states in zip(*final, strict=True))


_tanh_cell = partial(_cell, partial(_rnn, torch.tanh))
_relu_cell = partial(_cell, partial(_rnn, torch.relu))
_gru_cell, _lstm_cell = partial(_cell, _gru), partial(_cell, _lstm)

_LAYERED: dict[Any, Callable[..., Any]] = {
    functional.multi_head_attention_forward: _opened(functional.multi_head_attention_forward),
    torch.rnn_tanh: partial(_recurrent, _tanh_cell),
    torch.rnn_relu: partial(_recurrent, _relu_cell),
    torch.gru: partial(_recurrent, _gru_cell),
    torch.lstm: partial(_recurrent, _lstm_cell),
    torch.rnn_tanh_cell: partial(_step, _tanh_cell),
    torch.rnn_relu_cell: partial(_step, _relu_cell),
    torch.gru_cell: partial(_step, _gru_cell),
    torch.lstm_cell: partial(_step, _lstm_cell),
}

COMPOSITES: dict[Any, Callable[..., Any]] = {
    **_LAYERED,
    functional.scaled_dot_product_attention: _attention,
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _baddbmm),
    **dict.fromkeys((torch.addbmm, Tensor.addbmm), _addbmm),
    **dict.fromkeys((torch.prelu, Tensor.prelu, functional.prelu), _prelu),
    **dict.fromkeys((torch.var, Tensor.var), _variance),
    **dict.fromkeys((torch.std, Tensor.std), _deviation),
    functional.glu: _glu,
    **{
        function: _opened(function)
        for function in (functional.normalize, functional.softmin, functional.lp_pool1d, functional.lp_pool2d)
    },
}
"""By the function of the torch API; each takes its arguments."""

LAYERED = _LAYERED.keys()
"""Those that hide layers."""
