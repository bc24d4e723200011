"""Penalties on weights, beside a loss over samples."""

import pytest
import torch
import torch.nn.functional as F

from cases import x
from hesse.structure import NoStructure
from networks import Problem, classes, mlp
from questions import BLOCKS, DIAGONAL
from sweeping import check, swept

SAMPLES = 4


def classified(logits):
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


def in_place(loss, w):
    loss = loss * 2
    loss += w.pow(4).sum()
    return loss - w.exp().sum()


PENALTIES = {
    "squares": lambda loss, w: loss + 0.1 * (w**2).sum(),
    "transposed": lambda loss, w: loss + (w.T.cos() * torch.arange(3)).sum(),
    "rows touch": lambda loss, w: loss + w.norm(dim=1).sum(),
    "all touch": lambda loss, w: (w @ w.T - torch.eye(3).double()).square().mean() + loss,
    "twice": lambda loss, w: loss + w.pow(4).sum() + w.abs().sum() - w.sin().mean(),
    "in place": in_place,
    "stacked": lambda loss, w: torch.stack([loss, w.square().sum(), w.logsumexp((0, 1))]).sum(),
    "scaled together": lambda loss, w: (loss + w.square().sum()) / 3,
    "of its entropy": lambda loss, w: sum([loss, *(row.softmax(0).square().sum() for row in w)]),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_added(name):
    data = x(SAMPLES, 3)

    def function(weight, bias, last):
        hidden = torch.tanh(F.linear(data, weight, bias))
        return PENALTIES[name](classified(hidden @ last), weight)

    way = check(function, (x(3, 3), x(3), x(3, 3)), SAMPLES)
    assert not way.live


def test_on_a_view_that_is_also_the_weight():
    data = x(SAMPLES, 3)

    def function(weight, last):
        turned = weight.T
        return classified(torch.tanh(data @ turned) @ last) + (turned**2).sum() + weight.square().mean()

    check(function, (x(4, 3), x(4, 3)), SAMPLES)


def test_in_chunks_of_samples():
    data = x(SAMPLES, 3)

    def function(weight, last):
        return classified(torch.tanh(data @ weight) @ last) + (weight**2).sum() + last.norm()

    check(function, (x(3, 4), x(4, 3)), SAMPLES, size=2)


def test_added_to_another_loss_first():
    """Which is of a weight that is left out: the walk has no other reason to go there."""
    data = x(SAMPLES, 3)

    def function(weight, scale):
        rest = (torch.tanh(data) * scale.exp()).square().mean() + weight.pow(4).sum()
        return rest + torch.tanh(data @ weight).logsumexp(1).mean()

    check(function, (x(3, 4), x(3)), SAMPLES, covered={0})


def test_a_function_of_the_sum():
    data = x(SAMPLES, 3)
    function = lambda w: ((data @ w).square().sum() + w.square().sum()).log()
    with pytest.raises(NoStructure, match="samples"):
        swept(function, (x(3, 2),), SAMPLES)


def test_added_to_every_sample():
    """Not to what has no samples any more: the weight stays alive."""
    data = x(SAMPLES, 3)

    def function(weight, last):
        losses = F.cross_entropy(
            torch.tanh(data @ weight) @ last, torch.arange(SAMPLES) % 3, reduction="none"
        )
        return (losses + weight.square().sum()).mean()

    check(function, (x(3, 4), x(4, 3)), SAMPLES, covered={1})
    check(function, (x(3, 4), x(4, 3)), SAMPLES, live={0})


def test_overwritten():
    """What was added is not there any more."""
    data = x(SAMPLES, 3)

    def function(weight, last):
        added = weight.square().sum()
        loss = classified(torch.tanh(data @ weight) @ last) + added
        added.mul_(2)
        return loss

    with pytest.raises(NoStructure, match="overwritten"):
        swept(function, (x(3, 4), x(4, 3)), SAMPLES)


@pytest.mark.parametrize("question", [DIAGONAL, BLOCKS], ids=lambda question: question.name)
def test_weight_decay_takes_no_products(question):
    model = mlp()
    problem = Problem(
        model, lambda out: classes(out) + sum(p.pow(2).sum() for p in model.parameters()), x(5, 3)
    )
    closure = lambda: problem.loss(model(*problem.data))
    result = question.ask(closure, problem.tensors, method="sweep", full_output=True)
    plain = Problem(model, classes, *problem.data).matrix()
    matrix = plain + 2 * torch.eye(len(plain)).double()
    assert result.passes == result.plan.check_passes
    assert result.certificate.passed
    assert question.error(result.value, matrix, problem.tensors) < 1e-9
