"""Where the samples are, as the table of calls tells: from where parameters meet data to the loss.

What lies in one dimension of the data is taken for samples. The table tells where each call puts them, or
that it adds them up, and whether its second derivative joins any. Where it tells of every call on the way,
they do not touch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from torch import Tensor

from hesse.calls.table import site_of
from hesse.calls.weights import LayerCall
from hesse.look.evaluation import Evaluation
from hesse.structure import NoStructure
from hesse.tape.record import Call, Value, leading_to
from hesse.tape.samples import ONE_SAMPLE, Samples

PLACED_BY = "placed by"
"""Of a call's memo: the kind of map that told where its samples are."""
Places = Mapping[Value, Samples]
"""Of the values that are functions of samples; one sample, where they are functions of several."""


def placed(evaluation: Evaluation) -> Places | None:
    """The places by which the samples are apart in the most layers; None where it cannot be told of any."""
    assert evaluation.tape is not None
    calls = leading_to(evaluation.tape.value_of(evaluation.value), evaluation.tape.calls)
    if evaluation.tape.hidden:
        return None
    layers = {layer.order: layer for layer in evaluation.layers}
    best, most = None, 0
    for dim, count in _assumptions(calls, layers):
        places = _along(calls, layers, dim, count)
        separate = 0 if places is None else apart(in_layers(layers.values(), places))
        if separate > most:
            best, most = places, separate
        if most == len(layers):
            break
    return best


def contradicted(calls: Sequence[Call], found: Sequence[Sequence[Samples | None]]) -> Call | None:
    """A call whose results have samples where the table tells that they are not, whatever was found."""
    places: dict[Value, Samples] = {}
    for call, results in zip(calls, found, strict=True):
        inputs = [value for value in dict.fromkeys(call.inputs.values()) if value in places]
        places.update((v, place) for v, place in zip(call.outputs, results, strict=True) if place is not None)
        if inputs and all(places[value].count > 1 for value in inputs):
            with suppress(NoStructure):
                told = site_of(call, inputs, places).first.placed() or results
                pairs = zip(results, told, strict=True)
                if any(place is not None and place.count > 1 and place != own for place, own in pairs):
                    return call
    return None


def in_layers(layers: Iterable[LayerCall], places: Places) -> dict[int, Samples]:
    """Where samples are in the input and the output of each layer, by its order."""
    own = {layer: places.get(layer.output, ONE_SAMPLE) for layer in layers}
    return {layer.order: place if place.dim < lead(layer) else ONE_SAMPLE for layer, place in own.items()}


def apart(samples: Mapping[int, Samples]) -> int:
    """In how many layers they are apart."""
    return sum(place.count > 1 for place in samples.values())


def lead(layer: LayerCall) -> int:
    """How many leading dimensions the input has that are not the layer's own."""
    return layer.input.dim() - layer.layout.own[0]


def data_of(call: Call) -> list[Tensor]:
    """The arguments that require no grad and have numbers in all dimensions of the result."""
    dims = call.outputs[0].tensor.dim()
    return [
        argument
        for i, argument in enumerate(call.arguments)
        if i not in call.inputs
        and isinstance(argument, Tensor)
        and argument.is_floating_point()
        and argument.dim() == dims
    ]


def _assumptions(calls: Sequence[Call], layers: Mapping[int, LayerCall]) -> Iterator[tuple[int, int]]:
    """Dimensions and numbers of samples, likely ones first: as large data have them."""
    data = []
    for call in calls:
        layer = layers.get(call.order)
        if layer is None:
            data += [(tensor, tensor.dim() - 1) for tensor in data_of(call)]
        elif not layer.moves:
            data.append((layer.input, lead(layer)))
    data.sort(key=lambda pair: -pair[0].numel())
    for dim in (0, 1):
        yield from dict.fromkeys((dim, t.shape[dim]) for t, lead in data if dim < lead and t.shape[dim] > 1)


def _along(
    calls: Sequence[Call], layers: Mapping[int, LayerCall], dim: int, count: int
) -> dict[Value, Samples] | None:
    """The places of all values, with samples in a dimension of the data; None where nobody can tell."""
    places: dict[Value, Samples] = {}
    for call in calls:
        inputs = [value for value in dict.fromkeys(call.inputs.values()) if value in places]
        if inputs:
            found = _through(call, inputs, places)
            if found is None:
                return None
            places.update(zip(call.outputs, found, strict=True))
        else:
            place = _entering(call, layers.get(call.order), dim, count)
            if place is not None:
                places[call.outputs[0]] = place
    return places


def _through(call: Call, inputs: Sequence[Value], places: Places) -> Sequence[Samples] | None:
    """The places in the results of a call; None where samples may touch, or the table does not tell."""
    try:
        site = site_of(call, inputs, places)
        if any(places[value].count == 1 for value in inputs):
            return [ONE_SAMPLE] * len(call.outputs) if site.second.vanishes else None
        call.memo[PLACED_BY] = type(site.first)
        found = site.first.placed()
        joined = found is None or any(place.count == 1 for place in found)
        return found if not joined or site.second.within or site.second.vanishes else None
    except NoStructure:
        return None


def _entering(call: Call, layer: LayerCall | None, dim: int, count: int) -> Samples | None:
    """The samples that come in here, with the input of a layer or with data that parameters meet.

    Data may be transposed: they are in the other of the first two dimensions where only that fits.
    """
    result = call.outputs[0].tensor
    if layer is not None:
        shapes = [] if layer.moves else [layer.input.shape[: lead(layer)]]
    else:
        data = data_of(call)
        shapes = [tensor.shape for tensor in (result, *data)] if data else []
    for own in (dim, 1 - dim):
        if shapes and all(len(shape) > own and shape[own] == count for shape in shapes):
            return Samples(count, own)
    return None
