"""Write docs/models.md from what was measured: `python -m benchmarks.models.page`."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain, groupby
from statistics import median
from textwrap import shorten
from typing import Any

from benchmarks.models.measure import COORDINATES, TOLERANCE
from benchmarks.models.run import read
from benchmarks.table import ROOT, machine

PAGE = ROOT / "docs" / "models.md"

Record = dict[str, Any]

_AGREES = "agrees"
_BOTH_WRONG = "agrees, and differences with neither"
_TORCH_WRONG = "agrees with differences (torch does not)"
_TORCH_REFUSES = "agrees with differences (torch refuses)"
_KINK = "kink"
_DISAGREES = "disagrees"
_REFUSED = "refused"
_ERROR = "error"
_LATE = "out of time"
_MEANING = {
    _AGREES: f"every entry compared is within {TOLERANCE:g} of plain autograd's.",
    _BOTH_WRONG: "as before, but a part of the function hides from autograd, and so from hesse.",
    _TORCH_WRONG: "where the two differ, the differences are with hesse.",
    _TORCH_REFUSES: "plain autograd raises; the differences are with hesse.",
    _KINK: "where the two differ, the differences do not settle: the gradient jumps.",
    _DISAGREES: "where the two differ, the differences are not with hesse.",
    _REFUSED: "hesse says why it does not answer.",
    _ERROR: "hesse does not answer, and it is not by its own message that one learns why.",
    _LATE: "no answer within the limit.",
}

# Differences have fewer digits than derivatives. Relative to the largest entry of the tensor's diagonal:
_SETTLED, _NEAR = 1e-4, 1e-3

_INTRODUCTION = """\
# Models of other people's

hesse on models that others wrote, small and with random weights, and on functions from textbooks (`science`).
`make models` does it again: `benchmarks.models.run` measures each model in a process of its own, and
`benchmarks.models.page` writes this page. The models are in `benchmarks/models/catalogue`.

{machine}

- All are as their packages build them, their parameters then moved a little at random, and differentiated in
  float64 unless the remark says otherwise. The function is the model's own loss where it has one.
- "coordinates": what the diagonal of the Hessian is taken by, unless the row says otherwise: the parameters.
- "method": what hesse chose ([how-it-works.md](how-it-works.md)), by share of the coordinates.
- "gradients": the time of hesse with its defaults, the check included, in gradients of the same function.
  Times are the processor's, of one thread.
- "products": how many times longer one plain product per coordinate takes, one after the other; the time of
  some is scaled to all. Above 1, hesse is faster.
- "MiB": the memory that the call needs beyond what was there before, its answer included.
- "verdict": entries drawn from every tensor ({coordinates} in all, or one of each; of a Hessian, columns) are
  compared with plain double backward, in units of the largest entry of the tensor's diagonal. Where they
  are apart, at the largest entries and where a tensor has no curvature, central differences of the gradient
  are taken too.

