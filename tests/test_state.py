"""The caller's model, gradients, buffers, modes and random state are left as they were."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse


class Net(nn.Module):
    """Changes its state in every way a forward pass can."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.embedding = nn.Embedding(5, 4, max_norm=0.1)
        self.out = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("history", torch.zeros(3, 4))

    def forward(self, x):
        self.calls += 1
        hidden = self.norm(self.first(x))
        hidden = torch.tanh(self.spectral(hidden)) + self.embedding(torch.arange(len(x)) % 5)
        self.average = 0.9 * self.average + 0.1 * hidden.detach().mean(0)  # rebinds
        self.history[0] = hidden.detach().mean(0)  # writes to a part
        self.history[1].add_(1)
        self.history.data[2].copy_(self.average)
        return self.out(hidden)


def snapshot(model):
    return {
        "state": copy.deepcopy(model.state_dict()),
        "buffers": [id(b) for b in model.buffers()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "global hooks": len(nn.modules.module._global_forward_hooks),
        "random": torch.get_rng_state(),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled(),
            torch.backends.cudnn.enabled,
            torch.overrides._len_torch_function_stack(),
        ),
    }


def assert_same(model, before):
    after = snapshot(model)
    for name, value in before.pop("state").items():
        assert torch.equal(after["state"][name], value), name
    after.pop("state")
    assert torch.equal(after.pop("random"), before.pop("random"))
    for new, old in zip(after.pop("grad"), before.pop("grad"), strict=True):
        assert (new is None and old is None) or torch.equal(new, old)
    assert after == before


X, Y = torch.randn(6, 3), torch.randn(6, 2)


@pytest.fixture
def model():
    model = Net().train()
    model.out.weight.requires_grad_(False)
    model.first.weight.grad = torch.ones(4, 3)
    return model


QUESTIONS = {
    "model diagonal": lambda m, loss: hesse.model_hessian_diagonal(m, loss, X, Y),
    "diagonal": lambda m, loss: hesse.hessian_diagonal(lambda: loss(m(X), Y), list(m.parameters())),
    "hessian": lambda m, loss: hesse.hessian(lambda: loss(m(X), Y), list(m.parameters())),
    "blocks": lambda m, loss: hesse.hessian_blocks(lambda: loss(m(X), Y), list(m.parameters())),
    "trace": lambda m, loss: hesse.hessian_trace(lambda: loss(m(X), Y), list(m.parameters())),
    "hvp": lambda m, loss: hesse.hvp(lambda: loss(m(X), Y), list(m.parameters()), list(m.parameters())),
    "along": lambda m, loss: hesse.second_directional_derivative(
        lambda: loss(m(X), Y), list(m.parameters()), list(m.parameters())
    ),
    "functional": lambda m, loss: hesse.hessian_diagonal(
        lambda p: loss(torch.func.functional_call(m, p, (X,)), Y), dict(m.named_parameters())
    ),
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_nothing_changes(model, question):
    before = snapshot(model)
    question(model, F.mse_loss)
    assert_same(model, before)


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_nothing_changes_when_the_function_raises(model, question):
    def loss(output, targets):
        raise ValueError("half-way")

    before = snapshot(model)
    with pytest.raises(ValueError, match="half-way"):
        question(model, loss)
    assert_same(model, before)


def test_nothing_changes_when_interrupted(model):
    def stop(done, total):
        raise KeyboardInterrupt

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        hesse.model_hessian_diagonal(model, F.mse_loss, X, Y, progress=stop)
    assert_same(model, before)


def test_in_place_on_the_inputs_leaves_the_callers_tensor():
    x = torch.tensor([1.0, 2.0])

    def func(x):
        with torch.no_grad():
            x.clamp_(max=1.5)
        return x.pow(3).sum()

    assert hesse.hessian_diagonal(func, x).tolist() == [6.0, 9.0]
    assert x.tolist() == [1.0, 2.0]


def test_a_mutating_function_still_gets_its_own_values():
    """What the function reads after writing it is what counts, until the answer is there."""
    counter = torch.zeros((), dtype=torch.float64)
    x = torch.tensor([2.0], dtype=torch.float64)

    def func(x):
        counter.add_(1)
        return (x**3 * counter).sum()  # saved for the backward pass

    assert hesse.hessian(func, x).item() == 12.0
    assert hesse.hvp(func, x, torch.ones(1)).item() == 12.0
    assert counter.item() == 0


@pytest.mark.parametrize("embed", [F.embedding, lambda i, w: F.embedding(i, w, max_norm=None)])
def test_an_embedding_without_max_norm_is_not_written_to(embed):
    table = torch.randn(5, 3, requires_grad=True)
    version = table._version
    hesse.hessian_diagonal(lambda: embed(torch.arange(3), table).pow(3).sum(), [table])
    assert table._version == version


def test_random_numbers_that_do_not_matter_are_allowed_and_given_back():
    x = torch.ones(2)
    state = torch.get_rng_state()
    func = lambda x: (x**2).sum() + 0 * torch.rand(())
    assert hesse.hessian_diagonal(func, x).tolist() == [2.0, 2.0]
    assert hesse.hvp(func, x, x).tolist() == [2.0, 2.0]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(mode):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with mode():
        assert hesse.hessian_diagonal(lambda: (x**3).sum(), [x])[0].tolist() == [6.0, 12.0]
        assert hesse.hvp(lambda x: (x**3).sum(), x.detach(), torch.ones(2)).tolist() == [6.0, 12.0]


def test_results_do_not_hold_the_graph():
    x = torch.ones(2, requires_grad=True)
    for answer in (
        hesse.hessian(lambda x: (x**3).sum(), x),
        hesse.hessian_diagonal(lambda: (x**3).sum(), [x])[0],
        hesse.hessian_trace(lambda x: (x**3).sum(), x),
        hesse.hvp(lambda x: (x**3).sum(), x, torch.ones(2)),
    ):
        assert not answer.requires_grad
    assert x.grad is None


def test_threads_that_share_a_model_take_turns(model):
    from concurrent.futures import ThreadPoolExecutor

    before = snapshot(model)
    expected = hesse.model_hessian_diagonal(model, F.mse_loss, X, Y)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(hesse.model_hessian_diagonal, model, F.mse_loss, X, Y) for _ in range(8)]
        for run in runs:
            torch.testing.assert_close(run.result(), expected)
    assert_same(model, before)
