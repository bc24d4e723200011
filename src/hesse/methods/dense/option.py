"""What products offer: everything, at one of them per coordinate."""

from __future__ import annotations

from hesse.look.meter import total
from hesse.methods.base import Applicable, Ask, Found, Products, Run, nothing, transposed
from hesse.methods.dense.run import turned
from hesse.runtime.progress import Progress


def offer(ask: Ask) -> Applicable:
    """One product per coordinate, or per chosen row or column."""
    if ask.part is None:
        costs = ask.products()
        reason = "one product per coordinate, right for any function"
        return Applicable(total(costs.values()), {}, list(costs), reason)
    rows, columns, exchanged = turned(ask.part.rows.numbers, ask.part.columns.numbers, ask.gradient)
    reason = f"one product per {'column' if exchanged else 'row'}, right for any function"
    return Applicable(ask.products_of(rows, columns), {}, list(rows)[:1], reason, run=run_of(ask))


def run_of(ask: Ask) -> Run:
    """Products for a part; the question itself takes them otherwise."""
    if ask.part is None:
        return nothing
    rows, columns, exchanged = turned(ask.part.rows.numbers, ask.part.columns.numbers, ask.gradient)

    def run(progress: Progress, check: bool, products: Products) -> Found:
        found = products(rows, columns)
        return transposed(found) if exchanged else found, []

    return run
