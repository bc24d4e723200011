import itertools
import types

import pytest
import torch

# The tensors are tiny. Where something else keeps the machine busy, more threads wait for each other, and the
# suite takes ten times as long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _faults_are_raised(monkeypatch):
    """A fault of ours must not pass for a function without structure."""
    monkeypatch.setattr("hesse.structure.RAISES_FAULTS", True)


@pytest.fixture(autouse=True)
def _steady_clock(monkeypatch):
    """An evaluation takes a millisecond and so does a gradient: plans do not depend on a busy machine."""
    ticks = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: 1e-3 * next(ticks))
    for module in ("hesse.look.evaluation",):
        monkeypatch.setattr(f"{module}.time", clock)


@pytest.fixture
def taps_everywhere(monkeypatch):
    """Every layer that can be tapped is tapped, also where the dense method would be as fast."""
    monkeypatch.setattr("hesse.methods.taps.option._paying", lambda ask, layers, beside: list(layers))


# Their backward is not the derivative of their forward, which hesse says, and takes at its word.
BENT = ["custom Function, asymmetric", "a backward by hand"]


def pytest_collection_modifyitems(items):
    for item in items:
        if any(name in item.name for name in BENT):
            item.add_marker(pytest.mark.filterwarnings("ignore::hesse.errors.DerivativeWarning"))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
