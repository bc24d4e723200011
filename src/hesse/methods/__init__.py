"""Ways to answer a question: each makes an offer, and knows nothing of the others."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from hesse.methods.base import Ask, MethodName, Offer, Run
from hesse.methods.dense import option as _dense
from hesse.methods.sweep import option as _sweep
from hesse.methods.taps import option as _taps


class Method(NamedTuple):
    """A way to answer.

    Attributes:
        offer: what it would take, and how.
        run_of: how, where that is planned already.
    """

    offer: Callable[[Ask], Offer]
    run_of: Callable[[Ask], Run]


METHODS: Mapping[MethodName, Method] = {
    "sweep": Method(_sweep.offer, _sweep.run_of),
    "taps": Method(_taps.offer, _taps.run_of),
    "dense": Method(_dense.offer, _dense.run_of),
}
