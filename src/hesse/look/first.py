"""The first look at a function: evaluated at its point, with what is known of its structure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from hesse.look.evaluation import Evaluation, evaluated, glanced, remark, require_deterministic
from hesse.look.explore import explore
from hesse.look.gauss_newton import gradient_of
from hesse.look.gradient import Gradient
from hesse.look.learned import Learned, learned
from hesse.problem import Problem
from hesse.runtime import random_state
from hesse.runtime.memory import Budget


@dataclass(frozen=True)
class Look:
    """A function at its point.

    Attributes:
        gradient: its gradient.
        same: what was learned before, where it looks the same.
        changed: what looks different than before, if anything.
    """

    gradient: Gradient
    same: Learned | None = None
    changed: str | None = None

    @property
    def learned(self) -> Learned:
        """What is to be kept of the look."""
        return self.same or learned(self.gradient.evaluation, self.gradient.found)


@contextmanager
def looked_at(
    problem: Problem,
    budget: Budget,
    structure: bool,
    strict: bool = False,
    create_graph: bool = False,
    known: Learned | None = None,
    changes: bool = True,
) -> Iterator[Look]:
    """The function at its point, with its `structure` if that is of interest.

    It is evaluated twice, and recorded the second time if that may help; once more, where its graph may hold
    what had to be put back for a look. Where it looks as is `known`, it is evaluated once. `changes`: some
    samples may be changed to find them, where the table does not tell.
    """
    with ExitStack() as held:

        def evaluate(recorded: bool) -> Evaluation:
            held.close()
            return held.enter_context(evaluated(problem, strict, create_graph, recorded))

        def evaluate_again(before: Evaluation, recorded: bool) -> Evaluation:
            # What the one before has changed is put back first: the value may depend on it.
            again = replace(evaluate(recorded), seconds=before.seconds, untaped=before.untaped)
            require_deterministic(before.value, again.value)
            return again

        changed = None
        recorded = structure and (known is None or known.recorded)
        if known is not None:
            evaluation = replace(evaluate(recorded), seconds=known.seconds)
            if random_state.current().used:  # they may be what the function depends on (dropout)
                evaluation = evaluate_again(evaluation, recorded)
            changed = known.differs(evaluation) if recorded else None
        if known is None or changed is not None:
            held.close()
            glance = glanced(problem, create_graph, structure)
            recorded = structure and glance.layered
            evaluation = evaluate(recorded)
            if evaluation.untaped:  # then the calls were others
                evaluation = evaluate_again(evaluation, recorded=False)
            else:
                require_deterministic(glance.value, evaluation.value)
            # Who comes first, warms up.
            evaluation = replace(evaluation, seconds=min(glance.seconds, evaluation.seconds))
        elif recorded and known.places is None:
            changed = "where its samples are depends on numbers"
        same = known if changed is None else None
        if same is not None and recorded:
            found = same.found(evaluation)
        else:
            found = explore(problem, evaluation, budget, changes)
        if found.changed:
            evaluation = evaluate_again(evaluation, recorded)
        remark(evaluation)
        yield Look(gradient_of(evaluation, found), same, changed)
