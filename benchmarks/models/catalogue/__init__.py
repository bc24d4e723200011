"""Models by the packages that they come from, one file a package; each has its `MODELS`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from benchmarks.models.imports import mend_torchvision, restore_names
from benchmarks.models.model import Catalogue, Model

PACKAGES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")))


def catalogue(package: str) -> Catalogue:
    """The models of a package; raises what its import raises."""
    mend_torchvision()
    restore_names()
    return import_module(f"{__name__}.{package}").MODELS


def find(name: str) -> Model:
    """A model by its name, `package/model`."""
    return catalogue(name.split("/")[0]).models[name]
