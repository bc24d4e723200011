import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def taps_everywhere(monkeypatch):
    """Every layer that can be tapped is tapped, also where the dense method would be as fast."""
    monkeypatch.setattr("hesse.planning._paying", lambda question, layers, *rest: list(layers))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
