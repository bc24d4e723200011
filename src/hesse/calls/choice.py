"""Which class a call is taken out by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hesse.calls.convolutions import Convolution, is_convolution
from hesse.calls.elementwise import Elementwise, Separable
from hesse.calls.local import Local
from hesse.calls.products import Bilinear, LinearMap, MatrixProduct
from hesse.calls.rows import closed_form
from hesse.calls.table import Kind, canonical, kind_of
from hesse.calls.views import View
from hesse.tape.record import Call, Value
from hesse.tape.samples import Samples

_CLASSES: dict[Kind, type[Local]] = {
    Kind.SEPARABLE: Separable,
    Kind.PIECEWISE: Elementwise,
    Kind.ELEMENTWISE: Elementwise,
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
    if kind is Kind.VIEW and list(inputs) == list(call.inputs.values()):
        return View(call, inputs, samples)
    if kind is Kind.BILINEAR:
        return _bilinear(call, inputs)(call, inputs, samples)
    return _CLASSES.get(kind, Local)(call, inputs, samples)


def _bilinear(call: Call, inputs: Sequence[Value]) -> type[Local]:
    live = [position for position, value in call.inputs.items() if value in inputs]
    if canonical(call.name) == "linear" and live == [0]:
        return LinearMap
    if live == [0] and is_convolution(call):
        return Convolution
    if call.name.strip("_") in ("matmul", "mm", "bmm") and call.spec == ():
        return MatrixProduct if min(factor.dim() for factor in call.arguments) > 1 else Bilinear
    return Bilinear
