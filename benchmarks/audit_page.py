"""The page that an audit is written up on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from benchmarks.audit_judgement import TOLERANCE, Verdict

NOT_EXAMINED = "not examined"
_Record = dict[str, Any]

_METHOD = """\
All operations of torch's own database (OpInfo), with {samples:,} samples of arguments that come with it, were
called in float64 and complex128 on a CPU. Autograd's product of the Hessian of a random linear and quadratic
form of all results with a random vector is compared with central differences of autograd's gradient. What is
right is no more than {tolerance:g} off, or no more than rounding of the arguments makes of it. What is called
wrong is so at the sample's own arguments and near by, where differences with several steps agree with each
other and those to both sides do; what is at a kink, or rounded too much, does not settle. What must be
symmetric or triangular is made so inside the function, as torch's own tests do."""

_REMARKS = {
    "_weight_norm": "Not in the database. A term of the double backward is missing.",
    "as_strided_scatter": "The gradient by the first argument is that of the elements which are overwritten, "
    "and zero for those that stay: the complement of what it should be.",
    "logaddexp.far_apart": "Not in the database. The gradient is made of `1 / (1 + exp(b - a))`, which "
    "overflows where the arguments are 710 apart, or one is minus infinity; what is differentiated next is "
    "`inf / inf`.",
    "logaddexp2.far_apart": "Not in the database. As logaddexp, from 1024 on.",
    "masked.logaddexp": "What is masked out is minus infinity for `logaddexp`: NaN, as there.",
    "nn.functional.linear_cross_entropy.chunked": "The backward scales a gradient that the forward saved.",
    "nn.functional.max_unpool1d": "Samples whose indices coincide: which element is written is not defined.",
    "nn.functional.max_unpool2d": "Samples whose indices coincide: which element is written is not defined.",
    "nn.functional.max_unpool3d": "Samples whose indices coincide: which element is written is not defined.",
    "logsumexp": "Complex arguments of a million and more: the phase is rounded too much.",
    "__rpow__": "Negative numbers to a power: NaN from the value on.",
    "as_strided.partial_views": "A view of a larger storage, which has no copy of the same layout.",
}
"""What was found out by hand about calls that are not right."""


def page(record: _Record) -> str:
    """The page, in Markdown."""
    rows: list[_Record] = record["operations"]
    verdicts = Counter(row["verdict"] for row in rows)
    by_reason = Counter(row["why_not"] for row in rows if row["verdict"] == NOT_EXAMINED)
    samples = sum(sum(row["verdicts"].values()) for row in rows)
    counts = [f"| {verdict} | {number} |" for verdict, number in verdicts.most_common()]
    wrong = [Verdict.WRONG, Verdict.WRONG_HERE, Verdict.FIRST]
    return "\n".join(
        [
            f"# Second derivatives of torch {record['torch']}",
            "",
            f"Written by `python -m benchmarks.audit` with hesse {record['hesse']} in {record['seconds']} "
            f"seconds; the figures are in `benchmarks/results/audit-torch-{record['torch']}.json`.",
            "",
            _METHOD.format(samples=samples, tolerance=TOLERANCE),
            "",
            "An operation, in each dtype, has the gravest verdict of all its samples.",
            "",
            "| verdict | operations |",
            "|---|---:|",
            *counts,
            "",
            "## Wrong",
            "",
            "Relative distance of the product from the differences, for the worst sample; what hesse makes "
            "of the first one. Where the gradient is wrong already, so is the Hessian.",
            "",
            *_table(rows, wrong, ("call", "samples", "off", "hesse", "remark"), _wrong),
            "",
            "## Without a second derivative",
            "",
            "There is a gradient, and its own derivative raises; `hvp` in hesse does the following.",
            "",
            *_table(rows, [Verdict.NONE], ("call", "samples", "torch", "hesse"), _none),
            "",
            "## Not settled, rounded or not run",
            "",
            "Nothing is known to be wrong here.",
            "",
            *_table(
                rows,
                [Verdict.UNSETTLED, Verdict.CASTS, Verdict.FAILS],
                ("call", "samples", "why", "remark"),
                _open,
            ),
            "",
            "## Not examined",
            "",
            *(f"- {reason}: {number}. {_names(rows, reason)}" for reason, number in by_reason.most_common()),
            "",
        ]
    )


def _table(rows: Iterable[_Record], verdicts: list[Verdict], head: tuple[str, ...], cells: Any) -> list[str]:
    values = [verdict.value for verdict in verdicts]
    chosen = [row for row in rows if row["verdict"] in values]
    if not chosen:
        return ["None."]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in cells(row)) for row in chosen]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {line} |" for line in lines)]


def _wrong(row: _Record) -> tuple[str, ...]:
    off = "NaN" if row["off"] is None else f"{row['off']:.2g}"
    remark = _REMARKS.get(row["name"], "")
    if row["verdict"] != Verdict.WRONG.value:
        remark = f"{row['verdict'].capitalize()}. {remark}"
    return _call(row), _samples(row), off, row["hesse"], remark


def _none(row: _Record) -> tuple[str, ...]:
    return (
        _call(row),
        _samples(row),
        row["notes"][0],
        row["hesse"].split("; hessian")[0].removeprefix("hvp: "),
    )


def _open(row: _Record) -> tuple[str, ...]:
    why = f"{row['verdict']}: {row['notes'][0]}" if row["notes"] else row["verdict"]
    return _call(row), _samples(row), why, _REMARKS.get(row["name"], "")


def _call(row: _Record) -> str:
    return f"`{row['name']}`, {row['dtype']}"


def _samples(row: _Record) -> str:
    return f"{row['verdicts'][row['verdict']]} of {sum(row['verdicts'].values())}"


def _names(rows: Iterable[_Record], reason: str) -> str:
    names = sorted({row["name"] for row in rows if row["why_not"] == reason})
    return ", ".join(f"`{name}`" for name in names) + "."
