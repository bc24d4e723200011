"""The route of a sweep: which calls it takes out, in what order, and where parameters enter them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from weakref import WeakKeyDictionary

from torch import Tensor

from hesse.calls.facts import Site
from hesse.calls.table import site_of
from hesse.curvature.entry import Entry
from hesse.curvature.parameters import entries
from hesse.methods.sweep.carried.penalties import penal
from hesse.methods.sweep.carried.uses import Use, Uses, entering
from hesse.methods.sweep.chunks import Guess, guessed
from hesse.structure import NoStructure
from hesse.tape.record import Call, Recorder, Value, leading_to
from hesse.tape.samples import Samples, most


@dataclass
class Step:
    """A call on the route to the loss.

    Attributes:
        site: the call as a function of the values that curvature is carried to.
        entries: where parameters enter it that have no other uses, but for penalties.
        uses: where leaves that are alive enter it.
        penalties: where penalties on parameters are added that are read elsewhere.
        straight: it is taken for linear, as what leads to the output of a model that is.
    """

    site: Site
    entries: list[Entry] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    penalties: list[Use] = field(default_factory=list)
    straight: bool = False


@dataclass(eq=False)
class Route:
    """What a sweep will do.

    Attributes:
        loss: the value it starts from.
        head: the calls whose results have no samples any more, last first.
        tail: the others, last first; samples are apart in all that they take and make.
        samples: where the samples are in every value on the route.
        depends: the live leaves that a value on the route is a function of.
    """

    loss: Value
    head: list[Step]
    tail: list[Step]
    samples: dict[Value, Samples]
    depends: dict[Value, Set[int]]
    _guesses: dict[int, list[dict[int, Guess]]] = field(default_factory=dict)

    @property
    def steps(self) -> list[Step]:
        """The calls, in the order of the walk."""
        return [*self.head, *self.tail]

    @property
    def count(self) -> int:
        """How many samples there are."""
        return most(self.samples)

    def chunks(self, size: int) -> list[range]:
        """All samples in chunks of at most `size`, as even as can be."""
        number = -(-self.count // size) if self.tail else 1
        bounds = [i * self.count // number for i in range(number + 1)]
        return [range(*pair) for pair in pairwise(bounds)]

    def guesses(self, size: int) -> list[dict[int, Guess]]:
        """How to narrow each call of the tail to chunks of at most `size` samples.

        Raises:
            NoStructure: some call cannot be narrowed.
        """
        if size not in self._guesses:
            chunks = self.chunks(size)
            self._guesses[size] = [guessed(step.site.call, self.samples, chunks) for step in self.tail]
        return self._guesses[size]

    @property
    def covered(self) -> set[int]:
        """The leaves whose curvature is read on the route, or carried along."""
        return self.live.union(*(entry.leaves for entry in self.entries))

    @property
    def live(self) -> set[int]:
        """The leaves that are alive on the route."""
        return {leaf for step in self.steps for use in step.uses for leaf in use.leaves}

    @property
    def entries(self) -> list[Entry]:
        """Where parameters enter, in the order of the walk."""
        return [entry for step in self.steps for entry in step.entries]

    def probed(self, leaves: Set[int]) -> list[Entry]:
        """The entries that are checked: the last one, which all of the walk leads to, and two others."""
        own = [entry for entry in self.entries if not leaves.isdisjoint(entry.leaves)]
        others = random.Random(6).sample(own[:-1], min(2, len(own[:-1])))
        return [*others, *own[-1:]]


def route_of(
    tape: Recorder,
    value: Tensor,
    samples: Mapping[Value, Samples | None],
    live: Set[int] = frozenset(),
    output: Value | None = None,
) -> Route:
    """Find the route from the loss to the parameters.

    Args:
        tape: the calls.
        value: the loss.
        samples: where they are in every value of the tape; None for values that have nothing to do with them.
        live: the leaves that may be kept alive, where their curvature cannot be read in one place.
        output: of a model that is taken for linear, if one is; parameters enter before it alone.

    Raises:
        NoStructure: the function does not have the structure; the message is a reason for the plan.
    """
    known = _ROUTES.setdefault(tape, [])
    for allowed, route in known:
        if allowed >= live >= route.live:
            return route
    known.append((live, _route(tape, value, samples, live, output)))
    return known[-1][1]


# A plan finds them, then a walk takes one; with the leaves that were allowed to live.
_ROUTES: WeakKeyDictionary[Recorder, list[tuple[Set[int], Route]]] = WeakKeyDictionary()


def _route(
    tape: Recorder,
    value: Tensor,
    samples: Mapping[Value, Samples | None],
    live: Set[int],
    output: Value | None,
) -> Route:
    loss = tape.value_of(value)
    if tape.hidden:
        raise NoStructure(tape.hidden)
    calls = leading_to(loss, tape.calls)
    if any(v.tensor.dtype != value.dtype for call in calls for v in (*call.inputs.values(), *call.outputs)):
        raise NoStructure("values are of different dtypes")
    batch_dims = _placed(calls, samples)
    model = calls if output is None else leading_to(output, calls)
    leaves, lost = entering(model, batch_dims)
    penalties = set() if lost or output is not None else penal(calls, batch_dims)
    steps, depends = _taken_out(calls, model, penalties, batch_dims, live)
    if output is not None:
        linear = set(model)
        for step in steps:
            step.straight = step.site.call in linear
    if not any(step.entries or step.uses for step in steps):
        raise NoStructure("no parameter enters linearly, and only once, where samples are apart")
    _penalise(steps, leaves)
    steps.reverse()
    together = any(step.uses for step in steps)  # a leaf that is alive has no samples to be apart
    return Route(loss, *((steps, []) if together else _split(steps, batch_dims)), batch_dims, depends)


def _taken_out(
    calls: Sequence[Call],
    model: Sequence[Call],
    penalties: Set[Call],
    batch_dims: Mapping[Value, Samples],
    live: Set[int],
) -> tuple[list[Step], dict[Value, Set[int]]]:
    """The calls that curvature is carried through, in their order, and the live leaves behind each value.

    `model`: those of them that parameters may enter.
    """
    counted = Counter(value for call in model if call not in penalties for value in call.inputs.values())
    alive, entered = Uses(model, batch_dims, live), set(model)
    depends: dict[Value, Set[int]] = {}
    steps = []
    for call in calls:
        inputs = [value for value in dict.fromkeys(call.inputs.values()) if value in depends]
        step = Step(site_of(call, inputs, batch_dims))
        step.entries = list(entries(step.site, counted)) if call in entered else []
        own = {leaf for entry in step.entries for leaf in entry.leaves}
        step.uses = [use for use in alive.of(step.site) if own.isdisjoint(use.leaves)]
        penalised = call not in penalties and any(v.source in penalties for v in call.inputs.values())
        if inputs or step.entries or step.uses or penalised:
            behind = {leaf for use in step.uses for leaf in use.leaves}
            behind = behind.union(*(depends[value] for value in inputs))
            depends.update(dict.fromkeys(call.outputs, behind))
            steps.append(step)
    return steps, depends


def _penalise(steps: Sequence[Step], entering: Mapping[Call, Sequence[Value]]) -> None:
    """Leaves that are read where they enter have no other uses but penalties: those are not kept alive."""
    read = {leaf for step in steps for entry in step.entries for leaf in entry.leaves}
    for step in steps:
        elsewhere = read.difference(*(entry.leaves for entry in step.entries))
        added = [leaf for leaf in dict.fromkeys(entering.get(step.site.call, ())) if leaf.leaf in elsewhere]
        step.penalties = [Use(leaf, step.site) for leaf in added]
        step.uses = [use for use in step.uses if read.isdisjoint(use.leaves)]


def _split(steps: list[Step], batch_dims: Mapping[Value, Samples]) -> tuple[list[Step], list[Step]]:
    """Head and tail of a route; where samples that were joined are used again, there is no tail."""
    count = most(batch_dims)

    def apart(values: Iterable[Value]) -> bool:
        return all(batch_dims[value].count == count for value in values)

    head = [step for step in steps if not apart(step.site.outputs)]
    tail = [step for step in steps if apart(step.site.outputs)]
    return (head, tail) if all(apart(step.site.inputs) for step in tail) else (steps, [])


def _placed(calls: Sequence[Call], samples: Mapping[Value, Samples | None]) -> dict[Value, Samples]:
    """The samples in all values that have any.

    A value that did not change when samples upstream did (a ReLU may be dead for just these) has them
    where an argument of its shape has.
    """
    batch_dims: dict[Value, Samples] = {}
    for call in calls:
        inputs = {
            value.tensor.shape: batch_dims[value] for value in call.inputs.values() if value in batch_dims
        }
        for value in call.outputs:
            batch_dim = samples.get(value)
            if batch_dim is None and inputs:
                few = any(value.tensor.numel() % other.count for other in inputs.values())
                batch_dim = Samples() if few else inputs.get(value.tensor.shape)
                if batch_dim is None:
                    raise NoStructure(f"where the samples are in the result of {call.name} cannot be told")
            if batch_dim is not None:
                batch_dims[value] = batch_dim
    return batch_dims
