"""The caller's world goes on as it was: pending backward passes, autocast, threads, forks, compilers."""

import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hesse
from cases import x
from hesse.runtime.isolation import isolated

DATA, LABELS = torch.randn(6, 3), torch.randint(0, 2, (6,))
ASK = {
    "diagonal": lambda loss, leaves: hesse.hessian_diagonal(loss, leaves),
    "dense": lambda loss, leaves: hesse.hessian_diagonal(loss, leaves, method="dense"),
    "hessian": lambda loss, leaves: hesse.hessian(loss, leaves),
    "trace": lambda loss, leaves: hesse.hessian_trace(loss, leaves, check=False),
    "hvp": lambda loss, leaves: hesse.hvp(loss, leaves, [torch.ones_like(p) for p in leaves]),
    "plan": lambda loss, leaves: hesse.plan("diagonal", loss, leaves),
    "approximate": lambda loss, leaves: hesse.approximate_diagonal(loss, leaves),
}
every_question = pytest.mark.parametrize("ask", ASK.values(), ids=ASK)


class Counting(nn.Module):
    """What the forward pass writes is saved for its backward pass."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.instance, self.out = nn.InstanceNorm1d(4, track_running_stats=True), nn.Linear(4, 2)
        self.register_buffer("calls", torch.ones(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, data):
        self.calls += 1
        hidden = self.norm(self.linear(data)) * self.calls
        self.last.copy_(hidden.detach().mean(0))
        return self.out(self.instance(hidden.tanh()[:, :, None].expand(-1, -1, 2)).mean(-1) * self.last)


@every_question
def test_a_backward_pass_that_is_still_to_come(ask):
    model = Counting().train()
    loss = lambda: F.cross_entropy(model(DATA), LABELS)
    leaves = list(model.parameters())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = torch.autograd.grad(loss(), leaves)
    for name, buffer in model.named_buffers():
        buffer.data.copy_(before[name])
    pending = loss()
    versions = [buffer._version for buffer in model.buffers()]
    ask(loss, leaves)
    assert [buffer._version for buffer in model.buffers()] == versions
    pending.backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def half_inside(model, data):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model[:2](data)
    return model[2](hidden.float())


@pytest.mark.parametrize("method", ["auto", "sweep", "taps", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_callers_autocast_is_the_functions_alone(method, dtype):
    """A float32 network inside of it is another function, and its derivatives are those of plain autograd."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    leaves = list(model.parameters())
    loss = lambda: F.cross_entropy(model(DATA).float(), LABELS)
    plain = hesse.hessian_diagonal(loss, leaves, method="dense")
    with torch.autocast("cpu", dtype=dtype), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", hesse.errors.PrecisionWarning)
        within = hesse.hessian_diagonal(loss, leaves, method=method)
        assert torch.get_autocast_dtype("cpu") == dtype
        assert torch.is_autocast_enabled("cpu")
    for one, other in zip(within, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.02)
    with torch.autocast("cpu", dtype=dtype), warnings.catch_warnings():
        warnings.simplefilter("error")  # a function that computes in float32 keeps its certificate
        w = torch.randn(4, requires_grad=True)
        exact = hesse.hessian(lambda: (w.exp() * w).sum() ** 2, [w], method=method)
    torch.testing.assert_close(exact, hesse.hessian(lambda: (w.exp() * w).sum() ** 2, [w]))


