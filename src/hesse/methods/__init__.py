"""Ways to answer a question: each makes an offer, and knows nothing of the others."""

from collections.abc import Callable, Mapping

from hesse.methods.base import Ask, MethodName, Offer
from hesse.methods.dense.option import offer as _dense
from hesse.methods.sweep.option import offer as _sweep
from hesse.methods.taps.option import offer as _taps

OFFERS: Mapping[MethodName, Callable[[Ask], Offer]] = {"sweep": _sweep, "taps": _taps, "dense": _dense}
