"""What a call by itself does to columns and blocks, against autograd of that call."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cases import x
from hesse.calls.table import canonical, site_of
from hesse.runtime.batches import loops_allowed
from hesse.tape.record import Recorder
from hesse.tape.replay import results_of
from hesse.tape.samples import ONE_SAMPLE
from sweeping import check
from test_rules import CLOSED, call_of, positive

PRODUCTS = {
    "matrices": (lambda a, b: a @ b, (2, 3), (3, 4)),
    "stacks": (lambda a, b: a @ b, (5, 2, 3), (5, 3, 4)),
    "broadcast": (lambda a, b: torch.matmul(a, b), (5, 1, 2, 3), (2, 3, 4)),
    "with itself": (lambda a: a @ a, (3, 3)),
    "with its transpose": (lambda a: a @ a.mT, (2, 3)),
    "vector": (lambda a, b: a @ b, (2, 3), (3,)),
    "by name": (lambda a, b: torch.matmul(other=b, input=a), (2, 3), (3, 2)),
    "layer of itself": (lambda a: F.linear(a, a), (3, 3)),
    "layer by name": (lambda a, b: F.linear(bias=torch.ones(4).double(), weight=b, input=a), (2, 3), (4, 3)),
    "frozen layer": (lambda a: F.linear(a, torch.ones(4, 3).double()), (2, 3)),
    "strides": (lambda a, b: F.conv2d(a, b, None, 2, (1, 0)), (3, 2, 5, 4), (4, 2, 3, 2)),
    "same": (lambda a, b: F.conv2d(a, b, padding="same", dilation=(1, 2)), (3, 2, 5, 4), (4, 2, 3, 3)),
    "same, uneven": (lambda a, b: F.conv1d(a, b, padding="same", dilation=3), (3, 2, 7), (4, 2, 2)),
    "valid": (lambda a, b: F.conv1d(a, b, padding="valid"), (3, 2, 5), (4, 2, 2)),
    "groups": (lambda a, b: F.conv2d(a, b, groups=2, dilation=2), (3, 4, 5, 6), (4, 2, 2, 2)),
    "one image": (lambda a, b: F.conv2d(a, b), (2, 5, 4), (4, 2, 3, 2)),
    "up": (lambda a, b: F.conv_transpose2d(a, b, None, 2, 1, 1, 2), (3, 4, 3, 3), (4, 2, 3, 3)),
    "frozen filter": (lambda a: F.conv1d(a, torch.ones(4, 2, 2).double()), (3, 2, 5)),
    "like another": (lambda a, b: a.reshape_as(b), (2, 6), (3, 4)),
    "reversed": (lambda a: a.flip(0).flip(1), (2, 3)),
    "slice": (lambda a: a[1:, ::2], (3, 4)),
    "parts": (lambda a: a.unbind(1)[1], (2, 3)),
    "steps": (lambda a: a.reshape(2, 6).T.reshape(3, 4).permute(1, 0), (3, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # where torch pads the input itself
@pytest.mark.parametrize("name", [*CLOSED, *PRODUCTS])
def test_pulls_as_autograd(name):
    function, *shapes = PRODUCTS[name] if name in PRODUCTS else call_of(name)
    tensors = [positive(*shape).requires_grad_() for shape in shapes]
    with Recorder(tensors) as tape:
        function(*tensors)
    for call, weighs in product(tape.calls, (True, False)):  # the second argument is live, or is not
        if any(v.tensor.dtype != torch.float64 for v in (*call.inputs.values(), *call.outputs)):
            continue  # no sweep goes through changes of dtype
        inputs = list(dict.fromkeys(v for p, v in call.inputs.items() if weighs or p != 1))
        if not inputs:
            continue
        places = dict.fromkeys([*inputs, *call.outputs], ONE_SAMPLE)
        closed = site_of(call, inputs, places).first
        stacks = [x(3, *output.tensor.shape) for output in call.outputs]
        arguments = [value.tensor.detach().requires_grad_() for value in inputs]
        position = {p: inputs.index(value) for p, value in call.inputs.items() if value in inputs}
        given = [arguments[position[p]] if p in position else a for p, a in enumerate(call.arguments)]
        results = results_of(
            call, [given[0].clone(), *given[1:]] if call.func is torch.Tensor.__setitem__ else given
        )
        with loops_allowed():
            pulled = closed.pull(stacks)
        for i in range(3):
            exact = torch.autograd.grad(
                results, arguments, [stack[i] for stack in stacks], retain_graph=True, materialize_grads=True
            )
            for value, part in zip(inputs, exact, strict=True):
                assert torch.allclose(pulled[value][i], part, atol=1e-12), canonical(call.name)
        if len(inputs) == len(call.outputs) == 1:
            (value,), (stack,) = inputs, stacks
            with loops_allowed():
                right = closed.pull_right(stack.reshape(1, 3, -1).clone())
                left = closed.pull_left(stack.reshape(1, 3, -1).mT.clone())
            assert torch.allclose(right[0], pulled[value].reshape(3, -1), atol=1e-12)
            assert torch.allclose(left[0].T, pulled[value].reshape(3, -1), atol=1e-12)


SQUARES = {
    "product": lambda s: s @ s,
    "product of three": lambda s: s @ s @ s,
    "elements": lambda s: s * s,
}


@pytest.mark.parametrize("name", SQUARES)
def test_a_value_may_be_both_arguments(name):
    data = x(5, 3, 4)

    def function(w):
        h = torch.tanh(F.linear(data, w))
        return SQUARES[name](h @ h.mT).tanh().square().sum()

    check(function, [0.3 * x(4, 4)], 5)


INDICES = {
    "a list": [0, 0, 2],
    "lists": [[0, 1], [1, 1]],
    "an array": np.array([0, 0, 2]),
    "a tensor": torch.tensor([2, 0, 0]),
    "a mask": [True, False, True],
    "a range": range(2),
    "a slice": slice(1, None),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_may_take_elements_twice(name):
    data = x(5, 4)
    function = lambda w: torch.tanh(data @ w)[:, INDICES[name]].flatten(1).sum(1).tanh().square().sum()
    check(function, [x(4, 3)], 5)
