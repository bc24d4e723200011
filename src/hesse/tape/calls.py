"""Which class a call is taken out by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hesse.tape.local import Bilinear, Elementwise, LinearMap, Local, Separable
from hesse.tape.record import Call, Value
from hesse.tape.rowwise import closed_form
from hesse.tape.rules import Kind, canonical, kind_of
from hesse.tape.samples import Samples

_CLASSES: dict[Kind, type[Local]] = {
    Kind.SEPARABLE: Separable,
    Kind.PIECEWISE: Elementwise,
    Kind.ELEMENTWISE: Elementwise,
    Kind.BILINEAR: Bilinear,
}


def local(call: Call, inputs: Sequence[Value], samples: Mapping[Value, Samples]) -> Local:
    """The call in closed form, or as its row of the table says.

    `inputs`: the arguments that it is taken out by; `samples`: where they are in every live value.
    """
    found = closed_form(call, inputs, samples)
    if found is not None:
        return found
    kind = kind_of(call)
    if kind is Kind.SEPARABLE and len({value.tensor.shape for value in call.inputs.values()}) > 1:
        return Local(call, inputs, samples)
    if canonical(call.name) == "linear" and [call.inputs.get(0)] == list(inputs):
        return LinearMap(call, inputs, samples)
    return _CLASSES.get(kind, Local)(call, inputs, samples)
