"""What a question will take, before it is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hesse.answer import Options, plan_for
from hesse.data.loss import Loss
from hesse.data.problem import problem_of
from hesse.errors import ArgumentError
from hesse.methods.base import Question
from hesse.planning.plan import Plan
from hesse.questions.products import plan_of_product
from hesse.selection import part_of

_ASKED: dict[str, Question] = {
    "hessian": "hessian",
    "hessian_blocks": "blocks",
    "hessian_diagonal": "diagonal",
    "model_hessian_diagonal": "diagonal",
    "hessian_trace": "diagonal",
    "blocks": "blocks",
    "diagonal": "diagonal",
    "trace": "diagonal",
}
_PRODUCTS = ("hvp", "second_directional_derivative", "product")


def plan(
    question: str | Callable[..., Any],
    func: Callable[..., Tensor] | Loss,
    inputs: Any = None,
    *,
    method: str | Plan = "auto",
    check: bool | str = True,
    memory: int | str | None = None,
    rows: Any = None,
    columns: Any = None,
    square: bool = False,
    flat: bool = False,
) -> Plan:
    r"""How a question would be answered, and what every method would take; nothing is answered.

    The function is evaluated and differentiated three or four times, to find its samples and layers.
    No second derivative is computed. Passes and memory follow from the structure; seconds are predicted
    from the operations, scaled by the time of one gradient of this function.

    Args:
        question: "hessian", "blocks", "diagonal", "trace" or "product", or one of the functions that answer
            them, or its name.
        func: the function, see `hessian`.
        inputs: what it is differentiated by, see `hessian`.
        method: see `hessian`.
        check: count the check in the time.
        memory: see `hessian`.
        rows: of a Hessian, see there; and so for all that follow.
        columns: see `hessian`.
        square: see `hessian`.
        flat: see `hessian`.

    Returns:
        A `Plan`: print it, read its fields, or give it back as `method=` to the question. It is valid for
        tensors of the same number, shapes and dtypes.

    Raises:
        HesseError: see `hessian`; `ArgumentError` for a question without a plan.

    Example:
        >>> import torch, hesse
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        >>> inputs = torch.randn(20, 8)
        >>> loss = lambda: model(inputs).square().mean()
        >>> plan = hesse.plan("diagonal", loss, list(model.parameters()), method="taps")
        >>> plan.method, plan.passes  # 5 + 1 outputs instead of 51 coordinates
        ('taps', 6)
        >>> diagonal = hesse.hessian_diagonal(loss, list(model.parameters()), method=plan)
    """
    name = question if isinstance(question, str) else getattr(question, "__name__", "")
    if name in _PRODUCTS:
        if rows is not None or columns is not None or square:
            raise ArgumentError(f"rows, columns and square choose a part of the hessian, met {name}")
        return plan_of_product(problem_of(func, inputs), memory)
    known = _ASKED.get(name)
    if known is None:
        raise ArgumentError(f"question must be one of {', '.join((*_ASKED, *_PRODUCTS))}, met {question!r}")
    diagonal = known == "diagonal"
    problem = problem_of(func, inputs, "params" if diagonal else "inputs", as_secorder=diagonal)
    part = part_of(problem, rows, columns, square, flat)
    if part is not None and known != "hessian":
        raise ArgumentError(f"rows, columns and square choose a part of the hessian, met the {known}")
    return plan_for(known, problem, Options(method, check, memory, flat=flat), part)
