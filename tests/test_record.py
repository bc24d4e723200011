"""The tape: what is seen of a function's calls, and what cannot be seen."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import Cubed, x
from hesse.tape.record import Recorder


def recorded(func, *shapes):
    """The recorder after a function of leaves of these shapes."""
    leaves = [x(*shape).requires_grad_() for shape in shapes]
    with Recorder(leaves) as recorder:
        result = func(*leaves)
    return recorder, leaves, result


def names(recorder):
    return [call.name for call in recorder.calls]


def test_calls_in_their_order_with_their_values():
    recorder, leaves, _ = recorded(lambda a, b: torch.tanh(a @ b).sum(), (2, 3), (3, 2))
    assert names(recorder) == ["matmul", "tanh", "sum"]
    assert [call.order for call in recorder.calls] == [0, 1, 2]
    product, tanh, total = recorder.calls
    assert [value.leaf for value in product.inputs.values()] == [0, 1]
    assert [value.tensor for value in product.inputs.values()] == leaves
    assert tanh.inputs[0] is product.outputs[0]
    assert tanh.inputs[0].source is product
    assert total.outputs[0].tensor.grad_fn is total.outputs[0].edge.node
    assert recorder.hidden is None


def test_a_call_can_be_made_again():
    recorder, _, result = recorded(lambda a: F.pad(a, (1, 0), value=2.0).prod(), (2, 3))
    pad, prod = recorder.calls
    assert torch.equal(prod.again(prod.arguments), result)
    assert torch.equal(pad.again([torch.ones(2, 3), *pad.arguments[1:]])[:, 0], torch.full((2,), 2.0))


def test_properties_have_their_name():
    recorder, *_ = recorded(lambda a: (a.T @ a.mT.T).sum(), (2, 2))
    assert names(recorder) == ["T", "mT", "T", "matmul", "sum"]


def test_what_has_nothing_to_do_with_the_leaves_is_left_out():
    recorder, *_ = recorded(
        lambda a: (torch.ones(3).exp() * 2).sum() + a.detach().sin().sum() + a.sum(), (3,)
    )
    assert names(recorder) == ["sum", "add"]


def test_without_gradients_nothing_is_recorded():
    def func(a):
        with torch.no_grad():
            a.sin()
        return a.cos()

    assert names(recorded(func, (3,))[0]) == ["cos"]


def test_inside_of_a_custom_function_nothing_is_recorded():
    recorder, *_ = recorded(lambda a: Cubed.apply(a * 2).sum(), (3,))
    assert "pow" not in names(recorder)
    assert recorder.hidden is not None or len(recorder.calls) == 3


def test_given_back_as_it_is_no_call_is_recorded():
    recorder, *_ = recorded(lambda a: a.contiguous().double().sum(), (3,))
    assert names(recorder) == ["sum"]


IN_PLACE = {
    "a method": (lambda h: h.sin_(), "sin_"),
    "an operator": (lambda h: h.__imul__(3), "mul_"),
    "an item": (lambda h: h.__setitem__(0, h[1] * 2), "__setitem__"),
    "a function with inplace": (lambda h: F.relu(h, inplace=True), "relu"),
    "a module": (lambda h: nn.SiLU(inplace=True)(h), "silu"),
}


@pytest.mark.parametrize(("change", "name"), IN_PLACE.values(), ids=IN_PLACE)
def test_changed_in_place_a_tensor_is_another_value(change, name):
    def func(a):
        hidden = a + 1
        change(hidden)
        return hidden.cos()

    recorder, _, _ = recorded(func, (3,))
    made, cosine = recorder.calls[0], recorder.calls[-1]
    assert name in names(recorder)
    assert made.outputs[0].changed
    assert cosine.inputs[0] is not made.outputs[0]
    assert cosine.inputs[0].source is recorder.calls[-2]
    assert recorder.hidden is None


def test_a_call_that_overwrites_keeps_what_was_there():
    recorder, leaves, _ = recorded(lambda a: (a * 2).sin_().sum(), (3,))
    sine = recorder.calls[1]
    torch.testing.assert_close(sine.arguments[0], 2 * leaves[0].detach())


def test_a_view_changed_in_place_is_told():
    def func(a):
        hidden = a * 2
        hidden[0].mul_(3)
        return hidden.sum()

    assert "changed in place through another one" in recorded(func, (2, 3))[0].hidden


def test_a_tensor_from_elsewhere_is_told():
    scale = x(3).requires_grad_()
    made_before = scale * 2
    recorder, *_ = recorded(lambda a: (a * made_before).sum(), (3,))
    assert recorder.hidden == "a tensor of shape [3] was made by no call that can be seen"


def test_multi_head_attention_is_entered():
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    tokens, parameters = x(2, 3, 4), list(attention.parameters())
    with Recorder(parameters) as recorder:
        found, weights = attention(tokens, tokens, tokens)
    assert names(recorder).count("linear") == 2
    assert "multi_head_attention_forward" not in names(recorder)
    assert recorder.hidden is None
    expected = attention(tokens, tokens, tokens)
    torch.testing.assert_close((found, weights), expected, rtol=0, atol=0)


def test_several_results_of_a_call():
    recorder, *_ = recorded(lambda a: sum(part.sin().sum() for part in a.split(2)), (5,))
    split = recorder.calls[0]
    assert [value.tensor.shape for value in split.outputs] == [(2,), (2,), (1,)]
    assert len({value.edge.output_nr for value in split.outputs}) == 3
