"""Carry out a plan, and certify what comes of it; where that fails, again with fewer assumptions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hesse.checks.certificate import Autograd, Certificate, Reference, certify
from hesse.checks.differences import Differences, hiding
from hesse.checks.suspects import suspects
from hesse.errors import CertificateWarning, DerivativeWarning, NonFiniteWarning, warn
from hesse.look.evaluation import calls_of
from hesse.look.finite import first_non_finite, is_finite
from hesse.look.gradient import Gradient, on_the_graph
from hesse.look.meter import Meter
from hesse.methods.base import Blocks, MethodName, Numbers, Question
from hesse.methods.dense import run as dense
from hesse.methods.dense.answers import Schedule
from hesse.methods.partial import Partial
from hesse.planning.choice import Choice, choose
from hesse.planning.plan import Plan
from hesse.probe import Probe, random_signs
from hesse.problem import Problem
from hesse.runtime.progress import Progress
from hesse.selection import Part
from hesse.structure import NoStructure, sought


@dataclass(frozen=True)
class Work:
    """A question to a gradient.

    Attributes:
        question: "hessian", "blocks" or "diagonal".
        problem: the problem.
        meter: holds its gradient, and what may be used.
        progress: is told of every pass.
        reference: makes what answers are certified by; None without a check.
        create_graph: keep all on the graph.
        part: of a Hessian, the rows and columns.
    """

    question: Question
    problem: Problem
    meter: Meter
    progress: Progress
    reference: Callable[[], Reference] | None
    create_graph: bool
    part: Part | None = None

    @property
    def gradient(self) -> Gradient:
        """What all products start from."""
        return self.meter.gradient

    def certified(self, choice: Choice) -> tuple[list[Any], Certificate | None, Plan]:
        """Answer as chosen; where that cannot be or the check fails, in ways that assume less."""
        refused: dict[MethodName, str] = {}
        while choice.plan.method != "dense":
            plan = choice.plan
            try:
                with sought():
                    parts, probes = self._run(choice, self._schedules[0])
            except NoStructure as error:  # seen only on the way
                refused[plan.method] = str(error)
                choice = self._choose("auto", refused)
                continue
            certificate = self._certificate(parts, probes)
            if certificate is None or self._stands(certificate, probes):
                return parts, certificate, plan  # methods but dense make no graph
            self._warn_of(f"by {plan.method}", certificate, last=False)
            choice = self._choose("dense", refused)
        for schedule in self._schedules:
            parts, probes = self._run(choice, schedule)
            certificate = self._certificate(parts, probes)
            if certificate is None or self._stands(certificate, probes):
                break
            self._warn_of(str(schedule), certificate, last=not schedule.batched, symmetric=schedule.symmetric)
        kept = on_the_graph(parts, self.gradient.leaves) if self.create_graph else parts
        return kept, certificate, choice.plan

    @property
    def _schedules(self) -> list[Schedule]:
        return dense.schedules(self.question, self.gradient)

    def _choose(self, method: str, refused: Mapping[MethodName, str]) -> Choice:
        check = self.reference is not None
        return choose(self.question, self.problem, self.meter, method, check, refused, part=self.part)

    def _certificate(self, parts: list[Any], probes: list[Probe]) -> Certificate | None:
        """What the check finds; None without one, or with nothing to compare with: that is warned of."""
        trouble = self._trouble(parts)
        if trouble:
            warn(NonFiniteWarning, trouble)
        if trouble or self.reference is None:
            return None
        reference = self.reference()
        return certify(reference, [*probes, *self._flat()] if reference.name == Differences.name else probes)

    def _trouble(self, parts: list[Any]) -> str | None:
        """What is not finite: of the gradient, where it will be needed anyway; else of the answer."""
        graphed = self.reference is not None or self.gradient.has_graph
        if graphed:
            _ = self.gradient.parts
        elif all(map(is_finite, pytree.tree_leaves(parts))):
            return None
        first = first_non_finite(self.problem, self.gradient)
        if first is not None:
            return f"{first}; second derivatives are not finite there either"
        return None if graphed else f"the {self.question} holds a NaN or an infinity"

    def _flat(self) -> list[Probe]:
        """Of blocks that are zero because autograd sees no curvature, where differences may see one."""
        leaves = self.gradient.leaves
        seen = {*self.gradient.curved, *(i for i, leaf in enumerate(leaves) if not leaf.requires_grad)}
        flat = [i for i, leaf in enumerate(leaves) if i not in seen and leaf.numel()]
        signs = random_signs([leaves[i] for i in flat])
        zeros = [torch.zeros_like(sign) for sign in signs]
        return [Probe([i], [i], [s], [z], 0.0) for i, s, z in zip(flat, signs, zeros, strict=True)]

    def _stands(self, certificate: Certificate, probes: list[Probe]) -> bool:
        """Is there nothing that another way could do better?"""
        if certificate.passed:
            return True
        if not math.isfinite(certificate.deviation):
            warn(
                NonFiniteWarning,
                f"the {self.question} holds a NaN or an infinity, though the gradient is finite",
            )
            return True
        if (
            certificate.route == Autograd.name
            or not certify(Autograd(self.problem, self.gradient), probes).passed
        ):
            return False
        warn(
            DerivativeWarning,
            f"the {self.question} equals products by plain autograd, and deviates from differences of the "
            f"gradient by {certificate.deviation:.2g} where {certificate.bound:.2g} is explained: "
            f"{self._reason()}",
        )
        return True

    def _reason(self) -> str:
        """Why autograd's products are not differences of its gradients."""
        wrong = suspects(self.gradient.calls or calls_of(self.problem))
        if wrong:
            return f"the second derivative that torch gives for {' and '.join(wrong)} is wrong"
        hidden = hiding(self.gradient)
        return (
            f"what hides from autograd is {' or '.join(hidden)}"
            if hidden
            else "func has kinks within the step of the differences, or is ill-conditioned in this dtype"
        )

    def _warn_of(self, how: str, certificate: Certificate, last: bool, symmetric: bool = False) -> None:
        next_step = (
            "func is ill-conditioned in this dtype, or its backward is not deterministic"
            if last
            else "it is computed again with fewer assumptions"
        )
        hint = (
            " (a Hessian that is not symmetric comes from a hook, a custom backward or an error in "
            "torch's own)"
            if symmetric
            else ""
        )
        other = "plain autograd" if certificate.route == Autograd.name else "differences of the gradient"
        warn(
            CertificateWarning,
            f"the {self.question} computed {how} deviates from {other} by "
            f"{certificate.deviation:.2g}, where rounding explains {certificate.bound:.2g}; "
            f"{next_step}{hint}",
        )

    def _run(self, choice: Choice, schedule: Schedule) -> tuple[list[Any], list[Probe]]:
        """The planned tensors by the plan's method, all others by one product per coordinate."""
        check = self.reference is not None
        self.progress.expect(choice.plan.passes)

        def products(rows: Numbers, columns: Numbers) -> Blocks:
            return dense.rows(rows, columns, self.meter, schedule, self.progress, self.create_graph)

        known, probes = choice.run(self.progress, check, products)
        if self.part is not None:
            found = Partial(self.gradient, self.part, known)
            return found.parts(), found.probes() if check else []
        question, meter, progress = self.question, self.meter, self.progress
        outcome = dense.run(question, meter, schedule, progress, self.create_graph, check, known)
        return outcome.parts, [*probes, *outcome.probes]