{meanings}
"""


@dataclass(frozen=True)
class Row:
    """A model on the page.

    Attributes:
        name: `package/model`.
        record: what was measured.
        verdict: one of the words above.
        reason: what was said where there is no answer.
    """

    name: str
    record: Record
    verdict: str
    reason: str = ""

    @property
    def package(self) -> str:
        """What it comes from."""
        return self.name.split("/")[0]

    @property
    def method(self) -> str | None:
        """What hesse chose."""
        method: str | None = self.record.get("hesse", {}).get("method")
        return method

    @property
    def behind_best(self) -> float:
        """How many times longer hesse takes than by the best other method of its own that was measured."""
        others = [self.record.get(way, {}) for way in ("sweep", "taps", "dense")]
        own = [other["seconds"] for other in others if other.get("seconds")]
        return self.seconds / min(own) if own and self.seconds else 0.0

    @property
    def given_back(self) -> float | None:
        """How long hesse takes with its plan given back, of what it takes without."""
        again = self.record.get("given_back", {}).get("seconds")
        return again / self.seconds if again and self.seconds else None

    @property
    def predicted(self) -> float | None:
        """What the plan predicted, of what was taken."""
        predicted = self.record.get("hesse", {}).get("predicted_seconds")
        return predicted / self.seconds if predicted and self.seconds else None

    @property
    def seconds(self) -> float | None:
        """How long hesse took."""
        seconds: float | None = self.record.get("hesse", {}).get("seconds")
        return seconds

    @property
    def times_faster(self) -> float | None:
        """How many times longer a loop of products takes."""
        products = self.record.get("products_seconds")
        return products / self.seconds if products and self.seconds else None


def judged(name: str, record: Record) -> Row:
    """A row with its verdict."""
    ours = record.get("hesse", {})
    if "error" in ours:
        return Row(name, record, _REFUSED if ours["ours"] else _ERROR, ours["error"])
    if "differences" not in record:
        if "out_of_time" in record:
            return Row(name, record, _LATE)
        return Row(name, record, _ERROR, record.get("build_error") or record.get("said", ""))
    contradicted = any(map(_contradicts, record["differences"]))
    if record["disagree"]:
        apart = [d for d in record["differences"] if _torch_apart(d)]
        if apart and not any(d["error"] <= _SETTLED * d["scale"] for d in apart):
            return Row(name, record, _KINK)
        return Row(name, record, _DISAGREES if contradicted or not apart else _TORCH_WRONG)
    if record["torch_refuses"]:
        return Row(name, record, _DISAGREES if contradicted else _TORCH_REFUSES)
    return Row(name, record, _BOTH_WRONG if contradicted else _AGREES)


def _contradicts(difference: Record) -> bool:
    """Whether a difference is certainly not what hesse answers."""
    off = abs(difference["hesse"] - difference["difference"])
    near = max(_NEAR * difference["scale"], 10 * difference["error"])
    return math.isfinite(difference["error"]) and not off <= near


def _torch_apart(difference: Record) -> bool:
    """Whether autograd found something else."""
    torch = difference["torch"]
    return torch is not None and not abs(difference["hesse"] - torch) <= TOLERANCE * difference["scale"]


def line(row: Row) -> str:
    """A row of the table."""
    record, ours = row.record, row.record.get("hesse", {})
    cells = [
        f"{row.name.split('/')[1]}: {record.get('what', '')}",
        f"{record['coordinates']:,}" if "coordinates" in record else "",
        _method(ours),
        _digits(row.seconds / record["gradient_seconds"]) if row.seconds else "",
        _digits(row.times_faster) if row.times_faster else "",
        _digits(ours["peak_bytes"] / 2**20) if "peak_bytes" in ours else "",
        row.verdict,
        remarks(row),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _method(ours: Record) -> str:
    """What hesse did, and for which share of the coordinates."""
    counts: dict[str, int] = ours.get("by_method", {})
    total = sum(counts.values())
    shares = {method: count / total for method, count in counts.items() if count / total > 0.005}
    order = sorted(shares, key=lambda method: -shares[method])
    return (
        ", ".join(f"{method} {shares[method]:.0%}" for method in order) if len(order) > 1 else "".join(order)
    )


def _digits(value: float) -> str:
    """Two digits, or all of a large number."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def remarks(row: Row) -> str:
    """What else there is to say, each in a few words."""
    record, ours = row.record, row.record.get("hesse", {})
    said = []
    if record.get("question") == "hessian":
        said.append(f"Hessian by {record['by']}")
    elif record.get("by", "parameters") != "parameters":
        said.append(f"by {record['by']}")
    if record.get("dtype", "float64") != "float64":
        said.append(record["dtype"])
    if row.reason:
        said.append(_clause(row.reason))
    said += [_warning(text) for text in ours.get("warnings", ())]
    if record.get("torch_refuses"):
        said.append("torch: " + _clause(record["torch_refuses"]))
    if record.get("question") == "diagonal" and ours.get("not_swept"):
        said.append(f"no sweep: {_clause(ours['not_swept'])}")
    return "; ".join(dict.fromkeys(said))


