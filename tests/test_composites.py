"""Calls taken apart on the tape: the same results as torch's own, from calls that have rows in the table."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import hesse
from cases import x
from hesse.tape.record import Recorder
from networks import Problem, Steps, Tokens, squares
from oracle import hessian_matrix, relative_error

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def recorded(func, leaves):
    """Names of the calls, and the result; and torch's own result."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = func()
        with Recorder(leaves) as recorder:
            found = func()
    assert recorder.hidden is None
    return [call.name for call in recorder.calls], found, expected


def assert_same(found, expected, leaves):
    """In values, in first derivatives, and in how they lie in memory."""
    found, expected = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
        strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (one, other)]
        assert strides[0] == strides[1]
    totals = [sum((part**3).sum() for part in parts) for parts in (found, expected)]
    gradients = [torch.autograd.grad(total, leaves, materialize_grads=True) for total in totals]
    torch.testing.assert_close(*gradients, **EXACT)


RECURRENT = {
    "rnn": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "lstm, projected": (nn.LSTM, {"proj_size": 2}),
}


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("given", [True, False], ids=["with a state", "without"])
@pytest.mark.parametrize(
    ("layers", "bias", "bidirectional", "batch_first"), list(product([1, 3], *3 * [[False, True]]))
)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name, layers, bias, bidirectional, batch_first, given, batched):
    kind, options = RECURRENT[name]
    model = kind(
        3, 4, layers, bias=bias, bidirectional=bidirectional, batch_first=batch_first, **options
    ).double()
    leaves = list(model.parameters())
    inputs = x(*((2, 5) if batch_first else (5, 2)), 3) if batched else x(5, 3)
    state = None
    if given:
        extent = layers * (1 + bidirectional), *([2] if batched else [])
        hidden = x(*extent, options.get("proj_size", 4)).requires_grad_()
        leaves.append(hidden)
        state = (hidden, x(*extent, 4)) if kind is nn.LSTM else hidden
    names, found, expected = recorded(lambda: model(inputs, state), leaves)
    assert not {"lstm", "gru", "rnn_tanh", "rnn_relu"}.intersection(names)
    assert_same(found, expected, leaves)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["with a state", "without"])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells(kind, given, bias):
    cell = kind(3, 4, bias=bias).double()
    leaves, inputs = list(cell.parameters()), x(2, 3)
    state = (x(2, 4), x(2, 4)) if kind is nn.LSTMCell else x(2, 4)
    names, found, expected = recorded(lambda: cell(inputs, state if given else None), leaves)
    assert names.count("linear") == 2
    assert_same(found, expected, leaves)


def packed(model):
    return model(nn.utils.rnn.pack_padded_sequence(x(3, 2, 3), torch.tensor([3, 2])))[0].data


WHOLE = {
    "packed": (lambda: nn.LSTM(3, 4), packed),
    "packed, gru": (lambda: nn.GRU(3, 4), packed),
    "more steps than inputs": (lambda: nn.GRU(3, 4), lambda model: model(x(8, 2, 3))),
}


@pytest.mark.parametrize("name", WHOLE)
def test_calls_that_stay_whole(name):
    build, func = WHOLE[name]
    model = build().double()
    with Recorder(list(model.parameters())) as recorder:
        func(model)
    assert not {"linear", "sigmoid"}.intersection(call.name for call in recorder.calls)


def test_dropout_between_layers_stays_whole():
    model = nn.LSTM(3, 4, 2, dropout=0.5).double()
    for training, names in ((True, ["lstm"]), (False, ["linear", "linear"])):
        with Recorder(list(model.train(training).parameters())) as recorder:
            model(x(3, 2, 3))
        assert [call.name for call in recorder.calls][:2] == names


def test_no_steps_are_an_error_as_with_torch():
    model = nn.GRU(3, 4).double()
    for context in (Recorder(list(model.parameters())), torch.enable_grad()):
        with pytest.raises(RuntimeError, match="sequence length"), context:
            model(x(0, 2, 3))


def attended():
    """Queries, keys and values of one batch, and keys and values for groups of two heads."""
    torch.manual_seed(0)
    query, key, value, *grouped = (
        x(*shape).requires_grad_() for shape in ((2, 4, 3, 2), *2 * [(2, 4, 5, 2)], *2 * [(2, 2, 5, 2)])
    )
    return query, (key, value), tuple(grouped)


