"""The plan: what was chosen for a question, what every method would take, and how each tensor is answered."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Literal

import torch

from hesse.errors import ArgumentError
from hesse.look.learned import Learned
from hesse.methods.base import MethodName, Question, counted
from hesse.problem import Problem
from hesse.runtime.memory import show
from hesse.selection import Part


@dataclass(frozen=True)
class Estimate:
    """What one method would take for the whole question.

    Attributes:
        method: its name.
        why_not: why it cannot answer, or None.
        passes: Hessian-vector products (or backward passes that cost as much), without the check.
        flops: floating-point operations.
        peak_bytes: memory beside the graph of the gradient, the answer included.
        seconds: predicted time, the check included.
    """

    method: str
    why_not: str | None = None
    passes: int = 0
    flops: float = 0.0
    peak_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Share:
    """One tensor's part in a plan.

    Attributes:
        name: what the tensor is called.
        shape: its shape.
        dtype: its dtype.
        method: the method for its coordinates.
        why: why not a faster one, or how it enters.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    method: str
    why: str


@dataclass(frozen=True)
class Plan:
    """The method chosen for a problem, and what every method would take.

    A plan is plain data, to be kept, sent and compared. Given back as `method=plan` it fixes the method of
    every tensor. It is valid for the same question about a problem with the same number of tensors of the
    same shapes and dtypes; the values may be others. A function that makes the same calls is evaluated only
    once, and answered at once; one that makes other calls is looked at again, and the plan of the result says
    so. Whatever the plan says, the result is certified.

    Attributes:
        question: "hessian", "blocks", "diagonal" (a trace is the sum of a diagonal) or "product".
        method: the method's name; a faster method may leave some tensors to "dense", see `shares`.
        reason: why this method.
        passes: Hessian-vector products it takes, without the check.
        check_passes: products that the check takes.
        flops: floating-point operations, without the check.
        peak_bytes: memory beside the graph of the gradient, the answer included.
        answer_bytes: memory of the answer.
        seconds: predicted time, scaled by the time of one gradient of this function.
        estimates: the same for every method.
        shares: the method of every tensor.
        part: how many rows and columns of a Hessian are asked for, if not all.
        chunk: how many samples a sweep takes at a time; zero where there is none.
        learned: what the look at the function found; the plan is carried out at once where it looks the same.
            Not compared: it holds times.
    """

    question: Question | Literal["product"]
    method: MethodName
    reason: str
    passes: int
    check_passes: int
    flops: float
    peak_bytes: int
    answer_bytes: int
    seconds: float
    estimates: tuple[Estimate, ...]
    shares: tuple[Share, ...]
    part: tuple[int, int] | None = None
    chunk: int = 0
    learned: Learned | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of_nothing(cls, question: Question | Literal["product"]) -> Plan:
        """The plan where there are no tensors."""
        return cls(question, "dense", "there is nothing to differentiate by", 0, 0, 0.0, 0, 0, 0.0, (), ())

    @property
    def asked(self) -> Question:
        """The question that there are several methods for."""
        assert self.question != "product"
        return self.question

    def by(self, method: str) -> frozenset[int]:
        """Indices of the tensors that a method answers."""
        return frozenset(i for i, share in enumerate(self.shares) if share.method == method)

    def require_fit(self, question: str, problem: Problem, part: Part | None = None) -> None:
        """Raise where the plan was made for another question or part of it, or for other tensors."""
        if question != self.question:
            raise ArgumentError(
                f"method is a plan for the {self.question}, met the {question}; make one with "
                f"hesse.plan({question!r}, ...)"
            )
        if self.part != (None if part is None else part.size):
            what = "all" if self.part is None else "{:,} rows and {:,} columns".format(*self.part)
            raise ArgumentError(
                f"method is a plan for {what} of the hessian; make one with hesse.plan, with the same rows "
                f"and columns"
            )
        planned = [(share.shape, share.dtype) for share in self.shares]
        if planned != [(tensor.shape, tensor.dtype) for tensor in problem.tensors]:
            raise ArgumentError(
                "method is a plan for tensors of other shapes or dtypes; make a new one with hesse.plan"
            )

    def __str__(self) -> str:
        """A table of the methods, the choice, and the tensors."""
        count = sum(share.shape.numel() for share in self.shares)
        some = "" if self.part is None else "{:,} rows and {:,} columns of the ".format(*self.part)
        lines = [
            f"{some}{self.question} of {count:,} coordinates in {counted(len(self.shares), 'tensor')}; "
            f"the answer takes {show(self.answer_bytes)}",
            "",
            _METHOD_ROW.format("method", "passes", "FLOPs", "peak memory", "seconds"),
        ]
        for e in self.estimates:
            mark = "* " if e.method == self.method else "  "
            if e.why_not:
                lines.append(f"{mark}{e.method:<8} {e.why_not}")
            else:
                cells = f"{e.passes:,}", f"{e.flops:.2g}", show(e.peak_bytes), f"{e.seconds:.2g}"
                lines.append(mark + _METHOD_ROW.format(e.method, *cells).strip())
        lines += [
            "",
            *textwrap.wrap(
                f"{self.method}: {self.reason}; the check takes {counted(self.check_passes, 'product')}", 98
            ),
            "",
        ]
        width = max((len(share.name) for share in self.shares), default=0)
        shapes = [str(list(share.shape)) for share in self.shares]
        across = max(map(len, shapes), default=0)
        lines += [
            f"  {share.name:<{width}}  {shape:<{across}}  {share.method:<6} {share.why}"
            for share, shape in zip(self.shares, shapes, strict=True)
        ]
        return "\n".join(line.rstrip() for line in lines)


_METHOD_ROW = "  {:<8} {:>12} {:>10} {:>12} {:>9}"
