"""Write docs/benchmarks.md and the figures in README.md from the results: `python -m benchmarks.table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.contestants import YARDSTICKS
from benchmarks.estimators import PRODUCTS
from benchmarks.measure import NOT_INSTALLED
from benchmarks.operators import MEDIAN_ASKED
from benchmarks.run import RESULTS

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
_MARKS = "<!-- figures: written by benchmarks.table -->\n", "<!-- end of figures -->\n"

_INTRODUCTION = """\
# Benchmarks

Every figure here is written by `python -m benchmarks.table` from the files in `benchmarks/results`,
which `python -m benchmarks.run` measures.

How it is measured:

- All in float32, seeded, default number of threads. The contestants of a case take turns, so that
  what disturbs the machine meets them all; the order rotates. "ms" is the median, "slowest" the
  longest run.
- Each is warmed up once before. Who has taken 5 seconds altogether is not asked again; where that
  was the warm-up, its time stands. "First call" is a single call in a process where nothing has run
  yet; it is in no ratio. What torch starts late is in it, for all alike. It and the peak are left out
  for calls beyond 2 seconds.
- "Peak" is the memory that one call needs beyond what was there before, its answer included,
  the largest of three runs in a fresh process (of one, where the first call took over a second): growth
  of the resident memory on a CPU, of what torch has allocated on a GPU.
- "Ratio" is the peer's time divided by hesse's (with its defaults, the check included): above 1,
  hesse is faster.
- "method=plan": asked with the plan of an earlier answer, which remembers what a look at the function found.
- The results are compared with those of plain double backward, one product at a time (the loop of
  torch.autograd.functional, torch-secorder, the product by hand): "deviation" is the largest
  difference, relative to the largest entry. Where one product per coordinate is too much for that,
  all are compared with plain double backward in float64 on coordinates of every tensor that are drawn
  at random; the deviation is then the float32 error of each contestant. A result that rounding does
  not explain is marked wrong; its time is shown but counts neither as the fastest peer's nor in the
  ratios that are summed up.
- "≈" marks an extrapolated time: of every tensor some products were taken and timed, up to 128 in the
  batched form and 16 one by one, and scaled to all its coordinates. No other answer's time is.
- BackPACK gets a model of its own and works on modules, the others on a function of the parameters;
  its time is that of clearing gradients, forward and backward. Whatever a peer raises is its result.
- Rows in italics are yardsticks and answer nothing. The "matrix-product floor" is the time that N P²
  operations (outer products of N vectors of P entries, one triangle) would take at the rate of a product
  of float32 matrices of size 1024, measured in the same run. "10 batched per-sample gradients" is the time
  of the gradients of all ten logits for every sample.