CAUSAL = torch.ones(3, 5, dtype=torch.bool).tril()
BLIND = CAUSAL & torch.tensor([[True], [False], [True]])  # a query that may look at nothing


def additive(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf) + x(*mask.shape)


MASKS = {
    "none": lambda: {},
    "causal": lambda: {"is_causal": True},
    "boolean": lambda: {"attn_mask": CAUSAL},
    "boolean, of every sample": lambda: {"attn_mask": torch.rand(2, 1, 3, 5) > 0.4},
    "boolean, blind": lambda: {"attn_mask": BLIND},
    "additive": lambda: {"attn_mask": x(3, 5)},
    "additive, blind": lambda: {"attn_mask": additive(BLIND)},
    "additive, float": lambda: {"attn_mask": additive(BLIND).float()},
    "additive, learned": lambda: {"attn_mask": additive(BLIND).requires_grad_()},
    "scaled": lambda: {"attn_mask": additive(CAUSAL), "scale": -0.7},
}


@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
@pytest.mark.parametrize("name", MASKS)
def test_attention(name, grouped):
    query, own, shared = attended()
    options = MASKS[name]()
    key, value = shared if grouped else own
    mask = options.get("attn_mask")
    leaves = [query, key, value, *([mask] if mask is not None and mask.requires_grad else [])]
    names, found, expected = recorded(
        lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **options), leaves
    )
    assert "scaled_dot_product_attention" not in names
    assert found.isfinite().all()
    assert_same(found, expected, leaves)


