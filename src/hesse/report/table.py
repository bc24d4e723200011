"""Results as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesse.answer import Result
from hesse.report.named import NamedResult
from hesse.runtime.total import total

_MOST_EIGENVALUES = 2000  # up to this many coordinates a table waits for the eigenvalues


def describe(named: NamedResult) -> str:
    """A table by tensor, and one line on how the answer came about."""
    lines = [_traces(named) if named.question == "trace" else by_tensor(named)]
    if named.question == "hessian" and sum(named.sizes) <= _MOST_EIGENVALUES and len(named.eigenvalues):
        smallest, largest = named.eigenvalues[0], named.eigenvalues[-1]
        lines.append(f"eigenvalues of the whole matrix: largest {largest:.4g}, smallest {smallest:.4g}")
    return "\n".join([*lines, summary(named.result)])


def by_tensor(named: NamedResult) -> str:
    """Minimum, mean, maximum and share of negative entries of each tensor's own part."""
    rows = [
        (name, str(list(shape)), *_statistics(part))
        for name, shape, part in zip(named.names, named.shapes, named.own, strict=True)
    ]
    return table(("tensor", "shape", "min", "mean", "max", "negative"), rows)


def summary(result: Result) -> str:
    """Method, passes, seconds and certificate in one line."""
    certificate = result.certificate
    if certificate is None:
        check = "not checked"
    else:
        relation = "within" if certificate.passed else "NOT WITHIN"
        check = f"deviation {certificate.deviation:.2g} {relation} bound {certificate.bound:.2g}"
    return f"method {result.plan.method}, passes {result.passes:,}, seconds {result.seconds:.3g}, {check}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first two, name and shape, to the left, the numbers after them to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(lines)


def _traces(named: NamedResult) -> str:
    rows = [
        (name, str(list(shape)), f"{part:.6g}")
        for name, shape, part in zip(named.names, named.shapes, named.parts, strict=True)
    ]
    return table(("tensor", "shape", "trace"), [*rows, ("total", "", f"{total(named.parts):.6g}")])


def _statistics(part: Tensor) -> list[str]:
    if not part.numel():
        return ["-"] * 4
    low, high = torch.aminmax(part)
    mean = part.mean(dtype=torch.float64)
    negative = (part < 0).sum() / part.numel()
    # Adding zero makes a negative zero positive.
    return [*(f"{value + 0.0:.4g}" for value in (low, mean, high)), f"{negative:.1%}"]
