"""Second derivatives of all of torch's operations against differences: `python -m benchmarks.audit`.

It goes over torch's own database of operations (OpInfo, which needs the package expecttest) and the samples
of arguments that come with it, and writes a page for the version of torch that it ran with.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_dtype import _dispatch_dtypes
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree as pytree

import hesse
from benchmarks.audit_judgement import (
    Combination,
    Judgement,
    Results,
    Verdict,
    curvature,
    differences,
    directions,
    judge,
)
from benchmarks.audit_page import NOT_EXAMINED, page
from benchmarks.table import ROOT
from hesse.probe import distance, norm

_SECONDS = 15.0  # for all samples of one operation in one dtype
_WIDE = {False: torch.float64, True: torch.complex128}


@dataclass
class Audited:
    """What was found about one operation in one dtype.

    Attributes:
        name: of the operation, and of its variant.
        dtype: of the arguments.
        why_not: nothing was examined, because.
        verdicts: how many samples had which.
        off: the largest relative distance of what is wrong, or else of all.
        notes: what torch raised, each once.
        example: the first sample with the gravest verdict.
        hesse: what hesse does with that.
    """

    name: str
    dtype: str
    why_not: str = ""
    verdicts: Counter[str] = field(default_factory=Counter)
    off: float = 0.0
    notes: list[str] = field(default_factory=list)
    example: str = ""
    hesse: str = ""

    @property
    def verdict(self) -> str:
        """The gravest."""
        return next((v.value for v in _GRAVEST if self.verdicts[v.value]), NOT_EXAMINED)


_GRAVEST = (
    Verdict.WRONG,
    Verdict.WRONG_HERE,
    Verdict.FIRST,
    Verdict.NONE,
    Verdict.FAILS,
    Verdict.CASTS,
    Verdict.UNSETTLED,
    Verdict.RIGHT,
)


def beyond() -> list[OpInfo]:
    """Calls that the database lacks and that are known to be wrong: they show that such are found."""
    leaf = partial(torch.tensor, dtype=torch.float64, requires_grad=True)
    weights = leaf([[1.0, 2.0], [-3.0, 0.5]]), leaf([[1.5], [2.0]]), 0
    return [
        _known("_weight_norm", torch._weight_norm, weights),
        _known("logaddexp.far_apart", torch.logaddexp, (leaf([1.0, -400.0]), leaf([2.0, 400.0]))),
        _known("logaddexp2.far_apart", torch.logaddexp2, (leaf([1.0, -600.0]), leaf([2.0, 600.0]))),
    ]


def _known(name: str, op: Any, args: tuple[Any, ...]) -> OpInfo:
    def samples(*_: Any, **__: Any) -> list[Any]:
        return [SampleInput(args[0], args=args[1:])]

    return OpInfo(name, op=op, dtypes=_dispatch_dtypes((torch.float64,)), sample_inputs_func=samples)


def audited(op: OpInfo, dtype: torch.dtype) -> Audited:
    """Examine all samples of an operation."""
    name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
    found = Audited(name, str(dtype).removeprefix("torch."))
    torch.manual_seed(0)
    try:
        samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    except Exception as error:  # some are for machines with an accelerator
        found.why_not = f"its samples cannot be made here ({type(error).__name__})"
        return found
    start, gravest = time.perf_counter(), len(_GRAVEST)
    for number, sample in enumerate(samples):
        if time.perf_counter() - start > _SECONDS:
            found.notes.append(f"{number} of {len(samples)} samples in {_SECONDS:.0f} seconds")
            break
        results, inputs = as_function(op, sample)
        if not inputs:
            continue
        found_here = judge(results, inputs)
        found.verdicts[found_here.verdict.value] += 1
        if found_here.note and found_here.note not in found.notes and found_here.verdict is not Verdict.RIGHT:
            found.notes.append(found_here.note)
        grave = _GRAVEST.index(found_here.verdict)
        if grave < gravest:
            found.off = 0.0
            gravest, found.example = grave, _shown(sample)
            if grave <= _GRAVEST.index(Verdict.NONE):
                found.hesse = asked(results, inputs, found_here)
        if grave == gravest:
            found.off = _larger(found_here.off, found.off)
    if not found.verdicts:
        found.why_not = "no sample has dense arguments with elements that require grad"
    return found


def as_function(op: OpInfo, sample: SampleInput) -> tuple[Results, list[Tensor]]:
    """A sample as a function of its real differentiable arguments, in float64, and these."""
    flat, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    tensors = {i: a for i, a in enumerate(flat) if isinstance(a, Tensor)}
    active = [i for i, a in tensors.items() if a.requires_grad and a.numel()]
    if any(tensor.layout is not torch.strided for tensor in tensors.values()):
        active = []
    wide = {i: flat[i].detach().to(_WIDE[flat[i].is_complex()]) for i in active}

    def results(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        given = list(flat)
        for position, tensor in zip(active, inputs, strict=True):
            given[position] = torch.view_as_complex(tensor) if wide[position].is_complex() else tensor.clone()
        first, args, kwargs = pytree.tree_unflatten(given, spec)
        torch.manual_seed(0)
        # The wrapper makes what must be symmetric or triangular so, as torch's own tests do.
        made = op.gradcheck_wrapper(op.get_op(), first, *args, **kwargs)
        if sample.output_process_fn_grad is not None:
            made = sample.output_process_fn_grad(made)
        return [r for r in pytree.tree_leaves(made) if isinstance(r, Tensor)]

    return results, [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in wide.values()]


def asked(results: Results, inputs: Sequence[Tensor], judgement: Judgement) -> str:
    """What hesse makes of a call: its product, and its Hessian checked by differences."""
    combination = Combination(results, inputs)
    tensors, vectors = tuple(inputs), tuple(directions(inputs))

    def off(answer: Sequence[Tensor]) -> float:
        if judgement.verdict is Verdict.FIRST:  # then differences of the gradient are wrong as well
            expected = curvature(combination, inputs, 1e-4)
            along = sum(float((a * v).sum()) for a, v in zip(answer, vectors, strict=True))
            return abs(along - expected) / (abs(expected) or 1.0)
        slopes = differences(combination, inputs, 1e-6)
        return distance(answer, slopes) / (norm(slopes) or 1.0)

    def product() -> Sequence[Tensor]:
        found: Sequence[Tensor] = hesse.hvp(combination, tensors, vectors)
        return found

    def checked() -> Sequence[Tensor]:
        blocks = hesse.hessian(combination, tensors, check="differences")
        return [
            torch.stack([torch.tensordot(b, v, v.dim()) for b, v in zip(row, vectors, strict=True)]).sum(0)
            for row in blocks
        ]

    return "; ".join(
        f"{name}: {_answered(question, off)}"
        for name, question in (("hvp", product), ('hessian(check="differences")', checked))
    )


def _answered(question: Callable[[], Sequence[Tensor]], off: Callable[[Sequence[Tensor]], float]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = off(question())
            said = "right" if found < 1e-3 else _amount(found)
        except (hesse.errors.HesseError, RuntimeError) as error:
            said = f"{type(error).__name__}: {_line(error)}"
    given = [w.message for w in caught if isinstance(w.message, hesse.errors.HesseWarning)]
    return "; ".join([said, *(f"warns: {_line(message)}" for message in given)])


def _amount(off: float) -> str:
    return "NaN" if math.isnan(off) else f"wrong by {off:.0%}" if off < 1 else "wrong by more than its size"


def _line(message: object) -> str:
    text = " ".join(str(message).split())
    return text if len(text) < 200 else f"{text[:200]}..."


def _shown(sample: SampleInput) -> str:
    """Shapes and options."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return str(list(value.shape))
        if isinstance(value, (list, tuple)):
            return "(" + ", ".join(map(one, value)) + ")"
        return repr(value)

    options = [f"{name}={one(value)}" for name, value in sample.kwargs.items()]
    return _line(", ".join([one(sample.input), *map(one, sample.args), *options]))