REFUSED = {
    "two masks": {"attn_mask": CAUSAL, "is_causal": True},
    "a mask of numbers": {"attn_mask": CAUSAL.long()},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_attention_that_torch_refuses(options):
    query, (key, value), _ = attended()
    with pytest.raises(RuntimeError, match="mask"), sdpa_kernel(SDPBackend.MATH), Recorder([query]):
        F.scaled_dot_product_attention(query, key, value, **options)


def test_attention_with_dropout_stays_whole():
    query, (key, value), _ = attended()
    with Recorder([query, key, value]) as recorder:
        F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    assert [call.name for call in recorder.calls] == ["scaled_dot_product_attention"]


def test_a_product_with_a_mask_added():
    query, keys, mask = (x(*shape).requires_grad_() for shape in ((2, 3, 4), (2, 4, 5), (3, 5)))
    leaves = [query, keys, mask]
    names, found, expected = recorded(lambda: torch.baddbmm(mask, query, keys), leaves)
    assert names == ["bmm", "add"]
    assert_same(found, expected, leaves)
    names, found, expected = recorded(lambda: torch.baddbmm(mask, query, keys, beta=0.5, alpha=2), leaves)
    assert names == ["baddbmm"]
    assert_same(found, expected, leaves)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_by_fewer_products_than_coordinates(kind):
    """By what the plan picks itself."""
    cells = kind(8, 8, batch_first=True)
    model = nn.Sequential(Outputs(cells), nn.Linear(8, 2))
    problem = Problem(model, squares, x(4, 3, 8))
    result = hesse.hessian_diagonal(problem.closure, problem.tensors, full_output=True)
    assert result.plan.method == "taps"
    outputs = 8 * {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}[kind]
    # One for every step and output, of which a GRU has two kinds; one for every state that is an input.
    taps = 3 * outputs * (1 + (kind is nn.GRU)) + 2 * 8 + 3 * 2
    assert result.plan.passes == taps < sum(tensor.numel() for tensor in problem.tensors) / 2
    found = torch.cat([part.flatten() for part in result.value])
    assert relative_error(found, problem.matrix().diagonal()) < 1e-9


CANCELLED = {
    "recurrent": lambda: Problem(Steps(nn.LSTM, batch_first=True), squares, x(3, 3, 2)),
    "attention": lambda: Problem(Tokens(), squares, x(3, 4, 4)),
}


@pytest.mark.parametrize("method", ["auto", "taps", "dense"])
@pytest.mark.parametrize("name", CANCELLED)
def test_rounding_is_no_randomness(name, method):
    """All evaluations of an answer make the same calls, also where only rounding is left of the value."""
    problem = CANCELLED[name]()
    with sdpa_kernel(SDPBackend.MATH):
        value = problem.closure().item()
    diagonal = hesse.hessian_diagonal(lambda: problem.closure() - value, problem.tensors, method=method)
    found = torch.cat([part.flatten() for part in diagonal])
    assert relative_error(found, problem.matrix().diagonal()) < 1e-9


class Outputs(nn.Module):
    """Without the states."""

    def __init__(self, cells):
        super().__init__()
        self.cells = cells

    def forward(self, sequence):
        return self.cells(sequence)[0]


def test_the_dense_method_keeps_the_kernel(monkeypatch):
    """It looks at no structure, and evaluates the function as it is."""
    monkeypatch.setattr("hesse.tape.composites.COMPOSITES", {torch.lstm: None})
    problem = Problem(Steps(nn.LSTM), squares, x(2, 3, 2))
    result = hesse.hessian_diagonal(problem.closure, problem.tensors, method="dense")
    found = torch.cat([part.flatten() for part in result])
    assert relative_error(found, problem.matrix().diagonal()) < 1e-9


WEIGHT = x(4).requires_grad_()
BATCHES = x(3, 2, 4), x(3, 4, 5)
SMALL_CALLS = {
    "prelu": lambda h: F.prelu(h, WEIGHT),
    "prelu, one weight": lambda h: torch.prelu(h, WEIGHT[:1]),
    "glu": lambda h: F.glu(h),
    "glu, dimension": lambda h: F.glu(h.T, 0),
    "var": lambda h: h.var(1),
    "var, kept": lambda h: torch.var(h, (1,), unbiased=False, keepdim=True),
    "var, correction": lambda h: h.var(dim=-1, correction=0),
    "std": lambda h: h.std(1),
    "std, two dimensions": lambda h: torch.std(h.view(5, 2, 2), (1, 2), correction=2),
    "normalize": lambda h: F.normalize(h),
    "softmin": lambda h: F.softmin(h, 1),
    "lp_pool1d": lambda h: F.lp_pool1d(h[:, None], 2, 2),
    "lp_pool2d": lambda h: F.lp_pool2d(h.view(5, 1, 2, 2), 2, (1, 2)),
    "addbmm": lambda h: torch.addbmm(h[:2, :1], BATCHES[0] * h[0], BATCHES[1]),
}


@pytest.mark.parametrize("name", SMALL_CALLS)
def test_small_calls(name):
    """Taken apart, of the same value and derivatives, and swept."""
    call = SMALL_CALLS[name]
    hidden = x(5, 4).requires_grad_()
    leaves = [hidden, WEIGHT] if "prelu" in name else [hidden]
    names, found, expected = recorded(lambda: call(hidden), leaves)
    assert name.partition(",")[0] not in names
    torch.testing.assert_close(found, expected, **EXACT)
    totals = [(part**3).sum() for part in (found, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(t, leaves, retain_graph=True) for t in totals), **EXACT)
    if name == "addbmm":
        return  # which adds up what would be samples
    weight, data = x(4, 3), x(5, 3)
    func = lambda w: call(F.linear(data, w)).sin().sum()
    result = hesse.hessian_diagonal(func, weight, full_output=True, method="sweep")
    assert result.plan.method == "sweep"
    assert "autograd" not in result.plan.reason
    assert relative_error(result.value.flatten(), hessian_matrix(func, [weight]).diagonal()) < 1e-9


def test_what_torch_refuses_it_refuses_and_what_has_no_spread_it_does_itself():
    h = torch.ones(3, 3, dtype=torch.float64).requires_grad_()
    with Recorder([h]) as recorder, pytest.raises(RuntimeError, match="even"):
        F.glu(h)
    with recorder:
        gradient = torch.autograd.grad(h.std(1).sum(), h)[0]
    assert not gradient.isnan().any()
    assert [call.name for call in recorder.calls] == ["std", "sum"]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_exported_modules_are_seen_and_scripts_are_said_to_hide():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = x(5, 3)
    exported = torch.export.export(model, (data,)).module()
    expected = hesse.hessian_diagonal(lambda: squares(model(data)), list(model.parameters()))
    loss, parameters = lambda: squares(exported(data)), list(exported.parameters())
    result = hesse.hessian_diagonal(loss, parameters, method="sweep", full_output=True)
    assert result.plan.method == "sweep"
    torch.testing.assert_close([d.data for d in result.value], expected)
    traced = torch.jit.trace(model, data)
    plan = hesse.plan("diagonal", lambda: squares(traced(data)), list(traced.parameters()))
    assert plan.method == "dense"
    assert {e.method: e.why_not for e in plan.estimates}["sweep"] == "no call of a layer can be seen"
