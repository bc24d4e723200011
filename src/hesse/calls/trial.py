"""Where samples go through a call that is linear, by a trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hesse.structure import refusing
from hesse.tape.record import Call, Value
from hesse.tape.replay import results_of
from hesse.tape.samples import ONE_SAMPLE, Samples, possible


def tried(
    call: Call, inputs: Sequence[Value], samples: Mapping[Value, Samples], degree: int = 0
) -> list[Samples]:
    """Where the samples of some inputs are in the results of a call that is linear in all that requires grad.

    Where samples are apart, a factor of its own for every sample of the inputs is one for every sample of the
    result. Numbers at random tell, with zeros in place of all other inputs. (Positive factors do the same for
    the largest of some elements.) `degree`: the call is a product instead, in which the inputs are so many
    factors together.
    """
    generator = torch.Generator().manual_seed(6)
    count = samples[inputs[0]].count
    factors = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
    numbers = {
        value: torch.rand(value.tensor.shape, generator=generator).to(value.tensor) for value in inputs
    }
    scaled = {value: samples[value].times(numbers[value], factors) for value in inputs}
    rest = [value for value in call.inputs.values() if degree and value not in numbers]
    others = {v: torch.rand(v.tensor.shape, generator=generator).to(v.tensor) for v in rest}
    with torch.enable_grad(), refusing(f"{call.name} could not be run again"):
        given = others, numbers | others, scaled | others
        nothing, one, other = (_results(call, some) for some in given)
    return [
        _place(a.detach() - o.detach(), b.detach() - o.detach(), factors ** max(degree, 1))
        for o, a, b in zip(nothing, one, other, strict=True)
    ]


def _results(call: Call, given: Mapping[Value, Tensor]) -> list[Tensor]:
    arguments = list(call.arguments)
    for i, value in call.inputs.items():
        arguments[i] = torch.zeros_like(value.tensor, requires_grad=True) + given.get(value, 0)
    return results_of(call, arguments)


def _place(one: Tensor, scaled: Tensor, factors: Tensor) -> Samples:
    tolerance = 100 * torch.finfo(one.dtype).eps * float(one.abs().max()) if one.numel() else 0.0
    for place in possible(one.shape, len(factors)):
        if torch.allclose(scaled, place.times(one, factors), rtol=0.0, atol=tolerance):
            return place
    return ONE_SAMPLE