def _warning(text: str) -> str:
    """A warning of hesse's, which begins with its class."""
    if found := re.search(r"computes in (\S+) from its call of (torch's )?(\S+)", text):
        return f"warns: computes in {found[1].removeprefix('torch.')} from `{found[3]}` on"
    if found := re.search(r"hides from autograd is (.*?):", text):
        return f"warns: what hides from autograd is {found[1]}"
    return "warns: " + _clause(text.partition(": ")[2])


def _clause(text: str) -> str:
    """The beginning of what was said."""
    return shorten(text.partition("; ")[0].replace("`", "'"), 100, placeholder=" ...").rstrip(".")


def table(rows: list[Row]) -> list[str]:
    """The models of a package."""
    return [
        f"## {rows[0].package}",
        "",
        "| model | coordinates | method | gradients | products | MiB | verdict | remarks |",
        "|---|---:|---|---:|---:|---:|---|---|",
        *map(line, rows),
        "",
    ]


def summary(rows: list[Row]) -> list[str]:
    """What the rows come to."""
    packages = len({row.package for row in rows})
    verdicts = Counter(row.verdict for row in rows)
    counted = [f"{word}: {verdicts[word]}" for word in _MEANING if verdicts[word]]
    times = {row.name: row.times_faster for row in rows if row.times_faster}
    faster = [factor for factor in times.values() if factor >= 1]
    swept = [times[row.name] for row in rows if row.name in times and row.method == "sweep"]
    slower = [row for row in rows if times.get(row.name, 1) < 1]
    behind = [row.behind_best for row in rows if row.behind_best > 1.25]
    given = [row.given_back for row in rows if row.given_back]
    predicted = [row.predicted for row in rows if row.predicted]
    within = {times: sum(1 / times <= ratio <= times for ratio in predicted) for times in (2, 4)}
    warned = sum(bool(row.record.get("hesse", {}).get("warnings")) for row in rows)
    fewest = max((row.record["coordinates"] for row in slower), default=0)
    longest = max((row.seconds or 0 for row in slower), default=0)
    return [
        f"- {len(rows)} models of {packages} packages. {'; '.join(counted).capitalize()}.",
        f"- {len(faster)} of {len(times)} are faster than a loop of products, {median(faster):.2g} times"
        f" in the median; the {len(swept)} that are swept {median(swept):.2g} times.",
        f"- {len(slower)} are slower, all with at most {fewest:,} coordinates and {longest:.2g} s: looking"
        " at a function and checking its answer takes longer than the products of a small one.",
        f"- For {len(behind)} of them what hesse chose takes over 1.25 times as long as another of its own"
        f" methods: {median(behind):.2g} times in the median, {max(behind):.2g} times at most.",
        f"- With its plan given back hesse takes {median(given):.2g} of the time in the median, the check"
        " included.",
        f"- Of {len(predicted)} predicted times, {within[2]} are within a factor of two of the one measured,"
        f" {within[4]} within four; the median is {median(predicted):.2g} of what was measured.",
        f"- With {warned} of them hesse warns of something.",
    ]


def page(content: Record) -> str:
    """The whole page."""
    rows = [judged(name, record) for name, record in content["models"].items()]
    meanings = "\n".join(f"  - {word}: {meaning}" for word, meaning in _MEANING.items())
    head = _INTRODUCTION.format(
        machine=machine(content["environment"]), coordinates=COORDINATES, meanings=meanings
    )
    tables = [table(list(some)) for _, some in groupby(rows, key=lambda row: row.package)]
    return "\n".join([head, *summary(rows), "", *chain.from_iterable(tables)])


def main() -> None:
    PAGE.write_text(page(read()))
    print(f"wrote docs/{PAGE.name}")


if __name__ == "__main__":
    main()
