"""The same on a GPU."""

import pytest
import torch
from torch import nn

import hesse
from cases import CASES
from oracle import as_matrix, relative_error

pytestmark = pytest.mark.cuda


def test_recurrent_layers_without_cudnn():
    model = nn.LSTM(3, 4, batch_first=True).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = hesse.model_hessian_diagonal(model, lambda out, _: out[0].pow(2).sum(), x, None)
    model.cuda()
    found = hesse.model_hessian_diagonal(model, lambda out, _: out[0].pow(2).sum(), x.cuda(), None)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.cpu(), e)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("cubic", "rosenbrock", "fused attention")])
def test_same_as_on_the_cpu(case):
    func, tensors = case()
    expected = as_matrix(hesse.hessian(func, tensors), tensors)
    moved = tuple(t.cuda() for t in tensors)
    found = as_matrix(hesse.hessian(func, moved), moved)
    assert relative_error(found.cpu(), expected) < 1e-10


def test_dropout_is_noticed_and_random_state_kept():
    state = torch.cuda.get_rng_state()
    x = torch.randn(8, device="cuda")
    with pytest.raises(hesse.HesseError, match="not deterministic"):
        hesse.hvp(lambda x: nn.functional.dropout(x).pow(2).sum(), x, x)
    assert torch.equal(state, torch.cuda.get_rng_state())


def test_budget_counts_the_device():
    x = torch.randn(8000, device="cuda")
    weights = torch.randn(500, 8000, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hesse.hessian(lambda x: (weights @ x / 90).tanh().pow(2).sum(), x, memory="1GiB")
    assert torch.cuda.max_memory_allocated() - before < 1.15 * 2**30