What to keep in mind: these are small problems, where the overhead of a call counts; other sizes,
threads and machines give other ratios. The check that hesse does and its peers do not is in its times
unless a row says otherwise. hesse sizes its batches by the clock while it works, so its times and its
peaks scatter where the machine is disturbed.
"""

_TITLES = {
    "hessian": "The full Hessian",
    "diagonal": "The diagonal of the Hessian",
    "hvp": "One product with a vector",
    "approximate": "Approximate diagonals",
    "operators": "Operators over data",
    "estimators": "Estimates from products",
    "import": "Importing",
}

_YES_NO = {True: "yes", False: "**no**", None: ""}

_DERIVED = {
    "ratio_to_curvlinops": "Time of curvlinops divided by that of hesse",
    "ratio_to_fastest_peer": "Ratio to the fastest peer, extrapolated times included",
    "ratio_to_torch_func_hessian": "Ratio to `torch.func.hessian`",
    "ratio_to_backpack": "Ratio to BackPACK",
    "seconds_over_floor": "Time of hesse divided by the matrix-product floor",
    "seconds_over_per_sample_gradients": "Time of hesse divided by that of 10 batched per-sample gradients",
    "predicted_over_measured": "Time that hesse predicted divided by the one measured",
    "hesse_over_by_hand": "Time of hesse divided by that of the product by hand",
    "plan_over_by_hand": "The same with a plan given back",
    "ratio_of_plan_to_fastest_peer": "Ratio of a plan given back, without the check, to the fastest peer",
    "seconds_over_gradient": "Time of hesse divided by that of a gradient",
    "seconds_added_by_hesse": "Seconds that hesse adds to importing torch",
}
# What is said of every case too.
_IN_CASE = ("seconds_over_floor", "seconds_over_per_sample_gradients", "seconds_over_gradient")


def section(content: dict[str, Any]) -> str:
    """One question on one machine."""
    if content["question"] == "approximate":
        return approximate_section(content)
    if content["question"] == "estimators":
        return estimators_section(content)
    cases = content["cases"]
    lines = [f"## {_TITLES[content['question']]}", "", machine(content["environment"]), ""]
    if content["question"] == "operators":
        lines += asked_lines(content)
    lines += [
        "| case | contestant | ms | slowest | first call | peak MiB | deviation | ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, case in cases.items():
        lines += rows(name, case)
    lines += ["", *map(summary_line, content["summary"].items()), ""]
    lines += [case_line(name, case) for name, case in cases.items()]
    return "\n".join(lines) + "\n"


def asked_lines(content: dict[str, Any]) -> list[str]:
    """What was asked of every row, and whether it is reached."""
    lines = [
        "Here hesse answers with an operator of `hesse.Loss`, curvlinops with `HessianLinearOperator` and",
        "`GGNLinearOperator` (`check_deterministic=False`), of the same list of batches, with flat vectors;",
        "`A @ V` is of 32 columns. By hand is a double backward of every batch, or three passes for the",
        "Gauss-Newton matrix; 32 times is extrapolated from 4 products. All are compared with products by",
        "hand in float64, diagonals with the Jacobians of all samples in float64. A peer's time counts as",
        "it is, also where its result is wrong. Of two others, the faster one counts.",
        "",
        "| case | others / hesse | asked: at least | found | reached |",
        "|---|---|---:|---:|---|",
    ]
    for name, case in content["cases"].items():
        for wish in case["asked"]:
            kind = "peak" if wish["key"] == "peak_bytes" else "time"
            of = f"{kind}: {wish['over']} / {wish['under']}"
            found = "nobody else answers" if wish["found"] is None else times_longer(wish["found"])
            lines.append(
                f"| {name} | {of} | {times_longer(wish['least'])} | {found} | {_YES_NO[wish['reached']]} |"
            )
    if beside := content["summary"].get("ratio_to_curvlinops"):
        median = beside["median"]
        cells = [times_longer(MEDIAN_ASKED), times_longer(median), _YES_NO[median >= MEDIAN_ASKED]]
        lines.append("| all, median | time: curvlinops / hesse | " + " | ".join(cells) + " |")
    return [*lines, ""]


def approximate_section(content: dict[str, Any]) -> str:
    """Approximate diagonals beside exact ones."""
    lines = [
        f"## {_TITLES['approximate']}",
        "",
        machine(content["environment"]),
        "",
        "`hesse.approximate_diagonal` beside the exact diagonal, over all coordinates of a network as it is",
        "initialised: the error in norm, the share of right signs, and the rank correlation. The last",
        "column is the time in gradients.",
        "",
        "| case | contestant | relative error | right signs | rank correlation | ms | slowest | gradients |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, case in content["cases"].items():
        for who, record in case["contestants"].items():
            keys = ("relative_error", "right_signs", "rank_correlation")
            cells = [f"{record[key]:.3f}" if key in record else "" for key in keys]
            cells += [milliseconds(record[key]) for key in ("seconds", "slowest")]
            cells.append(f"{record['gradients']:.1f}")
            lines.append(f"| {name} | {who} | " + " | ".join(cells) + " |")
    lines += ["", *(case_line(name, case) for name, case in content["cases"].items())]
    return "\n".join(lines) + "\n"


def estimators_section(content: dict[str, Any]) -> str:
    """Errors of estimates by their products, and products for eigenpairs."""
    cases = dict(content["cases"])
    eigenpairs = cases.pop("eigenpairs")
    lines = [
        f"## {_TITLES['estimators']}",
        "",
        machine(content["environment"]),
        "",
        "The median relative error of a trace and of a diagonal (in norm; absolute for the zero operator),",
        "and in how many of 100 runs two standard errors held it, by spectrum and products. hesse's default",
        "decides how large a basis it takes. Medians of so few runs scatter: by some 12 percent for 100,",
        "by 18 for 50.",
        "",
        "| spectrum | of | estimator | " + " | ".join(f"{products} products" for products in PRODUCTS) + " |",
        "|---|---|---|" + "---:|" * len(PRODUCTS),
    ]
    for name, case in cases.items():
        for who, record in case["contestants"].items():
            kind, estimator = who.split(", ", 1)
            cells = [estimate_cell(record[str(products)]) for products in PRODUCTS]
            lines.append(f"| {name} | {kind} | {estimator} | " + " | ".join(cells) + " |")
    lines += ["", f"Each: {next(iter(cases.values()))['description']}.", ""]
    lines += [
        f"Eigenpairs: {eigenpairs['description']}.",
        "",
        "| eigenpairs by | products, mean | products, most | largest relative error of a value |",
        "|---|---:|---:|---:|",
    ]
    for who, record in eigenpairs["contestants"].items():
        lines.append(f"| {who} | {record['products']:.1f} | {record['most']} | {record['error']:.1e} |")
    return "\n".join(lines) + "\n"


def estimate_cell(record: dict[str, Any]) -> str:
    if "error" in record:
        return "raises"
    covered = f" ({100 * record['coverage']:.0f})" if "coverage" in record else ""
    return f"{record['median']:.1e}{covered}"


def machine(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    gpu = f"{environment['gpu']}, with " if environment["gpu"] else ""
    cores, threads = environment["cores"], environment["threads"]
    return f"On {gpu}{environment['cpu']}, {cores} cores, {threads} threads; {versions}."


def rows(name: str, case: dict[str, Any]) -> list[str]:
    """One row for each contestant of a case; the first is hesse with its defaults."""
    contestants = case["contestants"]
    ours = next(iter(contestants.values())).get("seconds")
    lines = []
    for who, record in contestants.items():
        if "error" in record:
            cells = [NOT_INSTALLED if record["error"] == NOT_INSTALLED else "raises", "", "", "", "", ""]
        else:
            about = "≈ " if "extrapolated_from" in record else ""
            ratio = about + times_longer(record["seconds"] / ours) if ours else ""
            first = milliseconds(record["first_call"]) if "first_call" in record else ""
            peak = f"{record['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in record else ""
            times = [about + milliseconds(record[key]) for key in ("seconds", "slowest")]
            deviation = f"{record['deviation']:.1e}" if "deviation" in record else ""
            cells = [*times, first, peak, deviation, ratio]
        mark = "**" if who == case.get("fastest_peer") else "*" if who in YARDSTICKS else ""
        shown = f"{mark}{who}{mark}"
        shown += "" if record.get("right", True) else " (wrong result)"
        lines.append(f"| {name} | {shown} | " + " | ".join(cells) + " |")
    return lines


def times_longer(ratio: float) -> str:
    return f"{ratio:,.2f}" if ratio > 0.1 else f"{ratio:.2g}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def summary_line(item: tuple[str, dict[str, float]]) -> str:
    key, values = item
    return f"- {_DERIVED[key]}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()) + "."


def case_line(name: str, case: dict[str, Any]) -> str:
    """What a case is, how hesse went about it, what was extrapolated, and what went wrong."""
    parts = [f"- {name}: {case['description']}"]
    if "coordinates" in case:
        parts[0] += f"; {case['coordinates']:,} coordinates"
    if case.get("sampled"):
        parts[0] += f", {case['sampled']:,} of them compared"
    records = case["contestants"]
    parts += [plan_line(record) for record in records.values() if "plan" in record]
    parts += [
        f"{who}: extrapolated from {record['extrapolated_from']:,} products"
        for who, record in records.items()
        if "extrapolated_from" in record
    ]
    parts += [
        f"{who} raises `{record['error']}`"
        for who, record in records.items()
        if record.get("error", NOT_INSTALLED) != NOT_INSTALLED
    ]
    parts += [f"{_DERIVED[key]}: {case[key]:.3g}" for key in _IN_CASE if key in case]
    return ". ".join(part.rstrip(".") for part in [*parts, case.get("note", "")] if part) + "."


def plan_line(record: dict[str, Any]) -> str:
    """What hesse chose, and how long it thought that would take."""
    plan = record["plan"]
    line = f"hesse chose {plan['method']}, {plan['passes']:,} passes"
    if plan["seconds"] is not None:
        line += f"; predicted {milliseconds(plan['seconds'])} ms, took {milliseconds(record['seconds'])}"
    return line


def figures(found: list[dict[str, Any]]) -> str:
    """The ratios of every case on the CPU, in one table."""
    by_question = {content["question"]: content for content in found if not content["environment"]["gpu"]}
    columns = {
        "hessian": ("Hessian: fastest torch route / hesse", "ratio_to_fastest_peer"),
        "diagonal": ("diagonal: fastest peer / hesse", "ratio_to_fastest_peer"),
        "hvp": ("product: by hand / hesse", "hesse_over_by_hand"),
    }
    names = list(dict.fromkeys(name for q in columns for name in by_question[q]["cases"]))
    lines = [
        "| case | " + " | ".join(title for title, _ in columns.values()) + " | the diagonal's fastest peer |",
        "|---|" + "---:|" * len(columns) + "---|",
    ]
    for name in names:
        cells = []
        for question, (_, key) in columns.items():
            case = by_question[question]["cases"].get(name, {})
            value = case.get(key)
            if value is not None and question == "hvp":
                value = 1 / value
            fastest = case.get("contestants", {}).get(case.get("fastest_peer"), {})
            about = "≈ " if "extrapolated_from" in fastest else ""
            cells.append("" if value is None else about + times_longer(value))
        peer = by_question["diagonal"]["cases"].get(name, {}).get("fastest_peer", "")
        lines.append(f"| {name} | " + " | ".join([*cells, peer]) + " |")
    return "\n".join([machine(by_question["hessian"]["environment"]), "", *lines, ""])


def main() -> None:
    found = [
        content for path in RESULTS.glob("*.json") if "question" in (content := json.loads(path.read_text()))
    ]
    order = list(_TITLES)
    found.sort(key=lambda content: (order.index(content["question"]), content["environment"]["gpu"] or ""))
    PAGE.write_text("\n".join([_INTRODUCTION, *map(section, found)]))
    before, rest = README.read_text().split(_MARKS[0])
    after = rest.split(_MARKS[1])[1]
    README.write_text(before + _MARKS[0] + figures(found) + _MARKS[1] + after)
    print(f"wrote docs/{PAGE.name} and the figures in {README.name}")


if __name__ == "__main__":
    main()
