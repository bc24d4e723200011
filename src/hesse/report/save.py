"""Results as files."""

from __future__ import annotations

import importlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import hesse
from hesse.errors import HesseError
from hesse.report.named import NamedResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (".png", ".pdf", ".svg")
TENSORS = ".safetensors"


class WriteError(HesseError, OSError):
    """A file or folder cannot be written."""


class MissingPackageError(HesseError, ImportError):
    """An optional package is not installed."""


def require(extra: str, *modules: str) -> None:
    """Raise, with the command that helps, where a package of one of hesse's extras is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingPackageError(
                f"{module} cannot be imported ({error}); run: pip install 'hesse[{extra}]'"
            ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into a `WriteError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WriteError(f"cannot write {path}: {reason}") from error


def require_tensors(path: Path) -> None:
    """Raise before the work where the result could not be written after it, or under a name that misleads."""
    if path.suffix.lower() not in ("", TENSORS):
        raise WriteError(
            f"cannot write {path}: the name of a file of tensors ends in {TENSORS}, or has no end"
        )
    require_writable(path)


def require_writable(path: Path) -> None:
    """Raise before hours of work rather than after them; leaves nothing behind."""
    new = not path.exists()
    if not new and not path.is_file():
        raise WriteError(f"cannot write {path}: it is no regular file")
    with writing(path):
        path.open("ab").close()
        if new:
            path.unlink()


def require_figure(path: Path) -> None:
    """Raise before the work where the figure could not be drawn or written after it."""
    if path.suffix.lower() not in FIGURES:
        raise WriteError(f"cannot write {path}: a figure's name ends in {', '.join(FIGURES)}")
    require("plot", "matplotlib")
    require_writable(path)


def save_tensors(path: Path, named: NamedResult) -> None:
    """Write the parts by name to a safetensors file, with how they came about as its metadata."""
    from safetensors.torch import save_file

    result = named.result
    metadata = {
        "hesse": hesse.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "question": named.question,
        "method": result.plan.method,
        "passes": str(result.passes),
        "seconds": str(result.seconds),
        "names": json.dumps(list(named.names)),
        "shapes": json.dumps(named.shapes),
    }
    if result.certificate is not None:
        metadata["certificate_deviation"] = str(result.certificate.deviation)
        metadata["certificate_bound"] = str(result.certificate.bound)
    with writing(path):
        # save_file puts a new file in the place of the old one, which only its owner may read.
        path = path.resolve()
        path.touch()
        mode = path.stat().st_mode
        save_file({name: _owned(part) for name, part in named.by_name.items()}, path, metadata)
        path.chmod(mode)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure in the format that the file's name asks for."""
    with writing(path):
        figure.savefig(path, dpi=150)


def _owned(part: Tensor) -> Tensor:
    # The format knows no views: what is a window on other memory would be refused.
    alone = part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
    return part if alone else part.clone(memory_format=torch.contiguous_format)