def _larger(one: float, other: float) -> float:
    """The larger; NaN is the largest."""
    return one if math.isnan(one) or one > other else other


def operations(names: Sequence[str]) -> Iterator[Audited]:
    """All operations of the database, or some by name, in every dtype that counts."""
    for op in (*op_db, *beyond()):
        if names and op.name not in names:
            continue
        dtypes = [dtype for dtype in _WIDE.values() if dtype in op.supported_dtypes("cpu")]
        if not (op.supports_autograd and dtypes):
            why = "takes no float64 or complex128" if op.supports_autograd else "not differentiable"
            yield Audited(op.name, "", why)
            continue
        for dtype in dtypes:
            yield audited(op, dtype)


def main() -> None:
    """Examine, print what is not right, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="operations; with all, the default, files are written")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, found = time.perf_counter(), []
    for one in operations(names):
        found.append(one)
        if one.verdict not in (Verdict.RIGHT.value, NOT_EXAMINED):
            print(f"{one.name} ({one.dtype}): {dict(one.verdicts)}, {one.off:.2g}", one.example, flush=True)
            print("    " + "\n    ".join(filter(None, (*one.notes, one.hesse))), flush=True)
    if names:
        return
    version = torch.__version__.partition("+")[0]
    record = {
        "torch": version,
        "hesse": hesse.__version__,
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - start),
        "operations": [
            vars(one) | {"verdict": one.verdict, "off": None if math.isnan(one.off) else one.off}
            for one in found
        ],
    }
    (ROOT / "benchmarks" / "results" / f"audit-torch-{version}.json").write_text(
        f"{json.dumps(record, indent=1)}\n"
    )
    target = ROOT / "docs" / "audit" / f"torch-{version}.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(page(record))


if __name__ == "__main__":
    main()
