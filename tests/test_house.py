"""Imports point down the list of rooms, and methods know nothing of each other."""

import ast
from pathlib import Path

import pytest

import hesse

ROOMS = (
    "cli",
    "demo",
    "report",
    "integrations",
    "__init__",
    "operators",
    "questions",
    "data",
    "estimators",
    "answer",
    "work",
    "products",
    "planning",
    "checks",
    "methods",
    "curvature",
    "look",
    "probe",
    "calls",
    "tape",
    "structure",
    "selection",
    "problem",
    "runtime",
    "errors",
)
PACKAGE = Path(hesse.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file):
    """The modules of hesse that a file imports, wherever in the file, without the package's name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hesse":
            for name in (alias.name for alias in node.names):
                inner = PACKAGE.joinpath(*node.module.split(".")[1:], name)
                module = inner.with_suffix(".py").exists() or inner.is_dir()
                yield [*node.module.split(".")[1:], *([name] if module else [])] or ["__init__"]
        elif isinstance(node, ast.Import):
            for name in (alias.name.split(".") for alias in node.names):
                if name[0] == "hesse":
                    yield name[1:] or ["__init__"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    own = file.relative_to(PACKAGE).with_suffix("").parts
    for module in imported(file):
        assert ROOMS.index(module[0]) >= ROOMS.index(own[0]), module
        if own[0] == module[0] == "methods" and own[1] != "__init__":
            assert module[1] in (own[1], "base"), module


def test_there_are_no_other_rooms():
    assert {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES} == set(ROOMS)
