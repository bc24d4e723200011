"""What some packages need in order to be imported beside this torch."""

from __future__ import annotations

import sys
import typing
from contextlib import suppress
from importlib import import_module

import torch
import torch.utils.data.dataloader

_OPERATORS = ("nms", "qnms")
_DEFINED: list[torch.library.Library] = []  # what is defined is there for as long as its library


def mend_torchvision() -> None:
    """Declare the operators that torchvision looks up, where its compiled part cannot be loaded.

    Its usual wheels are built for CUDA. Packages import it for other things; no model here calls these.
    """
    with suppress(ImportError):
        try:
            import_module("torchvision")
        except RuntimeError:
            _declare()


def _declare() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DEFINED.append(library)


def restore_names() -> None:
    """Names that torch has dropped and that others still import."""
    dataloader = torch.utils.data.dataloader
    if not hasattr(dataloader, "T_co"):
        dataloader.T_co = typing.TypeVar("T_co", covariant=True)