@pytest.mark.filterwarnings("ignore::hesse.errors.PrecisionWarning")
@pytest.mark.parametrize("method", ["auto", "taps", "dense"])
def test_a_head_in_float32_behind_autocast(method):
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    leaves = list(model.parameters())
    loss = lambda: F.cross_entropy(half_inside(model, DATA), LABELS)
    plain = hesse.hessian_diagonal(loss, leaves, method="dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hesse.hessian_diagonal(loss, leaves, method=method)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.05)


class Elsewhere(threading.Thread):
    """Does something over and over while a question is asked."""

    def __init__(self, task):
        super().__init__()
        self.task, self.results, self._over = task, [], threading.Event()

    def run(self):
        while not self._over.is_set():
            self.results.append(self.task())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self.join()


def drawn():
    return torch.rand(1, dtype=torch.float64).item()


def test_random_numbers_of_another_thread_are_not_rewound():
    """Every number is drawn once."""
    func = lambda x: (x**3).sum()
    with Elsewhere(drawn) as thread:
        for _ in range(30):
            hesse.hessian_diagonal(func, torch.ones(3))
            hesse.hvp(func, torch.ones(3), torch.ones(3))
    assert len(thread.results) > 100
    assert len(set(thread.results)) == len(thread.results)


def test_random_numbers_of_another_thread_between_those_of_the_function():
    """The function draws some too, before and after."""
    numbers = []

    def func(x):
        noise = torch.rand(3)
        numbers.append(pool.submit(drawn).result())
        return (x**3 + 0 * noise + 0 * torch.rand(3)).sum()

    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            hesse.hessian_diagonal(func, torch.ones(3))
            hesse.hvp(func, torch.ones(3), torch.ones(3))
            numbers.append(pool.submit(drawn).result())
    assert len(numbers) > 9
    assert len(set(numbers)) == len(numbers)


def seeded(x):
    torch.manual_seed(0)
    return (F.dropout(x, 0.5, training=True) * torch.rand(8)).pow(3).sum()


def forked(x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        noise = torch.rand(8)
    return (x * noise).pow(3).sum()


def put_back(x):
    torch.set_rng_state(STATE)
    return (x * torch.rand(8)).pow(3).sum()


STATE = torch.Generator().manual_seed(5).get_state()


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("func", [seeded, forked, put_back])
def test_a_function_that_seeds_its_random_numbers(func, beside):
    """Also where the caller has seeded by the same number, and whether other threads are there or not."""
    torch.manual_seed(0)
    point = torch.ones(8)
    before = torch.get_rng_state()
    expected = torch.autograd.functional.hessian(func, point)
    torch.manual_seed(0)
    with Elsewhere(lambda: time.sleep(0.001)) if beside else nullcontext():
        for _ in range(2):
            torch.testing.assert_close(hesse.hessian(func, point), expected)
            torch.testing.assert_close(hesse.hvp(func, point, point), expected.sum(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.random.default_generator is torch.default_generator


def test_what_the_function_draws_is_not_taken_from_the_callers():
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    seen = []

    def func(x):
        seen.append(torch.rand(2))
        return (x**2).sum() + 0 * F.dropout(x, 0.5).sum()

    hesse.hessian(func, torch.ones(2))
    assert torch.equal(torch.rand(5), expected)
    assert torch.equal(seen[0], expected[:2])  # it begins where the caller's stream is, and goes on
    assert not torch.equal(seen[0], seen[1])


def test_buffers_that_another_thread_rebinds_stay():
    module = nn.Module()
    module.register_buffer("state", torch.zeros(()))
    model = Counting().train()

    def task():
        module.state = module.state + 1
        return module.state.item()

    with Elsewhere(task) as thread:
        for _ in range(20):
            hesse.model_hessian_diagonal(model, F.cross_entropy, DATA, LABELS)
    assert thread.results == [float(i + 1) for i in range(len(thread.results))]
    assert len(thread.results) > 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_a_thread_is_inside():
    """The child asks a question of its own, with the kernels and hooks that the parent had chosen before."""
    inside, done = threading.Event(), threading.Event()

    def slow(x):
        inside.set()
        done.wait(20)
        return (x**2).sum()

    thread = threading.Thread(target=lambda: hesse.hvp(slow, torch.ones(2), torch.ones(2)))
    flash, hooks = (
        torch.backends.cuda.flash_sdp_enabled(),
        nn.modules.module._global_buffer_registration_hooks,
    )
    thread.start()
    inside.wait(20)
    assert not torch.backends.cuda.flash_sdp_enabled()
    child = os.fork()
    if child == 0:
        restored = torch.backends.cuda.flash_sdp_enabled() == flash and not hooks
        with isolated():
            pass
        os._exit(0 if restored else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # the compiler's own
def test_asked_inside_of_a_compiled_function():
    model = nn.Linear(3, 1)
    parameters = list(model.parameters())

    @torch.compile(backend="eager")
    def func(x):
        hidden = 2 * x
        full = hesse.hessian(lambda z: (z**3).sum(), hidden)
        diagonal = hesse.hessian_diagonal(lambda: model(x).square().sum(), parameters)
        product = hesse.hvp(lambda z: (z**3).sum(), hidden, hidden)
        return full.sum() + product.sum() + diagonal[0].sum()

    point = torch.tensor([1.0, 2.0, 3.0])
    expected = 12 * point.sum() + 24 * point.square().sum() + 2 * point.square().sum()
    torch.testing.assert_close(func(point), expected)
    torch.testing.assert_close(func(point), expected)


class Wrapped(torch.Tensor):
    """A subclass without memory of its own."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        bare = torch.utils._pytree.tree_map(
            lambda a: a.held if isinstance(a, Wrapped) else a, (args, kwargs or {})
        )
        return func(*bare[0], **bare[1])


@pytest.mark.parametrize("method", ["auto", "dense"])
def test_tensors_that_wrap_others(method):
    factor = x(3)
    wrapped = Wrapped(factor)
    point = x(3)
    found = hesse.hessian(lambda x: ((x * wrapped) ** 2).sum(), point, method=method)
    torch.testing.assert_close(found, torch.diag(2 * factor**2))
    weight = x(2, 3).requires_grad_()
    diagonal = hesse.hessian_diagonal(
        lambda: F.linear(wrapped, weight).square().sum(), [weight], method=method
    )[0]
    torch.testing.assert_close(diagonal, 2 * (factor**2).expand(2, 3))


@pytest.mark.parametrize(
    "question",
    [
        lambda f, x: hesse.hessian_trace(f, x, create_graph=True),
        lambda f, x: hesse.hessian(f, x, create_graph=True).sum(),
        lambda f, x: hesse.hessian_diagonal(f, x, create_graph=True).sum(),
        lambda f, x: hesse.hessian_blocks(f, x, create_graph=True).sum(),
        lambda f, x: hesse.hvp(f, x, torch.ones_like(x), create_graph=True).sum(),
        lambda f, x: hesse.second_directional_derivative(f, x, torch.ones_like(x), create_graph=True),
    ],
)
def test_inside_of_torch_func_grad(question):
    point = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = torch.func.grad(lambda x: question(lambda x: (x**4).sum(), x))(point)
    torch.testing.assert_close(found, 24 * point)


def test_a_backward_inside_of_a_backward_leaves_no_gradients():
    class Recomputed(torch.autograd.Function):
        """As reentrant checkpoints do: the parameters that are not passed get theirs by a side effect."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x * w).sin().sum()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                (y * w).sin().sum().backward()
            return gradient * y.grad

    w = torch.tensor([0.5, 2.0], requires_grad=True)
    held = torch.tensor([3.0, 4.0])
    for grad in (None, held):
        w.grad = grad
        with pytest.warns(hesse.errors.DerivativeWarning):
            hesse.hessian_diagonal(lambda: Recomputed.apply(w * 2) + (w**2).sum(), [w])
        assert w.grad is grad
    assert held.tolist() == [3.0, 4.0]
