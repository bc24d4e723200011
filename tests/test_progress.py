"""The bar: shown when it helps, silent otherwise."""

import io
import sys

import pytest
import torch

import hesse
from hesse.runtime import progress

X = torch.randn(100)
FUNC = lambda x: x.pow(3).sum()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """Run the Hessian on a given screen and return what it showed there."""

    def run(screen, **options):
        # Not patched in the fixture itself: pytest puts its own stderr in place before each phase.
        monkeypatch.setattr(sys, "stderr", screen)
        hesse.hessian(FUNC, X, **options)
        return screen.getvalue()

    return run


def test_quick_work_shows_nothing(shown):
    assert shown(Terminal()) == ""


def test_work_beyond_the_patience_shows_a_bar(shown, monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    assert "hesse" in shown(Terminal())


def test_told_to_be_silent(shown, monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    assert shown(Terminal(), progress=False) == ""


def test_no_terminal_no_bar(shown, monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    assert shown(io.StringIO()) == ""
    assert "hesse" in shown(io.StringIO(), progress=True)


def test_ctrl_c_closes_the_bar_and_comes_through(shown, monkeypatch):
    advance = progress.Progress.advance

    def interrupted(self, passes):
        advance(self, passes)
        closed.append(self._bar)
        raise KeyboardInterrupt

    closed = []
    monkeypatch.setattr(progress.Progress, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shown(Terminal(), progress=True)
    assert closed[0].disable  # what tqdm sets when it is closed
